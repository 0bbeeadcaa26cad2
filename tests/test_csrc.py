"""The CUDA C++ kernel for few rows: its arithmetic in an emulator, its build, and on a GPU.

Dimension key: M rows, N output features, K input features.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import setup_cuda
from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul import csrc, linear_reference
from lowbit_kernels.matmul.csrc import (
    EPILOGUES,
    TILES,
    CsrcConfig,
    aligned_rows,
    choose_csrc_config,
    linear_csrc,
    serves_csrc,
)
from lowbit_kernels.testing import assert_as_accurate
from tests.csrc.emulation import build_emulator, emulate
from tests.linear_cases import check, make_inputs

ROOT = Path(__file__).parent.parent
SPECS = {"channel": QuantSpec(4, None)} | {f"g{g}": QuantSpec(4, g) for g in (32, 64, 128, 256)}
SHAPES = {"whole": (128, 1024), "ragged": (70, 701), "one block": (9, 40)}  # N, K
ROWS = (1, 7, 16, 33, 64)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
shapes = pytest.mark.parametrize(("N", "K"), SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    library = build_emulator(tmp_path_factory.mktemp("emulator"))
    if library is None:
        pytest.skip("needs a C++ compiler")
    return library


def tiles(M):
    """Every tile for M rows."""
    block_m = next(rows for rows in TILES if rows >= M)
    return [CsrcConfig(block_m, warps_n) for warps_n in TILES[block_m]]


@dtypes
@shapes
@specs
@pytest.mark.parametrize("M", ROWS)
def test_kernel_is_as_accurate_as_torch(emulator, M, spec, N, K, dtype):
    inputs = make_inputs(M, N, K, spec, dtype, "cpu")
    for tile, epilogue in zip(tiles(M), ("gelu", None), strict=True):
        check(emulate(emulator, *inputs, epilogue, tile), *inputs, epilogue)


@dtypes
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_epilogue_is_as_accurate_as_torch(emulator, epilogue, dtype):
    inputs = make_inputs(5, 50, 130, SPECS["g64"], dtype, "cpu")
    for splits in (1, 2):
        check(emulate(emulator, *inputs, epilogue, CsrcConfig(8, 4, splits)), *inputs, epilogue)


@pytest.mark.parametrize("M", ROWS)
def test_split_sums_are_as_accurate_as_torch(emulator, M):
    inputs = make_inputs(M, 20, 2100, SPECS["g32"], torch.float16, "cpu")
    for tile in tiles(M):
        for splits in (2, 3, 7):
            config = CsrcConfig(tile.block_m, tile.warps_n, splits)
            check(emulate(emulator, *inputs, "silu", config), *inputs, "silu")


@pytest.mark.parametrize("M", ROWS)
def test_results_have_the_same_bits_whatever_the_order_of_threads_and_copies(emulator, M):
    inputs = make_inputs(M, 40, 1300, SPECS["g64"], torch.float16, "cpu")
    for tile in tiles(M):
        config = CsrcConfig(tile.block_m, tile.warps_n, 2)
        y = emulate(emulator, *inputs, "gelu", config)
        assert torch.equal(emulate(emulator, *inputs, "gelu", config), y)
        assert torch.equal(emulate(emulator, *inputs, "gelu", config, eager=True), y)


@dtypes
def test_every_code_and_group_scale_decodes_exactly(emulator, dtype):
    """x picks single weights, and sums of one product each round once, on the way out."""
    spec, K = QuantSpec(4, 32), 16 * 32
    weight = quantize_weight(torch.randn(16, K), spec)
    # row n, group g: all codes, twice, with group scale g + 1
    weight.qweight.copy_((torch.arange(16 * K // 2) % 256).view(16, -1))
    weight.group_scale.copy_(torch.arange(1, 17).expand(16, -1))
    weight.scale.fill_(1)
    integers = weight.integers().to(dtype)
    for start in range(0, K, 64):
        x = torch.eye(64, K, dtype=dtype).roll(start, 1)
        y = emulate(emulator, x, weight, None, None, None, CsrcConfig(64, 2))
        assert torch.equal(y, integers[:, start : start + 64].T)


def test_codes_past_the_end_and_memory_around_x_never_reach_the_output(emulator):
    x, weight, bias, residual = make_inputs(9, 40, 100, SPECS["g64"], torch.float16, "cpu")
    weight.qweight[:, -14:] = 0xFF
    surroundings = torch.full((20, 112), torch.nan, dtype=torch.float16)
    surroundings[4:13, :100] = x
    for tile in tiles(9):
        y = emulate(emulator, surroundings[4:13, :100], weight, bias, residual, "relu", tile)
        check(y, x, weight, bias, residual, "relu")


def test_strided_rows_and_residual(emulator):
    x, weight, bias, residual = make_inputs(5, 24, 96, SPECS["g64"], torch.float16, "cpu")
    wide_x, wide_residual = torch.randn(5, 136).half(), torch.randn(5, 31).half()
    wide_x[:, 8:104], wide_residual[:, 3:27] = x, residual
    y = emulate(
        emulator, wide_x[:, 8:104], weight, bias, wide_residual[:, 3:27], None, CsrcConfig(8, 4)
    )
    check(y, x, weight, bias, residual, None)


def test_rows_are_copied_only_where_they_are_not_aligned():
    x = torch.randn(2, 3, 72).half()
    assert aligned_rows(x).data_ptr() == x.data_ptr()
    assert aligned_rows(x[:, :, 8:64]).data_ptr() == x.data_ptr() + 16
    odd = torch.randn(2, 3, 37).half()
    copied = aligned_rows(odd)
    assert copied.stride(0) == 40
    assert torch.equal(copied[:, :37], odd.view(6, 37))
    assert not copied[:, 37:].any()
    shifted = x[:, :, 1:65]
    assert aligned_rows(shifted).data_ptr() % 16 == 0
    assert torch.equal(aligned_rows(shifted), shifted.reshape(6, 64))


@pytest.mark.parametrize("M", range(1, 65))
def test_config_covers_the_shape(M):
    for N, K in [(1, 1), (1024, 1024), (4096, 1024), (1024, 4096), (8192, 8192), (128, 65536)]:
        config = choose_csrc_config(M, N, K, num_sms=132)
        assert M <= config.block_m <= max(2 * M, 8)
        assert config.warps_n in TILES[config.block_m]
        tiles = -(-N // config.block_n)
        assert config.splits == 1 or config.splits * tiles <= 2 * 132
        # small enough a sum needs no second kernel
        assert config.splits == 1 or K >= 8192 or N == 1024


def test_what_is_served():
    spec = QuantSpec(4)
    assert serves_csrc(64, spec, torch.bfloat16, "gelu")
    assert not serves_csrc(65, spec, torch.bfloat16, "gelu")
    assert not serves_csrc(1, spec, torch.float32, None)
    assert not serves_csrc(1, spec, torch.float16, "glu")
    for other in (
        QuantSpec(8),
        QuantSpec(2),
        QuantSpec(4, symmetric=False),
        QuantSpec(4, inputs="int8"),
        QuantSpec(4, deterministic=True),
    ):
        assert not serves_csrc(1, other, torch.float16, None)


def test_what_is_not_served_is_refused():
    x, weight, bias, _ = make_inputs(3, 8, 64, SPECS["g64"], torch.float16, "cpu")
    with pytest.raises(NotImplementedError, match=r"at most 64 rows.*got 3 rows.*'glu'"):
        linear_csrc(x[None], weight, bias, None, "glu", CsrcConfig(8, 1))


def test_no_rows_need_no_library():
    x, weight, bias, _ = make_inputs(0, 8, 64, SPECS["g64"], torch.float16, "cpu")
    y, z = linear_csrc(x[None], weight, bias, None, None, CsrcConfig(8, 1))
    assert y.shape == (0, 8)
    assert z is None


def test_a_library_that_does_not_load_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(csrc, "LIBRARY", tmp_path / "_csrc.so")
    assert not csrc.is_available.__wrapped__()
    csrc.LIBRARY.write_bytes(b"not a library")
    with pytest.warns(UserWarning, match=r"cannot load .*_csrc\.so, build it again"):
        assert not csrc.is_available.__wrapped__()


def test_without_nvcc_the_build_says_so_in_one_line(tmp_path):
    script = (
        "import sys, setup_cuda; setup_cuda.find_nvcc = lambda: None;"
        "sys.exit(setup_cuda.main(['--output', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.fullmatch(r"setup_cuda.py: no nvcc found in .*\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_nvcc_is_looked_for_in_cuda_home_first(tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_cuda.find_nvcc() == str(nvcc)


@pytest.mark.slow
def test_the_library_builds_loads_without_a_gpu_and_spills_nothing(tmp_path):
    if setup_cuda.find_nvcc() is None:
        pytest.skip("needs nvcc")
    arguments = ["--arch", "80", "90a", "--output", str(tmp_path)]
    subprocess.run([sys.executable, ROOT / "setup_cuda.py", *arguments], check=True)
    library = tmp_path / setup_cuda.LIBRARY
    assert library.name == csrc.LIBRARY.name
    # in a process of its own: a library that setup_cuda.py left in the package defines the same op
    script = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]);"
        "print(torch.ops.lowbit.linear_small_m.default._schema)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script, library], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == (
        "lowbit::linear_small_m(Tensor x, Tensor qweight, Tensor scale, Tensor? group_scale, "
        "Tensor? bias, Tensor? residual, int group_size, int epilogue, int block_m, int warps_n, "
        "bool static_weight, Tensor(a!) y, Tensor(b!)? parts) -> ()"
    )
    usage = resource_usage(library)
    # two dtypes, short and long groups; the kernel that adds parts of a sum
    kernels = 2 * (2 * sum(map(len, TILES.values())) + 1)
    assert {target: len(found) for target, found in usage.items()} == {
        "sm_80": kernels,
        "sm_90a": kernels,
    }
    for target, found in usage.items():
        for name, used in found.items():
            assert used["STACK"] == used["LOCAL"] == 0, f"{target} spills in {name}: {used}"


def resource_usage(library):
    """{target: {kernel: {"REG": ..., "STACK": ..., "LOCAL": ...}}} of a library."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton else ROOT
    folders = [str(Path(setup_cuda.find_nvcc()).parent), str(bundled), os.environ["PATH"]]
    tool = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if tool is None:
        pytest.skip("needs cuobjdump")
    text = subprocess.run(
        [tool, "-res-usage", library], capture_output=True, text=True, check=True
    ).stdout
    usage = {}
    for line in text.splitlines():
        if arch := re.match(r"arch = (\w+)", line):
            target = arch[1]
        elif function := re.match(r"\s*Function (\S+):", line):
            name = function[1]
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            usage.setdefault(target, {})[name] = numbers
    return usage


@pytest.fixture
def built():
    """The library in the package, as users have it."""
    if not csrc.is_available():
        pytest.skip("needs the library that setup_cuda.py builds")


GPU_SHAPES = [(768, 3072), (1024, 1024), (4096, 1024), (1024, 4096), (8192, 8192), (196, 324)]


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize(("N", "K"), GPU_SHAPES)
@pytest.mark.parametrize("M", [1, 8, 16, 17, 50, 64])
def test_kernel_is_as_accurate_as_torch_on_a_gpu(built, M, N, K, dtype):
    inputs = make_inputs(M, N, K, SPECS["g64"], dtype, "cuda")
    for warps_n in TILES[tiles(M)[0].block_m]:
        for splits in (1, 2, 4):
            config = CsrcConfig(tiles(M)[0].block_m, warps_n, splits)
            y, _ = linear_csrc(inputs[0][None], *inputs[1:], "gelu", config)
            check(y, *inputs, "gelu")
            again, _ = linear_csrc(inputs[0][None], *inputs[1:], "gelu", config, static_weight=True)
            assert torch.equal(y, again)


@pytest.mark.gpu
@specs
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_kernel_agrees_with_triton_on_a_gpu(built, spec, epilogue):
    from lowbit_kernels.matmul.dispatch import LinearConfig
    from lowbit_kernels.matmul.kernel import linear_triton

    x, *rest = make_inputs(7, 130, 701, spec, torch.float16, "cuda")
    config = choose_csrc_config(7, 130, 701, 132)
    y, _ = linear_csrc(x[None], *rest, epilogue, config)
    triton, _ = linear_triton(x[None], *rest, epilogue, LinearConfig(64, 16))
    weight, bias, residual = rest
    exact = linear_reference(x.double(), weight, bias.double(), residual.double(), epilogue)
    assert_as_accurate(y, triton, exact)


@pytest.mark.gpu
def test_captured_graph_equals_eager(built):
    inputs = make_inputs(5, 1024, 4096, SPECS["g64"], torch.bfloat16, "cuda")
    x, rest = inputs[0][None], inputs[1:]
    config = CsrcConfig(8, 1, splits=4)
    graph = torch.cuda.CUDAGraph()
    linear_csrc(x, *rest, "silu", config)
    with torch.cuda.graph(graph):
        first, _ = linear_csrc(x, *rest, "silu", config, static_weight=True)
        second, _ = linear_csrc(x, *rest, "silu", config, static_weight=True)
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected, _ = linear_csrc(x, *rest, "silu", config)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
