"""The CPU kernels against the references, on every path that a machine may take."""

import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.conv1d.reference import conv1d_reference
from lowbit_kernels.cpu import conv1d_cpu, cpu_backend, library, linear_cpu, portable, resident
from lowbit_kernels.cpu.resident import resident_bytes, resident_int8
from lowbit_kernels.formats import (
    QuantizedWeight,
    QuantSpec,
    quantize_depthwise_weight,
    quantize_weight,
)
from lowbit_kernels.matmul.reference import linear_reference
from lowbit_kernels.testing import assert_as_accurate

EPILOGUES = (None, "gelu", "gelu_tanh", "silu", "relu", "glu")
SPECS = [
    QuantSpec(bits=8),
    QuantSpec(bits=4),
    QuantSpec(bits=4, group_size=32),
    QuantSpec(bits=4, symmetric=False),
    QuantSpec(bits=2),
    QuantSpec(bits=2, symmetric=False),
    QuantSpec(bits=1),
    QuantSpec(bits=8, group_size="tensor", inputs="int8"),
    QuantSpec(bits=4, inputs="int8"),
    QuantSpec(bits=2, inputs="int8"),
    QuantSpec(bits=1, inputs="int8"),
]
# M, K, N: one row; few rows, whose weights are decoded in registers; ragged everywhere; whole
# tiles; several panels of output channels
SHAPES = [(1, 64, 48), (3, 99, 70), (8, 300, 38), (13, 99, 70), (16, 128, 96), (37, 200, 130)]


@pytest.fixture(params=["native", "onednn", "float"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of computing: our kernels, oneDNN, and where oneDNN's int8 would saturate."""
    if request.param == "native":
        if library.native() is None:
            pytest.skip(cpu_backend())
    else:
        monkeypatch.setattr(library, "native", lambda: None)
        monkeypatch.setattr(library, "native_int8", lambda: None)
    if request.param == "float":
        monkeypatch.setattr(portable, "has_exact_onednn", lambda: False)
    elif request.param == "onednn" and not portable.has_exact_onednn():
        pytest.skip("this processor has no VNNI")
    return str(request.param)


def make_weight(N: int, K: int, spec: QuantSpec) -> QuantizedWeight:
    return quantize_weight(torch.randn(N, K) / K**0.5, spec)


def integer_weight(levels: Tensor, **spec: object) -> QuantizedWeight:
    """An 8-bit weight of these levels [N, K] and scale 1."""
    weight = quantize_weight(levels.float(), QuantSpec(bits=8, inputs="int8"))
    weight.scale.fill_(1)
    weight.qweight[:, : levels.shape[1]] = levels.to(torch.int8).view(torch.uint8)
    return weight


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_as_accurate_as_pytorch(path: str, spec: QuantSpec, shape: tuple[int, ...]):
    M, K, N = shape
    weight, bias = make_weight(N, K, spec), torch.randn(N)
    # a slice of something wider: no stride is the natural one
    x = torch.randn(M, K + 3)[:, 1:-2]
    for epilogue in EPILOGUES:
        residual = torch.randn(M, N // 2 if epilogue == "glu" else N)
        y = linear_cpu(x, weight, bias, residual, epilogue)
        low = linear_reference(x, weight, bias, residual, epilogue)
        high = linear_reference(x.double(), weight, bias.double(), residual.double(), epilogue)
        assert_as_accurate(y, low, high, str(epilogue))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [None, "int8"])
def test_linear_in_16_bits(path: str, dtype: torch.dtype, inputs: str | None):
    weight = make_weight(70, 99, QuantSpec(inputs=inputs))
    x, bias = torch.randn(2, 7, 99).to(dtype), torch.randn(70).to(dtype)
    residual = torch.randn(2, 7, 70).to(dtype)
    y = linear_cpu(x, weight, bias, residual, "gelu")
    x, residual = x.flatten(0, 1), residual.flatten(0, 1)
    low = linear_reference(x, weight, bias, residual, "gelu")
    high = linear_reference(x.double(), weight, bias.double(), residual.double(), "gelu")
    assert_as_accurate(y.flatten(0, 1), low, high)


@pytest.mark.parametrize("inputs", [None, "int8"])
def test_linear_without_rows(path: str, inputs: str | None):
    weight = make_weight(6, 64, QuantSpec(inputs=inputs))
    assert linear_cpu(torch.empty(3, 0, 64), weight).shape == (3, 0, 6)
    assert linear_cpu(torch.empty(0, 64), weight, epilogue="glu").shape == (0, 3)


def test_integer_sums_are_exact(path: str):
    # the largest products there are, and sums far beyond 16 bits and beyond fp32's integers
    K = 3000
    levels = torch.randint(-127, 128, (50, K))
    levels[0], levels[1] = -127, 127
    x = torch.randint(-127, 128, (9, K)).float()
    x[0], x[1], x[2] = 127, -127, 0
    y = linear_cpu(x, integer_weight(levels), x_scale_rows=torch.ones(9))
    assert torch.equal(y, (x.double() @ levels.double().t()).float())


def test_integers_are_level_times_group_scale(path: str):
    weight = make_weight(50, 130, QuantSpec(bits=4, inputs="int8"))
    weight.scale.fill_(1)
    x = torch.randint(-127, 128, (5, 130)).float()
    y = linear_cpu(x, weight, x_scale_rows=torch.ones(5))
    assert torch.equal(y, (x.double() @ weight.integers().double().t()).float())


def test_a_row_does_not_see_the_others(path: str):
    weight = make_weight(70, 99, QuantSpec(inputs="int8"))
    x = torch.randn(5, 99)
    together = linear_cpu(x * torch.tensor([1.0, 1e-3, 1e3, 0.0, 1.0])[:, None], weight)
    assert torch.equal(together[0], linear_cpu(x[:1], weight)[0])
    assert torch.equal(together[3], torch.zeros(70))


@pytest.mark.parametrize("inputs", [None, "int8"])
def test_nan_stays_in_its_row(path: str, inputs: str | None):
    weight, x = make_weight(70, 99, QuantSpec(inputs=inputs)), torch.randn(3, 99)
    x[1, 5] = torch.nan
    y = linear_cpu(x, weight, epilogue="gelu")
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_other_inputs_are_refused():
    weight = make_weight(6, 64, QuantSpec(inputs="int4"))
    with pytest.raises(NotImplementedError, match="int4"):
        linear_cpu(torch.randn(2, 64), weight)
    with pytest.raises(NotImplementedError, match="int4"):
        conv1d_cpu(torch.randn(1, 5, 64), weight)


# T, C, N, geometry: strided; dilated; grouped with padding; grouped, strided, uneven padding
CONVS = [
    (50, 32, 70, Geometry(3, stride=2)),
    (50, 32, 48, Geometry(5, left=2, right=2, dilation=2)),
    (40, 96, 96, Geometry(7, left=3, right=3, groups=4)),
    (33, 40, 40, Geometry(5, stride=2, left=2, right=1, dilation=2, groups=2)),
    (1, 33, 6, Geometry(1)),
    (60, 40, 40, Geometry(5, left=2, right=2, groups=40)),
    (61, 20, 20, Geometry(5, stride=2, left=4, dilation=2, groups=20)),
    (9, 17, 17, Geometry(31, left=15, right=15, groups=17)),
]


def conv_weight(C: int, N: int, geometry: Geometry, spec: QuantSpec) -> QuantizedWeight:
    taps, inner = geometry.kernel_size, C // geometry.groups
    if geometry.groups == C:
        return quantize_depthwise_weight(torch.randn(N, taps) / taps**0.5, spec)
    return make_weight(N, taps * inner, spec)


def run_conv(
    x: Tensor, weight: QuantizedWeight, geometry: Geometry, *rest: object, **more: object
) -> Tensor:
    """conv1d_cpu with the reference's layout, [B, C, T]."""
    bias, residual, epilogue, lengths = rest
    y = conv1d_cpu(
        x.transpose(1, 2),
        weight,
        bias,
        None if residual is None else residual.transpose(1, 2),
        epilogue,
        stride=geometry.stride,
        padding=(geometry.left, geometry.right),
        dilation=geometry.dilation,
        groups=geometry.groups,
        lengths=lengths,
    )
    return y.transpose(1, 2)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.symmetric], ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv1d_is_as_accurate_as_pytorch(path: str, spec: QuantSpec, conv: tuple):
    T, C, N, geometry = conv
    weight, bias = conv_weight(C, N, geometry, spec), torch.randn(N)
    x, lengths = torch.randn(3, C, T), torch.tensor([T, T // 2, 0])
    for epilogue in (None, "gelu") if N % 2 else (None, "gelu", "glu"):
        width = N // 2 if epilogue == "glu" else N
        residual = torch.randn(3, width, geometry.frames_out(T))
        y = run_conv(x, weight, geometry, bias, residual, epilogue, lengths)
        low = conv1d_reference(x, weight, bias, geometry, epilogue, residual, lengths)
        high = conv1d_reference(
            x.double(), weight, bias.double(), geometry, epilogue, residual.double(), lengths
        )
        assert_as_accurate(y, low, high, str(epilogue))


@pytest.mark.parametrize("inputs", [None, "int8"])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv1d_of_a_padded_batch_equals_single_utterances(
    path: str, inputs: str | None, conv: tuple
):
    T, C, N, geometry = conv
    weight = conv_weight(C, N, geometry, QuantSpec(inputs=inputs, group_size=None))
    x = torch.randn(2, C, T)
    valid = T - T // 3
    if geometry.frames_out(valid) < 1:
        pytest.skip("too short to be cut")
    # what lies in the padding must not matter, whatever it is
    x[1, :, valid:] = torch.nan
    together = run_conv(x, weight, geometry, None, None, None, torch.tensor([T, valid]))
    alone = run_conv(x[1:, :, :valid], weight, geometry, None, None, None, None)
    together = together[1:, :, : alone.shape[2]]
    if path == "native" or inputs == "int8":
        assert torch.equal(together, alone)
    else:  # PyTorch's own products round differently with another number of rows
        high = conv1d_reference(x[1:, :, :valid].double(), weight, None, geometry)
        assert_as_accurate(together, alone, high)


def test_conv1d_static_scale(path: str):
    geometry = Geometry(3, stride=2)
    weight = conv_weight(32, 70, geometry, QuantSpec(inputs="int8", input_scale="static"))
    # small enough to clip
    weight = QuantizedWeight(**{**vars(weight), "input_scale": torch.tensor(0.01)})
    x = torch.randn(2, 32, 21)
    low = conv1d_reference(x, weight, None, geometry)
    high = conv1d_reference(x.double(), weight, None, geometry)
    assert_as_accurate(run_conv(x, weight, geometry, None, None, None, None), low, high)


def test_conv1d_in_16_bits(path: str):
    geometry = Geometry(7, left=3, right=3, groups=4)
    weight = conv_weight(96, 96, geometry, QuantSpec(inputs="int8"))
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(2, 96, 20).to(dtype)
        y = run_conv(x, weight, geometry, None, None, "gelu", None)
        low = conv1d_reference(x, weight, None, geometry, "gelu")
        assert_as_accurate(y, low, conv1d_reference(x.double(), weight, None, geometry, "gelu"))


def test_conv1d_of_an_empty_batch(path: str):
    weight = make_weight(6, 96, QuantSpec(inputs="int8"))
    assert conv1d_cpu(torch.empty(0, 9, 32), weight, stride=2).shape == (0, 4, 6)


def test_resident_copy_is_made_once_and_counted():
    weight = make_weight(100, 64, QuantSpec(inputs="int8"))
    assert resident_bytes(weight.qweight) == 0
    copy = resident_int8(weight, "native")
    assert resident_int8(weight, "native") is copy
    # 3 panels of 48 channels: int8 weights and one int32 a channel
    assert resident_bytes(weight.qweight) == 3 * 48 * (64 + 4)


@pytest.mark.parametrize("part", ["qweight", "group_scale"])
@pytest.mark.parametrize("inference", [False, True])
def test_an_update_in_place_is_seen(path: str, part: str, inference: bool):
    with torch.inference_mode(inference):
        weight = make_weight(50, 64, QuantSpec(inputs="int8"))
        x = torch.randn(3, 64)
        before = linear_cpu(x, weight)
        tensor = getattr(weight, part)
        tensor.copy_(tensor.flip(0))
        after = linear_cpu(x, weight)
        assert not torch.equal(before, after)
        fresh = QuantizedWeight(
            **{**vars(weight), "qweight": weight.qweight.clone(),
               "group_scale": weight.group_scale.clone()}
        )  # fmt: skip
        assert torch.equal(after, linear_cpu(x, fresh))


def test_the_resident_copy_goes_with_its_weight():
    weight = make_weight(50, 64, QuantSpec(inputs="int8"))
    linear_cpu(torch.randn(3, 64), weight)
    held = len(resident._entries)
    del weight
    gc.collect()
    assert len(resident._entries) < held


def test_threads_share_a_weight():
    weight, x = make_weight(100, 128, QuantSpec(inputs="int8")), torch.randn(3, 128)
    results: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(linear_cpu(x, weight))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(r, linear_cpu(x, weight)) for r in results)


def _backend_of(tmp_path: object, **environment: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import torch; from lowbit_kernels.cpu import *; from lowbit_kernels.formats import *\n"
        "w = quantize_weight(torch.randn(8, 64), QuantSpec(inputs='int8'))\n"
        "for _ in range(2): assert linear_cpu(torch.randn(2, 64), w).isfinite().all()\n"
        "print(cpu_backend())"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=str(tmp_path),
        env={"PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path), **environment},
    )  # fmt: skip


def test_without_a_compiler_it_says_so_once_and_works(tmp_path):
    missing = _backend_of(tmp_path, PATH="")
    assert "no C++ compiler" in missing.stdout
    assert missing.stderr.count("RuntimeWarning") == 1
    broken = _backend_of(tmp_path, PATH="/usr/bin:/bin", CXX="false")
    assert "false failed" in broken.stdout
    assert broken.stderr.count("RuntimeWarning") == 1


def test_a_cache_that_others_may_write_is_not_used(tmp_path):
    folder = tmp_path / "lowbit_kernels"
    folder.mkdir()
    folder.chmod(0o777)
    result = _backend_of(tmp_path, PATH="/usr/bin:/bin", CXX="c++", XDG_CACHE_HOME=str(tmp_path))
    assert "writable by nobody else" in result.stdout
    assert list(folder.iterdir()) == []
