"""The linear layer's kernel whose programs stay: the bits of the other kernel, or that kernel.

Dimension key: B utterances, T frames, M rows, N output features, K input features.
"""

from dataclasses import replace

import pytest
import torch

from lowbit_kernels.formats import QuantSpec
from lowbit_kernels.matmul import gpu, kernel, persistent_kernel
from lowbit_kernels.matmul.dispatch import Gpu, LinearConfig, candidates
from lowbit_kernels.matmul.kernel import linear_triton
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.quantize_kernel import quantize_rows_triton
from tests.linear_cases import SPECS, make_inputs, specs

# on a GPU wgmma needs 64 rows of the weight
CONFIG = LinearConfig(64, 32, persistent=True)
HOPPER = Gpu("H200", (9, 0), 132, 232448)


@pytest.fixture
def launches(monkeypatch):
    """The grids of the persistent kernel's launches."""
    grids, launch = [], kernel.launch_persistent

    def counted(grid, args, constants):
        grids.append(grid)
        launch(grid, args, constants)

    monkeypatch.setattr(kernel, "launch_persistent", counted)
    return grids


@pytest.fixture(autouse=True)
def device_with_descriptors(device):
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("served on capability 9.x")


@specs
@pytest.mark.parametrize("epilogue", [None, "gelu", "glu"])
@pytest.mark.parametrize(("M", "K"), [(96, 512), (71, 264)], ids=["whole", "ragged"])
def test_bits_are_those_of_the_other_kernel(M, K, epilogue, spec, device, launches):
    x, weight, bias, residual = make_inputs(M, 150, K, spec, torch.float16, device, epilogue)
    found, expected = (
        linear_triton(x[None], weight, bias, residual, epilogue, config, want_preactivation=True)
        for config in (CONFIG, replace(CONFIG, persistent=False))
    )
    assert len(launches) == 1
    for actual, other in zip(found, expected, strict=True):
        assert torch.equal(actual, other)


def test_programs_do_several_tiles(device, launches, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(gpu, "INTERPRETED_SMS", 1)
        kernel._plan.cache_clear()
    args = make_inputs(150, 200, 128, SPECS["w4g64"], torch.float16, device)
    y, _ = linear_triton(args[0][None], *args[1:], "gelu", CONFIG)
    other, _ = linear_triton(args[0][None], *args[1:], "gelu", replace(CONFIG, persistent=False))
    assert torch.equal(y, other)
    assert device == "cuda" or launches == [(1, 1, 1)]
    kernel._plan.cache_clear()


def test_int8_inputs(device, launches):
    spec = QuantSpec(4, inputs="int8")
    x, weight, bias, residual = make_inputs(40, 70, 320, spec, torch.float16, device)
    q, scale = quantize_rows_triton(x[None], None)
    found, expected = (
        linear_triton(q, weight, bias, residual, "gelu", config, x_scale=scale, dtype=x.dtype)[0]
        for config in (CONFIG, replace(CONFIG, persistent=False))
    )
    assert torch.equal(found, expected)
    assert len(launches) == 1


def of_batch(x):
    return x[:64].reshape(2, 32, 128)


def of_one_frame(x):
    return x[:64].view(2, 32, 128)[:, :1]


def with_gaps(x):
    return x[:64].reshape(32, 256)[None, :, :128]


@pytest.mark.parametrize("view", [of_batch, of_one_frame, with_gaps])
def test_views_that_are_matrices(view, device, launches):
    x, weight, bias, _ = make_inputs(70, 70, 128, SPECS["w4g64"], torch.float16, device)
    rows = view(x)
    y, _ = linear_triton(rows, weight, bias, None, None, CONFIG)
    other, _ = linear_triton(
        rows.contiguous(), weight, bias, None, None, replace(CONFIG, persistent=False)
    )
    assert torch.equal(y, other)
    assert len(launches) == 1


def misaligned(x):
    return x.flatten()[1 : 1 + 8 * 128].view(1, 8, 128)


def odd_stride(x):
    return x.flatten()[: 8 * 129].view(1, 8, 129)[..., :128]


def overlapping(x):
    return x.as_strided((1, 10, 128), (2048, 64, 1))


def of_utterances_apart(x):
    return x[:64].view(4, 16, 128)[::2, :10]


@pytest.mark.parametrize("view", [misaligned, odd_stride, overlapping, of_utterances_apart])
def test_other_views_take_the_other_kernel(view, device, launches):
    x, weight, bias, _ = make_inputs(70, 70, 128, SPECS["w4g64"], torch.float16, device)
    rows = view(x)
    y, _ = linear_triton(rows, weight, bias, None, None, CONFIG)
    other, _ = linear_triton(
        rows.contiguous(), weight, bias, None, None, replace(CONFIG, persistent=False)
    )
    assert torch.equal(y, other)
    assert launches == []


def test_a_row_count_of_zero(device):
    x, weight, bias, residual = make_inputs(0, 70, 128, SPECS["w4g64"], torch.float16, device)
    y, _ = linear_triton(x[None], weight, bias, residual, None, CONFIG)
    assert y.shape == (0, 70)


def test_descriptors_of_other_blocks_take_other_code(monkeypatch):
    class Kernel:
        arg_names = ("x_desc",)
        compiled = 0

        def __getitem__(self, grid):
            def compile_and_launch(*args, **constants):
                self.compiled += 1
                return {(1, 1, 1): lambda *args: None}

            return compile_and_launch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    recorder, constants = Kernel(), Constants({})
    launch = Launcher(recorder)
    x = torch.zeros(1, 64, 128, dtype=torch.float16)
    for rows in (x, x.float(), x[:, :32], torch.zeros_like(x)):
        launch((1, 1), (persistent_kernel.describe_rows(rows, 32, 64),), constants)
    assert recorder.compiled == 2  # the dtype; not the address, not the number of rows
    launch((1, 1), (persistent_kernel.describe_rows(x, 64, 64),), constants)
    assert recorder.compiled == 3


def test_it_is_measured_where_programs_have_several_tiles():
    def persistent(M, gpu=HOPPER, K=1024):
        return [c for c in candidates(M, 4096, K, 4, 2, gpu) if c.persistent]

    assert persistent(16000)
    assert all(c.splits == 1 for c in persistent(16000))
    assert not persistent(64)
    assert not persistent(64, K=64)  # no sum is split, and still each program has one tile
    assert not persistent(16000, replace(HOPPER, capability=(8, 0)))
    assert not persistent(16000, replace(HOPPER, capability=(10, 0)))
    assert not persistent(16000, replace(HOPPER, is_hip=True))
