"""``attn_implementation="lowbit"``: against eager, with padding, and where it must step aside."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_kernels import dequantize, quantize
from lowbit_kernels.integrations.huggingface_attention import lowbit_attention
from lowbit_kernels.testing import assert_as_accurate
from tests.families.models import FAMILIES, Family

BY_NAME = {family.name: family for family in FAMILIES}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


@pytest.mark.parametrize("name", [f.name for f in FAMILIES if f.name != "wavlm"])
def test_attention_matches_eager(name: str) -> None:
    family = BY_NAME[name]
    padded = _padding_is_defined(family)
    inputs = family.inputs() if padded else family.full_inputs()
    model = family.build()
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("sdpa")
    high = _valid(family, logits(exact, _double(inputs)))
    model.set_attn_implementation("eager")
    low = _valid(family, logits(model, inputs))
    model.set_attn_implementation("lowbit")
    assert_as_accurate(_valid(family, logits(model, inputs)), low, high)


def _padding_is_defined(family: Family) -> bool:
    """Not in float: padding enters convolutions, and eager Parakeet makes NaN of it."""
    sees_padding = family.name.startswith("conformer") or family.name.endswith("adapter")
    return not sees_padding and family.name not in ("parakeet", "whisper")


def _valid(family: Family, output: Tensor) -> Tensor:
    """The frames that are not padding, one after the other."""
    if not _padding_is_defined(family):
        return output
    short = 34 if family.input_name == "input_values" else 40
    return torch.cat([output[0], output[1, :short]])


@pytest.mark.parametrize("name", [f.name for f in FAMILIES if f.name not in ("wavlm", "whisper")])
def test_attention_ignores_padding(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    quantize(model)
    model.set_attn_implementation("lowbit")
    batch = logits(model, family.inputs())
    for i, inputs in enumerate(family.single_inputs()):
        alone = logits(model, inputs)[0]
        assert (batch[i, : len(alone)] - alone).abs().max() <= 1e-5


class Kinds(TorchDispatchMode):
    """The kinds of position schemes that flash_attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str | None] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.lowbit.flash_attention.default:
            self.seen.add(args[4])
        return func(*args, **(kwargs or {}))


POSITIONS = {
    "conformer-relative": ("relative", "pos_bias_u", "pos_bias_v"),
    "wav2vec2-bert": ("relative", "distance_embedding"),
    "parakeet": ("relative", "bias_u", "bias_v"),
    "wavlm": ("offset", "rel_attn_embed", "gru_rel_pos_const", "gru_rel_pos_linear"),
}


def position_gradients(model: Any, inputs: dict[str, Tensor], name: str) -> Tensor:
    """Of the parameters of a name in all layers, one after the other."""
    parameters = [p for path, p in model.named_parameters() if name in path.split(".")]
    logits = model(**inputs).logits
    torch.manual_seed(1)
    grad = torch.randn(logits.shape).to(logits.dtype)
    leaves = [p.requires_grad_() for p in parameters]
    return torch.cat([g.flatten() for g in torch.autograd.grad(logits, leaves, grad)])


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_computed_in_the_kernel(name: str) -> None:
    family, (kind, *names) = BY_NAME[name], POSITIONS[name]
    model = family.build().eval()
    quantize(model)
    exact, plain = dequantize(copy.deepcopy(model)), copy.deepcopy(model)
    if name == "wavlm":  # whose attention is always fused
        plain = copy.deepcopy(exact)
    else:
        model.set_attn_implementation("lowbit")
    inputs = family.full_inputs()
    exact = exact.double()
    for parameter in names:
        with Kinds() as kinds:
            found = position_gradients(model, inputs, parameter)
        assert kinds.seen == {kind}
        low = position_gradients(plain, inputs, parameter)
        high = position_gradients(exact, _double(inputs), parameter)
        assert_as_accurate(found, low, high, parameter)


@pytest.mark.parametrize("name", ["conformer-relative", "wav2vec2-bert", "parakeet"])
def test_other_implementations_stay_what_they_are(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    quantize(model)
    model.set_attn_implementation("sdpa")
    with Kinds() as kinds:
        logits(model, family.full_inputs())
    assert not kinds.seen


def test_attention_without_its_mask_would_be_seen() -> None:
    from transformers.masking_utils import AttentionMaskInterface

    family = BY_NAME["wav2vec2-layer"]
    model, inputs = family.build(), family.inputs()
    model.set_attn_implementation("lowbit")
    good = logits(model, inputs)
    mask = AttentionMaskInterface._global_mapping.pop("lowbit")
    try:
        assert (logits(model, inputs)[1, :30] - good[1, :30]).abs().max() > 1e-2
    finally:
        AttentionMaskInterface._global_mapping["lowbit"] = mask


def test_attention_refuses_left_padding() -> None:
    q = torch.randn(2, 2, 5, 8)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    with pytest.raises(ValueError, match="a valid frame after padding"):
        lowbit_attention(torch.nn.Module(), q, q, q, mask)


def test_causal_attention_falls_to_sdpa() -> None:
    q = torch.randn(2, 2, 5, 8)
    module = torch.nn.Module()
    module.is_causal = True
    output, _ = lowbit_attention(module, q, q, q, None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.equal(output, expected.transpose(1, 2))
    with pytest.raises(NotImplementedError, match="bidirectional self-attention only"):
        lowbit_attention(module, q, q, q, None, position_bias=torch.zeros(1, 1, 5, 5))


def test_attention_compiles_in_one_graph() -> None:
    family = BY_NAME["wav2vec2-layer"]
    model, inputs = family.build(), family.inputs()
    quantize(model)
    model.set_attn_implementation("lowbit")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).logits, logits(model, inputs))
    torch._dynamo.reset()
