"""torch.export with any number of frames, AOTInductor packages, other streams and devices.

Dimension key: B batch, C channels, T frames, H heads, D head dimension.
"""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

from conftest import HAS_GPU
from lowbit_kernels import QConv1d, QLinear, QuantConfig, QuantSpec, flash_attention, quantize
from lowbit_kernels.fake_quant import Levels, Quantizer, fake_quantize, initial_scale
from lowbit_kernels.norm import masked_group_norm, norm_activation
from lowbit_kernels.testing import assert_as_accurate

B, C, H, D = 2, 64, 4, 16
SPECS = [QuantSpec(4), QuantSpec(4, inputs="int8"), QuantSpec(8, inputs="int8"), QuantSpec(1)]
# (family, config, attention): every front end, position scheme and kind of convolution
MODELS = [
    ("wav2vec2-group", QuantConfig.fast, "lowbit"),
    ("wav2vec2-layer", QuantConfig.small, "sdpa"),
    ("wavlm", QuantConfig.fast, None),
    ("conformer-relative", QuantConfig.small, "lowbit"),
    ("sew", QuantConfig.fast, "sdpa"),
    ("hubert", QuantConfig.fast, "fused"),
]


class Attention(nn.Module):
    """Of x [B, T, C], with key lengths."""

    def forward(self, x, lengths):
        heads = x.unflatten(-1, (H, D)).transpose(1, 2)
        return flash_attention(heads, heads, heads, lengths=lengths)


class Layers(nn.Module):
    """All three kinds of ops that hold or read packed weights."""

    def __init__(self, spec):
        super().__init__()
        self.linear = QLinear(C, C, spec=spec)
        self.conv = QConv1d(C, C, 3, padding=1, spec=spec)
        self.depthwise = QConv1d(C, C, 5, padding=2, groups=C, spec=QuantSpec(8))
        self.attention = Attention()

    def forward(self, x, lengths):
        x = self.conv(self.linear(x).mT)
        return self.attention(self.depthwise(x).mT, lengths)


def frames(T):
    return torch.randn(B, T, C), torch.tensor([T, T // 2])


def export(module, *args, **kwargs):
    """With dimension 1 of every tensor of two dimensions and more left open."""
    shapes = [{1: Dim.DYNAMIC} if x.dim() > 1 else None for x in (*args, *kwargs.values())]
    with torch.no_grad():
        return torch.export.export(module, args, kwargs, dynamic_shapes=tuple(shapes))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"w{spec.bits}-{spec.inputs}")
def test_layers_are_exported_with_any_number_of_frames(spec):
    layers = Layers(spec).eval()
    exported = export(layers, *frames(37)).module()
    for T in (37, 5, 91):
        x = frames(T)
        with torch.no_grad():
            assert torch.equal(exported(*x), layers(*x))


def waves(T):
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 3 * T // 4 :] = 0
    return {"input_values": torch.randn(B, T), "attention_mask": mask}


def quantized(name, config, attention=None):
    pytest.importorskip("transformers")
    from tests.families.models import FAMILIES

    model = next(family for family in FAMILIES if family.name == name).build()
    quantize(model, config(), fuse=attention == "fused")
    if attention not in (None, "fused"):
        model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize(("name", "config", "attention"), MODELS, ids=[m[0] for m in MODELS])
def test_models_are_exported_with_any_number_of_samples(name, config, attention):
    model = quantized(name, config, attention)
    program = export(model, **waves(2000))
    # what is traced are the layers one by one
    model = quantized(name, config, "lowbit" if attention == "fused" else attention)
    assert any("lowbit" in str(node.target) for node in program.graph.nodes)
    for T in (2000, 1390, 3100):
        inputs = waves(T)
        with torch.no_grad():
            assert torch.equal(program.module()(**inputs).logits, model(**inputs).logits), T


def test_a_program_is_saved_and_loaded(tmp_path):
    layers, x = Layers(SPECS[0]).eval(), frames(20)
    torch.export.save(export(layers, *frames(37)), tmp_path / "layers.pt2")
    with torch.no_grad():
        again = torch.export.load(tmp_path / "layers.pt2").module()
        assert torch.equal(again(*x), layers(*x))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
RUN = """
import sys, torch
{imports}
x, lengths, expected = torch.load(sys.argv[2])
run = torch._inductor.aoti_load_package(sys.argv[1])
assert torch.equal(run(x, lengths), expected)
"""


@needs_compiler
def test_a_package_runs_elsewhere_or_names_the_op_that_is_missing(tmp_path):
    layers = Layers(SPECS[1]).eval()
    path = str(tmp_path / "layers.pt2")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(export(layers, *frames(37)), package_path=path)
        run = torch._inductor.aoti_load_package(path)
        x = frames(20)
        expected = run(*x)
        wanted, exact = layers(*x), copy.deepcopy(layers).double()(x[0].double(), x[1])
    assert_as_accurate(expected, wanted, exact)
    torch.save((*x, expected), tmp_path / "x.pt")

    def start(imports):
        command = [sys.executable, "-c", RUN.format(imports=imports), path, str(tmp_path / "x.pt")]
        return subprocess.run(command, capture_output=True, text=True)

    done = start("import lowbit_kernels.modules")
    assert done.returncode == 0, done.stderr
    done = start("")
    assert done.returncode == 1
    assert "Could not find schema for lowbit::" in done.stderr.splitlines()[-1]


@needs_compiler
def test_a_package_of_a_whole_model(tmp_path):
    model = quantized("wav2vec2-group", QuantConfig.small, "lowbit")
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            export(model, **waves(2000)), package_path=str(tmp_path / "model.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        for T in (2000, 1390):
            inputs = waves(T)
            low = model(**inputs).logits
            exact = copy.deepcopy(model).double()
            high = exact(inputs["input_values"].double(), inputs["attention_mask"]).logits
            assert_as_accurate(run(**inputs).logits, low, high, f"{T} samples")


def _ops(device):
    """Calls of x [B, T, C] that launch our kernels, by name."""
    x = torch.ones(B, 8, C, device=device)
    weight, bias = torch.ones(C, device=device), torch.zeros(C, device=device)
    lengths = torch.tensor([8, 5], device=device)
    quantizer = Quantizer(Levels.of_input(8), initial_scale(x, Levels.of_input(8)), "lsq")
    layers = {
        f"{type(layer).__name__} {i}": layer.to(device).eval()
        for i, layer in enumerate(
            [*(QLinear(C, C, spec=spec) for spec in SPECS), QConv1d(C, C, 5, spec=SPECS[0]),
             QConv1d(C, C, 5, spec=SPECS[1]), QConv1d(C, C, 5, groups=C, spec=SPECS[2])]
        )
    }  # fmt: skip
    calls = {
        name: (lambda x, layer=layer: layer(x.mT if isinstance(layer, QConv1d) else x))
        for name, layer in layers.items()
    }
    return calls | {
        "flash_attention": lambda x: Attention()(x, lengths),
        "masked_group_norm": lambda x: masked_group_norm(
            x.mT, weight, bias, lengths=lengths, num_groups=C
        ),
        "norm_activation": lambda x: norm_activation(x, weight, bias, activation="gelu"),
        "fake_quantize": lambda x: fake_quantize(x, quantizer),
    }


NAMES = list(_ops("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_an_op_runs_on_the_current_stream(name):
    call, x = _ops("cuda")[name], torch.randn(B, 8, C, device="cuda")
    with torch.no_grad():
        expected, late = call(x), torch.full_like(x, torch.nan)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # whatever runs on another stream reads the NaN
            late.copy_(x)
            got = call(late)
        torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_an_op_runs_on_another_device_than_the_current_one(name):
    torch.manual_seed(1)
    first = _ops("cuda:0")[name]
    torch.manual_seed(1)
    second, x = _ops("cuda:1")[name], torch.randn(B, 8, C, device="cuda:0")
    with torch.no_grad():
        got = second(x.to("cuda:1"))
        assert torch.cuda.current_device() == 0
        assert got.device == torch.device("cuda:1")
        assert torch.equal(got.to("cuda:0"), first(x))
