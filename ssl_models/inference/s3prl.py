"""An upstream for s3prl, so that SUPERB can judge a low-bit encoder.

s3prl finds upstreams in its ``hub`` module. One line there, as for each of its own, adds this one::

    from ssl_models.inference.s3prl import lowbit

    python run_downstream.py -m train -u lowbit -k hubert-4bit -d asr -n hubert-4bit-asr

Dimension key: B utterances, S samples at 16 kHz, T frames, C features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_models.error_propagation.sources import find_blocks
from ssl_models.error_propagation.trace import watching
from ssl_models.inference.loaded import LoadedEncoder


class Upstream(nn.Module):
    """What s3prl asks of an upstream: the states of all layers, and their rate.

    Args:
        ckpt: folder of a low-bit or float encoder, as for ``LowbitEncoder``.

    Raises:
        ValueError: for a folder that is not there, or as ``LoadedEncoder.load``.
    """

    def __init__(self, ckpt: str | Path) -> None:
        super().__init__()
        if not Path(ckpt).is_dir():
            raise ValueError(f"ckpt must be a folder that exists, got {ckpt}")
        self.encoder = LoadedEncoder.load(Path(ckpt))
        self.blocks = find_blocks(self.encoder.model)

    def get_downsample_rates(self, key: str | None = None) -> int:
        """Samples from one frame to the next."""
        counts = self.encoder.frame_counts(torch.tensor([160_000, 320_000]))
        return round(160_000 / int(counts[1] - counts[0]))

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Encode B waveforms of [S].

        Returns:
            ``hidden_states``: of [B, T, C], what enters the first layer, what leaves each but the
            last, and what the encoder gives, its last norm included, which is
            ``last_hidden_state``, too. Of a layer at half the rate each frame counts twice.
        """
        states: list[Tensor] = []
        first = self.encoder.model.get_submodule(self.blocks[0])
        entering = first.register_forward_pre_hook(
            lambda module, args: states.append(args[0])  # type: ignore[func-returns-value]
        )
        with (
            entering,
            watching(self.encoder.model, self.blocks[:-1], lambda _, x: states.append(x)),
        ):
            last, _ = self.encoder(wavs)
        states = [_at_rate(each, last.shape[1]) for each in states] + [last]
        return {"hidden_states": tuple(states), "last_hidden_state": last}


def lowbit(ckpt: str, *args: Any, **kwargs: Any) -> Upstream:
    """The entry of s3prl's hub; its other options are for other upstreams."""
    return Upstream(ckpt)


def _at_rate(x: Tensor, T: int) -> Tensor:
    """[B, T' , C] as T frames."""
    return x.repeat_interleave(-(-T // x.shape[1]), 1)[:, :T]
