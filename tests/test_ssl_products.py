"""Low-bit encoders multiply by this library's ops alone, forward and backward."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_kernels import QuantConfig, QuantSpec, convert, prepare_qat, quantize
from lowbit_kernels.modules import QATModule
from ssl_models.encoder import SpeechEncoder
from tests.ssl_cases import KINDS, build, encode, inputs

kinds = pytest.mark.parametrize("kind", KINDS)
# of the front end: those of its name
NO_DIMENSIONS = dict.fromkeys(("conv_dims", "conv_kernels", "conv_strides"))


class Called(TorchDispatchMode):
    """The ops called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


PRODUCTS = re.compile(r"^aten\.\w*(?:conv|mm\b|linear|matmul|einsum|mv\b|dot|attention)")


def products(call: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    """Products that are not this library's, and what of it was called."""
    with Called() as called:
        call()
    counts = called.counts
    foreign = Counter({n.split(".")[1]: c for n, c in counts.items() if PRODUCTS.match(n)})
    return foreign, Counter({n: c for n, c in counts.items() if n.startswith("lowbit.")})


def count_gates(encoder: nn.Module) -> int:
    """WavLM's position gates: a few hundred weights each, which stay in float."""
    return sum(name.endswith("gru_rel_pos_linear") for name, _ in encoder.named_modules())


def step(encoder: SpeechEncoder) -> None:
    encoder(**inputs())[0].square().mean().backward()


# the one convolution that stays in float: that over the waveform
WAVEFORM = {"convolution": 1, "convolution_backward": 1}


@pytest.mark.parametrize("inputs_kind", [None, "int8", "int2"])
@kinds
def test_a_training_step_calls_this_librarys_products_alone(
    kind: str, inputs_kind: str | None
) -> None:
    encoder = build(kind).train()
    gates = count_gates(encoder)
    # one product forward, and two gradients
    allowed = Counter({**WAVEFORM, "mm": 3 * gates}) + Counter()
    scale = "token" if inputs_kind is None else "static"
    spec = QuantSpec(2, inputs=inputs_kind, input_scale=scale)
    matmuls = None if inputs_kind is None else inputs_kind
    prepare_qat(encoder, QuantConfig(spec, attention_matmuls=matmuls))
    step(encoder)
    foreign, ours = products(lambda: step(encoder))
    assert foreign == allowed
    attention = "flash_attention" if matmuls is None else "low_bit_attention"
    assert ours[f"lowbit.{attention}"] == ours[f"lowbit.{attention}_backward"] == 4
    twins = sum(isinstance(layer, QATModule) for layer in encoder.modules())
    for direction in ("", "_backward"):
        layers = ("training_linear", "training_conv1d")
        assert sum(ours[f"lowbit.{each}{direction}"] for each in layers) == twins
    # adapters and biases train behind packed weights
    convert(encoder)
    foreign, ours = products(lambda: step(encoder))
    assert foreign == allowed
    forward = ("linear", "linear_train", "conv1d", "conv1d_train")
    assert sum(ours[f"lowbit.{each}"] for each in forward) == twins


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("preset", ["small", "fast"])
@kinds
def test_inference_calls_this_librarys_products_alone(kind: str, preset: str, fuse: bool) -> None:
    encoder = build(kind)
    quantize(encoder, getattr(QuantConfig, preset)(), fuse=fuse)
    foreign, ours = products(lambda: encode(encoder, inputs()))
    # the front end is one call, the convolution over the waveform in it
    gates = count_gates(encoder)
    assert foreign.total() <= gates
    assert foreign.keys() <= {"linear"}
    assert ours["lowbit.front_end"] == 1


def test_mel_energies_are_the_one_product_of_their_front_end() -> None:
    encoder = build("post-norm", front_end="fbank", **NO_DIMENSIONS).train()
    prepare_qat(encoder, QuantSpec(4))
    foreign, _ = products(lambda: step(encoder))
    assert sum(foreign.values()) == 1
    assert set(foreign) <= {"mm", "bmm"}


def test_a_foreign_product_would_be_seen() -> None:
    x: Tensor = torch.randn(2, 3, 4)
    for call in (
        lambda: nn.Linear(4, 4)(x),
        lambda: nn.Linear(4, 4)(x[0]),
        lambda: x @ x.mT,
        lambda: nn.functional.conv1d(x, torch.randn(3, 3, 1)),
        lambda: nn.functional.scaled_dot_product_attention(x, x, x),
    ):
        assert products(call)[0]
