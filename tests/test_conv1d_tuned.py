"""Measured tables of convolutions: what dispatch takes from them, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch

from lowbit_kernels.conv1d import Geometry, conv1d_reference
from lowbit_kernels.conv1d.dispatch import DETERMINISTIC_FRAMES, choose_conv1d
from lowbit_kernels.formats import QuantSpec
from lowbit_kernels.matmul import tuned
from lowbit_kernels.matmul.dispatch import (
    Choice,
    Gpu,
    LinearConfig,
    choose_config,
    choose_linear,
)
from lowbit_kernels.matmul.tuned import Layer
from lowbit_kernels.testing import assert_as_accurate
from tests.conv1d_cases import FLOAT, INT8, make_inputs

H200 = Gpu("NVIDIA H200", (9, 0), 132, 232_448)
# tiles that no default has
TILES = {"block_n": 32, "block_m": 16, "splits": 1}
MEASURED = Choice("matmul", LinearConfig(**TILES))
DEQUANTIZED = Choice("dequant_cublas")
DENSE, GROUPED = Geometry(3, 2), Geometry(3, groups=2)
FIXED = QuantSpec(bits=4, deterministic=True)
N, K = 64, 96


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a GPU's table, of rows of each layer."""
    caches = (tuned.load_table, choose_linear, choose_conv1d)

    def write(*layers, gpu=H200, kinds=("linear", "conv1d")):
        lists = {kind: [] for kind in kinds}
        for layer, rows in layers:
            lists[layer.kind].append(layer._asdict() | {"rows": rows})
        path = tuned.table_path(gpu.name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(lists))
        for cached in caches:
            cached.cache_clear()

    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    yield write
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def layer_of(spec=FLOAT, groups=1, kind="conv1d", is_plain=False):
    return Layer(kind, N, K, spec.bits, spec.group, spec.inputs, is_plain, groups)


def row(choice=MEASURED, up_to=512):
    return {"up_to": up_to, "backend": choice.backend, "config": choice.config and TILES}


def choose(M=100, geometry=DENSE, spec=FLOAT, dtype=torch.bfloat16, is_plain=False, **options):
    return choose_conv1d(M, N, K, geometry, False, spec, dtype, H200, is_plain, **options)


def linear(M=100, is_plain=False):
    return choose_linear(M, N, K, 4, 64, None, torch.bfloat16, is_plain, False, H200)


def default(M=100, itemsize=2, groups=1):
    return Choice("matmul", choose_config(M, N, K, 4, itemsize, H200, groups))


def test_a_measured_convolution_is_served_as_measured(table):
    table((layer_of(), [row(), row(DEQUANTIZED, 1024)]))
    assert choose(100) == choose(512) == choose(100, Geometry(3)) == MEASURED
    assert choose(513) == DEQUANTIZED
    # other layers, and more rows than were measured
    assert choose(1025) == default(1025)
    assert choose(is_plain=True) == default()
    assert choose(spec=INT8) == default(itemsize=1)
    assert choose(geometry=GROUPED) == default(groups=2)
    assert linear().config == default().config


def test_a_linear_layer_of_the_same_numbers_is_another(table):
    fused = {"up_to": 512, "backend": "fused", "config": TILES}
    table((layer_of(kind="linear"), [fused]))
    assert linear() == Choice("fused", MEASURED.config)
    assert choose() == default()


def test_groups_are_told_apart(table):
    table((layer_of(groups=2), [row()]), (layer_of(), [row(DEQUANTIZED)]))
    assert choose(geometry=GROUPED) == MEASURED
    assert choose() == DEQUANTIZED
    assert choose(geometry=replace(GROUPED, groups=4)) == default(groups=4)


def test_products_of_a_library_serve_only_what_they_can(table):
    layers = [layer_of(spec, groups) for spec in (FLOAT, INT8) for groups in (1, 2)]
    table(*[(layer, [row(DEQUANTIZED, 10**7)]) for layer in layers])
    assert choose() == DEQUANTIZED
    assert choose(only_matmul=True) == default()
    assert choose(spec=FIXED) == default(DETERMINISTIC_FRAMES)
    assert choose(spec=INT8) == default(itemsize=1)
    assert choose(geometry=GROUPED) == default(groups=2)
    assert choose(geometry=Geometry(3, dilation=2)) == default()


def test_fp32_is_torchs_own_product(table):
    table((layer_of(), [row()]), (layer_of(INT8), [row()]))
    assert choose(dtype=torch.float32) == Choice("dequant_cudnn")
    assert choose(dtype=torch.float32, spec=INT8) == MEASURED


def test_a_depthwise_convolution_has_its_own_kernel(table):
    layer = Layer("conv1d", 1, 31, 4, 64, None, False, N)
    table((layer, [row(up_to=10**7)]))
    geometry = Geometry(31, left=15, right=15, groups=N)
    arguments = (geometry, True, FLOAT, torch.bfloat16, H200, False)
    assert choose_conv1d(100, 1, 31, *arguments) == Choice("depthwise")


@pytest.mark.parametrize("only_matmul", [False, True])
def test_a_deterministic_choice_does_not_follow_the_rows(table, only_matmul):
    rows = [row(DEQUANTIZED), row(up_to=DETERMINISTIC_FRAMES)]
    table((layer_of(), rows))
    for M in (1, 512, DETERMINISTIC_FRAMES + 1, 10**6):
        assert choose(M, spec=FIXED, only_matmul=only_matmul) == MEASURED
    # sums that are split grow with the frames
    rows[1]["config"] = TILES | {"splits": 2}
    table((layer_of(), rows))
    assert choose(spec=FIXED, only_matmul=only_matmul) == default(DETERMINISTIC_FRAMES)
    assert choose(4000).config.splits == 2


def test_a_table_without_convolutions_serves(table):
    fused = {"up_to": 512, "backend": "fused", "config": TILES}
    table((layer_of(kind="linear")._replace(groups=1), [fused]), kinds=("linear",))
    assert choose() == default()
    assert linear() == Choice("fused", MEASURED.config)
    table(kinds=("conv1d",))
    with pytest.raises(ValueError, match=r"nvidia-h200\.json is not a table of tuned layers"):
        choose()


@pytest.fixture
def cuda_code(monkeypatch, device):
    """The CUDA implementation, and the tiles that it multiplies with."""
    from lowbit_kernels.conv1d import cuda

    if device == "cpu":
        monkeypatch.setattr(cuda, "gpu_of", lambda device: Gpu("a GPU", (8, 0), 4, 99 << 10))
    launch, configs = cuda.linear_triton, []

    def record(x, weight, bias, residual, epilogue, config, **options):
        configs.append(config)
        return launch(x, weight, bias, residual, epilogue, config, **options)

    monkeypatch.setattr(cuda, "linear_triton", record)
    return cuda, configs


@pytest.mark.parametrize("case", ["front-end", "grouped"])
@pytest.mark.parametrize("spec", [FLOAT, INT8, FIXED], ids=str)
def test_the_forward_pass_takes_measured_tiles(case, spec, cuda_code, table, device):
    cuda, configs = cuda_code
    x, weight, bias, _, lengths, geometry = make_inputs(case, spec, torch.float16, device)
    groups = geometry.groups
    layer = Layer("conv1d", weight.N // groups, weight.K, 4, 64, spec.inputs, False, groups)
    table((layer, [row(up_to=10**7)]), gpu=cuda.gpu_of(x.device))
    y, _ = cuda.conv1d_cuda(x, weight, bias, None, lengths, geometry, "gelu")
    assert configs == [MEASURED.config]
    low, high = (
        conv1d_reference(x.to(wide), weight, bias.to(wide), geometry, "gelu", lengths=lengths)
        for wide in (torch.float16, torch.float64)
    )
    assert_as_accurate(y, low, high)


def test_the_backward_pass_reads_no_table(cuda_code, table, device, monkeypatch):
    cuda, configs = cuda_code
    x, weight, bias, _, lengths, geometry = make_inputs("front-end", FLOAT, torch.float16, device)
    layers = [Layer("conv1d", weight.N, weight.K, 4, 64, None, plain) for plain in (False, True)]
    table(*[(layer, [row(DEQUANTIZED)]) for layer in layers], gpu=cuda.gpu_of(x.device))
    y, z = cuda.conv1d_cuda(
        x, weight, bias, None, lengths, geometry, "gelu", want_preactivation=True
    )
    assert configs == []
    monkeypatch.setattr(cuda, "_dequantized_dx", lambda *_: pytest.fail("by the table"))
    dx, _ = cuda.conv1d_backward_cuda(
        y, z, weight, lengths, geometry, "gelu", *x.shape[1:], True, True
    )
    assert dx.shape == x.shape
