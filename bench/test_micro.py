"""``pytest --benchmark``: members of a group compute the same thing, and are checked before."""

import time

import pytest
import torch

from bench.harness import relative_error
from bench.micro import DEVICE, DTYPE, IDS, LINEAR_PEERS, OPS, SIZES, Member

# a round shorter than this is mostly clock
ROUND_SECONDS = 2e-3
ROUNDS = 10


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory():
    """The NaN poison of the tests would be timed too."""


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def backward_of(member: Member):
    """The gradient of x once more, of a graph that stays."""
    out = member.call()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, member.x, grad, retain_graph=True)[0], grad


def checked_call(member: Member, direction: str):
    """What to time, after one call gave the right result."""
    call, grad = member.call, None
    if direction == "backward":
        call, grad = backward_of(member)
    with torch.set_grad_enabled(direction == "backward"):
        result = call()
    x = member.x.detach().float().requires_grad_()
    expected = member.exact(x)
    if grad is not None:
        (expected,) = torch.autograd.grad(expected, x, grad.float())
    error = relative_error(result, expected)
    assert error <= member.max_error, "no time for a wrong result"
    return call


@pytest.mark.parametrize(("op", "direction", "size", "provider"), IDS, ids=map("-".join, IDS))
def test_micro(benchmark, op, direction, size, provider):
    sizes = OPS[op][0][SIZES.index(size)]
    try:
        call = checked_call(OPS[op][1][provider](sizes), direction)
    except Exception as error:
        if provider in LINEAR_PEERS:
            pytest.skip(f"{provider} does not serve {sizes}: {error}")
        raise

    def synchronized():
        call()
        synchronize()

    benchmark.group = f"{op} {direction}, {size} {'x'.join(map(str, sizes))}"
    benchmark.extra_info |= {"device": DEVICE, "dtype": str(DTYPE), "provider": provider}
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "error_checked": True}
    if DEVICE == "cuda":
        benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
    with torch.set_grad_enabled(direction == "backward"):
        started = time.perf_counter()
        synchronized()
        once = time.perf_counter() - started
        repeats = max(1, min(100, int(ROUND_SECONDS / once)))
        benchmark.pedantic(synchronized, rounds=ROUNDS, iterations=repeats, warmup_rounds=1)
