"""Which epilogue stands for an activation module of transformers."""

from typing import Any

from torch import nn

_BY_NAME = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}


def epilogue_of(activation: Any) -> str | None:
    """The epilogue that computes what ``activation`` does, or ``None``."""
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if isinstance(activation, nn.SiLU):
        return "silu"
    if isinstance(activation, nn.ReLU):
        return "relu"
    return _BY_NAME.get(type(activation).__name__)
