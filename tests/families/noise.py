"""How far a model's output moves when its weights are quantized, and how far theory lets it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels import QuantConfig, quantize
from lowbit_kernels.modules import QuantizedModule, folded_weight

DRAWS = 3
# the rule for every family: the output may err this many times as much as white noise of the same
# power in every weight makes it err
ALLOWED = 1.5


def output_error(model: nn.Module, reference: Tensor, inputs: dict[str, Tensor]) -> float:
    """Root mean square of the difference between a model's logits and the reference."""
    with torch.no_grad():
        difference: Tensor = model(**inputs).logits - reference
    return difference.square().mean().sqrt().item()


def predicted_error(model: nn.Module, config: QuantConfig, inputs: dict[str, Tensor]) -> float:
    """Mean output error with Gaussian noise of each layer's own SQNR in the float weights."""
    with torch.no_grad():
        reference = model(**inputs).logits
    report = quantize(copy.deepcopy(model), config)
    noise_ratio = {layer.name: 10 ** (-layer.sqnr_db / 20) for layer in report.quantized}
    errors = []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        noisy = copy.deepcopy(model)
        for name, ratio in noise_ratio.items():
            _add_noise(noisy.get_submodule(name), ratio)
        errors.append(output_error(noisy, reference, inputs))
    return sum(errors) / DRAWS


@torch.no_grad()
def _add_noise(layer: Any, ratio: float) -> None:
    weight = folded_weight(layer) if isinstance(layer, nn.Conv1d) else layer.weight
    noise = torch.randn_like(weight)
    noisy = weight + noise * (ratio * weight.norm() / noise.norm())
    if nn.utils.parametrize.is_parametrized(layer):
        layer.parametrizations.weight[0] = _Constant(noisy)
    else:
        layer.weight.copy_(noisy)


class _Constant(nn.Module):
    """A parametrization that ignores what it parametrizes."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *originals: Tensor) -> Tensor:
        return self.value


def swap_scales(model: nn.Module) -> None:
    """The planted bug: each row gets the scale of its neighbor."""
    for layer in model.modules():
        if isinstance(layer, QuantizedModule):
            layer.scale.copy_(layer.scale.roll(1))
