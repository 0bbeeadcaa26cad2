"""Kinds of layers, the config field that quantizes them, and what low-bit encoders call."""

import copy
import dataclasses
import functools
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_kernels import (
    QuantConfig,
    QuantSpec,
    convert,
    dequantize,
    load_quantized,
    prepare_qat,
    quantize,
    save_quantized,
)
from lowbit_kernels.modules import LowBitMatmuls, QATModule, QuantizedModule
from lowbit_kernels.modules.blocks import can_join
from lowbit_kernels.testing import assert_as_accurate
from ssl_models.config import SpeechEncoderConfig
from ssl_models.encoder import SpeechEncoder
from ssl_models.module_kinds import MODULE_KINDS, config_for, module_kind
from tests.ssl_cases import KINDS, LENGTHS, build, encode, exact, inputs, small_config

kinds = pytest.mark.parametrize("kind", KINDS)
W4 = QuantSpec(4)
# of WavLM's attention: a few hundred weights that stay in float
GATE = "gru_rel_pos_linear"
# those of the front end by name
NO_DIMENSIONS = dict.fromkeys(("conv_dims", "conv_kernels", "conv_strides"))
SUBSETS = [c for n in range(1, 5) for c in combinations(MODULE_KINDS, n)]


def layers_of(encoder: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Linear | nn.Conv1d)}


@pytest.mark.parametrize("front_end", ["wav2vec2", "sew", "fbank"])
@kinds
def test_every_layer_is_of_one_kind(kind: str, front_end: str) -> None:
    with torch.device("meta"):
        encoder = SpeechEncoder(small_config(kind, front_end=front_end, **NO_DIMENSIONS))
    found = {name: module_kind(name) for name in layers_of(encoder) if GATE not in name}
    assert None not in found.values()
    assert set(found.values()) == set(MODULE_KINDS)
    for name, found_kind in found.items():
        assert [each for each in MODULE_KINDS if _is_of(each, name)] == [found_kind]
        # a model around the encoder changes nothing
        assert module_kind(f"model.encoder.{name}") == found_kind


def _is_of(kind: str, name: str) -> bool:
    return config_for([kind], W4).spec_for(name)[0] is not None


@pytest.mark.parametrize(
    "name",
    [
        "lm_head", "encoder.layers.0.layer_norm", "encoder.layers.0.attention.gru_rel_pos_linear",
        "quantizer.weight_proj", "ctc_head.linear", "output",
    ],
)  # fmt: skip
def test_heads_and_gates_are_of_none(name: str) -> None:
    assert module_kind(name) is None
    assert not any(_is_of(kind, name) for kind in MODULE_KINDS)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_any_kinds_can_be_quantized(subset: tuple[str, ...]) -> None:
    model = nn.ModuleDict({"encoder": build("conformer"), "head": nn.Linear(32, 5)})
    report = quantize(model, config_for(subset, QuantSpec(2)))
    assert {module_kind(layer.name) for layer in report.quantized} == set(subset)
    left = [layer.name for layer in report.left if module_kind(layer.name) in subset]
    over_waveform = "encoder.feature_extractor.conv_layers.0.conv"
    assert left == [over_waveform] * ("front_end" in subset)


def test_unknown_kinds_are_refused() -> None:
    for wrong in ((), ("attention", "norm")):
        with pytest.raises(ValueError, match=r"kinds must be of .*, at least one, got \("):
            config_for(wrong, W4)


MIXED: dict[str, Any] = {
    "attention": {
        "mode": "qat", "quantizer": "elastic", "bits": 1, "group_size": "tensor", "inputs": "int1",
        "input_scale": "static", "attention_matmuls": "int1", "attention_shift": True,
    },
    "feed_forward": {"mode": "packed", "bits": 4, "inputs": "int8"},
    "conv": {"mode": "qat", "bits": 2},
    "front_end": {"mode": "float"},
}  # fmt: skip
CLASSES = {"qat": QATModule, "packed": QuantizedModule}


@kinds
def test_the_config_says_what_each_kind_is(kind: str, tmp_path: Any) -> None:
    config = small_config(kind, quantization=MIXED)
    assert SpeechEncoderConfig.from_json(config.to_json()) == config
    encoder = SpeechEncoder(SpeechEncoderConfig.from_json(config.to_json()))
    assert encoder.config == config
    for name, layer in layers_of(encoder).items():
        choice = MIXED[str(module_kind(name))] if GATE not in name else {"mode": "float"}
        is_a = [mode for mode, kind in CLASSES.items() if isinstance(layer, kind)] or ["float"]
        assert is_a == [choice["mode"]]
        if choice["mode"] != "float":
            spec = {key: choice[key] for key in choice.keys() & QuantSpec().to_dict()}
            assert layer.spec == QuantSpec(**spec)
    matmuls = [module for module in encoder.modules() if isinstance(module, LowBitMatmuls)]
    assert [(each.bits, each.quantizer) for each in matmuls] == [(1, "elastic")] * 4
    # q, k and v of each layer: what the storage of BiT-LA counts
    assert sum(each.shift.numel() for each in matmuls if each.shift is not None) == 4 * 3 * 32
    encoder(**inputs())
    # a training checkpoint
    again = SpeechEncoder(config)
    again.load_state_dict(encoder.state_dict())
    for one, other in zip(
        encode(again.eval(), inputs()), encode(encoder.eval(), inputs()), strict=True
    ):
        assert torch.equal(one, other)
    convert(encoder)
    save_quantized(encoder, tmp_path)
    loaded = load_quantized(tmp_path)
    assert isinstance(loaded, SpeechEncoder)
    assert loaded.config == config
    for one, other in zip(encode(loaded, inputs()), encode(encoder, inputs()), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_holds_what_the_encoder_is_now(tmp_path: Any) -> None:
    """Not what its config asked for at first."""
    encoder = build("conformer", quantization={"conv": {"mode": "packed", "bits": 8}})
    quantize(dequantize(encoder), config_for(["attention"], W4))
    save_quantized(encoder, tmp_path)
    loaded = load_quantized(tmp_path)
    assert type(loaded.encoder.layers[0].conv_module.depthwise_conv) is nn.Conv1d
    outputs = encode(loaded, inputs()), encode(encoder, inputs()), exact(encoder, inputs())
    for found, wanted, high in zip(*outputs, strict=True):
        assert_as_accurate(found, wanted, high)


def test_layers_of_a_kind_may_differ() -> None:
    """BiT's two sets of levels, and a layer in float; patterns reach no other kind."""
    bit = {
        "mode": "qat", "quantizer": "elastic", "bits": 1, "group_size": "tensor", "inputs": "int1",
        "input_scale": "static",
        "overrides": {r"layers\.3": None, "output_dense|out_proj": {"inputs": "uint1"}},
    }  # fmt: skip
    config = small_config("post-norm", activation="relu", quantization={"feed_forward": bit})
    encoder = SpeechEncoder(SpeechEncoderConfig.from_json(config.to_json()))
    encoder(**inputs())[0].square().mean().backward()
    first, last = encoder.encoder.layers[0], encoder.encoder.layers[3]
    assert str(first.feed_forward.intermediate_dense.spec) == "w1 tensor, int1 inputs (static)"
    assert str(first.feed_forward.output_dense.spec) == "w1 tensor, uint1 inputs (static)"
    assert type(first.attention.out_proj) is nn.Linear
    assert type(last.feed_forward.output_dense) is nn.Linear


def test_a_preset_takes_it_and_stays_hashable() -> None:
    changes = {"num_layers": 1, "quantization": {"conv": {"mode": "packed", "bits": 8}}}
    encoder = SpeechEncoder.from_preset("sparseformer-dn-s", **changes)
    assert type(encoder.encoder.pos_conv_embed.conv).__name__ == "QConv1d"
    assert hash(encoder.config) == hash(dataclasses.replace(encoder.config))
    assert encoder.config != dataclasses.replace(encoder.config, quantization={})


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (3, "quantization must be a mapping from kinds of .*, got 3"),
        ({"norm": {"mode": "qat"}}, "quantization must be a mapping from kinds of .*'norm'"),
        ({"conv": {"bits": 4}}, r"quantization\['conv'\] must have a 'mode' of .*'bits': 4"),
        ({"conv": {"mode": "qat", "bits": 3}}, r"quantization\['conv'\] .* bits must be .* got 3"),
        ({"conv": {"mode": "qat", "bit": 4}}, r"quantization\['conv'\] .* argument 'bit'"),
        ({"conv": {"mode": "qat", "quantizer": "pact"}}, "'quantizer' of .*, got 'pact'"),
        ({"conv": {"mode": "qat", "attention_matmuls": "int4"}}, "argument 'attention_matmuls'"),
        ({"conv": {"mode": "qat", "overrides": 3}}, r"quantization\['conv'\] .* 'items'"),
        ({"conv": {"mode": "qat", "overrides": {"(": None}}}, r"regular expressions, got '\('"),
        ({"conv": {"mode": "float", "bits": 4}}, r"\['bits'\] with mode 'float'"),
        ({"conv": {"mode": "packed", "quantizer": "lsq"}}, r"\['quantizer'\] with mode 'packed'"),
        (
            {"attention": {"mode": "packed", "attention_matmuls": "int4"}},
            r"\['attention_matmuls'\] with mode 'packed'",
        ),
        (
            {"attention": {"mode": "qat", "attention_shift": True}},
            r"quantization\['attention'\] .* attention_shift must be False",
        ),
    ],
)
def test_a_wrong_choice_is_named_with_its_rule(quantization: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeechEncoderConfig(quantization=quantization)


def trained(kind: str, config: QuantConfig, quantizer: str) -> SpeechEncoder:
    """An encoder after a step that moves every scale."""
    encoder = build(kind).train()
    prepare_qat(encoder, config, quantizer)
    encoder(**inputs())
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3)
    encoder(**inputs())[0].square().mean().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    optimizer.step()
    return encoder.eval()


def low(bits: int, scope: str, group_size: Any = "tensor") -> QuantConfig:
    """The scopes of arXiv 2301.00652, and convolutions."""
    spec = QuantSpec(bits, group_size, inputs=f"int{bits}", input_scale="static")
    is_la = scope == "BiT-LA"
    return QuantConfig(
        spec,
        overrides={} if scope == "all" else {r"conv": None},
        attention_matmuls=f"int{bits}" if is_la else None,
        attention_shift=is_la,
        fuse=True,
    )


@pytest.mark.parametrize(
    ("scope", "bits", "quantizer", "group_size"),
    [
        ("BiT-L", 1, "elastic", "tensor"),
        ("BiT-LA", 1, "elastic", "tensor"),
        ("BiT-LA", 2, "elastic", None),
        ("BiT-LA", 8, "lsq", "tensor"),
        ("all", 1, "elastic", None),
        ("all", 2, "lsq", "tensor"),
        ("all", 4, "elastic", "auto"),
        ("all", 8, "lsq", None),
    ],
)
@pytest.mark.parametrize("kind", ["post-norm", "conformer", "squeezeformer", "block"])
def test_packed_outputs_are_those_trained(
    kind: str, scope: str, bits: int, quantizer: str, group_size: Any
) -> None:
    encoder, batch = trained(kind, low(bits, scope, group_size), quantizer), inputs()
    twin = copy.deepcopy(encoder)
    report = convert(encoder)
    assert all(f"int{bits} inputs (static)" in str(layer.spec) for layer in report.quantized)
    assert any("conv_module" in x.name or "pos_conv" in x.name for x in report.quantized) == (
        scope == "all"
    )
    wanted = check_layers(twin, encoder, batch)
    check_outputs(twin, encoder, batch, wanted)


def check_layers(twin: nn.Module, packed: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """That each packed layer gives what the trained one gives for what that one gets."""
    layers = [name for name, layer in twin.named_modules() if isinstance(layer, QATModule)]
    calls: dict[str, tuple[Any, ...]] = {}

    def remember(name: str, layer: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        calls[name] = args[0], kwargs, out

    for name in layers:
        hook = functools.partial(remember, name)
        twin.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    wanted = encode(twin, batch)
    assert calls.keys() == set(layers)
    with torch.no_grad():
        for name, (x, kwargs, out) in calls.items():
            high = copy.deepcopy(twin.get_submodule(name)).double()(x.double(), **kwargs)
            assert_as_accurate(packed.get_submodule(name)(x, **kwargs), out, high, name)
    return wanted


def check_outputs(
    twin: nn.Module, packed: nn.Module, batch: dict[str, Tensor], wanted: list[Tensor]
) -> None:
    """That the encoders agree, too, and that padding changes nothing.

    In fp64: in fp32 the smallest difference can move a number to the next of a few levels.
    """
    wave, lengths = batch["waveforms"].double(), batch["lengths"]
    # with gradients, as fused ops have no fp64
    exact, found = (each.double()(wave, lengths)[0].detach() for each in (twin, packed))
    for i, length in enumerate(LENGTHS):
        alone, rows = packed(wave[i : i + 1, :length])[0][0].detach(), slice(len(wanted[i]))
        assert_as_accurate(found[i, rows].float(), wanted[i], exact[i, rows])
        assert_as_accurate(alone.float(), wanted[i], exact[i, rows])


def test_layers_are_joined_only_if_they_learned_one_input_scale() -> None:
    spec = QuantSpec(4, inputs="int8", input_scale="static")
    encoder = trained("post-norm", QuantConfig(spec, fuse=True), "lsq")
    convert(encoder)
    attention = encoder.encoder.layers[0].attention
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    for layer in projections:
        layer.input_scale.fill_(0.1)
    assert can_join(projections)
    attention.k_proj.input_scale.mul_(3)
    assert not can_join(projections)
    encode(encoder, inputs())


def test_weights_alone_train_with_eight_bit_inputs() -> None:
    """SqWQ: the third scope, with every quantizer."""
    for quantizer in ("ste", "lsq", "elastic"):
        encoder = trained("post-norm", QuantConfig(QuantSpec(2, inputs="int8")), quantizer)
        twin = copy.deepcopy(encoder)
        convert(encoder)
        check_outputs(twin, encoder, inputs(), check_layers(twin, encoder, inputs()))
