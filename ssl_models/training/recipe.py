"""Recipe: what a training run is made of."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Recipe:
    """What a run is made of; a state file of another recipe is refused.

    Attributes:
        steps: of the optimizer.
        seed: of dropout and masks.
        peak_rate: largest learning rate.
        warmup_steps: of a linear rise.
        fall: share of the steps, at the end, over which the rate falls linearly to 0.
        weight_decay: of parameters with two dimensions or more; learned scales have none.
        max_grad_norm: gradients are scaled down to this norm.
        accumulate: batches a step, over all processes, which it must be divisible among.
        bf16: autocast.
        checkpoint_activations: compute each layer of the encoder again for its gradients.
        layer_drop: probability to pass a layer of the encoder by.
        max_bad_steps: so many steps in a row without a finite loss end the run.

    Raises:
        ValueError: naming the field, the rule and the value.
    """

    steps: int = 1000
    seed: int = 0
    peak_rate: float = 5e-4
    warmup_steps: int = 100
    fall: float = 0.5
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    accumulate: int = 1
    bf16: bool = False
    checkpoint_activations: bool = False
    layer_drop: float = 0.0
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            # YAML and people write 1 for 1.0
            if kind is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")
        for name in ("steps", "warmup_steps", "accumulate", "max_bad_steps"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("peak_rate", "max_grad_norm"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("seed", "weight_decay"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("fall", 0 < self.fall <= 1, "in (0, 1]")
        self._check("layer_drop", 0 <= self.layer_drop < 1, "in [0, 1)")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, a plateau, and a linear fall to 0."""
        warm_up = (step + 1) / self.warmup_steps
        down = (self.steps - step) / (self.fall * self.steps)
        return self.peak_rate * min(1.0, warm_up, down)

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Self:
        """A recipe from a YAML file, some of its fields changed.

        Raises:
            ValueError: for what is no mapping, an unknown field or a wrong value.
        """
        import yaml

        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} must be YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must be a mapping of a recipe's fields, got {values!r}")
        known = [field.name for field in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{name} must be one of {known}, got it with {value!r}")
            # YAML reads 1e-3, without a point, as text
            if name in known and isinstance(value, str):
                values[name] = _number(value)
        return cls(**(values | changes))


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
