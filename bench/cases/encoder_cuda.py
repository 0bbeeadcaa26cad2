"""A whole wav2vec2-base encoder on a GPU: one utterance for latency, 32 for throughput.

Dimension key: B batch, T samples.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import Case, Point, Prepared, Provider, Row
from bench.cases.encoder_cpu import (
    FLOAT_ERROR,
    INT8_ERROR,
    cost,
    encode,
    float_model,
    make_inputs,
    quantized_model,
    stored_bytes,
    with_stored_weights,
)
from bench.shapes import SAMPLE_RATE, SECONDS
from lowbit_kernels import QuantConfig, capture_graphs


def prepare(
    model: nn.Module, audio: Tensor, max_error: float, *, graphs: bool, expects: nn.Module | None
) -> Prepared:
    """Time a model from an idle device on, as one request sees it.

    Args:
        model: what runs.
        audio: [B, T].
        max_error: as in ``Prepared``.
        graphs: whether a CUDA graph of the model is replayed instead.
        expects: a low-bit model whose weights say what is right; None: the baseline.
    """
    stored = stored_bytes(model)
    B, T = audio.shape
    run = capture_graphs(model, seconds=[T / SAMPLE_RATE], batch=[B]) if graphs else model
    call = encode(run, audio)

    def from_idle() -> Tensor:
        _wait(audio)
        return call()

    expected = None if expects is None else functools.partial(with_stored_weights, expects, audio)
    facts = dict if graphs or not audio.is_cuda else functools.partial(_memory, call, stored)
    return Prepared(from_idle, max_error, expected, stored, facts)


def _wait(audio: Tensor) -> None:
    if audio.is_cuda:
        torch.cuda.synchronize()


def _memory(call: Callable[[], Tensor], stored: int) -> Row:
    """Of the weights and of a call."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        call()
    return {"peak_bytes": stored + torch.cuda.max_memory_allocated() - before}


def unquantized(audio: Tensor, graphs: bool = False) -> Prepared:
    """bfloat16 with scaled_dot_product_attention."""
    error = FLOAT_ERROR[audio.dtype]
    return prepare(float_model(audio), audio, error, graphs=graphs, expects=None)


def compiled(audio: Tensor) -> Prepared:
    """``torch.compile``, which replays CUDA graphs of its own."""
    torch.compiler.reset()
    run = torch.compile(float_model(audio), mode="reduce-overhead")
    return prepare(run, audio, FLOAT_ERROR[audio.dtype], graphs=False, expects=None)


def ours(
    config: Callable[[], QuantConfig], attention: str = "sdpa", graphs: bool = False
) -> Callable[[Tensor], Prepared]:
    """A preset, with PyTorch's attention or ours."""

    def prepare_ours(audio: Tensor) -> Prepared:
        model = quantized_model(audio, config(), attention)
        error = INT8_ERROR if config == QuantConfig.fast else FLOAT_ERROR[audio.dtype]
        return prepare(model, audio, error, graphs=graphs, expects=model)

    return prepare_ours


ENCODER_CUDA = Case(
    name="encoder_cuda",
    title="wav2vec2-base on a GPU, 10 s of audio, random weights",
    points=tuple(
        Point(f"batch {B}", {"B": B, "T": SECONDS * SAMPLE_RATE}, "wav2vec2-base") for B in (1, 32)
    ),
    make_inputs=make_inputs,
    providers=(
        Provider("bf16 eager", unquantized),
        Provider("bf16 torch.compile", compiled),
        Provider("lowbit small()", ours(QuantConfig.small)),
        Provider("lowbit fast()", ours(QuantConfig.fast)),
        Provider("lowbit small(), graphs", ours(QuantConfig.small, graphs=True)),
        Provider("lowbit fast(), graphs", ours(QuantConfig.fast, graphs=True)),
        # with the model's attn_implementation="lowbit" instead of PyTorch's fused attention
        Provider("lowbit fast(), attention too", ours(QuantConfig.fast, "lowbit")),
        Provider("lowbit fast(), attention too, graphs", ours(QuantConfig.fast, "lowbit", True)),
        # our graphs of a model that is not ours
        Provider("bf16, graphs", lambda audio: unquantized(audio, graphs=True)),
    ),
    baseline="bf16 eager",
    cost=cost,
    layout="providers",
    device="cuda",
    dtype=torch.bfloat16,
    weight=3.0,
)
