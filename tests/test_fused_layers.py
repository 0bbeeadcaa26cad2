"""``quantize(fuse=True)``: the same numbers in fewer ops, and every way back."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit_kernels import (
    QuantConfig,
    QuantSpec,
    dequantize,
    load_quantized,
    quantize,
    save_quantized,
)
from lowbit_kernels.integrations.encoder_layers import FusedLayer
from lowbit_kernels.integrations.fuse import is_fused
from lowbit_kernels.integrations.huggingface import LowbitConfig
from lowbit_kernels.testing import assert_as_accurate
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


def build(name: str, preset: str, *, fuse: bool) -> Any:
    family, config = BY_NAME[name], CONFIGS[preset]
    model = family.build()
    clips = [family.full_inputs()] if preset == "static" else None
    quantize(model, config, fuse=fuse, calibration=clips)
    if not name.startswith("wavlm"):
        model.set_attn_implementation("lowbit")
    return model


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(**inputs).logits
    return output


def exact_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of the same quantized model, computed in fp64."""
    double = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    output: Tensor = copy.deepcopy(model).double()(**double).logits
    return output.detach()


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_as_accurate_as_the_layers_they_were(name: str, preset: str) -> None:
    family = BY_NAME[name]
    inputs = family.inputs()
    plain, fused = (build(name, preset, fuse=fuse) for fuse in (False, True))
    assert len(layers_of(fused)) == LAYERS
    assert not is_fused(plain)
    assert_as_accurate(logits(fused, inputs), logits(plain, inputs), exact_logits(plain, inputs))


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


def most_launches(name: str, preset: str) -> int:
    transformer, conformer = {"small": (7, 14), "fast": (9, 18), "static": (7, 14)}[preset]
    # four look its table of clipped offsets up
    conformer += 4 * (name == "wav2vec2-bert")
    transformer += name.startswith("wavlm")  # the gate of its bias
    return conformer if name in CONFORMERS else transformer


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_layer_runs_in_a_handful_of_ops(name: str, preset: str) -> None:
    model = build(name, preset, fuse=True)
    names = launches_of_the_last_layer(model, BY_NAME[name].inputs(), ops)
    assert len(names) <= most_launches(name, preset), names


@pytest.mark.gpu
@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_layer_runs_in_a_handful_of_launches(name: str, preset: str) -> None:
    model = build(name, preset, fuse=True).to("cuda", torch.bfloat16)
    inputs = {
        n: t.to("cuda", torch.bfloat16 if t.is_floating_point() else t.dtype)
        for n, t in BY_NAME[name].inputs().items()
    }
    names = launches_of_the_last_layer(model, inputs, kernels)
    assert len(names) <= most_launches(name, preset), names


@pytest.mark.parametrize("name", ["wav2vec2-group", "wav2vec2-layer", "conformer-relative"])
def test_padded_utterances_equal_single_ones(name: str) -> None:
    family, model = BY_NAME[name], build(name, "small", fuse=True)
    batch = logits(model, family.inputs())
    for row, single in zip(batch, family.single_inputs(), strict=True):
        alone = logits(model, single)[0]
        assert_as_accurate(row[: len(alone)], alone, alone.double())


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


@pytest.mark.parametrize("change", ["write", "move", "load"])
def test_a_changed_weight_is_seen(change: str) -> None:
    inputs = BY_NAME["wav2vec2-group"].inputs()
    plain, fused = (build("wav2vec2-group", "small", fuse=fuse) for fuse in (False, True))
    logits(fused, inputs)
    other = build("wav2vec2-group", "small", fuse=False)
    for module in other.modules():
        if hasattr(module, "q_proj"):
            module.q_proj.scale *= 1.5
            module.k_proj.bias.data += 0.3
    for model in (plain, fused):
        if change == "load":
            model.load_state_dict(other.state_dict(), assign=True)
            continue
        for module in model.modules():
            if hasattr(module, "q_proj"):
                scale = module.q_proj.scale
                if change == "write":
                    scale *= 1.5
                else:
                    module.q_proj.scale = scale * 1.5
                module.k_proj.bias.data += 0.3
    wanted = logits(other, inputs)
    assert torch.equal(logits(plain, inputs), wanted)
    assert_as_accurate(logits(fused, inputs), wanted, wanted.double())


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


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_hook_that_changes_what_goes_between_layers_is_obeyed(where: str) -> None:
    inputs = BY_NAME["wav2vec2-group"].inputs()
    plain, fused = (build("wav2vec2-group", "fast", fuse=fuse) for fuse in (False, True))
    before = logits(fused, inputs)
    for model in (plain, fused):
        first, last = model.wav2vec2.encoder.layers
        if where == "first":
            first.register_forward_hook(lambda module, args, y: y.mul_(0.5))
        else:
            last.register_forward_pre_hook(lambda module, args: (args[0].mul_(0.5),))
    after = logits(fused, inputs)
    assert not torch.equal(after, before)
    assert_as_accurate(after, logits(plain, inputs), exact_logits(plain, inputs))


@pytest.mark.parametrize("how", ["gradients", "training", "eager", "autocast"])
def test_elsewhere_a_layer_computes_what_it_did(how: str) -> None:
    inputs = BY_NAME["wav2vec2-group"].inputs()
    outputs = []
    for fuse in (False, True):
        model = build("wav2vec2-group", "small", fuse=fuse)
        if how == "eager":
            model.set_attn_implementation("eager")
        model.train(how == "training")
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


@pytest.mark.parametrize("how", ["deepcopy", "save_quantized", "save_pretrained", "torch.save"])
def test_copies_and_checkpoints_stay_fused(how: str, tmp_path: Any) -> None:
    inputs = BY_NAME["wav2vec2-group"].inputs()
    model = build("wav2vec2-group", "fast", fuse=True)
    wanted = logits(model, inputs)
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "save_quantized":
        save_quantized(model, tmp_path)
        again = load_quantized(tmp_path)
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
