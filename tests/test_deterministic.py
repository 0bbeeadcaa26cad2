"""``deterministic=True``: the same bits for an utterance whatever else is in the batch.

Dimension key: B batch, T frames, M rows, N output features, K input features, C channels.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lowbit_kernels import QConv1d, QLinear, QuantConfig, QuantSpec, flash_attention, quantize
from lowbit_kernels.conv1d import Geometry, low_bit_conv1d
from lowbit_kernels.conv1d import cuda as cuda_conv
from lowbit_kernels.cpu import library
from lowbit_kernels.formats import quantize_weight
from lowbit_kernels.matmul import backward_kernel, low_bit_linear
from lowbit_kernels.matmul import cuda as cuda_linear
from lowbit_kernels.matmul.dispatch import Gpu, choose_backend, choose_config
from lowbit_kernels.norm import masked_group_norm, norm_quantize
from tests.conv1d_cases import CASES, EPILOGUES, keywords, make_inputs
from tests.interpreter_memory import round_products_alike
from tests.linear_cases import SPECS

HUGGING_FACE = "lowbit_kernels.integrations.huggingface_config"
ROWS = (1, 3, 64, 200)
GPU = Gpu("a small GPU", (9, 0), 4, 227 * 1024)
FIXED = {name: replace(spec, deterministic=True) for name, spec in SPECS.items()}
INT8 = {
    f"w{bits}-int8-{kind}": QuantSpec(bits, inputs="int8", input_scale=kind, deterministic=True)
    for bits in (1, 2, 4, 8) for kind in ("token", "utterance", "static")
}  # fmt: skip
float_specs = pytest.mark.parametrize("spec", FIXED.values(), ids=FIXED)
all_specs = pytest.mark.parametrize("spec", (FIXED | INT8).values(), ids=FIXED | INT8)
W4 = FIXED["w4g64"]


@pytest.fixture
def compiled():
    if library.native() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def same_bits(run, batch, *, rows=()):
    """Whether every utterance of a batch, and its first rows alone, give the batch's bits."""
    together = run(batch)
    for b in range(len(batch)):
        assert torch.equal(run(batch[b : b + 1])[0], together[b]), f"utterance {b}"
    for T in rows:
        assert torch.equal(run(batch[2:3, :T])[0], together[2, :T]), f"{T} rows"


def test_the_spec_holds_it():
    assert not QuantSpec().deterministic
    assert str(QuantSpec(inputs="int8", deterministic=True)) == "w4 g64, int8 inputs, deterministic"
    assert QuantSpec(**W4.to_dict()) == W4
    with pytest.raises(ValueError, match="deterministic must be True or False, got 1"):
        QuantSpec(deterministic=1)


def test_it_reaches_every_layer_of_a_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8))
    config = QuantConfig(overrides={"1": QuantSpec(8), "2": None})
    report = quantize(model, config, deterministic=True)
    assert [m.spec.deterministic for m in model[:2]] == [True, True]
    assert type(model[2]) is nn.Linear
    specs = [layer.spec for layer in report.layers]
    assert specs == ["w4 g64, deterministic", "w8 channel, deterministic", None]
    assert not config.default.deterministic  # the caller's config is left as it was


@pytest.mark.parametrize("preset", [None, "small", "fast"])
def test_hugging_face_configs_carry_it(preset):
    LowbitConfig = pytest.importorskip(HUGGING_FACE).LowbitConfig
    config = LowbitConfig(bits=8, preset=preset, deterministic=True)
    again = LowbitConfig.from_dict(config.to_dict()).quant_config.default
    assert (again, again.deterministic) == (config.quant_config.default, True)


def test_a_config_without_the_field_is_not_deterministic():
    LowbitConfig = pytest.importorskip(HUGGING_FACE).LowbitConfig
    saved = LowbitConfig(bits=8).to_dict()
    saved["config"]["default"].pop("deterministic")
    assert LowbitConfig.from_dict(saved).quant_config.default == QuantSpec(8)


def test_the_backend_never_depends_on_rows():
    for dtype in (torch.float16, torch.bfloat16):
        chosen = {choose_backend(M, None, dtype, (9, 0), True) for M in (1, 500, 4096, 10**6)}
        assert chosen == {"fused"}
        for geometry in (Geometry(3, 2), Geometry(3, dilation=2), Geometry(3, groups=2)):
            for is_depthwise in (False, geometry.groups > 1):
                arguments = (geometry, is_depthwise, None, dtype, (9, 0), True)
                assert len({cuda_conv.choose_kernel(M, *arguments) for M in (1, 10**6)}) == 1


def test_float32_products_on_cuda_are_refused():
    with pytest.raises(NotImplementedError, match=r"got float32.*model\.half\(\).*inputs='int8'"):
        choose_backend(1, None, torch.float32, (9, 0), True)
    with pytest.raises(NotImplementedError, match="got float32"):
        cuda_conv.choose_kernel(1, Geometry(3), False, None, torch.float32, (9, 0), True)
    assert choose_backend(1, "int8", torch.float32, (9, 0), True) == "fused"
    depthwise = Geometry(3, groups=8)
    kernel = cuda_conv.choose_kernel(1, depthwise, True, None, torch.float32, (9, 0), True)
    assert kernel == "depthwise"


@pytest.fixture
def small_gpu(monkeypatch, device):
    """The CUDA path where few multiprocessors make the splits follow the rows."""
    if device == "cpu":
        round_products_alike(monkeypatch)
    for module in (cuda_linear, cuda_conv):
        monkeypatch.setattr(module, "gpu_of", lambda device: GPU)
    return device


@pytest.fixture
def configs(small_gpu, monkeypatch):
    """What the launcher was called with, for linear layers and convolutions."""
    seen = []
    for module in (cuda_linear, cuda_conv):
        launch = module.linear_triton

        def record(*args, launch=launch, **kwargs):
            seen.append(args[5])
            return launch(*args, **kwargs)

        monkeypatch.setattr(module, "linear_triton", record)
    return seen


@pytest.mark.parametrize("spec", [W4, INT8["w4-int8-token"]], ids=str)
def test_kernels_give_shared_rows_the_same_bits(spec, configs, small_gpu):
    N, K = 40, 600
    weight = quantize_weight(torch.randn(N, K, device=small_gpu) / K**0.5, spec)
    x = torch.randn(max(ROWS), K, device=small_gpu, dtype=torch.float16)
    grad = torch.randn(max(ROWS), N, device=small_gpu, dtype=torch.float16)

    def run(M):
        y, _ = cuda_linear.linear_cuda(x[:M], weight, None, None, "gelu")
        return y, cuda_linear.linear_backward_cuda(grad[:M], None, weight, None, False)[0]

    y, dx = run(max(ROWS))
    for M in ROWS[:-1]:
        for part, whole in zip(run(M), (y, dx), strict=True):
            assert torch.equal(part, whole[:M]), M
    assert len(set(configs)) == 1
    # the flag is what does it: without it tiles and splits follow M
    plain = [choose_config(M, N, K, spec.bits, 2, GPU) for M in ROWS]
    assert len({config.block_m for config in plain}) > 1
    assert len({config.splits for config in plain}) > 1


def test_gradients_in_float32_are_refused(small_gpu):
    grad = torch.randn(2, 6, 8, device=small_gpu)
    weight = quantize_weight(torch.randn(8, 8, device=small_gpu), INT8["w4-int8-token"])
    with pytest.raises(NotImplementedError, match="without gradients"):
        cuda_linear.linear_backward_cuda(grad, None, weight, None, False)
    with pytest.raises(NotImplementedError, match="without gradients"):
        cuda_conv.conv1d_backward_cuda(
            grad.transpose(1, 2), None, weight, None, Geometry(1), None, 8, 6, True, False
        )


def test_tiles_of_a_gradient_never_depend_on_rows(monkeypatch, device):
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **config: seen.append(config)

    monkeypatch.setattr(backward_kernel, "_linear_dx_kernel", Recorder())
    weight = quantize_weight(torch.randn(40, 300, device=device), W4)
    for M in ROWS:
        backward_kernel.linear_dx_triton(torch.randn(M, 40, device=device), weight)
    assert all(config == seen[0] for config in seen)


@pytest.mark.parametrize("spec", [W4, INT8["w4-int8-utterance"]], ids=str)
@pytest.mark.parametrize(
    "case", ["front-end", "even-same", "dilated", "grouped", "depthwise-causal"]
)
def test_convolution_kernels_give_an_utterance_the_same_bits(case, spec, configs, small_gpu):
    x, weight, bias, _, lengths, geometry = make_inputs(case, spec, torch.float16, small_gpu, B=3)
    T_out = geometry.frames_out(x.shape[2])

    def run(rows):
        y, z = cuda_conv.conv1d_cuda(
            x[rows], weight, bias, None, lengths[rows], geometry, "gelu", want_preactivation=True
        )
        dx, _ = cuda_conv.conv1d_backward_cuda(
            grad[rows], z, weight, lengths[rows], geometry, "gelu", *x.shape[1:], True, False
        )
        return y, dx

    grad = torch.randn(3, weight.N, T_out, device=small_gpu, dtype=torch.float16)
    together = run(slice(0, 3))
    for b in range(3):
        for alone, whole in zip(run(slice(b, b + 1)), together, strict=True):
            assert torch.equal(alone[0], whole[b]), b
    assert len(set(configs)) <= 1


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.usefixtures("compiled", "threads")
@all_specs
def test_linear_layers_on_a_cpu(spec, epilogue):
    layer = QLinear.from_float(nn.Linear(101, 72), spec)
    if spec.input_scale == "static":
        layer.input_scale = torch.tensor(0.03)
    rows = () if spec.input_scale == "utterance" else (1, 2, 7, 8, 9, 40)
    x = torch.randn(5, 41, 101)
    with torch.no_grad():
        same_bits(lambda x: layer(x, epilogue=epilogue), x, rows=rows)
        y = layer(x, epilogue=epilogue)
    assert torch.equal(layer(x, epilogue=epilogue), y), "in training"


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.usefixtures("compiled", "threads")
def test_threads_that_share_a_row_on_a_cpu(epilogue):
    weight = quantize_weight(torch.randn(1040, 8), W4)
    for _ in range(20):
        x = torch.randn(501, 8)
        y = low_bit_linear(x, weight, epilogue=epilogue)
        assert torch.equal(low_bit_linear(x[250:251], weight, epilogue=epilogue)[0], y[250])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("compiled")
@all_specs
def test_convolutions_on_a_cpu(case, spec):
    C, N, T, geometry = CASES[case]
    if not spec.symmetric and geometry.groups > 1:
        pytest.skip("grouped convolutions take symmetric weights")
    x, weight, bias, _, lengths, geometry = make_inputs(case, spec, B=5)
    if spec.input_scale == "static":
        weight = replace(weight, input_scale=torch.tensor(0.03))

    def run(x, lengths):
        return low_bit_conv1d(
            x, weight, bias, epilogue="gelu", lengths=lengths, **keywords(geometry)
        )

    together = run(x, lengths)
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(run(x[b : b + 1], lengths[b : b + 1])[0], together[b])
        T_out = geometry.frames_out(n)
        if T_out > 0:  # without any padding behind it
            assert torch.equal(run(x[b : b + 1, :, :n], None)[0], together[b, :, :T_out])
    layer = QConv1d(C, N, 3, groups=geometry.groups, spec=replace(spec, input_scale="token"))
    x = torch.randn(5, C, T)
    with torch.no_grad():
        same_bits(lambda x: layer(x, epilogue="silu"), x)
        y = layer(x, epilogue="silu")
    assert torch.equal(layer(x, epilogue="silu"), y), "in training"


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: (None, "no C++ compiler"))
    monkeypatch.setattr(library, "_warn_once", lambda reason: None)


@pytest.mark.parametrize("geometry", [None, Geometry(3), Geometry(3, groups=8)], ids=str)
@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_what_cannot_be_promised_is_refused(geometry):
    def run(spec, epilogue):
        layer = (
            QLinear(8, 8, spec=spec)
            if geometry is None
            else QConv1d(8, 8, 3, groups=geometry.groups, spec=spec)
        )
        return layer(torch.randn(2, 8, 8), epilogue=epilogue)

    wanted = r"compiled CPU kernels.*no C\+\+ compiler.*install a C\+\+ compiler.*inputs='int8'"
    with pytest.raises(RuntimeError, match=wanted):
        run(W4, None)
    exact = INT8["w4-int8-token"]
    for epilogue in ("gelu", "glu"):
        with pytest.raises(RuntimeError, match=f"inputs='int8' and epilogue='{epilogue}'"):
            run(exact, epilogue)
    assert run(exact, "relu").isfinite().all()
    assert run(QuantSpec(), "gelu").isfinite().all()


@pytest.mark.usefixtures("compiled")
def test_the_other_layers_of_an_encoder_keep_the_bits(device):
    B, H, T, D = 5, 2, 70, 24
    lengths = torch.tensor([70, 1, 33, 0, 69], device=device)
    q, k, v = torch.randn(3, B, H, T, D, device=device)
    out = flash_attention(q, k, v, lengths=lengths, window=20)
    x = torch.randn(B, 12, T, device=device)
    weight, bias = torch.randn(2, 12, device=device)
    norm = masked_group_norm(x, weight, bias, lengths=lengths, num_groups=4)
    rows = torch.randn(B, T, 50, device=device)
    ones = torch.ones(50, device=device)
    levels = norm_quantize(rows, ones, ones)
    for b, n in enumerate(lengths.tolist()):
        part = slice(b, b + 1)
        alone = flash_attention(*(t[part, :, :n] for t in (q, k, v)), window=20)
        assert torch.equal(alone[0], out[b, :, :n])
        alone = masked_group_norm(x[part, :, :n], weight, bias, lengths=None, num_groups=4)
        assert torch.equal(alone[0], norm[b, :, :n])
        for alone, whole in zip(norm_quantize(rows[part, :n], ones, ones), levels, strict=True):
            assert torch.equal(alone[0], whole[b, :n])


def tiny_wav2vec2(norm):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        vocab_size=33, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=100, conv_dim=(36, 48, 48), conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        feat_extract_norm=norm, conv_bias=norm == "layer", attn_implementation="lowbit",
        do_stable_layer_norm=norm == "layer",
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config).eval()


@pytest.mark.parametrize("preset", ["small", "fast"])
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.usefixtures("compiled", "threads")
def test_a_whole_model_on_a_cpu(norm, preset):
    model = tiny_wav2vec2(norm)
    quantize(model, getattr(QuantConfig, preset)(), deterministic=True)

    def frames(waves):
        lengths = [len(wave) for wave in waves]
        batch = nn.utils.rnn.pad_sequence(waves, batch_first=True)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            out = model.wav2vec2(batch, attention_mask=mask.long()).last_hidden_state
        valid = model._get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()
        return [h[:n] for h, n in zip(out, valid, strict=True)]

    for lengths in ((2000,) * 4, (2000, 1999, 900, 1333)):
        waves = [torch.randn(length) for length in lengths]
        for wave, together in zip(waves, frames(waves), strict=True):
            assert torch.equal(frames([wave])[0], together)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@all_specs
def test_linear_layers_on_a_gpu(spec, dtype):
    weight = quantize_weight(torch.randn(768, 1024, device="cuda") / 32, spec)
    if spec.input_scale == "static":
        weight = replace(weight, input_scale=torch.tensor(0.03, device="cuda"))
    bias = torch.randn(768, device="cuda", dtype=dtype)
    rows = () if spec.input_scale == "utterance" else (1, 3, 64, 200)
    for epilogue in (None, "gelu", "glu"):

        def run(x, epilogue=epilogue):
            return low_bit_linear(x, weight, bias, epilogue=epilogue)

        same_bits(run, torch.randn(12, 499, 1024, device="cuda", dtype=dtype), rows=rows)

    def gradient(grad):
        leaf = torch.zeros(*grad.shape[:-1], 1024, device="cuda", dtype=dtype, requires_grad=True)
        low_bit_linear(leaf, weight).backward(grad)
        return leaf.grad

    same_bits(gradient, torch.randn(12, 499, 768, device="cuda", dtype=dtype), rows=rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("spec", [W4, INT8["w4-int8-utterance"]], ids=str)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(512, 512, 3, stride=2),
        nn.Conv1d(768, 768, 128, padding=64, groups=16),
        nn.Conv1d(512, 512, 31, padding=15, groups=512),
        nn.Conv1d(256, 512, 3, dilation=2),
    ],
    ids=["front-end", "positional", "depthwise", "dilated"],
)
def test_convolutions_on_a_gpu(conv, spec, dtype):
    layer = QConv1d.from_float(conv.to("cuda", dtype), spec)
    x = torch.randn(12, conv.in_channels, 999, device="cuda", dtype=dtype)
    with torch.no_grad():
        same_bits(lambda x: layer(x, epilogue="gelu"), x)


@pytest.mark.gpu
def test_float32_inputs_are_refused_on_a_gpu():
    weight = quantize_weight(torch.randn(8, 8, device="cuda"), W4)
    with pytest.raises(NotImplementedError, match="got float32"):
        low_bit_linear(torch.randn(2, 8, device="cuda"), weight)
