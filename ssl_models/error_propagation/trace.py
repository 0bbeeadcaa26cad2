"""What a model's blocks and branches give for an utterance.

Dimension key: B utterances, T frames, C channels, V tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# runs a model on an utterance: logits or frames [B, T, V]
Forward = Callable[[nn.Module, Any], Tensor]


@dataclass
class Trace:
    """What was seen in one forward pass.

    Attributes:
        outputs: of the watched modules, [B, T, C], by name.
        end: what the model gave, [B, T, V].
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    end: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.inference_mode()
def trace(model: nn.Module, forward: Forward, utterance: Any, names: Sequence[str]) -> Trace:
    """Run a model and keep what the modules of these names give."""
    found = Trace()
    with watching(model, names, lambda name, output: found.outputs.__setitem__(name, output)):
        found.end = forward(model, utterance)
    return found


@contextlib.contextmanager
def watching(
    model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, output)`` for each of these modules that runs inside the ``with``."""

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> None:
        see(name, output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(hook, name)))
        yield
