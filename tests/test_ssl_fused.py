"""``quantize`` on speech encoders: the same numbers in fewer ops, and every way back."""

import copy
import gc
from typing import Any

import pytest
import torch

from lowbit_kernels import (
    QuantConfig,
    convert,
    dequantize,
    load_quantized,
    prepare_qat,
    quantize,
    save_quantized,
)
from lowbit_kernels.integrations.fuse import is_fused
from lowbit_kernels.testing import assert_as_accurate
from ssl_models.encoder import SpeechEncoder
from ssl_models.fused import fold_scales
from ssl_models.squeezeformer import SqueezeformerLayer
from tests.fused_cases import CONFIGS, layers_of, ops
from tests.ssl_cases import KINDS, build, encode, exact, inputs


def quantized(kind: str, preset: str, *, fuse: bool, dtype: Any = torch.float32) -> SpeechEncoder:
    encoder = build(kind).to(dtype)
    batch = inputs()
    clips = [batch["waveforms"].to(dtype)] if preset == "static" else None
    quantize(encoder, CONFIGS[preset], fuse=fuse, calibration=clips)
    return encoder


def launches(encoder: Any, batch: dict[str, Any]) -> list[list[str]]:
    """The ops of each fused layer, in order."""
    encode(encoder, batch)
    counted: list[list[str]] = []
    kind = type(layers_of(encoder)[0])
    forward = kind._fused

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, names = ops(lambda: forward(self, *args, **kwargs))
        counted.append(names)
        return out

    kind._fused = counting
    try:
        encode(encoder, batch)
    finally:
        del kind._fused
    return counted


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_are_as_accurate_as_the_layers_they_were(kind: str, preset: str) -> None:
    batch = inputs()
    plain, fused = (quantized(kind, preset, fuse=fuse) for fuse in (False, True))
    assert len(layers_of(fused)) == 4
    assert not is_fused(plain)
    rows = encode(fused, batch), encode(plain, batch), exact(plain, batch)
    for found, wanted, precise in zip(*rows, strict=True):
        assert_as_accurate(found, wanted, precise)


@pytest.mark.parametrize(
    "kind", ["post-norm", "pre-norm", "gated", "stacked", "conformer", "sliding", "block"]
)
def test_float_inputs_give_the_same_bits_as_without_fusion(kind: str) -> None:
    plain, fused = (quantized(kind, "small", fuse=fuse) for fuse in (False, True))
    for found, wanted in zip(encode(fused, inputs()), encode(plain, inputs()), strict=True):
        assert torch.equal(found, wanted)


def most_launches(kind: str, preset: str) -> int:
    if kind in ("conformer", "squeezeformer", "wide-reduction", "no-reduction"):
        return {"small": 14, "fast": 18, "static": 14}[preset]
    # local attention does not round its result
    # and a gate is an op
    more = kind.startswith("gated")
    return more + {"small": 7, "fast": 9, "static": 7 + (kind == "sliding")}[preset]


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [
        ("small", torch.float32),
        ("small", torch.bfloat16),
        ("fast", torch.bfloat16),
        ("static", torch.float32),
    ],
    ids=str,
)
# block attention splits frames and lengths first
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"block", "wide-reduction"}))
def test_a_fused_layer_runs_in_a_handful_of_ops(kind: str, preset: str, dtype: Any) -> None:
    encoder = quantized(kind, preset, fuse=True, dtype=dtype)
    batch = inputs()
    batch["waveforms"] = batch["waveforms"].to(dtype)
    counted = launches(encoder, batch)
    assert len(counted) == 4
    # the first of a stack projects positions for all, and finds nothing made for it
    assert len(counted[1]) <= most_launches(kind, preset), counted[1]
    assert all(len(names) <= most_launches(kind, preset) + 3 for names in counted), counted


@pytest.mark.gpu
@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_on_a_gpu(kind: str, preset: str) -> None:
    plain, fused = (quantized(kind, preset, fuse=fuse).cuda() for fuse in (False, True))
    batch = inputs("cuda")
    wide = exact(plain.cpu(), inputs())
    rows = encode(fused, batch), encode(plain.cuda(), batch), wide
    for found, wanted, precise in zip(*rows, strict=True):
        assert_as_accurate(found, wanted, precise.cuda())


@pytest.mark.parametrize("preset", ["small", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_utterance_equals_a_single_one(kind: str, preset: str) -> None:
    encoder, batch = quantized(kind, preset, fuse=True), inputs()
    rows = encode(encoder, batch)
    for i, length in enumerate(batch["lengths"].tolist()):
        alone = encode(encoder, {"waveforms": batch["waveforms"][i : i + 1, :length]})[0]
        assert_as_accurate(rows[i], alone, alone.double())


def test_scales_are_folded_into_the_layers_behind_them() -> None:
    encoder = build("squeezeformer")
    before, precise = encode(encoder, inputs()), exact(encoder, inputs())
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, SqueezeformerLayer):
            encoder.set_submodule(name, fold_scales(layer))
    scales = [scale for m in encoder.modules() if isinstance(m, SqueezeformerLayer)
              for scale, _ in m.readers()]  # fmt: skip
    assert len(scales) == 16
    for scale in scales:
        assert (scale.weight == 1).all()
        assert (scale.bias == 0).all()
        assert not scale.weight.requires_grad
    for found, wanted, high in zip(encode(encoder, inputs()), before, precise, strict=True):
        assert_as_accurate(found, wanted, high)


def double(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"waveforms": batch["waveforms"].double()}


def test_a_dry_run_and_a_refusal_leave_every_tensor_as_it_was() -> None:
    encoder = build("squeezeformer")
    before = dict(encoder.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    quantize(encoder, dry_run=True)
    with pytest.raises(ValueError, match="calibration must hold at least one clip"):
        quantize(encoder, QuantConfig.fast(), calibration=[])
    after = dict(encoder.named_parameters())
    assert all(after[name] is p and torch.equal(p, values[name]) for name, p in before.items())


def test_a_scale_that_changes_something_is_not_passed_over() -> None:
    plain, fused = (quantized("squeezeformer", "small", fuse=fuse) for fuse in (False, True))
    before = encode(fused, inputs())[0]
    for encoder in (plain, fused):
        with torch.no_grad():
            encoder.encoder.layers[1].ffn1_scale.weight.mul_(1.5)
    after = encode(fused, inputs())[0]
    assert not torch.equal(after, before)
    wanted = encode(plain, inputs())[0]
    assert_as_accurate(after, wanted, exact(plain, inputs())[0])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_copies_compute_the_same(kind: str, tmp_path: Any) -> None:
    batch = inputs()
    encoder = quantized(kind, "fast", fuse=True)
    wanted = encode(encoder, batch)
    save_quantized(encoder, tmp_path)
    again = load_quantized(tmp_path, build(kind))
    torch.save(encoder, tmp_path / "encoder.pt")
    rebuilt = load_quantized(tmp_path)  # from what the checkpoint says of its configuration
    others = (
        again,
        rebuilt,
        copy.deepcopy(encoder),
        torch.load(tmp_path / "encoder.pt", weights_only=False),
    )
    del encoder
    gc.collect()
    for other in others:
        assert len(layers_of(other)) == 4
        assert all(map(torch.equal, encode(other, batch), wanted))


def test_dequantize_gives_plain_layers_back() -> None:
    for kind in KINDS:
        encoder = quantized(kind, "small", fuse=True)
        wanted = exact(encoder, inputs())
        dequantize(encoder)
        assert not is_fused(encoder)
        found = encode(encoder, inputs())
        for row, precise in zip(found, wanted, strict=True):
            assert row.shape == precise.shape
            assert_as_accurate(row, row, precise)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_encoder_trains_and_converts(kind: str) -> None:
    encoder = build(kind).train()
    prepare_qat(encoder, QuantConfig(QuantConfig.small(4).default, fuse=True))
    batch = inputs()
    encoder(**batch)[0].square().mean().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in encoder.parameters()
        if p.requires_grad
    )
    encoder.eval()
    trained = encode(encoder, batch)
    wide = copy.deepcopy(encoder)
    convert(encoder)
    assert len(layers_of(encoder)) == 4
    precise = encode(wide.double(), double(batch))
    for found, wanted, high in zip(encode(encoder, batch), trained, precise, strict=True):
        assert_as_accurate(found, wanted, high)


@pytest.mark.parametrize(
    "kind", ["post-norm", "gated", "conformer", "squeezeformer", "sliding", "block"]
)
def test_attention_products_in_low_bits(kind: str) -> None:
    encoder, batch = build(kind).train(), inputs()
    prepare_qat(encoder, QuantConfig(attention_matmuls="int4", fuse=True))
    encoder(**batch)[0].square().mean().backward()
    convert(encoder.eval())
    names = ops(lambda: encode(encoder, batch))[1]
    assert sum(name.startswith("lowbit.low_bit_attention") for name in names) == 4
    assert not any(name.startswith("lowbit.flash") for name in names)


@pytest.mark.parametrize("kind", ["post-norm", "gated", "conformer", "squeezeformer"])
def test_hooks_inside_are_called(kind: str) -> None:
    plain, fused = (quantized(kind, "small", fuse=fuse) for fuse in (False, True))
    calls: list[Any] = []
    linears = [m for m in layers_of(fused)[1].modules() if hasattr(m, "qweight")]
    for linear in linears:
        linear.register_forward_hook(lambda *args: calls.append(args[0]))
    rows = encode(fused, inputs()), encode(plain, inputs()), exact(plain, inputs())
    assert set(linears) == set(calls)
    for found, wanted, high in zip(*rows, strict=True):
        assert_as_accurate(found, wanted, high)


def test_the_front_end_is_one_call_once_it_is_quantized() -> None:
    encoder = quantized("post-norm", "small", fuse=True)
    names = ops(lambda: encode(encoder, inputs()))[1]
    assert names.count("lowbit.front_end.default") == 1
    assert not any(
        name.startswith("lowbit.conv1d")
        for name in names[: names.index("lowbit.front_end.default")]
    )
    dequantize(encoder)
    assert "lowbit.front_end.default" not in ops(lambda: encode(encoder, inputs()))[1]


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_int8_front_ends_are_quantized_around_silence(norm: str) -> None:
    encoder = build("post-norm", conv_norm=norm, conv_bias=True)
    quantize(encoder, QuantConfig.fast())
    second = encoder.feature_extractor.conv_layers[1].conv
    assert second.spec.input_offset
    assert second.input_offset.any()
    # the fused call, and the layers one by one
    found = encode(encoder, inputs())
    encoder.feature_extractor._layout = None
    batch, seen = inputs(), []
    hook = second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows = encode(encoder, batch), exact(encoder, batch)
    hook.remove()
    # the first convolution makes 154 frames of the shorter utterance
    wanted = second.input_offset[:, None].expand(-1, seen[0].shape[2] - 154)
    assert torch.equal(seen[0][1, :, 154:], wanted)
    assert not torch.equal(seen[0][1, :, 153], second.input_offset)
    for fused, row, high in zip(found, *rows, strict=True):
        assert_as_accurate(fused, row, high)
    for i, length in enumerate(batch["lengths"].tolist()):
        alone = encode(encoder, {"waveforms": batch["waveforms"][i : i + 1, :length]})[0]
        assert_as_accurate(rows[0][i], alone, alone.double())
