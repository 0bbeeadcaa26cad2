"""LowbitConfig: what ``from_pretrained(quantization_config=...)`` and config.json hold."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit_kernels.formats import FORMAT_VERSION, METHODS, QuantConfig, QuantSpec
from lowbit_kernels.formats.config import DEFAULT_SKIP
from lowbit_kernels.formats.spec import GroupSize

QUANT_METHOD = "lowbit_kernels"
_PRESETS = {"small": QuantConfig.small, "fast": QuantConfig.fast}


class LowbitConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a model.

    >>> config = LowbitConfig(bits=4)
    >>> model = AutoModelForCTC.from_pretrained("facebook/hubert-large-ls960-ft",
    ...                                         quantization_config=config)

    Args:
        bits, group_size, symmetric, inputs, input_scale, deterministic: the ``QuantSpec`` of every
            layer.
        method: rounding: ``"rtn"``, ``"search"`` or ``"hqq"``; ``None`` in a saved model.
        preset: ``"small"`` or ``"fast"``, see ``QuantConfig``; takes ``bits``, ``deterministic``
            and nothing else of the spec.
        fuse: as in ``quantize``.
        config: a ``QuantConfig`` or its dictionary, in place of the spec.
        modules_to_not_convert: dotted names, or parts of them, to leave in float besides the heads.
        layers: the layers of a quantized model; written by ``save_pretrained``.
        version: of the packed format.
        quant_method: always ``"lowbit_kernels"``.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: GroupSize = "auto",
        symmetric: bool = True,
        inputs: str | None = None,
        input_scale: str = "token",
        deterministic: bool = False,
        *,
        method: str | None = "rtn",
        preset: str | None = None,
        fuse: bool = False,
        config: QuantConfig | Mapping[str, Any] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        # first of all: a newer format may well have arguments that are unknown here
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"version must be at most {FORMAT_VERSION} (a newer lowbit-kernels reads newer "
                f"checkpoints), got {version!r}"
            )
        if unknown:
            raise ValueError(f"a LowbitConfig has no argument {sorted(unknown)}")
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r}, got {quant_method!r}")
        if method is not None and method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        spec = QuantSpec(bits, group_size, symmetric, inputs, input_scale, deterministic)
        if input_scale == "static" and not layers:
            raise ValueError(
                "input_scale must be 'token' or 'utterance' to quantize at load ('static' needs "
                "calibration clips: call quantize), got 'static'"
            )
        chosen = _choose(spec, preset, config)
        if modules_to_not_convert:
            chosen = _also_skip(chosen, modules_to_not_convert)
        # only JSON-able values from here on: transformers writes __dict__ to config.json
        self.quant_method = QUANT_METHOD
        self.version = version
        self.method = method
        self.config = replace(chosen, fuse=chosen.fuse or fuse).to_dict()
        self.layers = {name: dict(entry) for name, entry in (layers or {}).items()}

    @property
    def quant_config(self) -> QuantConfig:
        """The ``QuantConfig`` that ``config`` describes."""
        return QuantConfig.from_dict(self.config)


def _choose(
    spec: QuantSpec, preset: str | None, config: QuantConfig | Mapping[str, Any] | None
) -> QuantConfig:
    if preset is None and config is None:
        return QuantConfig(spec)
    if preset is not None and config is not None:
        raise ValueError(f"preset must be None where config is given, got {preset!r}")
    if config is not None:
        _check_default(spec, QuantSpec(), "config")
        return config if isinstance(config, QuantConfig) else QuantConfig.from_dict(config)
    if preset not in _PRESETS:
        raise ValueError(f"preset must be one of {tuple(_PRESETS)}, got {preset!r}")
    plain = QuantSpec(spec.bits, deterministic=spec.deterministic)
    _check_default(spec, plain, f"preset={preset!r}")
    default = _PRESETS[preset](spec.bits).default
    return QuantConfig(replace(default, deterministic=spec.deterministic))


def _check_default(spec: QuantSpec, default: QuantSpec, given: str) -> None:
    if spec != default:
        raise ValueError(f"the spec's arguments must be left out where {given} is given: {spec}")


def _also_skip(config: QuantConfig, names: Sequence[str]) -> QuantConfig:
    if isinstance(names, str):
        raise ValueError(f"modules_to_not_convert must be a list of names, got {names!r}")
    patterns = tuple(rf"(^|\.){re.escape(name)}(\.|$)" for name in names)
    return replace(config, skip=(config.skip or DEFAULT_SKIP) + patterns)
