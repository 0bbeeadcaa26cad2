"""prepare_qat(model) and convert(model): train a model as it will be quantized, then pack it."""

from dataclasses import replace

import torch
from torch import nn

from lowbit_kernels.conversion.convert import _as_config, _bytes, _check_layers, _report, adapt
from lowbit_kernels.conversion.expose import exposed
from lowbit_kernels.conversion.matmuls import add_matmuls, find_attention
from lowbit_kernels.conversion.naming import naming
from lowbit_kernels.conversion.plan import Decision, make_plan, unmatched_patterns
from lowbit_kernels.conversion.registry import finish
from lowbit_kernels.conversion.replace import names_of, replace_modules
from lowbit_kernels.conversion.report import QuantizationReport
from lowbit_kernels.fake_quant.quantizer import INPUT_LEVELS
from lowbit_kernels.formats import QuantConfig, QuantSpec
from lowbit_kernels.modules import QATConv1d, QATLinear, QATModule, QConv1d, QLinear

# where a model remembers what it was prepared with
_CONFIG = "_qat_config"


def prepare_qat(
    model: nn.Module, config: QuantConfig | QuantSpec | None = None, quantizer: str = "lsq"
) -> QuantizationReport:
    """Put training twins in the place of a model's linear layers and convolutions, in place.

    The twins share the parameters of the layers and add learned scales: make the optimizer
    afterwards. Then train, and call ``convert``. With ``config.attention_matmuls`` the products of
    attention are in low bits, too (``LowBitMatmuls``), with learned scales, and stay so.

    Weights and inputs of one bit are BiT's (arXiv 2205.13016): ``QuantSpec(1, "tensor",
    inputs="int1", input_scale="static")`` with ``"elastic"``; ``inputs="uint1"`` behind a ReLU.
    BiT-L (arXiv 2301.00652) leaves convolutions in float by an override, BiT-LA adds
    ``attention_matmuls="int1"``.

    Args:
        model: any module.
        config: which layer gets what, as for ``quantize``.
        quantizer: ``"ste"``, ``"lsq"`` or ``"elastic"``, see ``QATLinear`` and ``QATConv1d``.

    Returns:
        A report with every layer: its spec, or what was left in float and why.

    Raises:
        ValueError: for a wrong argument, a weight that is not finite, a model that is itself the
            layer or whose layers lie on several devices; the model is unchanged.
        NotImplementedError: for specs that no training twin exists for; the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got a {type(model).__name__}")
    config = _as_config(config)
    with torch.inference_mode(False), exposed(model):
        plan = make_plan(model, config, (None, *INPUT_LEVELS))
        chosen = [decision for decision in plan if decision.spec is not None]
        _check_layers(chosen)
        if config.attention_matmuls is not None:
            find_attention(model)
            if quantizer == "ste":
                raise NotImplementedError(
                    "attention_matmuls are learned by quantizer 'lsq' or 'elastic', got 'ste'"
                )
        twins = {d.module: _twin(d, quantizer) for d in chosen}
        replace_modules(model, twins)
        add_matmuls(model, config, quantizer)
        if twins:
            adapt(model)
            setattr(model, _CONFIG, config)
    layers = tuple(replace(_report(d, None), spec=str(d.spec) if d.spec else None) for d in plan)
    notes = unmatched_patterns(plan, config)
    if not chosen:
        notes.append("nothing will be quantized: no layer matched the config")
    return QuantizationReport(layers, _bytes(model), _bytes(model), tuple(notes))


def convert(model: nn.Module) -> QuantizationReport:
    """Pack the layers that ``prepare_qat`` made, in place: the outputs stay, to rounding.

    Args:
        model: a model that was prepared, and trained.

    Returns:
        A report with every layer that was packed; the SQNR is that of the trained float weight.

    Raises:
        ValueError: for a model without such layers, or with a learned scale of inputs that no batch
            has set; the model is unchanged.
    """
    names = {m: n for m, n in names_of(model).items() if isinstance(m, QATModule)}
    if not names or "" in next(iter(names.values())):
        raise ValueError(
            "model must contain layers that prepare_qat made, got "
            + ("the layer itself" if names else "none")
        )
    before, decisions = _bytes(model), []
    packed: dict[nn.Module, QLinear | QConv1d] = {}
    for layer, (name, *others) in names.items():
        assert isinstance(layer, QATLinear | QATConv1d), "chosen above"
        decisions.append(Decision(name, layer, layer.spec, "trained", tuple(others)))
        with naming(name):
            packed[layer] = layer.to_quantized()
    reports = tuple(_report(d, packed[d.module]) for d in decisions)
    config = model.__dict__.pop(_CONFIG, None) or QuantConfig(next(iter(packed.values())).spec)
    replace_modules(model, packed)
    adapt(model)
    finish(model, config)
    return QuantizationReport(reports, before, _bytes(model))


def _twin(decision: Decision, quantizer: str) -> QATModule:
    kind = QATConv1d if isinstance(decision.module, nn.Conv1d) else QATLinear
    assert decision.spec is not None, "chosen"
    with naming(decision.name):
        return kind.from_float(decision.module, decision.spec, quantizer)
