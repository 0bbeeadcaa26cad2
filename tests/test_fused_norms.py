"""LayerNorms that are part of the matmuls around them: ``quantize(fuse=True)`` in 16 bits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from lowbit_kernels import QuantConfig, QuantSpec, quantize
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul import low_bit_linear_normed, norm_columns, row_statistics
from lowbit_kernels.modules import blocks
from lowbit_kernels.testing import assert_as_accurate
from tests.families.models import LAYERS, WAVEFORM, Family, of
from tests.fused_cases import (
    BY_NAME,
    CONFORMERS,
    Launches,
    build,
    exact_logits,
    layers_of,
    logits,
    moved,
)


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedWeight]:
    """The weights of matmuls that apply a norm; what else such a matmul is given is checked."""
    weights: list[QuantizedWeight] = []

    def checked(x: Tensor, stats: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        *norm, columns, weight, _ = args
        rows = row_statistics(x.flatten(0, -2))
        assert_as_accurate(stats, rows, rows.double())
        assert torch.equal(columns, norm_columns(weight, *norm))
        weights.append(weight)
        return low_bit_linear_normed(x, stats, *args, **kwargs)

    monkeypatch.setattr(blocks, "low_bit_linear_normed", checked)
    return weights


FOLDED = {"wav2vec2-layer": 3, "whisper": 3, "wavlm-stable": 2, **dict.fromkeys(CONFORMERS, 6)}


@pytest.mark.parametrize("stream", ["as it is", "outlier"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FOLDED)
def test_folded_norms_are_as_accurate_as_norms(
    name: str, dtype: torch.dtype, stream: str, folded: list[QuantizedWeight]
) -> None:
    inputs = moved(BY_NAME[name].inputs(), "cpu", dtype)
    plain, fused = (build(name, "small", fuse=fuse, dtype=dtype) for fuse in (False, True))
    for module in (*plain.modules(), *fused.modules()):
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5
    if stream == "outlier":
        # a residual stream with a mean of several deviations, and one feature far from the others
        ends = ("out_proj", "output_dense", "fc2", "linear_out")
        for model in (plain, fused):
            for path, module in model.named_modules():
                if path.endswith(ends):
                    module.bias.data += 8
                    module.bias.data[5] += 50
    output = logits(fused, inputs)
    # Whisper clamps in fp16 what goes from layer to layer
    clamps = name == "whisper" and dtype == torch.float16
    assert len(folded) == FOLDED[name] - clamps
    assert_as_accurate(output, logits(plain, inputs), exact_logits(plain, inputs))


@pytest.mark.parametrize("what", ["scale", "shift", "codes", "group scales", "all"])
def test_what_a_fold_is_computed_of_may_change(what: str, folded: list[QuantizedWeight]) -> None:
    name, dtype = "wav2vec2-layer", torch.bfloat16
    model = build(name, "small", fuse=True, dtype=dtype)
    inputs = moved(BY_NAME[name].inputs(), "cpu", dtype)
    before, layer = logits(model, inputs), layers_of(model)[-1]
    with torch.no_grad():
        if what == "scale":
            layer.layer_norm.weight *= 1.5
        elif what == "shift":
            layer.final_layer_norm.bias += 1
        elif what == "codes":
            layer.attention.k_proj.qweight ^= 255
        elif what == "group scales":
            layer.feed_forward.intermediate_dense.group_scale.fill_(3)
        else:
            state = model.state_dict()
            state = {n: t.flip(0) if "layers.1" in n else t for n, t in state.items()}
            model.load_state_dict(state, assign=True)
    assert not torch.equal(logits(model, inputs), before)
    assert len(folded) == 2 * FOLDED[name]


def test_statistics_are_made_for_those_who_take_them(folded: list[QuantizedWeight]) -> None:
    family, dtype = BY_NAME["wav2vec2-layer"], torch.bfloat16
    asymmetric = {r"layers\.1\.attention\.[qkv]_proj": QuantSpec(symmetric=False)}
    model = family.build().to(dtype)
    quantize(model, QuantConfig(QuantSpec(), overrides=asymmetric), fuse=True)
    with Launches() as launches:
        logits(model, moved(family.inputs(), "cpu", dtype))
    assert len(folded) == LAYERS
    assert sum(name.startswith("lowbit.linear_with_stats") for name in launches.names) == LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_attention_follow_the_layer(
    dtype: torch.dtype, folded: list[QuantizedWeight]
) -> None:
    options = {"adapter_attn_dim": 8, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    family = Family("adapter", of(Wav2Vec2Config, Wav2Vec2ForCTC, WAVEFORM, **options))
    plain, fused = family.build().to(dtype), family.build().to(dtype)
    quantize(plain)
    plain.set_attn_implementation("lowbit")
    quantize(fused, fuse=True)
    inputs = moved(family.inputs(), "cpu", dtype)
    assert layers_of(fused)[0].adapter_layer is not None
    assert_as_accurate(logits(fused, inputs), logits(plain, inputs), exact_logits(plain, inputs))
    # what an adapter is added to has other statistics
    assert len(folded) == LAYERS * (dtype == torch.bfloat16)
