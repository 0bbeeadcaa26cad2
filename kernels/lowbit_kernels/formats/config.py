"""QuantConfig: which layer of a model gets which QuantSpec."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit_kernels.formats.spec import QuantSpec

# parts whose outputs are read directly (logits, codebooks) or that are swapped by name (adapters):
# small, and the error of a head is the error of the answer
DEFAULT_SKIP = (
    r"(^|\.)(lm_head|ctc_head|proj_out|classifier|projector|project_hid|project_q|quantizer)(\.|$)",
    r"(^|\.)adapter_layer(\.|$)",
    r"(^|\.)(mask_emb|masked_spec_embed|label_embs)",
    # WavLM's position gate: a few hundred weights, read for every head of every frame
    r"(^|\.)gru_rel_pos_linear$",
)

# what attention_matmuls may be
ATTENTION_BITS = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}


@dataclass(frozen=True)
class QuantConfig:
    """Which layer gets which spec.

    Args:
        default: the spec of every linear layer and convolution that nothing else names.
        overrides: regular expressions, searched in the module's dotted name, to a spec, or to
            ``None`` (leave in float). The first match wins, and wins over ``skip``.
        skip: regular expressions of modules to leave in float: heads, codebooks, adapters.
        attention_matmuls: ``"int8"``, ``"int4"``, ``"int2"`` or ``"int1"``: low-bit q, k, v and
            probabilities with learned scales, which ``prepare_qat`` serves; ``None``: float ones.
        attention_shift: whether each feature of q, k and v has a learned shift before it is
            rounded, as BiT's have; with ``attention_matmuls``.
        fuse: whether encoder layers run in a handful of ops, see ``quantize``.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    default: QuantSpec = field(default_factory=QuantSpec)
    overrides: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    skip: tuple[str, ...] = DEFAULT_SKIP
    attention_matmuls: str | None = None
    attention_shift: bool = False
    fuse: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.default, QuantSpec):
            raise ValueError(f"default must be a QuantSpec, got {self.default!r}")
        if not isinstance(self.overrides, Mapping):
            raise ValueError(
                f"overrides must be a mapping from patterns to specs, got {self.overrides!r}"
            )
        object.__setattr__(self, "overrides", dict(self.overrides))
        if isinstance(self.skip, str) or not isinstance(self.skip, Iterable):
            raise ValueError(f"skip must be a sequence of patterns, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))
        for name, patterns in (("overrides", self.overrides), ("skip", self.skip)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise ValueError(
                        f"{name} must hold regular expressions, got {pattern!r}: {error}"
                    ) from None
        for pattern, spec in self.overrides.items():
            if spec is not None and not isinstance(spec, QuantSpec):
                raise ValueError(
                    f"overrides[{pattern!r}] must be a QuantSpec or None, got {spec!r}"
                )
        if not isinstance(self.fuse, bool):
            raise ValueError(f"fuse must be True or False, got {self.fuse!r}")
        if self.attention_matmuls not in (None, *ATTENTION_BITS):
            raise ValueError(
                f"attention_matmuls must be None or one of {tuple(ATTENTION_BITS)}, "
                f"got {self.attention_matmuls!r}"
            )
        if self.attention_shift not in (False, self.attention_matmuls is not None):
            raise ValueError(
                "attention_shift must be False, or True with attention_matmuls, "
                f"got {self.attention_shift!r}"
            )

    @classmethod
    def small(cls, bits: int = 4) -> "QuantConfig":
        """The least error: low-bit weights in groups of 64, float inputs."""
        return cls(QuantSpec(bits=bits))

    @classmethod
    def fast(cls, bits: int = 4) -> "QuantConfig":
        """The most speed: low-bit weights, int8 inputs and int8 arithmetic."""
        return cls(QuantSpec(bits=bits, inputs="int8"))

    def spec_for(self, name: str) -> tuple[QuantSpec | None, str]:
        """The spec of the module called ``name`` and the rule that decided it."""
        for pattern, spec in self.overrides.items():
            if re.search(pattern, name):
                return spec, f"override {pattern!r}"
        for pattern in self.skip:
            if re.search(pattern, name):
                return None, f"skip {pattern!r}"
        return self.default, "default"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the inverse of ``from_dict``."""
        return {
            "default": self.default.to_dict(),
            "overrides": {k: v and v.to_dict() for k, v in self.overrides.items()},
            "skip": list(self.skip),
            "attention_matmuls": self.attention_matmuls,
            "attention_shift": self.attention_shift,
            "fuse": self.fuse,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantConfig":
        """Rebuild a config from ``to_dict``'s output.

        Raises:
            ValueError: for an unknown key or a wrong value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(data) - known:
            raise ValueError(f"a QuantConfig has {sorted(known)}, got {sorted(unknown)}")
        if "default" not in data:
            raise ValueError(f"a QuantConfig must have a 'default', got {sorted(data)}")
        return cls(
            default=QuantSpec(**data["default"]),
            overrides={k: v and QuantSpec(**v) for k, v in data.get("overrides", {}).items()},
            skip=tuple(data.get("skip", DEFAULT_SKIP)),
            attention_matmuls=data.get("attention_matmuls"),
            attention_shift=data.get("attention_shift", False),
            fuse=data.get("fuse", False),
        )
