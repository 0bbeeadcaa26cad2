"""A padded batch gives what each utterance gives alone: every family, adapter and head.

Dimension key: B batch, T frames.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lowbit_kernels import QuantConfig, dequantize, quantize
from lowbit_kernels.conversion import adapt
from lowbit_kernels.integrations.class_swap import Swapped, restore_class
from lowbit_kernels.integrations.conformer import MaskedConformerLayer
from lowbit_kernels.integrations.sew import MaskedSEWDEncoder, MaskedSEWEncoder, PooledFrameMask
from lowbit_kernels.integrations.subsampling import (
    MaskedAdapter,
    MaskedAttentionAdapter,
    MaskedLayerNorm,
    MaskedSubsampling,
)
from lowbit_kernels.integrations.xvector import DilatedLengths
from tests.families.models import ADAPTER, BERT, FAMILIES, WAVEFORM, Family, of

_CONFORMER = WAVEFORM | {"conv_depthwise_kernel_size": 5}
_DATA2VEC = WAVEFORM | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 7}
_HEAD = {
    "classifier_proj_size": 24,
    "num_labels": 5,
    "tdnn_dim": (24, 24),
    "tdnn_kernel": (3, 2),
    "tdnn_dilation": (1, 2),
    "xvector_output_dim": 24,
}
_KINDS = {
    "Wav2Vec2": WAVEFORM,
    "Data2VecAudio": _DATA2VEC,
    "WavLM": WAVEFORM | {"num_buckets": 16},
    "Wav2Vec2Conformer": _CONFORMER,
    "Wav2Vec2Bert": BERT,
    "SEW": WAVEFORM,
    "SEWD": {k: v for k, v in WAVEFORM.items() if k != "layerdrop"},
}


def _variant(kind: str, head: str, **options: Any) -> Family:
    config = getattr(transformers, f"{kind}Config")
    model = getattr(transformers, f"{kind}For{head}")
    name = "-".join([kind, head, *(f"{k}={v}" for k, v in options.items() if k not in ADAPTER)])
    features = "input_features" if kind == "Wav2Vec2Bert" else "input_values"
    # the family's own name decides how many mel features it takes
    name = name.replace("Wav2Vec2Bert", "wav2vec2-bert")
    return Family(name, of(config, model, _KINDS[kind] | _HEAD, **options), input_name=features)


VARIANTS = [
    *(
        _variant(kind, "CTC", **ADAPTER, adapter_stride=stride)
        for kind, stride in (("Data2VecAudio", 2), ("WavLM", 2), ("Wav2Vec2Conformer", 3))
    ),
    _variant("Wav2Vec2Conformer", "CTC", position_embeddings_type=None),
    _variant("Wav2Vec2Bert", "CTC", position_embeddings_type="rotary"),
    _variant("SEW", "CTC", num_conv_pos_embeddings=15),
    _variant("SEW", "CTC", squeeze_factor=3),
    *(
        _variant(kind, "SequenceClassification", use_weighted_layer_sum=weighted)
        for kind in _KINDS
        for weighted in (False, True)
    ),
    _variant("SEWD", "CTC"),
    *(_variant(kind, "XVector") for kind in _KINDS if "SEW" not in kind),
]
PADDED = [family for family in (*FAMILIES, *VARIANTS) if family.is_ctc]
BY_NAME = {family.name: family for family in PADDED}
# more than one, so that lengths divide and do not divide by the strides after the front end
CUTS = {"input_values": (0, -10, 8), "input_features": (1, 3)}


def assert_padding_is_ignored(model: Any, family: Family) -> None:
    """Padded batches of several lengths give what their utterances give alone."""
    for cut in CUTS[family.input_name]:
        assert padding_error(model, family, cut) <= 1e-5


def padding_error(model: Any, family: Family, cut: int) -> float:
    """The largest difference between a padded batch's and single utterances' logits."""
    torch.manual_seed(0)
    padded = family.inputs(cut)
    mask = padded["attention_mask"]
    x = padded[family.input_name]
    # what the padding holds must not matter
    padding = mask.view(*mask.shape, *[1] * (x.dim() - 2)) == 0
    padded[family.input_name] = torch.where(padding, 20 * torch.randn_like(x), x)
    errors = []
    with torch.no_grad():
        batch = model(**padded).logits
        for i, inputs in enumerate(family.single_inputs(cut)):
            alone = model(inputs[family.input_name]).logits[0]  # without a mask
            actual = batch[i, : len(alone)] if batch.dim() == 3 else batch[i]
            scale = alone.abs().max().clamp_min(1)
            errors.append(((actual - alone).abs().max() / scale).item())
    return max(errors)


@pytest.mark.parametrize("family", PADDED, ids=lambda family: family.name)
@pytest.mark.parametrize("preset", ["float", "small", "fast"])
def test_padded_batch_equals_single_utterances(family: Family, preset: str) -> None:
    model = family.build()
    if preset == "float":
        adapt(model)
    else:
        quantize(model, QuantConfig.small() if preset == "small" else QuantConfig.fast())
    assert_padding_is_ignored(model, family)


@pytest.mark.parametrize(
    ("name", "mixin"),
    [
        ("conformer-relative", MaskedConformerLayer),
        ("conformer-rotary", MaskedConformerLayer),
        ("wav2vec2-adapter", MaskedAdapter),
        ("wav2vec2-bert-adapter", MaskedLayerNorm),
        ("wav2vec2-bert-adapter", MaskedAttentionAdapter),
        ("parakeet", MaskedSubsampling),
        ("sew", MaskedSEWEncoder),
        ("SEWD-CTC", MaskedSEWDEncoder),
        ("SEW-SequenceClassification-use_weighted_layer_sum=True", PooledFrameMask),
        ("Wav2Vec2-XVector", DilatedLengths),
    ],
)
def test_a_mask_left_out_would_be_seen(name: str, mixin: type[Swapped]) -> None:
    family = BY_NAME[name]
    model = family.build()
    quantize(model)
    masked = [module for module in model.modules() if isinstance(module, mixin)]
    assert masked
    for module in masked:
        restore_class(module)
    # transformers' first SEW head of its 5 series indexes past the end instead
    with pytest.raises((AssertionError, IndexError)):
        assert_padding_is_ignored(model, family)


_SWAPPED = [
    "conformer-relative",
    "sew",
    "SEWD-CTC",
    "wav2vec2-adapter",
    "wav2vec2-bert-adapter",
    "parakeet",
]


@pytest.mark.parametrize("name", [*_SWAPPED, "Wav2Vec2-XVector"])
def test_copies_ignore_padding_too_and_dequantize_restores(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    quantize(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_padding_is_ignored(other, family)
        restored = dequantize(other)
        assert not [m for m in restored.modules() if isinstance(m, Swapped)]
        assert not [m for m in restored.modules() if m._forward_pre_hooks]
    assert_padding_is_ignored(model, family)


@pytest.mark.parametrize("name", _SWAPPED)
def test_nothing_changes_without_padding(name: str) -> None:
    family = BY_NAME[name]
    model, inputs = family.build(), family.full_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        adapt(model)
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "lowbit"])
@pytest.mark.parametrize("name", ["conformer-relative", "conformer-rotary", "sew"])
def test_every_attention_implementation(name: str, implementation: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    quantize(model)
    model.set_attn_implementation(implementation)
    assert_padding_is_ignored(model, family)


def test_conformer_refuses_a_mask_that_it_cannot_read() -> None:
    model = BY_NAME["conformer-relative"].build()
    adapt(model)
    layer = model.wav2vec2_conformer.encoder.layers[0]
    with pytest.raises(NotImplementedError, match=r"must be 'eager', 'sdpa'.*got a mask of type"):
        layer(torch.zeros(1, 4, 48), attention_mask=object())


@pytest.mark.parametrize("name", ["conformer-relative", "sew"])
def test_interleaved_calls_keep_their_masks_under_checkpointing(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    quantize(model)
    model.train()
    first, second = family.inputs(), family.inputs()
    second["attention_mask"] = torch.ones_like(second["attention_mask"])
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        # the second forward comes before the first backward
        loss = model(**first).logits.square().sum()
        model(**second)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_padding_gets_no_gradient() -> None:
    family = BY_NAME["wav2vec2-bert-adapter"]
    model = family.build()
    quantize(model)
    inputs: dict[str, Tensor] = family.inputs(3)
    x = inputs["input_features"].requires_grad_()
    model(**inputs | {"labels": family.labels()}).loss.backward()
    valid = inputs["attention_mask"].bool()
    assert x.grad is not None
    assert (x.grad[~valid] == 0).all()
    assert (x.grad[valid] != 0).any()


@pytest.mark.parametrize("name", ["Data2VecAudio-CTC-adapter_stride=2", "sew"])
def test_one_graph_for_lengths_that_do_and_do_not_divide(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    quantize(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    batches = [family.inputs(), family.inputs(), family.inputs()]
    for batch, cut in zip(batches, (0, 40, 90), strict=True):
        batch["attention_mask"] = batch["attention_mask"][:, : 2000 - cut].clone()
        batch["input_values"] = batch["input_values"][:, : 2000 - cut].clone()
    with torch.no_grad():
        outputs = [compiled(**batch).logits for batch in batches]
        for output, batch in zip(outputs, batches, strict=True):
            assert torch.equal(output, model(**batch).logits)
    assert counter.frame_count == 1
    torch._dynamo.reset()
