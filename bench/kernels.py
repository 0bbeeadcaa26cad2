"""What a call launches on a GPU: how many kernels, and the time of each kind of layer."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.case import Row

# a kind of layer, and what is in the names of its operators or kernels; the first match counts
KINDS = {
    "convolutions": r"conv|front_end|fprop|cudnn",
    "attention": r"attention|softmax|bmm|flash|fmha",
    "linear layers": r"linear|addmm|::mm\b|matmul|gemm|nvjet|cutlass|_mm\b",
    "norms": r"norm",
    "activations, quantization": r"gelu|silu|glu|relu|sigmoid|quantize",
    "copies": r"mem(cpy|set)|copy|clone|contiguous|fill|cat\b|pad|zero",
    "rest": "",
}
# the compiler's loops carry the names of the products that they follow
LOOP = re.compile(r"^triton_(poi|red|per)_")
PRODUCTS = re.compile(r"addmm|bmm|mm|convolution|linear")


def profiled(call: Callable[[], Any]) -> Row:
    """``launches``, the kernels of a call, and ``kinds``, the seconds of each kind of layer."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return summary(profiler.events() or ())


def summary(events: Iterable[Any]) -> Row:
    """The same from the events of a profiler.

    A kernel is of the kind of the operator that launched it; by its own name where no operator is
    known, as in the replay of a CUDA graph.
    """
    events = list(events)
    alone = [
        (event.name, event.time_range.elapsed_us(), [])
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    launched = [
        (kernel.name, kernel.duration, _operators(event))
        for event in events
        for kernel in event.kernels
    ]
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, microseconds, operators in launched if len(launched) >= len(alone) else alone:
        kinds[kind_of(name, operators)] += microseconds / 1e6
    kernels = [name for name, *_ in alone if not name.startswith(("Memcpy", "Memset"))]
    return {"launches": len(kernels), "kinds": {kind: s for kind, s in kinds.items() if s}}


def _operators(event: Any) -> list[str]:
    """An operator and those that called it, the outermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names[::-1]


def kind_of(kernel: str, operators: Iterable[str] = ()) -> str:
    """The kind of layer that a kernel belongs to."""
    named = PRODUCTS.sub("", kernel) if LOOP.match(kernel) else kernel
    for name in (*operators, named):
        for kind, pattern in KINDS.items():
            if pattern and re.search(pattern, name, re.IGNORECASE):
                return kind
    return "rest"
