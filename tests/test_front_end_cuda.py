"""The front end's CUDA implementation against its layers; interpreted where there is no GPU."""

import functools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from lowbit_kernels.conv1d import Geometry, conv1d_reference, quantize_utterances
from lowbit_kernels.conv1d.dispatch import choose_conv1d
from lowbit_kernels.conv1d.front_end import describe_layers, flatten_layers, front_end, serves
from lowbit_kernels.cpu import FrontEndLayer, Norm
from lowbit_kernels.formats import QuantizedWeight, QuantSpec, quantize_weight
from lowbit_kernels.matmul import tuned
from lowbit_kernels.matmul.dispatch import Gpu, LinearConfig
from lowbit_kernels.matmul.reference import apply_epilogue
from lowbit_kernels.testing import assert_as_accurate

# N, taps, stride of the layers: ragged; and SEW's form, whose layers have one tap in between
RAGGED = [(37, 10, 5), (48, 3, 2), (40, 2, 2)]
SEW = [(32, 10, 5), (48, 3, 2), (48, 1, 1)]
KINDS = ("group", "layer", "none")
INPUTS = (None, "utterance", "static")


@pytest.fixture
def cuda_code(monkeypatch, device):
    from lowbit_kernels.conv1d import front_end_cuda

    if device == "cpu":
        gpu = Gpu("a GPU", (8, 0), 4, 99 << 10)
        monkeypatch.setattr(front_end_cuda, "gpu_of", lambda device: gpu)
    return front_end_cuda.front_end_cuda


def make_layers(kind, inputs, device, dtype=torch.float16, shape=RAGGED, offset=False, fixed=True):
    layers, C = [], 1
    for number, (N, taps, stride) in enumerate(shape):
        weight = (torch.randn(N, 1, taps) / taps**0.5).to(device, dtype)
        input_offset = None
        if number:
            view = torch.randn(N, taps * C, device=device) / (taps * C) ** 0.5
            weight = quantize_weight(view, QuantSpec(inputs=inputs and "int8", deterministic=fixed))
            if inputs == "static":
                scale = torch.tensor(0.03, device=device)
                weight = replace(weight, input_scale=scale)
            input_offset = torch.randn(C, device=device) / 4 if offset else None
        norm = None
        if kind == "layer" or (kind == "group" and number == 0):
            gain = (1 + torch.randn(N) / 4).to(device, dtype)
            norm = Norm(kind, gain, torch.randn(N).to(device, dtype), 1e-5)
        bias = None if kind == "group" else torch.randn(N).to(device, dtype)
        layers.append(FrontEndLayer(weight, bias, stride, norm, input_offset=input_offset))
        C = N
    return layers


def reference(waveform, layers, dtype, lengths=None):
    """The layers one by one, each utterance alone: [B, T, N], zeros past its last frame."""
    out = []
    for b, wave in enumerate(waveform):
        alone = wave if lengths is None else wave[: lengths[b]]
        out.append(_utterance(alone.to(dtype)[None, None], layers, dtype)[0].T)
    T = max(y.shape[0] for y in out)
    return torch.stack([F.pad(y, (0, 0, 0, T - y.shape[0])) for y in out])


def _utterance(h, layers, dtype):
    for layer in layers:
        weight, norm = layer.weight, layer.norm
        bias = None if layer.bias is None else layer.bias.to(dtype)
        if h.shape[2] < layer.taps(h.shape[1]):
            return h.new_zeros(1, layers[-1].N, 0)
        if isinstance(weight, QuantizedWeight):
            if layer.input_offset is not None:
                h = h - layer.input_offset[:, None].to(dtype)
            h = conv1d_reference(h, weight, bias, Geometry(layer.taps(h.shape[1]), layer.stride))
        else:
            h = F.conv1d(h, weight.to(dtype), bias, layer.stride)
        if norm is not None:
            gain, shift = norm.weight.to(dtype), norm.bias.to(dtype)
            if norm.kind == "group":
                h = F.group_norm(h, layer.N, gain, shift, norm.eps)
            else:
                h = F.layer_norm(h.mT, (layer.N,), gain, shift, norm.eps).mT
        h = apply_epilogue(h, layer.activation)
    return h


def check(cuda_code, waveform, layers, lengths=None):
    y = cuda_code(waveform, layers, lengths)
    low, high = (reference(waveform, layers, d, lengths) for d in (waveform.dtype, torch.float64))
    assert_as_accurate(y, low, high)
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_it_is_as_accurate_as_the_layers(cuda_code, device, kind, inputs):
    # an offset, so that the mean over time matters
    waveform = (torch.randn(2, 401) / 2 + 0.3).to(device, torch.float16)
    check(cuda_code, waveform, make_layers(kind, inputs, device))


@pytest.mark.parametrize("inputs", INPUTS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_input_offsets_are_taken_off(cuda_code, device, kind, inputs):
    waveform = torch.randn(1, 301).to(device, torch.float16)
    # sums that are split, and such that are not
    for fixed in (False, True):
        check(cuda_code, waveform, make_layers(kind, inputs, device, offset=True, fixed=fixed))


@pytest.mark.parametrize("inputs", INPUTS)
def test_layers_of_one_tap(cuda_code, device, inputs):
    waveform = torch.randn(2, 401).to(device, torch.float16)
    check(cuda_code, waveform, make_layers("group", inputs, device, shape=SEW, fixed=False))


@pytest.fixture
def table(cuda_code, tmp_path, monkeypatch, device):
    """Writes a table of the last layer of ``RAGGED``, and says which tiles multiply."""
    from lowbit_kernels.conv1d import front_end_cuda

    path, launch, configs = tmp_path / "a-gpu.json", front_end_cuda.linear_triton, []

    def write(inputs, is_plain, **row):
        layer = {
            "N": 40, "K": 96, "bits": 4, "group_size": 64, "inputs": inputs and "int8",
            "is_plain": is_plain, "groups": 1, "rows": [{"up_to": 10**6, **row}],
        }  # fmt: skip
        path.write_text(json.dumps({"linear": [], "conv1d": [layer]}))

    def record(*args, **options):
        configs.append(args[5])
        return launch(*args, **options)

    monkeypatch.setattr(front_end_cuda, "linear_triton", record)
    monkeypatch.setattr(tuned, "table_path", lambda gpu_name: path)
    for cached in (tuned.load_table, choose_conv1d):
        cached.cache_clear()
    yield write, configs
    monkeypatch.undo()
    for cached in (tuned.load_table, choose_conv1d):
        cached.cache_clear()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_measured_tiles_serve(cuda_code, table, device, kind, inputs, splits):
    write, configs = table
    tiles = {"block_n": 32, "block_m": 16, "splits": splits}
    write(inputs, kind == "layer", backend="matmul", config=tiles)
    waveform = torch.randn(2, 401).to(device, torch.float16)
    check(cuda_code, waveform, make_layers(kind, inputs, device, fixed=False))
    assert configs[1] == LinearConfig(**tiles) != configs[0]


def test_the_librarys_product_serves_no_layer(cuda_code, table, device):
    write, configs = table
    write(None, False, backend="dequant_cublas", config=None)
    waveform = torch.randn(2, 401).to(device, torch.float16)
    check(cuda_code, waveform, make_layers("group", None, device, fixed=False))
    assert len(configs) == 2


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_activations(cuda_code, device, kind, activation):
    layers = make_layers(kind, None, device)
    layers = [replace(layer, activation=activation) for layer in layers]
    check(cuda_code, torch.randn(1, 401).to(device, torch.float16), layers)


@pytest.mark.parametrize(("taps", "stride"), [(16, 8), (5, 1), (7, 9)])
def test_other_windows(cuda_code, device, taps, stride):
    shape = [(24, taps, stride), (16, 2, 2)]
    waveform = torch.randn(1, 301).to(device, torch.float16)
    check(cuda_code, waveform, make_layers("group", None, device, shape=shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_a_padded_batch_equals_single_utterances(cuda_code, device, kind, inputs):
    layers, waveform = make_layers(kind, inputs, device), torch.randn(3, 301)
    lengths = torch.tensor([301, 230, 9], device=device)
    for b, length in enumerate(lengths.tolist()):
        # what lies in the padding must not matter; 9 samples give no frame
        waveform[b, length:] = torch.nan if b % 2 else 1e4
    waveform = waveform.to(device, torch.float16)
    y = check(cuda_code, waveform, layers, lengths)
    alone = cuda_code(waveform[1:2, :230], layers, None)
    assert torch.equal(y[1, : alone.shape[1]], alone[0])
    assert not y[1, alone.shape[1] :].any()
    assert not y[2].any()


def test_the_range_is_that_of_every_tile_of_features(cuda_code, device):
    layers = make_layers("none", "utterance", device, shape=[(16, 10, 5), (150, 3, 2), (24, 2, 2)])
    layers[1].bias[140:] += 9
    check(cuda_code, torch.randn(2, 201).to(device, torch.float16), layers)


@pytest.mark.parametrize("offset", [False, True])
def test_an_utterances_scale_is_that_of_its_own_frames(device, offset):
    from lowbit_kernels.conv1d.kernels import utterance_int8

    x = torch.randn(2, 20, 24, device=device, dtype=torch.float16)
    lengths, frames = torch.tensor([105, 52], device=device), [20, 9]
    x[1, 9:] = 1e4
    offset = torch.randn(24, device=device) if offset else None
    reach = utterance_int8.Reach(10, 5)
    part = utterance_int8.largest_triton(x[None], offset, lengths, 105, reach)
    q, scale = utterance_int8.quantize_utterances_triton(x, offset, part, 9)
    for b, T in enumerate(frames):
        alone = x[b, :T].float() if offset is None else x[b, :T].float() - offset
        wanted, wanted_scale = quantize_utterances(alone.T[None])
        assert torch.equal(q[b, :T].T[None], wanted)
        assert (scale.view(2, 9)[b] == wanted_scale).all()


@pytest.mark.parametrize("level", [0.0, 0.7, 1e4])
def test_silence_and_constants_are_finite(cuda_code, device, level):
    waveform = torch.full((1, 401), level, device=device, dtype=torch.float16)
    for inputs in INPUTS:
        assert cuda_code(waveform, make_layers("group", inputs, device), None).isfinite().all()


def test_a_drifting_waveform_keeps_its_variance(cuda_code, device):
    """Means of the windows that are far larger than what happens around them."""
    drift = torch.linspace(-50, 50, 1501) + torch.randn(1501) / 64
    check(cuda_code, drift[None].to(device, torch.float16), make_layers("group", None, device)[:1])


@pytest.mark.parametrize("inputs", INPUTS[:2])
def test_nan_reaches_the_features(cuda_code, device, inputs):
    waveform = torch.randn(2, 701)
    waveform[0, 300] = torch.nan
    y = cuda_code(waveform.to(device, torch.float16), make_layers("group", inputs, device), None)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_empty_batches_single_frames_and_strides(cuda_code, device):
    layers = make_layers("group", "utterance", device)
    assert cuda_code(torch.empty(0, 701, dtype=torch.float16, device=device), layers, None).shape \
        == (0, 34, 40)  # fmt: skip
    field = functools.reduce(lambda n, layer: (n - 1) * layer[2] + layer[1], RAGGED[::-1], 1)
    wide = torch.randn(2 * field, 2).to(device, torch.float16).T
    y = check(cuda_code, wide[:, ::2], layers)
    assert y.shape[1] == 1


def test_it_repeats_its_bits(cuda_code, device):
    layers = make_layers("group", "utterance", device)
    waveform = torch.randn(2, 201).to(device, torch.float16)
    assert torch.equal(cuda_code(waveform, layers, None), cuda_code(waveform, layers, None))


def test_what_it_serves():
    half, weight = torch.zeros(1, 400, dtype=torch.float16), torch.zeros(8, 1, 10)
    assert serves(half.float(), weight)
    assert not serves(half.double(), weight.double())
    with FakeTensorMode():
        wave = torch.empty(1, 400, device="cuda", dtype=torch.bfloat16)
        for dtype, taps, served in (
            (torch.bfloat16, 16, True),
            (torch.bfloat16, 17, False),
            (torch.float16, 10, False),
        ):
            assert serves(wave, torch.empty(8, 1, taps, device="cuda", dtype=dtype)) == served
        assert not serves(wave.float(), torch.empty(8, 1, 10, device="cuda"))


def call(waveform, layers, lengths=None):
    return front_end(waveform, lengths, flatten_layers(layers), describe_layers(layers))


BASE = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]
REAL = {
    "base": ("group", BASE),
    "large": ("layer", BASE),
    "sew": ("group", [(64, 10, 5), (128, 3, 2), (128, 1, 1), (256, 3, 2), (512, 1, 1)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case, inputs):
    kind, shape = REAL[case]
    layers = make_layers(kind, inputs, "cuda", torch.bfloat16, shape, offset=inputs is not None)
    waveform = torch.randn(2, 48000, device="cuda").bfloat16()
    check(call, waveform, layers, torch.tensor([48000, 31234], device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", INPUTS)
def test_graph_capture_replays(inputs):
    layers = make_layers("group", inputs, "cuda", torch.bfloat16, BASE)
    waveform = torch.randn(2, 16000, device="cuda").bfloat16()
    lengths = torch.tensor([16000, 9000], device="cuda")
    call(waveform, layers, lengths)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(waveform, layers, lengths)
    waveform.copy_(torch.randn_like(waveform))
    lengths.copy_(torch.tensor([7000, 16000]))
    graph.replay()
    assert torch.equal(captured, call(waveform, layers, lengths))


@pytest.mark.gpu
def test_registration_on_a_gpu():
    layers = make_layers("group", "utterance", "cuda")
    waveform = torch.randn(2, 701, device="cuda").half()
    args = (waveform, None, flatten_layers(layers), describe_layers(layers))
    torch.library.opcheck(torch.ops.lowbit.front_end.default, args)
    compiled = torch.compile(lambda x: call(x, layers), fullgraph=True)
    assert torch.equal(compiled(waveform), call(waveform, layers))
    with pytest.raises(NotImplementedError, match=r"fp16 and bf16 waveforms.*got torch.float32"):
        call(waveform.float(), layers)
