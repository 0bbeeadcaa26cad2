"""The packed format and the rounding into it: exact bytes, round trips, accuracy from theory."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_kernels.formats import (
    METHODS,
    QuantConfig,
    QuantSpec,
    quantize_depthwise_weight,
    quantize_weight,
)
from lowbit_kernels.formats.packing import pack, row_bytes, to_codes, to_levels, unpack
from lowbit_kernels.formats.weight import MAX_GROUP_SCALE, empty_depthwise_weight, empty_weight

GOLDEN = Path(__file__).parent / "golden" / "format_v1.json"
LEVELS = {1: [-1, 1], 2: [-3, -1, 1, 3], 4: list(range(-8, 8)), 8: list(range(-127, 128))}

SPECS = [
    pytest.param(QuantSpec(bits=1), id="w1"),
    pytest.param(QuantSpec(bits=1, group_size=64), id="w1-g64"),
    pytest.param(QuantSpec(bits=2), id="w2-g64"),
    pytest.param(QuantSpec(bits=2, symmetric=False), id="w2-asymmetric"),
    pytest.param(QuantSpec(bits=4), id="w4-g64"),
    pytest.param(QuantSpec(bits=4, group_size=None), id="w4-channel"),
    pytest.param(QuantSpec(bits=4, group_size="tensor"), id="w4-tensor"),
    pytest.param(QuantSpec(bits=4, symmetric=False, group_size=32), id="w4-asymmetric"),
    pytest.param(QuantSpec(bits=8), id="w8"),
]


def sqnr_db(signal, noise):
    return 10 * math.log10(signal.square().sum().item() / noise.square().sum().item())


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([1, 2, 4, 8]), N=st.integers(1, 5), K=st.integers(1, 300))
def test_codes_survive_packing(bits, N, K):
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (N, row_bytes(K, bits))
    assert packed.shape[1] % 32 == 0
    assert torch.equal(unpack(packed, K, bits), codes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_each_element_lies_where_the_format_says(bits):
    K = 2 * 256 // bits + 5
    codes = torch.randint(0, 2**bits, (1, K), dtype=torch.uint8)
    packed = pack(codes, bits)[0].tolist()
    per_block = 256 // bits
    for k in range(K):
        block, inside = divmod(k, per_block)
        slice_, j = divmod(inside, 32)
        byte = packed[32 * block + j]
        assert (byte >> (slice_ * bits)) & (2**bits - 1) == codes[0, k]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_levels_and_codes_are_inverse(bits):
    levels = torch.tensor(LEVELS[bits], dtype=torch.int8)
    codes = to_codes(levels, bits)
    assert torch.equal(to_levels(codes, bits), levels)
    if bits < 8:
        assert codes.tolist() == list(range(2**bits))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("K", [1, 33, 64, 200])
def test_shapes_ranges_and_dequantization(spec, method, K):
    if method == "search" and not spec.symmetric:
        pytest.skip("search serves symmetric weights")
    weight = torch.randn(5, K)
    packed = quantize_weight(weight, spec, method)
    expected = empty_weight(5, K, spec)
    for name in ("qweight", "scale", "group_scale", "zero_point"):
        got, want = getattr(packed, name), getattr(expected, name)
        assert (got is None) == (want is None), name
        if got is not None:
            assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    if spec.symmetric:
        integers = packed.integers()
        assert integers.dtype == torch.int8
        rebuilt = integers.double() * packed.scale.double()[:, None]
        assert torch.equal(rebuilt, packed.dequantize(torch.float64))
    if packed.group_scale is not None:
        assert packed.group_scale.min() >= 1
        assert packed.group_scale.max() <= MAX_GROUP_SCALE[spec.bits]
    assert torch.isfinite(packed.dequantize()).all()


def gaussian_uniform_sqnr(bits, step):
    """SQNR in dB of a unit Gaussian under the format's levels times step, by integration."""
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64) * step
    edges = (levels[1:] + levels[:-1]) / 2
    error = x - levels[torch.bucketize(x, edges)]
    return -10 * math.log10(torch.trapezoid(error.square() * density, x).item())


def expected_largest(count):
    """Mean square of the largest magnitude among count unit Gaussians, by integration."""
    x = torch.linspace(0, 12, 400_001, dtype=torch.float64)
    below = torch.erf(x / math.sqrt(2)).pow(count)
    return torch.trapezoid(2 * x * (1 - below), x).item()


def test_one_bit_reaches_the_theoretical_sqnr():
    # a sign and its mean magnitude keep 2 / pi of the power
    theory = -10 * math.log10(1 - 2 / math.pi)
    weight = torch.randn(64, 4096)
    packed = quantize_weight(weight, QuantSpec(bits=1))
    assert sqnr_db(weight, weight - packed.dequantize()) == pytest.approx(theory, abs=0.05)


def test_two_bits_reach_the_best_uniform_quantizer():
    best = max(gaussian_uniform_sqnr(2, step) for step in torch.linspace(0.3, 0.7, 81).tolist())
    weight = torch.randn(64, 4096)
    packed = quantize_weight(weight, QuantSpec(bits=2, group_size=None))
    assert sqnr_db(weight, weight - packed.dequantize()) == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize(("bits", "count"), [(8, 1024), (4, 64)])
def test_largest_magnitude_scales_reach_their_theory(bits, count):
    # uniform noise of step^2 / 12, the step set by the largest of the scale's weights
    group = None if bits == 8 else count
    top = {8: 127, 4: 7}[bits]
    theory = 10 * math.log10(12 * top**2 / expected_largest(count))
    weight = torch.randn(512, count * (1 if group is None else 8))
    packed = quantize_weight(weight, QuantSpec(bits=bits, group_size=group))
    measured = sqnr_db(weight, weight - packed.dequantize())
    # choosing each group scale by its error gains up to half a decibel over the plain rule
    assert theory - 0.1 <= measured <= theory + (0.1 if bits == 8 else 0.6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_never_loses_to_nearest_rounding(bits):
    weight = torch.randn(32, 512)
    errors = {
        method: (weight - quantize_weight(weight, QuantSpec(bits=bits), method).dequantize())
        .square()
        .sum()
        for method in ("rtn", "search")
    }
    assert errors["search"] <= errors["rtn"] * 1.0001


def test_hqq_lets_outliers_go():
    # heavy tails: the bulk must be better represented than by the largest magnitude
    weight = torch.randn(32, 512)
    weight[:, ::128] *= 20
    bulk = torch.ones(512, dtype=torch.bool)
    bulk[::128] = False
    for spec in (QuantSpec(bits=4), QuantSpec(bits=4, symmetric=False)):
        error = {
            method: (weight - quantize_weight(weight, spec, method).dequantize())[:, bulk].abs()
            for method in ("rtn", "hqq")
        }
        assert error["hqq"].pow(0.7).mean() < error["rtn"].pow(0.7).mean()


def test_an_all_zero_row_stays_zero():
    weight = torch.randn(3, 96)
    weight[1] = 0
    for bits in (1, 2, 4, 8):
        packed = quantize_weight(weight, QuantSpec(bits=bits))
        assert (packed.dequantize()[1] == 0).all()


def test_four_bits_in_groups_of_64_cost_what_the_format_promises():
    packed = quantize_weight(torch.randn(1024, 4096), QuantSpec(bits=4))
    assert packed.nbytes * 8 / (1024 * 4096) == 4 + 8 / 64 + 32 / 4096


def test_depthwise_levels_are_tap_major():
    weight = torch.randn(6, 31)
    packed = quantize_depthwise_weight(weight, QuantSpec(bits=8))
    assert packed.qweight.shape == (31, 6)
    assert packed.is_depthwise
    assert packed.N == 6
    step = weight.abs().amax(1) / 127
    assert ((weight - packed.dequantize()).abs() <= step[:, None] * 0.5001).all()
    empty = empty_depthwise_weight(6, 31, QuantSpec(bits=8))
    assert empty.qweight.shape == packed.qweight.shape


def golden_digest():
    """Bytes of fixed integers packed at every width, and of a fixed ramp quantized."""
    digests = {}
    for bits in (1, 2, 4, 8):
        codes = (torch.arange(3 * 300) * 7 % 2**bits).to(torch.uint8).view(3, 300)
        digests[f"pack-{bits}"] = pack(codes, bits).numpy().tobytes().hex()[:128]
        digests[f"pack-{bits}-sha256"] = hashlib.sha256(pack(codes, bits).numpy()).hexdigest()
    # powers of two: every division is exact, so no platform may differ
    ramp = torch.tensor([[2.0 ** (k % 5) * (-1) ** k for k in range(130)] for _ in range(2)])
    for spec in (QuantSpec(bits=4), QuantSpec(bits=2), QuantSpec(bits=1), QuantSpec(bits=8)):
        packed = quantize_weight(ramp, spec)
        tensors = [packed.qweight, packed.scale, packed.group_scale]
        joined = b"".join(t.numpy().tobytes() for t in tensors if t is not None)
        digests[f"quantize-{spec}"] = hashlib.sha256(joined).hexdigest()
    return digests


def test_the_format_has_not_drifted():
    assert golden_digest() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, r"bits must be one of \(1, 2, 4, 8\), got 3"),
        ({"bits": True}, "bits must be one of"),
        ({"bits": 4.0}, r"bits must be one of .*got 4\.0"),
        ({"input_offset": 0}, "input_offset must be False, or True .*got 0"),
        ({"group_size": 48}, "group_size must be a power of two >= 32.*got 48"),
        ({"group_size": 16}, "group_size must be a power of two >= 32.*got 16"),
        (
            {"bits": 8, "group_size": 64},
            r"group_size must be None .* or 'tensor' with bits=8.*got 64",
        ),
        ({"symmetric": False, "inputs": "int8"}, "symmetric=False needs bits 2 or 4"),
        ({"symmetric": False, "bits": 1, "group_size": 64}, "symmetric=False needs bits 2 or 4"),
        (
            {"symmetric": False, "group_size": None},
            "group_size must be a power of two >= 32 with symmetric",
        ),
        ({"inputs": "int7"}, "inputs must be one of .*got 'int7'"),
        ({"input_scale": "batch"}, "input_scale must be one of .*got 'batch'"),
    ],
)
def test_a_wrong_spec_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**arguments)


@pytest.mark.parametrize(
    ("weight", "method", "message"),
    [
        (torch.zeros(2, 3, 4), "rtn", r"weight must be a floating-point matrix.*\(2, 3, 4\)"),
        (torch.zeros(2, 3).int(), "rtn", "weight must be a floating-point matrix"),
        (torch.tensor([[1.0, float("nan")]]), "rtn", "weight must be finite, got 1"),
        (torch.tensor([[1.0, float("inf")]]), "rtn", "weight must be finite, got 1"),
        (torch.zeros(0, 3), "rtn", "weight must not be empty"),
        (torch.zeros(2, 3), "best", "method must be one of .*got 'best'"),
    ],
)
def test_a_wrong_weight_is_named(weight, method, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(weight, QuantSpec(), method)


def test_config_rules_and_their_order():
    config = QuantConfig(
        QuantSpec(bits=4), overrides={r"layers\.0\.": QuantSpec(bits=8), r"conv": None}
    )
    assert config.spec_for("encoder.layers.0.q_proj") == (
        QuantSpec(bits=8),
        r"override 'layers\\.0\\.'",
    )
    assert config.spec_for("pos_conv")[0] is None
    assert config.spec_for("encoder.layers.1.q_proj") == (QuantSpec(bits=4), "default")
    spec, reason = config.spec_for("lm_head")
    assert spec is None
    assert reason.startswith("skip")
    assert QuantConfig({}.get("x", QuantSpec()), overrides={"lm_head": QuantSpec()}).spec_for(
        "lm_head"
    )[0]


@pytest.mark.parametrize("config", [QuantConfig.small(), QuantConfig.fast(8), QuantConfig()])
def test_config_survives_json(config):
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QuantConfig(default=4), "default must be a QuantSpec, got 4"),
        (lambda: QuantConfig(overrides={"(": None}), r"overrides must hold regular expressions"),
        (lambda: QuantConfig(overrides=[4]), r"overrides must be a mapping .* got \[4\]"),
        (lambda: QuantConfig(overrides={5: None}), "overrides must hold regular expressions"),
        (lambda: QuantConfig(skip="lm_head"), "skip must be a sequence of patterns"),
        (lambda: QuantConfig(skip=5), "skip must be a sequence of patterns, got 5"),
        (lambda: QuantConfig(overrides={"a": 4}), r"overrides\['a'\] must be a QuantSpec or None"),
        (lambda: QuantConfig(attention_matmuls="int3"), "attention_matmuls must be None or one of"),
        (lambda: QuantConfig.from_dict({"default": {}, "bitz": 4}), "bitz"),
        (lambda: QuantConfig.from_dict({"skip": []}), r"must have a 'default', got \['skip'\]"),
    ],
)
def test_a_wrong_config_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
