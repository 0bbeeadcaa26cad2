"""LowbitEncoder: one callable that encodes a corpus, wherever its rows come from.

Dimension key: N rows, S samples at 16 kHz, T frames, C features.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_models.data.batches import read_audio
from ssl_models.data.manifest import SAMPLE_RATE
from ssl_models.inference.loaded import LoadedEncoder


class LowbitEncoder:
    """Rows of audio to rows of frames, for Ray Data's ``map_batches``, a ``DataLoader`` or a loop.

    It can be pickled: the model is loaded where the first rows come, once a process. A row that
    cannot be encoded says why, and the others go on.

    >>> encoder = LowbitEncoder("hubert-4bit")
    >>> rows = encoder({"path": ["a.flac", "b.wav"]})
    >>> rows["frames"][0].shape, rows["error"][0]
    ((499, 768), "")

    Args:
        folder: what ``save_quantized``, ``save_pretrained`` or ``lowbit train`` has written.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; None: a GPU where there is one.
        seconds: of audio, padding included, that go through the model at once; a longer utterance
            goes alone.

    Raises:
        ValueError: for a folder that is not there, or ``seconds`` not above 0.
    """

    def __init__(
        self, folder: str | Path, *, device: str | None = None, seconds: float = 160.0
    ) -> None:
        self.folder, self.device, self.seconds = Path(folder), device, seconds
        if not self.folder.is_dir():
            raise ValueError(f"folder must exist, got {folder}")
        if not seconds > 0:
            raise ValueError(f"seconds must be above 0, got {seconds}")

    def __getstate__(self) -> dict[str, Any]:
        """Without the model."""
        return {name: value for name, value in vars(self).items() if name != "encoder"}

    @cached_property
    def encoder(self) -> LoadedEncoder:
        """The model, in float16 on a GPU and float32 on a CPU where it computes in float."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        return LoadedEncoder.load(self.folder).to(device, dtype)

    @torch.inference_mode()
    def __call__(self, rows: Mapping[str, Sequence[Any] | NDArray[Any]]) -> dict[str, Any]:
        """Encode rows.

        Args:
            rows: columns of N; ``path``, of audio files, or ``audio``, of [S] at 16 kHz.

        Returns:
            The columns but ``audio``, and ``frames``: [T, C] each, none of them where ``error`` is
            not empty. After ``lowbit train finetune`` also ``text``.

        Raises:
            ValueError: without exactly one of ``path`` and ``audio``.
        """
        sources = [name for name in ("path", "audio") if name in rows]
        if len(sources) != 1:
            raise ValueError(f"rows must have 'path' or 'audio', got {sorted(rows)}")
        found = {name: column for name, column in rows.items() if name != "audio"}
        audios, errors = self._read(sources[0], rows[sources[0]])
        nothing = torch.zeros(0, self.encoder.hidden_size, dtype=self.encoder.dtype).numpy()
        frames = np.empty(len(audios), dtype=object)
        for i in range(len(audios)):
            frames[i] = nothing
        head = self.encoder.head
        texts = [""] * len(audios)
        for indices in self._batches(audios):
            outputs, counts = self.encoder([audios[i] for i in indices])
            for i, output, count in zip(indices, outputs, counts.tolist(), strict=True):
                frames[i] = output[:count].cpu().numpy()
            if head is not None:
                for i, text in zip(indices, head.decode(head.head(outputs), counts), strict=True):
                    texts[i] = text
        found |= {"frames": frames, "error": np.array(errors, dtype=object)}
        return found if head is None else found | {"text": np.array(texts, dtype=object)}

    def _read(self, source: str, column: Any) -> tuple[list[Tensor], list[str]]:
        """The audio of rows, and what is wrong with it; of that it is empty."""
        audios, errors = [], []
        for value in column:
            audio, error = torch.empty(0), ""
            try:
                read = read_audio(Path(value)) if source == "path" else value
                audio = self._checked(torch.from_numpy(np.asarray(read, dtype=np.float32).copy()))
            except (OSError, RuntimeError, TypeError, ValueError) as caught:
                error = str(caught).splitlines()[0]
            audios.append(audio)
            errors.append(error)
        return audios, errors

    def _checked(self, audio: Tensor) -> Tensor:
        if audio.dim() != 1 or not audio.isfinite().all():
            raise ValueError(f"audio must be finite, [S], got {list(audio.shape)}")
        if self.encoder.frame_counts(torch.tensor([len(audio)]))[0] < 1:
            raise ValueError(f"audio must be long enough for a frame, got {len(audio)} samples")
        return audio

    def _batches(self, audios: Sequence[Tensor]) -> Iterator[list[int]]:
        """Indices of what goes through the model together: of similar length, longest first."""
        lengths = [len(each) for each in audios]
        order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
        while order:
            size = max(1, int(self.seconds * SAMPLE_RATE) // lengths[order[0]])
            yield order[:size]
            order = order[size:]
