"""One process of ``torchrun``: trains with each engine, and the first writes what it saw."""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lowbit_kernels import QuantConfig, QuantSpec, prepare_qat
from ssl_models.config import SpeechEncoderConfig
from ssl_models.encoder import SpeechEncoder
from ssl_models.objectives import CTC, Distillation
from ssl_models.training import Recipe, train

RECIPE = Recipe(
    steps=4, peak_rate=2e-3, warmup_steps=1, accumulate=4, layer_drop=0.3, max_grad_norm=0.5
)
CONFIG = SpeechEncoderConfig(
    front_end="fbank", hidden_size=32, num_layers=2, num_heads=2, feed_forward_size=32,
    position_kernel=4, position_groups=2,
)  # fmt: skip
CASES = ("ctc", "qat")


@dataclass(frozen=True)
class Speech:
    """One utterance a batch."""

    waveforms: torch.Tensor
    lengths: torch.Tensor
    texts: tuple[str, ...]

    def to(self, device):
        return Speech(self.waveforms.to(device), self.lengths.to(device), self.texts)


class Killed(Exception):
    """At the same batch on every process."""


class Noise(torch.utils.data.Dataset):
    """A batch a number; one of them is not finite."""

    last = 10**9

    def __getitem__(self, number):
        if number >= self.last:
            raise Killed
        generator = torch.Generator().manual_seed(number)
        waveforms = 0.1 * torch.randn(1, 2600, generator=generator, dtype=torch.float64)
        if number == 9:
            waveforms[0, 7] = torch.nan
        return Speech(waveforms, torch.tensor([2600]), ("ab" if number % 2 else "c",))


class NoiseUntilKilled(Noise):
    """Of three steps."""

    last = 12


def run(case, engine, folder, batches=Noise, **options):
    """The losses, in fp64: there an order of sums moves no value over a step of a quantizer."""
    torch.manual_seed(0)
    model = SpeechEncoder(CONFIG).double()
    objective = CTC(32, "abc").double()
    if case == "qat":
        objective = Distillation(copy.deepcopy(model))
        spec = QuantSpec(4, inputs="int4", input_scale="static")
        prepare_qat(model, QuantConfig(spec, attention_matmuls="int8"))
    model.double()
    return train(model, objective, batches(), RECIPE, folder, engine=engine, **options).losses


def main(out: Path, engines: list[str]) -> None:
    found = {}
    for engine in engines:
        for case in CASES:
            found[f"{engine}-{case}"] = run(case, engine, out / f"{engine}-{case}")
    # what one engine has saved, another goes on from
    for killed, engine in zip(engines, engines[1:] + engines[:1], strict=True):
        folder = out / f"{killed}-killed"
        try:
            run("qat", killed, folder, NoiseUntilKilled, save_seconds=-1.0)
        except Killed:
            dist.barrier()
        found[f"{killed}-killed"] = run("qat", engine, folder, resume=True)
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found | {"processes": dist.get_world_size()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
