"""The attention that a transformers module asks for by ``attn_implementation``.

``"lowbit"`` is ``flash_attention``, ``"lowbit_int8"`` the same with int8 scores, for inference.
"""

from typing import Any

from torch import Tensor

from lowbit_kernels import modules
from lowbit_kernels.attention import int8_scores_attention

NAME, INT8_NAME = "lowbit", "lowbit_int8"


def chosen(module: Any) -> str | None:
    """The ``attn_implementation`` of a module, if it is one of this library's."""
    config = getattr(module, "config", None)
    name = getattr(config, "_attn_implementation", None)
    return name if name in (NAME, INT8_NAME) else None


def attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """``modules.attend``, with int8 scores where they were chosen.

    Raises:
        ValueError: if int8 scores were chosen for training, too.
    """
    if chosen(module) != INT8_NAME:
        return modules.attend(module, q, k, v, dropout_p=dropout_p, **options)
    if dropout_p:
        raise ValueError(f"attn_implementation must be {NAME!r} for training, got {INT8_NAME!r}")
    return int8_scores_attention(q, k, v, **options)


def require_lowbit(module: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of attention with low-bit products, which another attention would pass by.

    Raises:
        ValueError: if another one was chosen.
    """
    name = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
    if name != NAME:
        raise ValueError(
            f"attn_implementation must be {NAME!r} for a model with attention_matmuls, got {name!r}"
        )
