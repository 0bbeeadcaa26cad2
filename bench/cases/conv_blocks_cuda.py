"""The convolutional parts of a speech encoder, each as one block: inference and training.

The front end, the positional convolution and the Conformer's convolution module are those of
models of transformers with random weights; ours are what ``quantize`` and ``prepare_qat`` make of
them. Backward means the gradients of the input frames and of every parameter, or of the input and
the biases where the weights are frozen.

Dimension key: B batch, S samples, T frames, C channels.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Case, Cost, Goal, Point, Prepared, Provider, Result
from bench.errors import float_error
from bench.shapes import SAMPLE_RATE
from lowbit_kernels import QuantConfig, QuantSpec, dequantize, quantize
from lowbit_kernels.conversion.qat import prepare_qat

EAGER, FP16, COMPILED = "bf16 eager (cuDNN)", "fp16 eager (cuDNN)", "bf16 torch.compile"
W4, W4A8, QAT = "lowbit w4, float inputs", "lowbit w4, int8 inputs", "lowbit w4 QAT"
# rounding adds up over the layers of a block and over its gradients; int8 inputs cost more
LAYERS, INT8_ERROR = 16, 0.1
FRAME_SAMPLES = 320
OPTIONS: dict[str, Any] = {"num_hidden_layers": 1, "conformer_conv_dropout": 0.0}
TINY = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": (16, 16),
    "conv_kernel": (10, 3), "conv_stride": (5, 4), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "conv_depthwise_kernel_size": 7,
}  # fmt: skip
LARGE = {
    "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096,
    "feat_extract_norm": "layer", "conv_bias": True,
}  # fmt: skip


def front_end(size: str) -> nn.Module:
    """Waveform [B, S] to frames [B, C, T]: GroupNorm in the base size, LayerNorm in the large."""
    return _model("Wav2Vec2", size)


def positional(size: str) -> nn.Module:
    """Frames [B, T, C], 128 taps in 16 groups and GELU; data2vec's stack of five with 19 taps."""
    return _model("Data2VecAudio" if size == "data2vec" else "Wav2Vec2", size)


def conv_module(size: str) -> nn.Module:
    """Frames [B, T, C]: LayerNorm, pointwise, GLU, depthwise, BatchNorm, Swish, pointwise."""
    return _model("Wav2Vec2Conformer", size)


def _model(family: str, size: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"tiny": TINY, "large": LARGE}.get(size, {})
    if size.startswith("C"):
        sizes = {"hidden_size": int(size[1:]), "num_attention_heads": 8}
    if family == "Data2VecAudio":
        sizes = sizes | {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19}
    config = getattr(transformers, f"{family}Config")(**OPTIONS | sizes)
    return getattr(transformers, f"{family}Model")(config)


# the part of the model that is timed
PARTS: dict[Callable[[str], nn.Module], str] = {
    front_end: "feature_extractor",
    positional: "encoder.pos_conv_embed",
    conv_module: "encoder.layers.0.conv_module",
}
ORIGINS = {
    "tiny": "a tiny model", "base": "wav2vec2-base", "large": "wav2vec2-large",
    "data2vec": "data2vec-audio-base", "C512": "conformer-L", "C1024": "wav2vec2-conformer-large",
}  # fmt: skip
SIZES = {"tiny": 0, "base": 1, "large": 2, "data2vec": 3, "C512": 4, "C1024": 5}


@dataclass(frozen=True)
class Inputs:
    """A model, the path of its part, and the part's input: [B, S], or [B, T, C]."""

    model: nn.Module
    path: str
    x: Tensor
    backward: bool

    def part(self, model: nn.Module) -> nn.Module:
        """Of a model like this one, in training mode where gradients are taken."""
        return model.get_submodule(self.path).train(self.backward)


def make_inputs(
    build: Callable[[str], nn.Module], point: Point, device: str, dtype: torch.dtype
) -> Inputs:
    """Noise."""
    s = point.sizes
    size = next(name for name, code in SIZES.items() if code == s["size"])
    model: Any = build(size).to(device, dtype)
    shape = (s["B"], s["S"])
    if build is not front_end:
        shape = (s["B"], s["S"] // FRAME_SAMPLES, model.config.hidden_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return Inputs(model, PARTS[build], x, bool(s["backward"]))


def run(part: nn.Module, x: Tensor, backward: bool) -> Result:
    """The output, or the gradients of its sum with fixed weights."""
    if not backward:
        out: Tensor = part(x)
        return out
    with torch.inference_mode(False), torch.enable_grad():
        # a front end's layers, not its waveform, ask for gradients
        x = x.clone().requires_grad_(x.dim() > 2)
        y: Tensor = part(x)
        leaves = [t for t in (x, *part.parameters()) if t.requires_grad]
        found = torch.autograd.grad(y, leaves, y.detach(), allow_unused=True)
        return tuple(grad for grad in found if grad is not None)


def prepare(
    inputs: Inputs, part: nn.Module, exact: nn.Module | None, error: float, x: Tensor | None = None
) -> Prepared:
    """Time a part; ``exact`` says in float32 what it means, None: the baseline does."""
    x = inputs.x if x is None else x
    wide = None if exact is None else inputs.part(exact.float())
    expected = None
    if wide is not None:
        expected = functools.partial(run, wide, inputs.x.float(), inputs.backward)
    stored = sum(t.nbytes for t in (*part.parameters(), *part.buffers()))
    call = functools.partial(run, part, x, inputs.backward)
    return Prepared(call, error * (1 + inputs.backward), expected, stored, int8=error > 0.05)


def _error(dtype: torch.dtype) -> float:
    return LAYERS * float_error(512, dtype)


def eager(inputs: Inputs) -> Prepared:
    """As transformers runs it."""
    part = inputs.part(copy.deepcopy(inputs.model))
    return prepare(inputs, part, copy.deepcopy(inputs.model), _error(inputs.x.dtype))


def half(inputs: Inputs) -> Prepared:
    """The same in the other 16-bit format, which cuDNN has other kernels for."""
    model = copy.deepcopy(inputs.model)
    if not inputs.x.is_cuda:
        return prepare(inputs, inputs.part(model), None, _error(inputs.x.dtype))
    part, x = inputs.part(model.half()), inputs.x.half()
    return prepare(inputs, part, None, _error(inputs.x.dtype), x)


def compiled(inputs: Inputs) -> Prepared:
    """``torch.compile`` of the part."""
    torch.compiler.reset()
    part = inputs.part(copy.deepcopy(inputs.model))
    compiled_part: Any = torch.compile(part, dynamic=False)
    return prepare(inputs, compiled_part, None, _error(inputs.x.dtype))


def low_bit(inputs: Inputs, config: QuantConfig, error: float = 0.0) -> Prepared:
    """Ours with frozen weights; gradients are those of the input and of what is left in float."""
    model = copy.deepcopy(inputs.model)
    quantize(model, config)
    exact = dequantize(copy.deepcopy(model))
    if inputs.backward:
        for module in (*model.modules(), *exact.modules()):
            for name, parameter in module.named_parameters(recurse=False):
                parameter.requires_grad_(parameter.requires_grad and name == "bias")
    return prepare(inputs, inputs.part(model), exact, error or _error(inputs.x.dtype))


def quantization_aware(inputs: Inputs) -> Prepared:
    """Ours as it trains: fake-quantized weights and learned scales."""
    model = copy.deepcopy(inputs.model)
    prepare_qat(model, QuantSpec(bits=4, group_size=None))
    exact = copy.deepcopy(model)
    # a level on the other side of a half is another weight, once in a few thousand
    return prepare(inputs, inputs.part(model), exact, 4 * _error(inputs.x.dtype))


def cost(build: Callable[[str], nn.Module], point: Point, itemsize: int) -> Cost:
    """Of the part on the meta device; backward twice as much again, input and output once more."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        inputs = make_inputs(build, replace(point, sizes=point.sizes | {"backward": 0}), "meta",
                             torch.float32)  # fmt: skip
    part = inputs.part(inputs.model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = part(inputs.x)
    backward = point.sizes["backward"]
    values = inputs.x.numel() + y.numel()
    return Cost((1 + 2 * backward) * counter.get_total_flops(), itemsize * values * (1 + backward))


def _point(size: str, B: int, seconds: float, backward: bool, *goals: Goal) -> Point:
    name = f"{size}, {B} x {seconds:g} s, {'forward and backward' if backward else 'forward'}"
    sizes = {
        "B": B,
        "S": int(seconds * SAMPLE_RATE),
        "size": SIZES[size],
        "backward": int(backward),
    }
    return Point(name, sizes, ORIGINS[size], goals)


def _goals(ours: tuple[str, ...], *goals: tuple[float, float, str]) -> tuple[Goal, ...]:
    return tuple(Goal(name, *goal) for name in ours for goal in goals)


def _points(
    sizes: tuple[str, ...], forward: tuple[Goal, ...], backward: tuple[Goal, ...] = ()
) -> tuple[Point, ...]:
    # most important first
    return tuple(
        _point(size, B, seconds, is_backward, *(backward if is_backward else forward))
        for is_backward in (False, True)
        for B, seconds in ((1, 10), (32, 10), (1, 30), (32, 30))
        for size in sizes
    )


SMALL = tuple(_point("tiny", 2, 0.2, backward) for backward in (False, True))


def _case(
    name: str, title: str, build: Callable[[str], nn.Module], points: tuple[Point, ...]
) -> Case:
    return Case(
        name=name,
        title=title,
        points=points,
        make_inputs=functools.partial(make_inputs, build),
        providers=(
            Provider(EAGER, eager),
            Provider(FP16, half),
            Provider(COMPILED, compiled),
            Provider(W4, lambda inputs: low_bit(inputs, QuantConfig.small())),
            Provider(W4A8, lambda inputs: low_bit(inputs, QuantConfig.fast(), INT8_ERROR)),
            Provider(
                QAT, quantization_aware,
                points=tuple(p.name for p in (*points, *SMALL) if p.sizes["backward"]),
            ),
        ),
        baseline=EAGER,
        cost=functools.partial(cost, build),
        layout="goals",
        device="cuda",
        dtype=torch.bfloat16,
        modes=("graph", "eager", "flushed"),
        small=SMALL,
    )  # fmt: skip


_OURS = (W4, W4A8)
FRONT_END_CUDA = _case(
    "front_end_cuda", "Convolutional front ends", front_end,
    _points(("base", "large"), _goals(_OURS, (2.0, 3.0, EAGER), (1.5, 2.0, COMPILED))),
)  # fmt: skip
POSITIONAL_CUDA = _case(
    "positional_cuda", "Positional convolutions", positional,
    _points(("base", "large", "data2vec"), _goals(_OURS, (3.0, 4.0, EAGER))),
)  # fmt: skip
CONV_MODULE_CUDA = _case(
    "conv_module_cuda", "The Conformer's convolution module", conv_module,
    tuple(
        _point(
            size, B, 0.02 * T, backward,
            *(
                _goals((QAT,), (1.5, 2.0, EAGER)) if backward
                else _goals(_OURS, (2.5, 3.5, EAGER), (1.5, 1.8, COMPILED))
            ),
        )
        for backward in (False, True)
        for size, B, T in (("C512", 32, 1500), ("C1024", 1, 500), ("C1024", 32, 500))
    ),
)  # fmt: skip
