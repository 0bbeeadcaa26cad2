"""Inputs of fewer than 8 bits: layers train with them, and are the same as int8 products."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_kernels import (
    QConv1d,
    QLinear,
    QuantConfig,
    QuantSpec,
    convert,
    load_quantized,
    prepare_qat,
    quantize,
    save_quantized,
)
from lowbit_kernels.fake_quant import Quantizer
from lowbit_kernels.fake_quant.elementwise_kernel import fake_quantize_triton
from lowbit_kernels.fake_quant.quantizer import INPUT_LEVELS
from lowbit_kernels.fake_quant.reference import round_to_levels
from lowbit_kernels.formats.spec import LOW_INPUTS
from lowbit_kernels.matmul.quantize_kernel import quantize_rows_triton
from lowbit_kernels.modules import QATConv1d, QATLinear
from lowbit_kernels.testing import assert_as_accurate
from tests.fused_cases import ops

# arguments of nn.Conv1d; None: a linear layer
LAYERS = {
    "linear": None,
    "strided": (24, 16, 3, 2, 1),
    "grouped": (32, 32, 8, 1, 4, 1, 4),
    "depthwise": (24, 24, 5, 1, "same", 1, 24),
    "pointwise": (24, 16, 1),
}
layers = pytest.mark.parametrize("name", LAYERS)
kinds = pytest.mark.parametrize("inputs", LOW_INPUTS)
learned = pytest.mark.parametrize("quantizer", ["lsq", "elastic"])


def spec_of(inputs, bits=2):
    return QuantSpec(bits, None, inputs=inputs, input_scale="static")


def make_layer(name, inputs, quantizer="lsq", device="cpu"):
    sizes = LAYERS[name]
    if sizes is None:
        linear = nn.Linear(40, 12, device=device)
        return QATLinear.from_float(linear, spec_of(inputs), quantizer)
    return QATConv1d.from_float(nn.Conv1d(*sizes, device=device), spec_of(inputs), quantizer)


def make_input(layer, frames=21):
    """The second of two utterances ends early."""
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    x = torch.randn(2, width, frames, device=layer.weight.device)
    x[1, :, frames - 6 :] = 0
    return x.mT if isinstance(layer, nn.Linear) else x


def trained(layer, steps=3):
    x = make_input(layer)
    target = torch.randn_like(layer(x))
    for _ in range(steps):
        F.mse_loss(layer(x), target).backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    return layer


def output(layer, x, dtype):
    """The layer's output from integers that are written out here."""
    kind, step = layer.spec.inputs, layer.input_step.detach()
    bits, is_conv = int(kind[-1]), isinstance(layer, nn.Conv1d) and layer.kernel_size != (1,)
    low, high = (0, 2**bits - 1) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    v = x.float() * (1 / step)
    levels = v.round().clamp(low, high)
    if kind == "int1":
        levels = torch.where(v > 0, 1.0, -1.0)
        levels = levels * (v != 0) if is_conv else levels
    values, packed = levels.to(dtype) * step.to(dtype), layer.to_quantized()
    weight = packed._shape_weight(packed.quantized_weight().dequantize(dtype))
    if isinstance(layer, nn.Linear):
        return F.linear(values, weight, layer.bias.to(dtype))
    return layer._conv_forward(values, weight, layer.bias.to(dtype))


@learned
@kinds
@layers
def test_the_packed_layer_is_the_trained_one(name, inputs, quantizer, device):
    layer = trained(make_layer(name, inputs, quantizer, device))
    packed, x = layer.to_quantized(), make_input(layer, 19)
    assert isinstance(packed, QLinear | QConv1d)
    assert f"{inputs} inputs (static)" in repr(packed)
    with torch.no_grad():
        low, high = (output(layer, x, dtype) for dtype in (torch.float32, torch.float64))
        actual, called = ops(lambda: packed(x))
        assert_as_accurate(layer(x), low, high, "the trained layer")
        assert_as_accurate(actual, low, high, "the packed layer")
    op = "lowbit.linear.default" if name in ("linear", "pointwise") else "lowbit.conv1d.default"
    assert op in called


@pytest.mark.parametrize("inputs", ["int1", "int2", "uint1"])
@layers
def test_the_op_multiplies_these_very_integers(name, inputs):
    """Scaled by what no product in int8 could undo."""
    layer = make_layer(name, inputs)
    x = make_input(layer)
    with torch.no_grad():
        layer(x)
        packed = layer.to_quantized()
        x, weight = packed._operands(x if name == "linear" else x.mT, keeps_zeros=True)
    assert weight.spec.inputs == "int8"
    levels = (x / weight.input_scale).unique()
    found = {"int1": [-1, 0, 1], "int2": [-2, -1, 0, 1], "uint1": [0, 1]}[inputs]
    torch.testing.assert_close(levels, torch.tensor(found, dtype=torch.float32))


@kinds
@learned
def test_training_lowers_the_loss_and_moves_the_scale(inputs, quantizer, device):
    layer = make_layer("linear", inputs, quantizer, device)
    x = make_input(layer).abs()
    target, losses = torch.randn_like(layer(x)), []
    start = layer.input_step.detach().clone()
    for _ in range(20):
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    assert losses[-1] < losses[0]
    assert layer.input_step != start


@pytest.mark.parametrize(("inputs", "factor"), [("int1", 2), ("int2", 2), ("uint1", 4)])
def test_a_scale_starts_as_bit_s(inputs, factor, device):
    layer = make_layer("linear", inputs, device=device)
    x = make_input(layer).abs()
    layer(x)
    torch.testing.assert_close(layer.input_step.detach(), factor * x.abs().mean())


@pytest.mark.parametrize("inputs", ["int1", "int2", "int4"])
@pytest.mark.parametrize("name", ["strided", "grouped", "depthwise"])
def test_padding_is_zero_for_a_convolution(name, inputs, device):
    """In one bit, which has no zero, too: a padded utterance has the frames it has alone."""
    layer = trained(make_layer(name, inputs, device=device))
    x = make_input(layer)
    for each in (layer, layer.to_quantized()):
        with torch.no_grad():
            together, alone = each(x)[1:], each(x[1:, :, :15])
            valid = alone.shape[2] - 4
            exact = output(layer, x[1:], torch.float64)[..., :valid]
        assert_as_accurate(together[..., :valid], alone[..., :valid], exact)


@pytest.mark.parametrize("inputs", ["int1", "uint2"])
@layers
def test_gradients_of_the_packed_layer_are_those_of_training(name, inputs, device):
    """LoRA trains in front of it."""
    layer = trained(make_layer(name, inputs, device=device))
    x, packed = make_input(layer), layer.to_quantized()
    exact, grads = copy.deepcopy(layer).cpu().double(), []
    for each in (layer, packed, exact):
        rows = x.detach().to(each.bias).requires_grad_()
        each(rows).square().sum().backward()
        grads.append(rows.grad.cpu())
    assert (grads[1] == 0).any()
    assert_as_accurate(grads[1], grads[0], grads[2])


@pytest.mark.parametrize("inputs", ["int1", "uint4"])
@layers
def test_packed_layers_compile_and_run_in_16_bits(name, inputs, device):
    torch._dynamo.reset()
    layer = trained(make_layer(name, inputs, device=device))
    packed, x = layer.to_quantized(), make_input(layer)
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), packed(x))
        x = x.bfloat16()
        low, high = (output(layer, x, dtype) for dtype in (torch.bfloat16, torch.float64))
        with torch.autocast(device, dtype=torch.bfloat16):
            actual = packed(x.float())
        assert actual.dtype == torch.bfloat16
        assert_as_accurate(actual, low, high)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@kinds
def test_kernels_find_the_same_integers_again(inputs, dtype, device):
    """Rounded to few levels and back, then to int8 by the same scale."""
    x = 3 * torch.randn(5, 70, device=device, dtype=dtype)
    scale, levels = torch.tensor([[0.3]], device=device), INPUT_LEVELS[inputs]
    rounded = fake_quantize_triton(x, Quantizer(levels, scale, "lsq"), dtype)
    q, _ = quantize_rows_triton(rounded[None], scale.expand(5, 1).flatten().contiguous())
    expected = round_to_levels(x.float() * (1 / scale), levels)
    assert torch.equal(q[0].float(), expected)
    assert expected.unique().numel() == (levels.high - levels.low) // levels.step + 1


class Model(nn.Module):
    """Layers of every kind in a row."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(1, 16, 10, stride=5)
        self.conv = nn.Conv1d(16, 16, 3, stride=2)
        self.depthwise = nn.Conv1d(16, 16, 5, padding="same", groups=16)
        self.pointwise = nn.Conv1d(16, 32, 1)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)
        self.lm_head = nn.Linear(32, 5)

    def forward(self, wave):
        x = self.depthwise(self.conv(self.front(wave[:, None])))
        return self.lm_head(self.second(self.first(self.pointwise(x).mT).relu()))


# what leaves the ReLU has levels from zero on
CONFIG = QuantConfig(
    QuantSpec(1, "tensor", inputs="int1", input_scale="static"),
    overrides={"second": QuantSpec(1, "tensor", inputs="uint1", input_scale="static")},
)


def test_a_model_is_prepared_packed_saved_and_loaded(tmp_path):
    model, wave = Model(), torch.randn(2, 400)
    prepare_qat(model, CONFIG, "elastic")
    model(wave).square().mean().backward()
    with torch.no_grad():
        wanted, high = model(wave), copy.deepcopy(model).double()(wave.double())
        report = convert(model)
        actual = model(wave)
    assert_as_accurate(actual, wanted, high)
    specs = {layer.name: layer.spec for layer in report.quantized}
    assert specs["conv"] == "w1 tensor, int1 inputs (static)"
    assert specs["second"] == "w1 tensor, uint1 inputs (static)"
    # the copy in memory, as of int8 inputs
    assert all(layer.int8_copy_bytes for layer in report.quantized)
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path, Model().eval())
    with torch.no_grad():
        assert torch.equal(loaded(wave), actual)


def test_a_model_that_still_trains_is_not_saved(tmp_path):
    model = Model()
    prepare_qat(model, CONFIG)
    quantize(model, QuantConfig(skip=("first",), overrides={"lm_head": QuantSpec()}))
    with pytest.raises(ValueError, match="no layers that train: call convert first"):
        save_quantized(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("inputs", LOW_INPUTS)
def test_what_is_not_served_is_named(inputs):
    spec = spec_of(inputs)
    with pytest.raises(NotImplementedError, match=f"got '{inputs}': prepare_qat learns the scale"):
        quantize(Model(), spec, calibration=[torch.randn(400)])
    with pytest.raises(NotImplementedError, match=r"input_scale must be 'static'.* got 'token'"):
        prepare_qat(Model(), QuantSpec(inputs=inputs))
    with pytest.raises(NotImplementedError, match="by quantizer 'lsq' or 'elastic', got 'ste'"):
        prepare_qat(Model(), spec, "ste")
    packed = QLinear.from_float(nn.Linear(8, 8), spec)
    with pytest.raises(ValueError, match="input_scale must be a tensor with a static scale"):
        packed(torch.randn(2, 8))
    packed.input_scale = torch.tensor(0.5)
    assert packed(torch.randn(2, 8)).isfinite().all()
