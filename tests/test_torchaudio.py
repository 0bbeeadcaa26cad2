"""torchaudio's models, by stand-ins with its class names, attributes and call structure.

Its wheel does not import beside a CPU build of torch. Dimension key: B batch, S samples, T frames,
E embedding, H heads.
"""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lowbit_kernels import (
    QConv1d,
    QLinear,
    QuantConfig,
    QuantSpec,
    dequantize,
    load_quantized,
    quantize,
    save_quantized,
)
from lowbit_kernels.integrations.multihead import LinearMultiheadAttention
from lowbit_kernels.testing import assert_as_accurate

E, H = 32, 4


class ConvLayerBlock(nn.Module):
    def __init__(self, c_in: int, kernel_size: int, stride: int, norm: nn.Module | None) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.layer_norm = kernel_size, stride, norm
        self.conv = nn.Conv1d(c_in, E, kernel_size, stride, bias=False)

    def forward(self, x: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.conv(x)
        x = F.gelu(x if self.layer_norm is None else self.layer_norm(x))
        if length is not None:
            length = torch.div(length - self.kernel_size, self.stride, rounding_mode="floor") + 1
            length = length.clamp(min=0)
        return x, length


class FeatureExtractor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(
            [ConvLayerBlock(1, 10, 5, nn.GroupNorm(E, E)), ConvLayerBlock(E, 3, 4, None)]
        )

    def forward(self, x: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = x.unsqueeze(1)
        for layer in self.conv_layers:
            x, length = layer(x, length)
        return x.transpose(1, 2), length


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(E, E), nn.Linear(E, E)
        self.v_proj, self.out_proj = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, None]:
        B, T, _ = x.shape
        q, k, v = (
            p(x).view(B, T, H, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        additive = None if mask is None else -10000.0 * mask[:, None, None].to(x.dtype)
        out = F.scaled_dot_product_attention(q, k, v, additive)
        return self.out_proj(out.transpose(1, 2).reshape(B, T, E)), None


class WavLMSelfAttention(nn.Module):
    def __init__(self, has_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dropout = H, E // H, 0.0
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.num_buckets, self.max_distance = 16, 20
        self.rel_attn_embed = nn.Embedding(self.num_buckets, H) if has_bias else None
        self.gru_rel_pos = True
        self.gru_rel_pos_linear = nn.Linear(self.head_dim, 8)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, H, 1, 1))

    def compute_bias(self, query_length: int, key_length: int) -> Tensor:
        offsets = torch.arange(key_length)[None] - torch.arange(query_length)[:, None]
        half = self.num_buckets // 2
        distance, exact = offsets.abs(), half // 2
        far = torch.log(distance.float() / exact) / math.log(self.max_distance / exact)
        far = (exact + far * (half - exact)).long().clamp(max=half - 1)
        buckets = torch.where(distance < exact, distance, far) + half * (offsets > 0)
        return self.rel_attn_embed(buckets).permute(2, 0, 1)

    def forward(
        self,
        query: Tensor,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        B, T, _ = query.shape
        if self.rel_attn_embed is not None and position_bias is None:
            position_bias = self.compute_bias(T, T).unsqueeze(0).repeat(B, 1, 1, 1)
        heads = query.view(B, T, H, -1).permute(0, 2, 1, 3)
        gates = torch.sigmoid(self.gru_rel_pos_linear(heads).view(B, H, T, 2, 4).sum(-1))
        gate_a, gate_b = gates.chunk(2, dim=-1)
        bias = (gate_a * (gate_b * self.gru_rel_pos_const - 1.0) + 2.0) * position_bias
        if key_padding_mask is not None:
            bias = bias.masked_fill(key_padding_mask[:, None, None], -math.inf)
        projected = F.linear(query, self.attention.in_proj_weight, self.attention.in_proj_bias)
        q, k, v = (x.view(B, T, H, -1).transpose(1, 2) for x in projected.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, bias)
        return self.attention.out_proj(out.transpose(1, 2).reshape(B, T, E)), position_bias


class Wav2Vec2Model(nn.Module):
    """Waveforms [B, S] and lengths [B] to frames [B, T, E] and lengths [B]."""

    def __init__(self, wavlm: bool) -> None:
        super().__init__()
        self.feature_extractor = FeatureExtractor()
        layers = [WavLMSelfAttention(i == 0) if wavlm else SelfAttention() for i in range(2)]
        self.layers = nn.ModuleList(layers)
        self.wavlm = wavlm

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x, lengths = self.feature_extractor(waveforms, lengths)
        mask = None if lengths is None else torch.arange(x.shape[1]) >= lengths[:, None]
        if mask is not None:
            x = x.masked_fill(mask[..., None], 0.0)
        position_bias = None
        for layer in self.layers:
            if self.wavlm:
                y, position_bias = layer(x, mask, position_bias=position_bias)
            else:
                y, _ = layer(x, None, mask)
            x = x + y
        return x, lengths


@pytest.fixture(params=[False, True], ids=["wav2vec2", "wavlm"])
def model(request: pytest.FixtureRequest) -> Any:
    return Wav2Vec2Model(request.param).eval()


def batch() -> tuple[Tensor, Tensor]:
    waveforms, lengths = torch.randn(2, 900), torch.tensor([900, 611])
    waveforms[1, 611:] = 0
    return waveforms, lengths


@pytest.mark.parametrize("config", [QuantConfig.small(), QuantConfig.fast()])
def test_padded_batch_equals_single_utterances(model: Any, config: QuantConfig) -> None:
    quantize(model, config)
    waveforms, lengths = batch()
    with torch.no_grad():
        together, frames = model(waveforms, lengths)
        for i, (length, T) in enumerate(zip(lengths, frames, strict=True)):
            alone, _ = model(waveforms[i : i + 1, :length], lengths[i : i + 1])
            assert alone.shape[1] == T
            assert (together[i, :T] - alone[0]).abs().max() <= 1e-5


def test_layers_are_called_and_nothing_is_left(model: Any) -> None:
    report = quantize(model)
    reasons = {layer.kind: layer.reason for layer in report.left}
    # WavLM looks its position buckets up
    assert reasons.pop("Embedding", "nn.Embedding is not served") == "nn.Embedding is not served"
    gate = reasons.pop("Linear", "gru_rel_pos_linear")  # WavLM's alone
    assert "gru_rel_pos_linear" in gate
    assert reasons == {"Conv1d": "one input channel: little to gain"}
    assert isinstance(model.feature_extractor.conv_layers[1].conv, QConv1d)
    called = set()
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            module.register_forward_pre_hook(lambda _, __, name=name: called.add(name))
    with torch.no_grad():
        model(*batch())
    assert called == {name for name, module in model.named_modules() if isinstance(module, QLinear)}


@pytest.mark.parametrize("lengths", [None, torch.tensor([900, 900])])
def test_outputs_are_those_of_the_dequantized_model(model: Any, lengths: Tensor | None) -> None:
    quantize(model)
    waveforms = batch()[0]
    with torch.no_grad():
        low_bit, _ = model(waveforms, lengths)
        plain = dequantize(copy.deepcopy(model))
        assert not [m for m in plain.modules() if isinstance(m, QLinear | LinearMultiheadAttention)]
        assert [type(m).__mro__[1] for m in plain.layers] == [nn.Module] * 2
        low, _ = plain(waveforms)
        high, _ = plain.double()(waveforms.double())
    assert_as_accurate(low_bit, low, high)


def test_static_scales_see_every_layer(model: Any) -> None:
    clips = [{"waveforms": torch.randn(1, 900)} for _ in range(2)]
    quantize(model, QuantConfig.fast(), calibration=clips)
    assert all(m.input_scale > 0 for m in model.modules() if isinstance(m, QLinear))


def test_dry_run_and_errors_leave_the_model(model: Any) -> None:
    before = dict(model.named_modules())
    kinds = {name: type(module) for name, module in before.items()}
    parameters = dict(model.named_parameters())
    assert quantize(model, dry_run=True).quantized
    with torch.no_grad():
        named = model.named_parameters()
        [p for name, p in named if name.endswith("out_proj.weight")][-1].view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        quantize(model)
    quantize(model, QuantConfig(QuantSpec(), skip=("",)))  # nothing is chosen
    assert dict(model.named_modules()) == before
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(parameters[name] is p for name, p in model.named_parameters())


def test_checkpoints_and_copies(model: Any, tmp_path: Any) -> None:
    fresh = copy.deepcopy(model)
    quantize(model)
    inputs = batch()
    with torch.no_grad():
        expected, _ = model(*inputs)
        save_quantized(model, tmp_path)
        assert torch.equal(load_quantized(tmp_path, fresh)(*inputs)[0], expected)
        assert torch.equal(copy.deepcopy(model)(*inputs)[0], expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(*inputs)[0], expected)


def test_one_graph_for_three_lengths(model: Any) -> None:
    quantize(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    waveforms, lengths = batch()
    with torch.no_grad():
        for S in (900, 800, 700):
            x = waveforms[:, :S].clone(memory_format=torch.contiguous_format)
            assert torch.equal(
                compiled(x, lengths.clamp(max=S))[0], model(x, lengths.clamp(max=S))[0]
            )
    assert counter.frame_count == 1
    torch._dynamo.reset()


# nn.MultiheadAttention itself


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multihead_is_the_same_function(
    batch_first: bool, need_weights: bool, cross: bool, bias: bool
) -> None:
    float_attention = nn.MultiheadAttention(E, H, bias=bias, batch_first=batch_first).eval()
    attention = LinearMultiheadAttention(float_attention)
    B, T, S = 2, 7, 9 if cross else 7
    x, memory = (torch.randn((B, n, E) if batch_first else (n, B, E)) for n in (T, S))
    memory = memory if cross else x
    padding = torch.arange(S) >= torch.tensor([S, S - 2])[:, None]
    mask = torch.rand(T, S) > 0.8
    mask[:, 0] = False
    options = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights}
    exact = copy.deepcopy(float_attention).double()
    actual = attention(x, memory, memory, **options)
    low = float_attention(x, memory, memory, **options)
    high = exact(x.double(), memory.double(), memory.double(), **options)
    assert_as_accurate(actual[0], low[0], high[0])
    assert (actual[1] is None) == (low[1] is None)
    if need_weights:
        assert_as_accurate(actual[1], low[1], high[1])
    one = x[0] if batch_first else x[:, 0]
    assert attention(one, one, one)[0].shape == float_attention(one, one, one)[0].shape
    back = attention.to_attention()
    assert torch.equal(back(x, memory, memory, **options)[0], low[0])


def test_transformer_encoder_calls_the_layers() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    report = quantize(encoder)
    assert len(report.quantized) == 8
    x = torch.randn(2, 7, E)
    padding = torch.arange(7) >= torch.tensor([7, 5])[:, None]
    with torch.no_grad():
        low_bit = encoder(x, src_key_padding_mask=padding)
        plain = dequantize(copy.deepcopy(encoder))
        assert isinstance(plain.layers[0].self_attn, nn.MultiheadAttention)
        valid = ~padding
        low = plain(x, src_key_padding_mask=padding)[valid]
        high = plain.double()(x.double(), src_key_padding_mask=padding)[valid]
    assert_as_accurate(low_bit[valid], low, high)


def test_attention_with_more_keys_is_left_alone() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(E, H, add_bias_kv=True)})
    report = quantize(model)
    assert not report.quantized
    assert type(model["attention"]) is nn.MultiheadAttention
