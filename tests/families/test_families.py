"""Every family, its whole row: numbers, hidden states, training, adapters, compile, copies, files.

Dimension key: B batch, T frames, V vocabulary.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lowbit_kernels import QuantConfig, dequantize, quantize
from lowbit_kernels.modules import QuantizedModule
from lowbit_kernels.testing import assert_as_accurate
from tests.families.models import FAMILIES, LAYERS, Family
from tests.families.noise import ALLOWED, output_error, predicted_error, swap_scales

# layers of tiny models are noisy together; one thread keeps the runs short on a shared machine
pytestmark = pytest.mark.filterwarnings("ignore:.*functools.lru_cache.*")


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def quantized(family: Family, config: QuantConfig | None = None) -> Any:
    model = family.build()
    quantize(model, config)
    return model


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(
    "config",
    [QuantConfig.small(8), QuantConfig.small(4), QuantConfig.fast(4)],
    ids=["8bit", "4bit", "4bit-int8-inputs"],
)
def test_output_error_is_what_the_bits_imply(family: Family, config: QuantConfig) -> None:
    inputs = family.full_inputs()
    allowed = actual = planted = 0.0
    for seed in (1, 2, 3):  # one tiny model has too few layers for its errors to average out
        model = family.build(seed)
        reference = logits(model, inputs)
        allowed += ALLOWED * predicted_error(model, config, inputs)
        quantize(model, config)
        actual += output_error(model, reference, inputs)
        swap_scales(model)
        planted += output_error(model, reference, inputs)
    assert actual <= allowed
    assert planted > allowed, "a planted bug must be seen"


def test_hidden_states(family: Family) -> None:
    model, inputs = family.build(), family.inputs()
    names = ["hidden_states"] if family.is_ctc else ["encoder_hidden_states"]
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True)
        quantize(model)
        after = model(**inputs, output_hidden_states=True)
    for name in names:
        old, new = getattr(before, name), getattr(after, name)
        assert len(new) == len(old) == LAYERS + 1
        assert [state.shape for state in new] == [state.shape for state in old]
        # every state is the quantized model's own: near the float one, and not the same
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(new, old, strict=True)]
        assert all(0 < error < 1 for error in errors), errors


def test_gradient_checkpointing(family: Family) -> None:
    model = quantized(family).train()
    inputs, labels = family.inputs(), family.labels()
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**_with_labels(inputs, labels)).loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    plain, checkpointed = gradients
    assert plain
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name


def _with_labels(inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if k != "decoder_input_ids"} | {"labels": labels}


def test_lora_trains_and_merges(family: Family) -> None:
    peft = pytest.importorskip("peft")
    model = quantized(family)
    inputs, labels = family.inputs(), family.labels()
    lora = peft.LoraConfig(r=4, target_modules=list(family.lora_targets), init_lora_weights=True)
    tuned = peft.get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(4):
        loss = tuned(**_with_labels(inputs, labels)).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0], losses

    tuned.eval()
    before_merge = logits(tuned, inputs)
    with tuned.disable_adapter():
        without_adapter = logits(tuned, inputs)
    with pytest.warns(UserWarning, match="requantized: SQNR"):
        merged = tuned.merge_and_unload()
    target = next(n for n, _ in merged.named_modules() if n.endswith(family.lora_targets[0]))
    assert isinstance(merged.get_submodule(target), QuantizedModule)
    # rounding the sum costs about what rounding the weight did; a lost adapter costs the adapter
    after_merge = logits(merged, inputs)
    assert (after_merge - before_merge).norm() < (without_adapter - before_merge).norm()


def test_one_graph_for_three_lengths(family: Family) -> None:
    model, inputs = quantized(family), family.inputs()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    batches = [_cut(family, inputs, cut) for cut in (0, 8, 16)]
    with torch.no_grad():
        outputs = [compiled(**batch).logits for batch in batches]
    assert counter.frame_count == 1
    for output, batch in zip(outputs, batches, strict=True):
        assert torch.equal(output, logits(model, batch))
    torch._dynamo.reset()


def _cut(family: Family, inputs: dict[str, Tensor], cut: int) -> dict[str, Tensor]:
    """The batch, shorter: by 10 ``cut`` samples, by ``cut`` mel frames, or by decoder tokens."""
    if "whisper" in family.name:  # the encoder takes 30 s always
        tokens = torch.randint(3, 20, (2, 6 + cut // 8), generator=torch.Generator().manual_seed(0))
        return inputs | {"decoder_input_ids": tokens}
    step = 10 if family.input_name == "input_values" else 1
    # copies all of them, for a view and a copy never share a graph
    layout = torch.contiguous_format
    return {
        n: t[:, : t.shape[1] - step * cut].clone(memory_format=layout) for n, t in inputs.items()
    }


def test_static_scales_serve_other_clips(family: Family) -> None:
    inputs, clip = family.full_inputs(), family.inputs()
    reference = logits(family.build(), inputs)
    dynamic = quantized(family, QuantConfig.fast())
    static = family.build()
    report = quantize(static, QuantConfig.fast(), calibration=[clip])
    unused = [layer.name for layer in report.left if "calibration" in layer.reason]
    # transformers' conformer builds a positional convolution and never calls it
    assert all(name.endswith("pos_conv_embed.conv") for name in unused)
    assert bool(unused) == family.name.startswith("conformer")
    layers = [m for m in static.modules() if isinstance(m, QuantizedModule)]
    assert layers
    assert all(layer.input_scale > 0 for layer in layers)
    error, allowed = (output_error(m, reference, inputs) for m in (static, dynamic))
    assert error <= ALLOWED * allowed


def test_copies_give_the_same_bits(family: Family) -> None:
    model, inputs = quantized(family), family.inputs()
    expected = logits(model, inputs)
    assert torch.equal(logits(copy.deepcopy(model), inputs), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), inputs), expected)
    other = quantized(family)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(other, inputs), expected)


def test_save_and_load_give_the_same_bits(family: Family, tmp_path: Any) -> None:
    model, inputs = quantized(family, QuantConfig.fast()), family.inputs()
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded, inputs), expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(type(model).from_pretrained(again), inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_loading_in_16_bits_keeps_the_scales(family: Family, dtype: Any, tmp_path: Any) -> None:
    model, inputs = quantized(family), family.inputs()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    scales = {n: t for n, t in model.named_buffers() if n.endswith("scale")}
    for name, scale in loaded.named_buffers():
        if name in scales:
            assert scale.dtype == scales[name].dtype
            assert torch.equal(scale, scales[name]), name
    assert loaded.dtype == dtype
    halved = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    output = logits(loaded, halved)
    assert output.dtype == dtype
    assert torch.isfinite(output).all()


def test_autocast(family: Family) -> None:
    model, inputs = quantized(family), family.full_inputs()
    reference = dequantize(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        actual, low = logits(model, inputs), logits(reference, inputs)
    doubled = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    assert_as_accurate(actual, low, logits(reference.double(), doubled))
