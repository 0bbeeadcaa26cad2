"""Models for the tests of fused layers, and counts of what a layer launches."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit_kernels import QuantConfig, dequantize, quantize
from lowbit_kernels.integrations.encoder_layers import FusedLayer
from tests.families.models import FAMILIES, LAYERS

BY_NAME = {family.name: family for family in FAMILIES}
TRANSFORMERS = ("wav2vec2-group", "wav2vec2-layer", "hubert", "data2vec", "unispeech-sat", "sew")
CONFORMERS = ("conformer-relative", "wav2vec2-bert")
FUSED = (*TRANSFORMERS, *CONFORMERS, "wavlm", "wavlm-stable", "whisper")
CONFIGS = {"small": QuantConfig.small(), "fast": QuantConfig.fast(), "static": QuantConfig.fast()}


class Launches(TorchDispatchMode):
    """Counts the kernels that the ops called under it launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name, given = str(func), {_memory(t) for t in tree_leaves(args) if isinstance(t, Tensor)}
        # a view launches nothing
        if any(_memory(t) not in given for t in tree_leaves(out) if isinstance(t, Tensor)):
            self.names.append(name)
            # a float input is rounded to int8 by a kernel of its own
            if name.startswith("lowbit.linear.") and "int8" in args:
                self.names.append("quantize")
        return out


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def moved(inputs: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in inputs.items()}


def build(
    name: str, preset: str, *, fuse: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    family, config = BY_NAME[name], CONFIGS[preset]
    model = family.build()
    torch.manual_seed(4)
    for module in model.modules():  # as trained ones: neither the identity nor zero
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            nn.init.normal_(module.weight, 1, 0.3)
    model.to(device, dtype)
    clips = [moved(family.full_inputs(), device, dtype)] if preset == "static" else None
    quantize(model, config, fuse=fuse, calibration=clips)
    if fuse:
        skip_where_attention_is_fixed(name)
    if not name.startswith("wavlm"):
        model.set_attn_implementation("lowbit")
    return model


def skip_where_attention_is_fixed(name: str) -> None:
    is_old = Version(transformers.__version__) < Version("5.15")
    if is_old and name in (*CONFORMERS, "conformer-rotary"):
        pytest.skip("conformers of older versions cannot choose their attention")


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(**inputs).logits
    return output


def exact_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of a float model with the same weights, in fp64: int8 rows differ by their rounding."""
    double = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    # in fp64 first, or the weights would be rounded to 16 bits
    return logits(dequantize(copy.deepcopy(model).double()).double(), double)


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


def launches_of_the_last_layer(
    model: Any,
    inputs: dict[str, Tensor],
    count: Callable[[Callable[[], Any]], tuple[Any, list[str]]],
) -> list[str]:
    """What a second forward launches between the last layer's input and its output."""
    logits(model, inputs)
    counted = []
    forward = type(layers_of(model)[-1])._fused

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, names = count(lambda: forward(self, *args, **kwargs))
        counted.append(names)
        return out

    type(layers_of(model)[-1])._fused = counting
    try:
        logits(model, inputs)
    finally:
        type(layers_of(model)[-1])._fused = forward
    assert len(counted) == LAYERS
    return counted[-1]


def ops(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    with Launches() as launches:
        out = call()
    return out, launches.names


def kernels(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return out, [event.name for event in events]
