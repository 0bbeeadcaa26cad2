"""The cells of the experiment: a model, a replicate and a stage, one JSON file each."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.experiment.models import CONFIGS, SLOTS

# of a replicate: its seed is the index, counted on from the first speaker again
SPEAKERS = ("theo", "jackson", "nicolas", "george", "lucas")
# bits of weights and inputs in quantization-aware training, by stage
TRAINED = {"w4a8": (4, 8), "w2a8": (2, 8), "w1a1": (1, 1)}
# each needs the one called "float" of its model and seed
STAGES = ("float", "ptq", *TRAINED)
# of what pre-training is worth: it comes first, and what is tuned from it needs it
PRETRAINED, TUNED = "pretrained", ("scratch", "tuned", "scratch-w4a8", "tuned-w4a8")
PRETRAINED_MODEL = "T"
# their weights
NEEDED = ("float", PRETRAINED)
# of the models without slots, unless there are more seeds than these
FEW_SEEDS = 3


@dataclass(frozen=True)
class Cell:
    """One of the experiment's parts.

    Args:
        model: its name.
        seed: of the replicate: batches, initial weights, noise.
        stage: of ``STAGES``, ``PRETRAINED`` or of ``TUNED``.
    """

    model: str
    seed: int
    stage: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.model}-{self.seed}-{self.stage}"

    @property
    def speaker(self) -> str:
        """Held out from training."""
        return SPEAKERS[self.seed % len(SPEAKERS)]

    @property
    def needs(self) -> "Cell | None":
        """What must be done before."""
        if self.stage in NEEDED or self.stage.startswith("scratch"):
            return None
        return Cell(self.model, self.seed, PRETRAINED if self.stage in TUNED else "float")


def all_cells(seeds: int = FEW_SEEDS) -> Iterator[Cell]:
    """Every cell, those of the primary endpoint first, those of pre-training last.

    Args:
        seeds: replicates of AA, AC and CC; the other models have one, or all if there are more
            than three.
    """
    for stages in (("float", "ptq"), tuple(TRAINED)):
        for slotted in (True, False):
            for seed in range(seeds if slotted or seeds > FEW_SEEDS else min(seeds, 1)):
                for model in CONFIGS:
                    if (model in SLOTS) == slotted:
                        yield from (Cell(model, seed, stage) for stage in stages)
    for seed in range(seeds):
        yield from (Cell(PRETRAINED_MODEL, seed, stage) for stage in (PRETRAINED, *TUNED))
