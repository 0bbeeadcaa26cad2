"""The cost model against published numbers, PyTorch's counter and hand-made counts."""

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lowbit_kernels.attention.flops
import lowbit_kernels.conv1d.flops
import lowbit_kernels.fake_quant.flops
import lowbit_kernels.matmul.flops  # noqa: F401  (each registers the formulas of its ops)
from lowbit_kernels import QuantConfig, quantize
from ssl_models.config import SpeechEncoderConfig
from ssl_models.cost import Cost, cost, estimated_runtime
from ssl_models.encoder import SpeechEncoder
from ssl_models.presets import PRESETS, preset
from tests.ssl_cases import KINDS, SAMPLES, build, inputs, small_config

FAST = preset("hubert-base-fast")
SECONDS = SAMPLES / 16_000
# arXiv 2301.00652: megabytes by scope and bits; GFLOPs, QuantOPs and runtime of each row
STORAGE = {
    "sqwq": (99.65, 57.19, 35.95, 25.34),
    "bit-l": (99.49, 57.02, 35.79, 25.17),
    "bit-la": (99.54, 57.08, 35.84, 25.23),
}
RUNTIMES = (
    (153.14, 0, 1.38), (110.79, 0, 1.00), (80.34, 0, 0.73),
    (82.24, 1898.44, 1.00), (82.24, 1054.69, 0.89), (82.24, 632.81, 0.83), (82.24, 421.88, 0.80),
    (82.29, 1898.44, 1.00), (82.29, 527.34, 0.81), (82.29, 158.20, 0.76), (82.29, 52.73, 0.75),
    (11.82, 3868.56, 0.63), (11.82, 1074.60, 0.25), (11.82, 322.38, 0.15), (11.82, 107.46, 0.12),
)  # fmt: skip


def total(config: SpeechEncoderConfig, **options: Any) -> dict[str, Any]:
    return cost(config, **options).to_dict()


def test_float_models_have_the_published_storage() -> None:
    for name, megabytes in (("hubert-base", 189.14), ("hubert-base-fast", 184.42)):
        found = total(preset(name), final_dim=256)
        assert found["storage_mb"] == pytest.approx(megabytes, abs=0.01)
        assert found["storage_mb"] == found["parameters"] * 2 / 1e6
        assert found["quant_gbit"] == 0
    # as transformers counts, and a projection to 256 features
    wanted = 94_371_712 + 769 * 256
    assert total(preset("hubert-base"), final_dim=256)["parameters"] == wanted


@pytest.mark.parametrize("scope", STORAGE)
def test_quantized_models_have_the_published_storage(scope: str) -> None:
    for bits, megabytes in zip((8, 4, 2, 1), STORAGE[scope], strict=True):
        found = total(FAST, bits=bits, scope=scope, final_dim=256)
        assert found["storage_mb"] == pytest.approx(megabytes, abs=0.01)


@pytest.mark.parametrize(("gflops", "quant_gbit", "runtime"), RUNTIMES)
def test_runtimes_are_the_published_ones(gflops: float, quant_gbit: float, runtime: float) -> None:
    assert estimated_runtime(gflops, quant_gbit) == pytest.approx(runtime, abs=0.006)


def test_what_is_not_quantized_has_the_published_flops() -> None:
    # printed: 153.14 - 110.79 less than the front end of wav2vec 2.0, and 11.82 in all
    old, new = (total(preset(name)) for name in ("hubert-base", "hubert-base-fast"))
    assert old["gflops"] - new["gflops"] == pytest.approx(153.14 - 110.79, rel=0.015)
    projection = 2 * 499 * 512 * 768 / 1e9
    for found, gflops in ((old, 49.08), (new, 6.59)):
        front_end = found["kinds"]["front_end"]["gflops"] - projection
        assert front_end == pytest.approx(gflops, rel=0.015)
    rest = total(FAST, bits=1, scope="bit-la")
    assert rest["gflops"] == pytest.approx(11.82, rel=0.015)


def test_quant_ops_follow_the_rule_of_bits() -> None:
    frames, C = 499, 768
    weights, attended = 12 * (4 * C * C + 2 * C * 3072), 12 * 2 * frames**2 * C
    for bits, read in ((8, 8), (4, 8), (1, 2)):
        ops = bits * read + max(bits, read)
        found = total(FAST, bits=bits, inputs=read)
        assert found["quant_gbit"] == frames * weights * ops / 2**30
        found = total(FAST, bits=bits, inputs=read, scope="bit-la")
        of_attention = attended * (read * read + read)
        assert found["quant_gbit"] == (frames * weights * ops + of_attention) / 2**30
    # float inputs: fewer bytes, the same arithmetic
    found, plain = total(FAST, bits=4, inputs=16), total(FAST)
    assert found["gflops"] == plain["gflops"]
    assert found["quant_gbit"] == 0
    assert plain["storage_mb"] - found["storage_mb"] == pytest.approx(weights * 1.5 / 1e6)


def test_convolutions_are_quantized_where_asked() -> None:
    found = cost(FAST, bits=2, convolutions=True)
    kinds, plain = found.by_kind(), cost(FAST, bits=2).by_kind()
    assert plain["conv"]["quant_gbit"] == plain["front_end"]["quant_gbit"] == 0
    # but the first, over the waveform
    assert kinds["front_end"]["gflops"] == 2 * 31_999 * 64 * 10 / 1e9
    assert kinds["conv"]["gflops"] == 0
    assert kinds["conv"]["storage_mb"] == (768 * 48 * 128 * 2 / 8 + 768 * 2) / 1e6
    assert [layer.name for layer in found.layers if layer.kind == "front_end" and layer.flops] == [
        "feature_extractor.conv_layers.0.conv"
    ]


def test_a_configs_quantization_holds_where_no_bits_are_given() -> None:
    both = {"mode": "qat", "bits": 2, "inputs": "int2", "input_scale": "static"}
    attention = both | {"attention_matmuls": "int2", "attention_shift": True}
    unsigned = both | {"inputs": "uint2"}
    chosen = {"attention": attention, "feed_forward": unsigned, "conv": {"mode": "float"}}
    config = dataclasses.replace(FAST, quantization=chosen)
    assert cost(config).by_kind() == cost(FAST, bits=2, scope="bit-la").by_kind()
    assert cost(config, bits=4).by_kind() == cost(FAST, bits=4).by_kind()
    packed = {"attention": {"mode": "packed"}, "feed_forward": {"mode": "packed", "inputs": "fp8"}}
    config = dataclasses.replace(FAST, quantization=packed)
    assert cost(config).by_kind() == cost(FAST, bits=4, inputs=16).by_kind()


def counted(encoder: SpeechEncoder, **batch: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(**batch)
    return counter.get_total_flops()


def flops(found: Cost) -> int:
    return sum(2 * layer.macs for layer in found.layers)


@pytest.mark.parametrize("changes", [{}, {"front_end": "fbank", "conv_dims": None,
    "conv_kernels": None, "conv_strides": None}], ids=["waveform", "fbank"])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_counts_the_same(kind: str, changes: dict[str, Any]) -> None:
    encoder, batch = build(kind, **changes), inputs()
    found = cost(small_config(kind, **changes), SECONDS)
    assert counted(encoder, waveforms=batch["waveforms"][:1]) == flops(found)
    assert sum(p.numel() for p in encoder.parameters()) == found.by_kind()["total"]["parameters"]


@pytest.mark.parametrize("name", ["hubert-large", "squeezeformer-xs"])
def test_pytorch_counts_the_same_of_presets(name: str) -> None:
    with FakeTensorMode():
        encoder = SpeechEncoder.from_preset(name).eval()
        assert counted(encoder, waveforms=torch.empty(1, 160_000)) == flops(cost(PRESETS[name]))


@pytest.mark.parametrize("fuse", [False, True], ids=["layers", "fused"])
@pytest.mark.parametrize("config", [QuantConfig.small(), QuantConfig.fast()], ids=["16", "8"])
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_counts_quantized_layers(kind: str, config: QuantConfig, fuse: bool) -> None:
    encoder, batch = build(kind), inputs()
    quantize(encoder, dataclasses.replace(config, fuse=fuse))
    batch = {"waveforms": batch["waveforms"][:1]}
    counted(encoder, **batch)  # projects positions once for all that follow
    assert counted(encoder, **batch) == flops(cost(small_config(kind), SECONDS))


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_counts_layers_in_training(kind: str) -> None:
    both = {"mode": "qat", "bits": 2, "inputs": "int2", "input_scale": "static"}
    kinds = {
        "attention": both | {"attention_matmuls": "int2"}, "feed_forward": both,
        "conv": both, "front_end": both,
    }  # fmt: skip
    config = small_config(kind, quantization=kinds)
    encoder = SpeechEncoder(config).train()
    assert counted(encoder, waveforms=inputs()["waveforms"][:1]) == flops(cost(config, SECONDS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "seconds must be a finite number above 0, got 0"),
        ({"seconds": float("inf")}, "seconds must be a finite number above 0, got inf"),
        ({"seconds": 0.001}, "seconds must be at least 0.025, one frame, got 0.001"),
        ({"bits": 3}, r"bits must be one of \(1, 2, 4, 8\), or None, got 3"),
        ({"bits": 4, "inputs": 32}, "inputs must be one of .*, got 32"),
        ({"bits": 4, "scope": "bit"}, "scope must be one of .*, got 'bit'"),
        ({"inputs": 8}, "bits must be given with inputs, scope or convolutions, got None with 8"),
        ({"scope": "sqwq"}, "bits must be given with inputs, scope or convolutions"),
        ({"final_dim": -1}, "final_dim must be an int >= 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost(preset("hubert-base"), **options)
