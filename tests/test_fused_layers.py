"""``quantize(fuse=True)``: the same numbers in fewer ops, and every way back."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_kernels import (
    QuantConfig,
    QuantSpec,
    dequantize,
    load_quantized,
    quantize,
    save_quantized,
)
from lowbit_kernels.integrations.fuse import is_fused
from lowbit_kernels.integrations.huggingface import LowbitConfig
from lowbit_kernels.matmul import csrc
from lowbit_kernels.testing import assert_as_accurate
from tests.families.models import LAYERS
from tests.fused_cases import (
    BY_NAME,
    CONFIGS,
    CONFORMERS,
    FUSED,
    Launches,
    build,
    exact_logits,
    kernels,
    launches_of_the_last_layer,
    layers_of,
    logits,
    moved,
    ops,
)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_as_accurate_as_the_layers_they_were(name: str, preset: str) -> None:
    family = BY_NAME[name]
    inputs = family.inputs()
    plain, fused = (build(name, preset, fuse=fuse) for fuse in (False, True))
    assert len(layers_of(fused)) == LAYERS
    assert not is_fused(plain)
    assert_as_accurate(logits(fused, inputs), logits(plain, inputs), exact_logits(plain, inputs))


# whose norms are part of the matmuls around them, but for the first norm of WavLM's
PRE_NORM = ("wav2vec2-layer", "whisper", "wavlm-stable")


def most_launches(name: str, preset: str, dtype: torch.dtype) -> int:
    transformer, conformer = {"small": (7, 14), "fast": (9, 18), "static": (7, 14)}[preset]
    if preset == "small" and dtype != torch.float32:
        conformer = 11
        if name in PRE_NORM:
            transformer = 5 + (name == "wavlm-stable")
    if name == "whisper" and dtype == torch.float16:
        # a clamp, and the next layer reads what it makes
        transformer += 1 + (preset == "small")
    transformer += name.startswith("wavlm")  # the gate of its bias
    return conformer if name in CONFORMERS else transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_layer_runs_in_a_handful_of_ops(name: str, preset: str, dtype: torch.dtype) -> None:
    model = build(name, preset, fuse=True, dtype=dtype)
    inputs = moved(BY_NAME[name].inputs(), "cpu", dtype)
    names = launches_of_the_last_layer(model, inputs, ops)
    assert len(names) <= most_launches(name, preset, dtype), names


@pytest.mark.gpu
@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_layer_runs_in_a_handful_of_launches(
    name: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # it would take these few rows, without norms
    monkeypatch.setattr(csrc, "is_available", lambda: False)
    there = {"device": "cuda", "dtype": torch.bfloat16}
    model = build(name, preset, fuse=True, **there)  # type: ignore[arg-type]
    inputs = moved(BY_NAME[name].inputs(), **there)  # type: ignore[arg-type]
    names = launches_of_the_last_layer(model, inputs, kernels)
    assert len(names) <= most_launches(name, preset, torch.bfloat16), names


@pytest.mark.parametrize(
    "name", ["wav2vec2-group", "wav2vec2-layer", "conformer-relative", "wavlm"]
)
def test_padded_utterances_equal_single_ones(name: str) -> None:
    family, model = BY_NAME[name], build(name, "small", fuse=True)
    batch = logits(model, family.inputs())
    for row, single in zip(batch, family.single_inputs(), strict=True):
        alone = logits(model, single)[0]
        assert_as_accurate(row[: len(alone)], alone, alone.double())


@pytest.mark.parametrize("preset", ["small", "fast"])
@pytest.mark.parametrize("name", ["wav2vec2-group", "wav2vec2-layer", "conformer-relative"])
def test_deterministic_layers_give_the_same_bits_in_any_batch(name: str, preset: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    quantize(model, CONFIGS[preset], deterministic=True, fuse=True)
    batch = model_frames(model, family.inputs())
    for row, single in zip(batch, family.single_inputs(), strict=True):
        alone = model_frames(model, single)[0]
        assert torch.equal(row[: len(alone)], alone)


def model_frames(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of the encoder: a head's product in float depends on the number of rows."""
    with torch.inference_mode():
        frames: Tensor = model.base_model(**inputs).last_hidden_state
    return frames


def test_whisper_clamps_in_fp16() -> None:
    outputs = []
    for fuse in (False, True):
        model = build("whisper", "small", fuse=fuse, dtype=torch.float16)
        layer = model.model.encoder.layers[0]
        layer.fc2.bias.data.fill_(6e4)
        with torch.inference_mode():
            outputs.append(as_tensor(layer(torch.full((2, 7, 48), 6e4, dtype=torch.float16), None)))
        assert outputs[-1].isfinite().all()
    assert_as_accurate(outputs[1], outputs[0], outputs[0].double())


def test_projections_share_memory_and_state_dicts_do_not_change() -> None:
    plain, fused = (build("wav2vec2-group", "small", fuse=fuse) for fuse in (False, True))
    logits(fused, BY_NAME["wav2vec2-group"].inputs())
    attention = layers_of(fused)[0].attention
    storages = {
        projection.qweight.untyped_storage().data_ptr()
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert len(storages) == 1
    states = plain.state_dict(), fused.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def _change(model: Any, how: str) -> None:
    """Other scales and biases, written in place or put in the place of the old ones."""
    for attention in (m for m in model.modules() if hasattr(m, "q_proj")):
        scale, bias = attention.q_proj.scale, attention.v_proj.bias.data
        if how in ("write", "load"):
            scale *= 1.5
            bias += 0.3
        elif how == "scale":
            attention.q_proj.scale = scale * 1.5
        else:
            attention.v_proj.bias.data = bias + 0.3


@pytest.mark.parametrize("how", ["write", "scale", "bias", "load"])
def test_a_changed_weight_is_seen(how: str) -> None:
    inputs = BY_NAME["wav2vec2-group"].inputs()
    plain, fused = (build("wav2vec2-group", "small", fuse=fuse) for fuse in (False, True))
    before = logits(fused, inputs)
    _change(plain, how)
    if how == "load":
        fused.load_state_dict(plain.state_dict(), assign=True)
    else:
        _change(fused, how)
    assert not torch.equal(logits(fused, inputs), before)
    assert_as_accurate(logits(fused, inputs), logits(plain, inputs), exact_logits(plain, inputs))


def _watch(model: Any) -> list[Any]:
    """A hook on a linear layer inside the last layer; a list that grows at each call."""
    calls: list[Any] = []
    layer = layers_of(model)[-1]
    layer.feed_forward.output_dense.register_forward_hook(lambda *args: calls.append(args))
    return calls


def test_hooks_inside_are_called() -> None:
    inputs = BY_NAME["wav2vec2-group"].inputs()
    plain, fused = (build("wav2vec2-group", "small", fuse=fuse) for fuse in (False, True))
    calls = _watch(fused)
    output = logits(fused, inputs)
    assert len(calls) == 1
    assert torch.equal(output, logits(plain, inputs))


def as_tensor(output: Any) -> Tensor:
    """Of a layer: in older versions of transformers the first of several."""
    return output[0] if isinstance(output, tuple) else output


def halve(module: Any, args: Any, output: Any) -> None:
    as_tensor(output).mul_(0.5)


# layers that hand int8 rows on, and layers that hand statistics on
HANDING = pytest.mark.parametrize(
    ("name", "preset", "dtype"),
    [("wav2vec2-group", "fast", torch.float32), ("wav2vec2-layer", "small", torch.bfloat16)],
)


@HANDING
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_hook_that_changes_what_goes_between_layers_is_obeyed(
    where: str, name: str, preset: str, dtype: torch.dtype
) -> None:
    inputs = moved(BY_NAME[name].inputs(), "cpu", dtype)
    plain, fused = (build(name, preset, fuse=fuse, dtype=dtype) for fuse in (False, True))
    before = logits(fused, inputs)
    for model in (plain, fused):
        first, last = model.wav2vec2.encoder.layers
        if where == "first":
            first.register_forward_hook(halve)
        else:
            last.register_forward_pre_hook(lambda module, args: (args[0].mul_(0.5),))
    after = logits(fused, inputs)
    assert not torch.equal(after, before)
    assert_as_accurate(after, logits(plain, inputs), exact_logits(plain, inputs))


@pytest.mark.parametrize("how", ["gradients", "training", "no gradients", "eager", "autocast"])
def test_elsewhere_a_layer_computes_what_it_did(how: str) -> None:
    inputs = BY_NAME["wav2vec2-group"].inputs()
    outputs = []
    for fuse in (False, True):
        model = build("wav2vec2-group", "small", fuse=fuse)
        if how == "eager":
            model.set_attn_implementation("eager")
        model.train(how in ("training", "no gradients"))
        with (
            torch.set_grad_enabled(how in ("gradients", "training")),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"),
            Launches() as launches,
        ):
            outputs.append(model(**inputs).logits)
        # three projections a layer, as without fusion
        wide = [n for n in launches.names if n.startswith("lowbit.linear")]
        assert len(wide) >= 6 * LAYERS
    assert torch.equal(outputs[0], outputs[1])
    assert outputs[1].requires_grad == (how in ("gradients", "training"))


def test_hidden_states_are_recorded() -> None:
    inputs = BY_NAME["wav2vec2-group"].inputs()
    plain, fused = (build("wav2vec2-group", "fast", fuse=fuse) for fuse in (False, True))
    with torch.inference_mode():
        wanted, found = (m(**inputs, output_hidden_states=True) for m in (plain, fused))
    assert len(found.hidden_states) == LAYERS + 1
    for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert_as_accurate(a, b, b.double())
    with Launches() as launches:  # recording leaves hooks behind, which only watch
        logits(fused, inputs)
    assert sum(name.startswith("lowbit.flash") for name in launches.names) == LAYERS
    assert sum(name.startswith("lowbit.linear") for name in launches.names) <= 4 * LAYERS + 2


@HANDING
@pytest.mark.parametrize("how", ["deepcopy", "save_quantized", "save_pretrained", "torch.save"])
def test_copies_and_checkpoints_stay_fused(
    how: str, tmp_path: Any, name: str, preset: str, dtype: torch.dtype
) -> None:
    inputs = moved(BY_NAME[name].inputs(), "cpu", dtype)
    model = build(name, preset, fuse=True, dtype=dtype)
    wanted = logits(model, inputs)
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "save_quantized":
        save_quantized(model, tmp_path)
        again = load_quantized(tmp_path).to(dtype)
    elif how == "save_pretrained":
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
    else:
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
    del model
    gc.collect()
    assert len(layers_of(again)) == LAYERS
    assert again.config._attn_implementation == "lowbit"
    assert torch.equal(logits(again, inputs), wanted)


def test_dequantize_gives_plain_layers_back() -> None:
    inputs = BY_NAME["conformer-relative"].inputs()
    model = build("conformer-relative", "small", fuse=True)
    wanted = logits(model, inputs)
    dequantize(model)
    assert not is_fused(model)
    layer = model.wav2vec2_conformer.encoder.layers[0]
    assert not {"_joined", "_next", "_positions"} & layer.__dict__.keys()
    found = logits(model, inputs)
    assert found.shape == wanted.shape


def test_lora_on_top_is_not_bypassed() -> None:
    peft = pytest.importorskip("peft")
    inputs = BY_NAME["wav2vec2-group"].inputs()
    outputs = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = build("wav2vec2-group", "small", fuse=fuse)
        before = logits(model, inputs)
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        outputs.append(logits(peft.get_peft_model(model, config).eval(), inputs))
        assert not torch.equal(outputs[-1], before)
    assert torch.equal(outputs[0], outputs[1])


def test_layers_that_differ_stay_as_they_were() -> None:
    family = BY_NAME["wav2vec2-group"]
    model = family.build()
    config = QuantConfig(
        QuantSpec(), overrides={r"layers\.0\.attention\.k_proj": QuantSpec(bits=8)}
    )
    quantize(model, config, fuse=True)
    with Launches() as launches:
        logits(model, family.inputs())
    # one layer has six matrix products, the other four; and the projection of the features
    assert sum(name.startswith("lowbit.linear") for name in launches.names) == 6 + 4 + 1


@HANDING
def test_nothing_is_taken_that_was_made_of_another_tensor(
    name: str, preset: str, dtype: torch.dtype
) -> None:
    plain, fused = (build(name, preset, fuse=fuse, dtype=dtype) for fuse in (False, True))
    inputs = moved(BY_NAME[name].inputs(), "cpu", dtype)
    x, z = torch.randn(2, 2, 9, 48, dtype=dtype)
    logits(fused, inputs)
    first, last = fused.wav2vec2.encoder.layers
    with torch.inference_mode():
        first(x)
        found, wanted = as_tensor(last(z)), as_tensor(plain.wav2vec2.encoder.layers[1](z))
        exact = as_tensor(
            dequantize(plain.double()).double().wav2vec2.encoder.layers[1](z.double())
        )
    assert_as_accurate(found, wanted, exact)


def test_positions_of_a_forward_that_a_layer_left_are_forgotten() -> None:
    family = BY_NAME["conformer-relative"]
    plain, fused = (build(family.name, "small", fuse=fuse) for fuse in (False, True))
    hook = layers_of(fused)[-1].ffn2.output_dense.register_forward_hook(lambda *_: None)
    logits(fused, family.inputs())
    hook.remove()
    shorter = family.single_inputs()[1]
    found = logits(fused, shorter)
    assert_as_accurate(found, logits(plain, shorter), exact_logits(plain, shorter))


def test_the_report_says_what_was_fused() -> None:
    report = quantize(BY_NAME["hubert"].build(), fuse=True)
    assert f"{LAYERS} encoder layers are fused" in report.notes
    report = quantize(BY_NAME["parakeet"].build(), fuse=True)
    assert "0 encoder layers are fused" in report.notes


def test_from_pretrained_fuses(tmp_path: Any) -> None:
    family = BY_NAME["wav2vec2-group"]
    model = family.build()
    model.save_pretrained(tmp_path)
    quantize(model, QuantConfig.fast(), fuse=True)
    config = LowbitConfig(preset="fast", fuse=True)
    again = type(model).from_pretrained(tmp_path, quantization_config=config).eval()
    assert len(layers_of(again)) == LAYERS
    assert torch.equal(logits(again, family.inputs()), logits(model, family.inputs()))


def test_fuse_must_be_a_bool() -> None:
    with pytest.raises(ValueError, match="fuse must be True or False, got 1"):
        QuantConfig(fuse=1)  # type: ignore[arg-type]
