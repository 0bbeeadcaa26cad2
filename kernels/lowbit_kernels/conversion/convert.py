"""quantize(model) and dequantize(model): whole models, in place, all or nothing."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lowbit_kernels.conversion.calibrate import evaluating, observe_input_scales
from lowbit_kernels.conversion.expose import exposed
from lowbit_kernels.conversion.matmuls import remove_matmuls
from lowbit_kernels.conversion.naming import naming
from lowbit_kernels.conversion.plan import Decision, make_plan, unmatched_patterns
from lowbit_kernels.conversion.registry import ADAPTERS, EXPOSERS, OFFSETS, finish
from lowbit_kernels.conversion.replace import replace_modules
from lowbit_kernels.conversion.report import LayerReport, QuantizationReport
from lowbit_kernels.formats import METHODS, QuantConfig, QuantSpec
from lowbit_kernels.modules import QConv1d, QLinear, folded_weight, takes_offset

# a row this far below its layer was made coarse by one huge group
_COARSE_ROW_DB = 6.0


def quantize(
    model: nn.Module,
    config: QuantConfig | QuantSpec | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    method: str = "rtn",
    deterministic: bool = False,
    fuse: bool = False,
    dry_run: bool = False,
) -> QuantizationReport:
    """Replace a model's linear layers and convolutions by low-bit ones, in place.

    Args:
        model: any module. Heads and codebooks are left alone unless ``config`` asks for them.
        config: which layer gets what; a bare ``QuantSpec`` is the default of a config; ``None``
            means ``QuantConfig.small()``.
        calibration: clips, each the model's first argument (a 1-D waveform becomes a batch of one)
            or a mapping of keyword arguments. Given, quantized inputs get static scales.
        method: ``"rtn"``, ``"search"`` or ``"hqq"``, see ``formats.quantize_weight``.
        deterministic: give every layer a ``deterministic`` spec: inference on one machine gives an
            utterance the same bits whatever else is in the batch. The promise covers the quantized
            layers; ``attn_implementation="lowbit"`` keeps it, with lengths too. PyTorch's own
            operators may break it: SDPA and eager attention in a padded batch, convolutions and
            matrix products of layers left in float (on a CPU, a head's for an utterance of fewer
            than 8 frames), activation functions on a CPU if they are not fused into a layer. Of a
            linear layer with ``input_scale="utterance"`` padding is part of the utterance.
        fuse: let the encoder layers of transformers' wav2vec2 family, of Whisper and of
            ``ssl_models`` run in a handful of ops in inference: one matmul for queries, keys and
            values, norms that make the next layer's int8 rows or, in 16 bits, are part of the
            matmuls around them, residuals and activations in the matmuls' epilogues. Sets
            ``attn_implementation="lowbit"``; with another one, with gradients, under autocast or
            ``torch.compile``, or with hooks or adapters inside, a layer runs as without ``fuse``.
        dry_run: only report.

    Returns:
        A report with every layer: what replaced it, bits, bytes, SQNR, and what was left and why.

    Raises:
        ValueError: for a wrong argument, a weight that is not finite, a model that is itself the
            layer or whose layers lie on several devices, or a static scale without calibration; the
            model is unchanged.
        NotImplementedError: for what has learned scales, which ``prepare_qat`` serves: inputs below
            8 bits and ``attention_matmuls``.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got a {type(model).__name__}")
    config = _as_config(config)
    if deterministic:
        config = _deterministic(config)
    config = dataclasses.replace(config, fuse=config.fuse or fuse)
    if config.attention_matmuls is not None:
        raise NotImplementedError(
            "attention_matmuls have learned scales: prepare_qat serves them, quantize only None, "
            f"got {config.attention_matmuls!r}"
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if isinstance(calibration, str | Mapping) or not isinstance(calibration, Iterable | None):
        raise ValueError(f"calibration must be an iterable of clips, got {calibration!r}")
    # a buffer made in inference mode could not be part of a training step later on
    with torch.inference_mode(False), torch.no_grad(), exposed(model):
        return _quantize(model, config, calibration, method, dry_run)


def _quantize(
    model: nn.Module,
    config: QuantConfig,
    calibration: Iterable[Any] | None,
    method: str,
    dry_run: bool,
) -> QuantizationReport:
    plan = make_plan(model, config)
    if calibration is not None:
        plan = [_change(d, input_scale="static") if d.spec and d.spec.inputs else d for d in plan]
    _check_layers([decision for decision in plan if decision.spec is not None])
    offsets = _find_offsets(model, plan)
    plan = [_change(d, input_offset=d.name in offsets) for d in plan]
    chosen = [decision for decision in plan if decision.spec is not None]
    before = _bytes(model)
    # every new layer is made before the first old one goes, so an error leaves the model as it was
    layers = {d.name: _quantized_layer(d, method) for d in _progress(chosen)}
    for name, offset in offsets.items():
        layer = layers[name]
        assert isinstance(layer, QConv1d), "only convolutions take offsets"
        layer.set_input_offset(offset)
    if static := {d.name: d.module for d in chosen if d.spec and d.spec.input_scale == "static"}:
        if calibration is None:
            raise ValueError("calibration must be given for input_scale='static', got None")
        scales = observe_input_scales(model, static, calibration, offsets)
        for name, scale in scales.items():
            layers[name].input_scale = scale.to(layers[name].qweight.device)
        unused = static.keys() - scales.keys()
        layers = {name: layer for name, layer in layers.items() if name not in unused}
        plan = [_leave_unused(d) if d.name in unused else d for d in plan]
    reports = tuple(_report(d, layers.get(d.name)) for d in plan)
    after = before + sum(r.bytes_after - r.bytes_before for r in reports)
    notes = unmatched_patterns(plan, config)
    if not dry_run:
        replace_modules(model, {d.module: layers[d.name] for d in chosen if d.name in layers})
        if layers:
            adapt(model)
            notes += finish(model, config)
    if not chosen:
        notes.append("nothing was quantized: no layer matched the config")
    return QuantizationReport(reports, before, after, tuple(notes))


def dequantize(model: nn.Module) -> nn.Module:
    """Give plain ``nn`` layers back, in place, with the weights rounded as they are.

    Returns:
        The model.
    """
    layers = [module for module in model.modules() if isinstance(module, QLinear | QConv1d)]
    replace_modules(model, {layer: layer.to_float() for layer in layers})
    for module in list(model.modules()):
        for adapter in (*ADAPTERS, *EXPOSERS):
            replace_modules(model, {module: adapter.restore(module)})
    remove_matmuls(model)
    finish(model, None)
    return model


def _as_config(config: QuantConfig | QuantSpec | None) -> QuantConfig:
    if config is None:
        return QuantConfig.small()
    if isinstance(config, QuantSpec):
        return QuantConfig(config)
    if not isinstance(config, QuantConfig):
        raise ValueError(f"config must be a QuantConfig, a QuantSpec or None, got {config!r}")
    return config


def _deterministic(config: QuantConfig) -> QuantConfig:
    def fixed(spec: QuantSpec) -> QuantSpec:
        return dataclasses.replace(spec, deterministic=True)

    overrides = {name: spec and fixed(spec) for name, spec in config.overrides.items()}
    return dataclasses.replace(config, default=fixed(config.default), overrides=overrides)


def _change(decision: Decision, **fields: Any) -> Decision:
    """The decision with other fields of its spec, if it has one."""
    spec = decision.spec and dataclasses.replace(decision.spec, **fields)
    return dataclasses.replace(decision, spec=spec)


def _find_offsets(model: nn.Module, plan: list[Decision]) -> dict[str, Tensor]:
    """The input offsets of the convolutions that get int8 inputs and can take one."""
    able = [d for d in plan if d.spec and d.spec.inputs == "int8" and _takes_offset(d.module)]
    found: dict[nn.Module, Tensor] = {}
    if able:
        with evaluating(model):
            for find in OFFSETS:
                found |= find(model)
    return {d.name: found[d.module] for d in able if d.module in found}


def _takes_offset(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and takes_offset(module)


def _leave_unused(decision: Decision) -> Decision:
    return dataclasses.replace(decision, spec=None, reason="no calibration clip reached it")


def _check_layers(chosen: list[Decision]) -> None:
    if any(not decision.name for decision in chosen):
        raise ValueError("model must contain the layer, got the layer itself")
    devices = {str(p.device) for d in chosen for p in d.module.parameters()}
    if len(devices) > 1:
        raise ValueError(f"model must lie on one device, got layers on {sorted(devices)}")
    if "meta" in devices:
        raise ValueError("model must hold real weights, got layers on the meta device")


def _progress(chosen: list[Decision]) -> Iterable[Decision]:
    console = Console(stderr=True)
    hidden = not (console.is_terminal and sys.stderr.isatty())
    return track(chosen, "quantizing", console=console, transient=True, disable=hidden)


def _quantized_layer(decision: Decision, method: str) -> QLinear | QConv1d:
    kind: Any = QConv1d if isinstance(decision.module, nn.Conv1d) else QLinear
    with naming(decision.name):
        return kind.from_float(decision.module, decision.spec, method=method)  # type: ignore[no-any-return]


def adapt(model: nn.Module) -> None:
    """Let every registered adapter stand in for the modules it matches, in place."""
    for module in list(model.modules()):
        for adapter in ADAPTERS:
            if adapter.matches(module):
                replace_modules(model, {module: adapter.adapt(module)})


def _report(decision: Decision, layer: QLinear | QConv1d | None) -> LayerReport:
    name, reason, module = decision.name, decision.reason, decision.module
    before, kind = _bytes(module), type(module).__name__.removeprefix("Parametrized")
    names = f"also registered as {', '.join(decision.other_names)}" if decision.other_names else ""
    if layer is None:
        return LayerReport(name, kind, None, reason, before, before, note=names)
    wanted = folded_weight(module).float()
    noise = layer.weight.as_subclass(Tensor).float() - wanted
    signal_power, noise_power = _row_power(wanted), _row_power(noise)
    rows = _decibels(signal_power, noise_power)
    whole = _decibels(signal_power.sum(), noise_power.sum()).item()
    coarse = (rows < whole - _COARSE_ROW_DB).nonzero().flatten().tolist()
    notes = [names] if names else []
    if coarse and layer.spec.group:
        first = ", ".join(map(str, coarse[:4])) + (", ..." if len(coarse) > 4 else "")
        notes.append(f"coarse rows (one huge group each): {first}")
    is_int8 = layer.spec.inputs == "int8" or layer.spec.has_low_inputs
    copy, note = wanted.numel() if is_int8 else 0, "; ".join(notes)
    return LayerReport(
        name, kind, str(layer.spec), reason, before, _bytes(layer), copy, round(whole, 2), note
    )


def _row_power(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.double().square()


def _decibels(signal: Tensor, noise: Tensor) -> Tensor:
    return 10 * torch.log10(signal / noise.clamp_min(torch.finfo(torch.double).tiny))


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
