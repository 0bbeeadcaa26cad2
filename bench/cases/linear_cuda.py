"""Linear layers on a GPU: ours, cuBLAS and the peers, from one row to 32 utterances.

The quantization of the inputs, the bias and the activation are inside the timed region. What a
backend was chosen for is in its row.

Dimension key: M rows, N output features, K input features.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import cuda_peers as peers
from bench import ladder
from bench import linear_points as points
from bench.case import ALL_MODES, READ_ONLY, Case, Point, Prepared, Provider, Row
from bench.cases.linear_cpu import Inputs, cost, make_inputs, ours, unquantized
from bench.errors import float_error
from bench.linear_points import CUBLAS
from lowbit_kernels import QLinear, QuantSpec
from lowbit_kernels.matmul.int8_op import low_bit_linear_int8

# weights of uniform distribution between the least and the largest of a group lose 100, 33, 7 to 9
# and 0.5 %; int8 inputs as much as int8 weights
LOSS = {1: 1.2, 2: 0.5, 4: 0.15, 8: 0.04}
FP8_LOSS = 0.08
SETS = 8
# so many that the packed weights of a streaming layer fill the L2 cache
STREAM_SETS = 32
# tuning themselves for a shape takes them long
GEMLITE_POINTS = tuple(
    p.name for p in (points.FEED_FORWARD, *points.STREAM[:3], points.BITS[0], points.BITS[2])
)


def chosen_backend(inputs: Inputs, spec: QuantSpec) -> Row:
    """What our dispatch chooses for the layer."""
    x, epilogue = inputs.x, "gelu" if inputs.gelu else None
    if not x.is_cuda:
        return {"backend": "cpu"}
    choice = ladder.default_choice(
        len(x), *inputs.linear.weight.shape, spec, x.dtype, epilogue, ladder.gpu_of(x.device)
    )
    tiles = {} if choice.config is None else {"tiles": asdict(choice.config)}
    return {"backend": choice.backend} | tiles


def low_bit(name: str, bits: int, int8: bool) -> Provider:
    """A QLinear, its backend in the row."""

    def prepare(inputs: Inputs) -> Prepared:
        spec = QuantSpec(bits=bits, inputs="int8" if int8 else None)
        facts = functools.partial(chosen_backend, inputs, spec)
        return replace(ours(inputs, int8, bits), facts=facts)

    return Provider(name, prepare)


def fed(inputs: Inputs) -> Prepared:
    """A layer whose input a norm or an activation has quantized before."""
    spec = QuantSpec(bits=4, inputs="int8")
    layer = QLinear.from_float(inputs.linear, spec)
    weight, epilogue = layer.quantized_weight(), "gelu" if inputs.gelu else None
    q, q_scale = peers.to_int8(inputs.x)

    def call() -> Tensor:
        return low_bit_linear_int8(
            q, q_scale, weight, layer.bias, epilogue=epilogue, dtype=inputs.x.dtype
        )

    facts = functools.partial(chosen_backend, inputs, spec)
    return replace(ours(inputs, int8=True), call=call, facts=facts)


def peer(
    name: str,
    quantize: Callable[[nn.Linear], Callable[[Tensor], Tensor]],
    needs: Mapping[str, str],
    bits: int,
    at: tuple[str, ...] | None = None,
) -> Provider:
    """A peer's layer, followed by GELU where the point has it."""

    def prepare(inputs: Inputs) -> Prepared:
        layer, x, gelu = quantize(inputs.linear), inputs.x, inputs.gelu
        call = lambda: F.gelu(layer(x)) if gelu else layer(x)  # noqa: E731
        stored = inputs.linear.weight.numel() * bits // 8 + inputs.linear.bias.nbytes
        return Prepared(call, LOSS[bits], weight_bytes=stored, int8="int8" in name)

    return Provider(name, prepare, needs, gpu_only=True, points=at)


def compiled_peer(
    name: str,
    make: Callable[[nn.Linear, bool], Callable[[Tensor], Tensor]],
    loss: float,
    at: tuple[str, ...] | None = None,
) -> Provider:
    """A peer out of PyTorch's own parts, its activation included."""

    def prepare(inputs: Inputs) -> Prepared:
        run, x = make(inputs.linear, inputs.gelu), inputs.x
        bound = loss or float_error(inputs.linear.in_features, x.dtype)
        itemsize = 1 if loss else x.itemsize
        stored = inputs.linear.weight.numel() * itemsize + inputs.linear.bias.nbytes
        return Prepared(lambda: run(x), bound, weight_bytes=stored, int8=bool(loss))

    return Provider(name, prepare, gpu_only=True, points=at)


def padded(inputs: Inputs) -> Prepared:
    """cuBLAS on sizes padded to multiples of 64, weight and input padded beforehand."""
    linear, x = inputs.linear, inputs.x
    pad_n, pad_k = -linear.out_features % 64, -linear.in_features % 64
    weight = F.pad(linear.weight, (0, pad_k, 0, pad_n))
    bias, x_padded, N = F.pad(linear.bias, (0, pad_n)), F.pad(x, (0, pad_k)), linear.out_features
    bound = float_error(linear.in_features, x.dtype)
    return Prepared(
        lambda: F.linear(x_padded, weight, bias)[:, :N], bound, weight_bytes=inputs.stored
    )


def read_only(inputs: Inputs) -> Prepared:
    """A sum over as many bytes as a 4-bit weight has: what reading them alone takes."""
    size = max(1, inputs.linear.weight.numel() // 8)
    packed = torch.randint(-(2**30), 2**30, (size,), device=inputs.x.device, dtype=torch.int32)
    call = lambda: packed.sum()  # noqa: E731
    return Prepared(call, 0.0, call, weight_bytes=packed.nbytes)


BASELINE = Provider(CUBLAS, unquantized)
MAX_AUTOTUNE = compiled_peer("torch.compile max-autotune", peers.max_autotune, 0, points.AUTOTUNED)
INT_MM = compiled_peer("_int_mm, int8", peers.int_mm, LOSS[8])
SCALED_MM = compiled_peer("_scaled_mm, fp8", peers.scaled_mm, FP8_LOSS)
W4, W8 = low_bit(points.W4, 4, int8=False), low_bit(points.W8, 8, int8=False)
W4A8, W8A8 = low_bit(points.W4A8, 4, int8=True), low_bit(points.W8A8, 8, int8=True)
W4A8_FED = Provider(points.W4A8_FED, fed)
TORCHAO_W4 = peer(points.TORCHAO_W4, peers.torchao_int4, peers.TORCHAO, 4)
TORCHAO_W8A8 = peer("torchao w8, int8 inputs", peers.torchao_int8, peers.TORCHAO, 8)
BITSANDBYTES = peer("bitsandbytes nf4", peers.bitsandbytes_nf4, peers.BITSANDBYTES, 4)
HUMMING_W4 = peer("humming w4", peers.humming_int4, peers.HUMMING, 4)
HUMMING_W4A8 = peer("humming w4, int8 inputs", peers.humming_int4_int8, peers.HUMMING, 4)


def gemlite(name: str, bits: int) -> Provider:
    """gemlite with 16-bit inputs."""
    quantize = functools.partial(peers.gemlite_weight_only, bits=bits)
    return peer(name, quantize, peers.GEMLITE, bits, GEMLITE_POINTS)


def _case(
    name: str,
    title: str,
    shapes: tuple[Point, ...],
    providers: tuple[Provider, ...],
    baseline: str = CUBLAS,
    weight: float = 1.0,
    sets: int = SETS,
) -> Case:
    return Case(
        name=name, title=title, points=shapes, make_inputs=make_inputs, providers=providers,
        baseline=baseline, cost=cost, layout="goals", weight=weight, device="cuda",
        dtype=torch.bfloat16, small=points.small(shapes), sets=sets,
        modes=ALL_MODES,
    )  # fmt: skip


LINEAR_BATCH1 = _case(
    "linear_batch1",
    "Linear layers of one utterance of 10 s",
    points.BATCH1,
    (
        BASELINE, MAX_AUTOTUNE, INT_MM, SCALED_MM, W4, W8, W4A8, W4A8_FED, W8A8, TORCHAO_W4,
        TORCHAO_W8A8, BITSANDBYTES, gemlite(points.GEMLITE_W4, 4),
        peer("gemlite w8, int8 inputs", peers.gemlite_int8, peers.GEMLITE, 8, GEMLITE_POINTS),
        HUMMING_W4, HUMMING_W4A8,
    ),
    weight=2.0,
)  # fmt: skip
LINEAR_LARGE = _case(
    "linear_large",
    "Linear layers of 4 to 32 utterances of 10 s",
    points.LARGE,
    (
        BASELINE, MAX_AUTOTUNE, INT_MM, SCALED_MM, W4, W4A8, W4A8_FED, W8A8, TORCHAO_W8A8,
        BITSANDBYTES, HUMMING_W4A8,
    ),
    weight=2.0,
)  # fmt: skip
LINEAR_STREAM = _case(
    "linear_stream",
    "Linear layers of a stream, 1 to 64 rows",
    points.STREAM,
    (
        BASELINE, Provider(READ_ONLY, read_only), W4, W8, TORCHAO_W4, BITSANDBYTES,
        gemlite(points.GEMLITE_W4, 4), HUMMING_W4,
    ),
    weight=2.0,
    sets=STREAM_SETS,
)  # fmt: skip
LINEAR_BITS = _case(
    "linear_bits",
    "Linear layers of 2 and 1 bits",
    points.BITS,
    (
        BASELINE, low_bit(points.W2, 2, int8=False), low_bit(points.W1, 1, int8=False),
        low_bit(points.W2A8, 2, int8=True), low_bit(points.W1A8, 1, int8=True),
        gemlite(points.GEMLITE_W2, 2), gemlite(points.GEMLITE_W1, 1),
    ),
)  # fmt: skip
LINEAR_ODD = _case(
    "linear_odd",
    "Linear layers of sizes that no tile divides",
    points.ODD,
    (
        Provider(points.PADDED, padded), BASELINE, W4, W4A8, TORCHAO_W4, BITSANDBYTES,
    ),
    baseline=points.PADDED,
)  # fmt: skip
