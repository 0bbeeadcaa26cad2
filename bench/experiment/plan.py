"""Plan: what every cell of the experiment has in common."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.experiment.cells import Cell
from bench.experiment.data import DigitBatches, Utterance, test_strings
from ssl_models.digits.data import Clip, load_fsdd


@dataclass(frozen=True)
class Plan:
    """What every cell has in common.

    Args:
        digits: folder of the Free Spoken Digit Dataset.
        speech: folder of read speech in FLAC.
        out: for the results, a JSON file a cell.
        work: for checkpoints.
        float_steps: of training in float.
        qat_steps: of quantization-aware training.
        strings: how many of the held-out speaker's strings are used; None: all.
        speeches: how many utterances of read speech.
        device: where all runs.
    """

    digits: Path
    speech: Path
    out: Path
    work: Path
    float_steps: int = 1500
    qat_steps: int = 500
    strings: int | None = None
    speeches: int = 50
    device: str = "cpu"

    @cached_property
    def clips(self) -> list[Clip]:
        """All recorded digits."""
        return load_fsdd(self.digits)

    def training(self, cell: Cell, curriculum: bool) -> DigitBatches:
        """Batches of all speakers but the held-out one, the same for every model of a replicate."""
        others = [clip for clip in self.clips if clip.speaker != cell.speaker]
        return DigitBatches(others, cell.seed, curriculum)

    def held_out(self, cell: Cell) -> list[Utterance]:
        """Strings of the held-out speaker."""
        return test_strings([c for c in self.clips if c.speaker == cell.speaker])[: self.strings]

    def path(self, cell: Cell) -> Path:
        """The cell's result."""
        return self.out / f"{cell.name}.json"

    def weights(self, cell: Cell) -> Path:
        """What a cell that others need has trained."""
        return self.work / f"{cell.name}.safetensors"
