"""The Conformer's convolution module: three ops, exact, the same for padded batches."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_kernels import QuantConfig, dequantize, quantize
from lowbit_kernels.conv1d import quantize_utterances
from lowbit_kernels.conversion.convert import adapt
from lowbit_kernels.formats import QuantSpec
from lowbit_kernels.matmul.reference import int8_scale, quantize_rows
from lowbit_kernels.modules.conv_module import ConvolutionModule
from lowbit_kernels.testing import assert_as_accurate

SPECS = [QuantSpec(4), QuantSpec(8, inputs="int8"), QuantSpec(4, inputs="int8")]


class Calls(TorchDispatchMode):
    """Counts the low-bit ops, and notes what else computes."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def int8_rows(h):
    """h [B, T, C] rounded to int8, one scale a frame."""
    rows = h.flatten(0, 1).float()
    scale = int8_scale(rows.abs().amax(-1))
    return (quantize_rows(rows, scale) * scale[:, None]).view(h.shape).to(h.dtype)


def int8_utterances(h):
    """h [B, C, T] rounded to int8, one scale an utterance."""
    q, scale = quantize_utterances(h)
    return (q * scale[:, None, None]).to(h.dtype)


def make(spec, norm="batch", causal=False, dtype=torch.float32, device="cpu", C=24, taps=7):
    """A module, and its float parts with the dequantized weights: a function of x, lengths."""
    torch.manual_seed(0)
    convs = (
        nn.Conv1d(C, 2 * C, 1),
        nn.Conv1d(C, C, taps, padding=taps // 2, groups=C),
        nn.Conv1d(C, C, 1, bias=norm == "batch"),
    )
    first, end = nn.LayerNorm(C), nn.LayerNorm(C) if norm == "layer" else nn.BatchNorm1d(C)
    for layer in (first, end):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    if norm == "batch":
        end.running_mean.normal_()
        end.running_var.uniform_(0.5, 2)
    end.eval()
    module = ConvolutionModule.from_float(
        first, convs[0], convs[1], end, "silu", convs[2], spec, causal=causal
    ).to(device, dtype)

    def reference(x, lengths, wide, int8=False):
        rows, utterances = (int8_rows, int8_utterances) if int8 else (lambda h: h,) * 2
        parts = copy.deepcopy(module).to(wide)
        weights = [
            getattr(parts, f"{name}_conv{i}").to_float().to(wide)
            for name, i in (("pointwise", 1), ("depthwise", ""), ("pointwise", 2))
        ]
        h = F.glu(weights[0](rows(parts.layer_norm(x.to(wide))).transpose(1, 2)), 1)
        if lengths is not None:
            h = h * (torch.arange(x.shape[1], device=device) < lengths[:, None])[:, None]
        h = utterances(h)
        pad = (taps - 1, 0) if causal else (taps // 2, taps // 2)
        h = F.conv1d(F.pad(h, pad), weights[1].weight, weights[1].bias, groups=C)
        h = parts.norm(h) if norm == "batch" else parts.norm(h.transpose(1, 2)).transpose(1, 2)
        h = rows(F.silu(h).transpose(1, 2)).transpose(1, 2)
        return weights[2](h).transpose(1, 2) + x.to(wide)

    return module, reference


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@torch.inference_mode()
def test_it_is_as_accurate_as_its_parts(norm, causal):
    module, reference = make(SPECS[0], norm, causal)
    x, lengths = torch.randn(2, 13, 24), torch.tensor([13, 8])
    y = module(x, lengths=lengths, residual=x)
    low, high = (reference(x, lengths, wide) for wide in (torch.float32, torch.float64))
    assert_as_accurate(y, low, high)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("spec", SPECS[1:], ids=str)
@torch.inference_mode()
def test_int8_inputs_cost_what_their_bits_do(spec, norm):
    module, reference = make(spec, norm)
    x = torch.randn(2, 13, 24)
    rounded = reference(x, None, torch.float32, int8=True)
    assert_as_accurate(module(x, residual=x), rounded, reference(x, None, torch.float64))


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@torch.inference_mode()
def test_three_ops(spec, norm):
    module, _ = make(spec, norm)
    x, lengths = torch.randn(2, 13, 24), torch.tensor([13, 8])
    module(x, lengths=lengths, residual=x)
    with torch.no_grad(), Calls() as calls:
        module(x, lengths=lengths, residual=x)
    ops = {name: n for name, n in calls.ops.items() if name.startswith("lowbit")}
    if spec.inputs is None:
        assert ops == {"lowbit.linear": 2, "lowbit.depthwise_conv1d_norm": 1}
    else:  # the input's LayerNorm quantizes, which is not one of the three
        assert ops == {
            "lowbit.norm_quantize": 1, "lowbit.linear_int8": 2, "lowbit.depthwise_conv1d_norm": 1,
        }  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@torch.inference_mode()
def test_a_padded_batch_is_its_utterances(spec, norm):
    module, _ = make(spec, norm)
    x, lengths = torch.randn(2, 13, 24), torch.tensor([13, 8])
    together = module(x, lengths=lengths, residual=x)
    alone = module(x[1:, :8], residual=x[1:, :8])
    # another number of rows may be summed in another order
    assert_as_accurate(together[1:, :8], alone, alone.double())


@torch.no_grad()
def test_the_folded_norm_follows_its_tensors():
    module, _ = make(SPECS[0])
    x = torch.randn(1, 9, 24)
    first = module(x)
    module.norm.running_mean.add_(1.0)
    assert not torch.equal(first, module(x))
    module.norm.load_state_dict({k: v + 1 for k, v in module.norm.state_dict().items()})
    other = copy.deepcopy(module)
    other.norm.weight.mul_(2)
    for m in (module, other):
        fresh = copy.deepcopy(m)
        fresh.depthwise_conv.__dict__.pop("_folded_norm")
        assert torch.equal(m(x), fresh(x))
    assert not torch.equal(module(x), other(x))
    assert not any("folded" in name for name in module.state_dict())


@torch.no_grad()
def test_it_compiles_to_one_graph():
    module, _ = make(SPECS[0])
    x, lengths = torch.randn(2, 9, 24), torch.tensor([9, 4])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = module(x, lengths=lengths, residual=x)
    assert_as_accurate(compiled(x, lengths=lengths, residual=x), y, y.double())


def test_errors():
    C = 8
    parts = [
        nn.LayerNorm(C), nn.Conv1d(C, 2 * C, 1), nn.Conv1d(C, C, 3, padding=1, groups=C),
        nn.BatchNorm1d(C), "silu", nn.Conv1d(C, C, 1),
    ]  # fmt: skip
    for i, wrong in ((1, nn.Conv1d(C, C, 1)), (2, nn.Conv1d(C, C, 3)), (3, nn.BatchNorm1d(C - 1)),
                     (3, nn.BatchNorm1d(C, affine=False)), (5, nn.Conv1d(C, C, 3))):  # fmt: skip
        with pytest.raises(ValueError, match="the parts must be pointwise"):
            ConvolutionModule.from_float(*parts[:i], wrong, *parts[i + 1 :], QuantSpec(4))
    module = ConvolutionModule.from_float(*parts, QuantSpec(4)).train()
    with pytest.raises(RuntimeError, match=r"for inference: call eval\(\)"):
        module(torch.randn(1, 5, C))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_real_shapes(dtype, norm):
    module, reference = make(SPECS[0], norm, dtype=dtype, device="cuda", C=512, taps=31)
    x = torch.randn(4, 499, 512, device="cuda", dtype=dtype)
    lengths = torch.tensor([499, 1, 20, 300], device="cuda")
    y = module(x, lengths=lengths, residual=x)
    low, high = (reference(x, lengths, wide) for wide in (dtype, torch.float64))
    assert_as_accurate(y, low, high)


FAMILIES = {
    "conformer-relative": ("conv_module", ("batch_norm",)),
    "conformer-rotary": ("conv_module", ("batch_norm",)),
    "wav2vec2-bert": ("conv_module", ()),
    "parakeet": ("conv", ()),
}


def exactly(model):
    """The model with the weights that its integers stand for, in fp64: no input is rounded."""
    return dequantize(copy.deepcopy(model)).double()


def widened(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("preset", ["small", "fast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers_run_it_in_inference(name, preset):
    from tests.families.test_padding import BY_NAME

    family = BY_NAME[name]
    model = family.build()
    quantize(model, getattr(QuantConfig, preset)())
    inputs, layers = family.inputs(), 2
    with torch.no_grad(), Calls() as calls:
        fused = model(**inputs).logits
    assert calls.ops["lowbit.depthwise_conv1d_norm"] == layers
    assert calls.ops["lowbit.conv1d"] <= 1  # a positional convolution
    with Calls() as calls:  # gradients are taken: as transformers computes it
        plain = model(**inputs).logits
    assert "lowbit.depthwise_conv1d_norm" not in calls.ops
    exact = exactly(model)(**widened(inputs)).logits.detach()
    assert_as_accurate(fused, plain.detach(), exact)


@pytest.mark.parametrize("preset", ["small", "fast"])
def test_berts_module_takes_any_mask(preset):
    from tests.families.test_padding import BY_NAME

    model = BY_NAME["wav2vec2-bert"].build()
    quantize(model, getattr(QuantConfig, preset)())
    module = model.wav2vec2_bert.encoder.layers[0].conv_module
    x = torch.randn(2, 12, 48)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = mask[1, 3] = 0
    plain = module(x, attention_mask=mask).detach()
    with torch.no_grad():
        fused = module(x, attention_mask=mask)
    exact = exactly(model).wav2vec2_bert.encoder.layers[0].conv_module
    assert_as_accurate(fused, plain, exact(x.double(), attention_mask=mask).detach())


def test_a_hook_on_a_part_is_called():
    from tests.families.test_padding import BY_NAME

    family = BY_NAME["wav2vec2-bert"]
    model = family.build()
    quantize(model)
    seen = []
    depthwise = model.wav2vec2_bert.encoder.layers[0].conv_module.depthwise_conv
    depthwise.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad(), Calls() as calls:
        model(**family.inputs())
    assert (seen, calls.ops["lowbit.depthwise_conv1d_norm"]) == ([1], 1)


def trained_module(extra, dtype=torch.float64):
    """Outputs, gradients and running statistics of a Conformer's module on two utterances."""
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

    torch.manual_seed(0)
    config = Wav2Vec2ConformerConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), conv_depthwise_kernel_size=7,
        conformer_conv_dropout=0.0, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = Wav2Vec2ConformerModel(config).to(dtype)
    adapt(model)
    layer = model.encoder.layers[0]
    lengths, T = torch.tensor([9, 5]), 9 + extra
    x = torch.randn(2, 9, 24, dtype=dtype)
    x = torch.cat((x, torch.full((2, extra, 24), 7.0, dtype=dtype)), 1)
    mask = torch.arange(T) < lengths[:, None]
    x = x.masked_fill(~mask[..., None], 3.0).requires_grad_()
    module = layer.conv_module.train()
    if extra:
        module._mask = mask
    y = module(x) if extra else None
    return module, x, mask, y


def test_training_counts_valid_frames_only():
    module, x, mask, y = trained_module(extra=3)
    y.masked_fill(~mask[..., None], 0).square().sum().backward()
    # one utterance after the other, with PyTorch's own parts
    twin, _, _, _ = trained_module(extra=0)
    leaves = [x.detach()[b, mask[b]].requires_grad_() for b in range(2)]
    before = [
        twin.depthwise_conv(twin.glu(twin.pointwise_conv1(twin.layer_norm(leaf[None]).mT)))[0].mT
        for leaf in leaves
    ]
    normed = twin.activation(twin.batch_norm(torch.cat(before)))
    expected = twin.pointwise_conv2(normed.mT[None])[0].mT
    expected.square().sum().backward()
    torch.testing.assert_close(y[mask], expected)
    torch.testing.assert_close(x.grad[mask], torch.cat([leaf.grad for leaf in leaves]))
    assert not x.grad[~mask].any()
    for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(module.batch_norm, name), getattr(twin.batch_norm, name))
