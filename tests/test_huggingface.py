"""LowbitConfig and the quantizer: registration, loading and saving, the masked front end."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import lowbit_kernels.integrations.front_end as front_end  # noqa: E402
from lowbit_kernels import (  # noqa: E402
    LowbitConfig,
    QConv1d,
    QLinear,
    QuantConfig,
    QuantSpec,
    dequantize,
    quantize,
)
from lowbit_kernels.testing import assert_as_accurate  # noqa: E402
from tests.families.models import FAMILIES, Family  # noqa: E402

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture
def family() -> Family:
    return BY_NAME["wav2vec2-group"]


@pytest.fixture
def float_checkpoint(family: Family, tmp_path: Path) -> Path:
    path = tmp_path / "float"
    family.build().save_pretrained(path)
    return path


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


# registration


def test_import_registers_and_loads_no_library() -> None:
    code = """
import sys
import lowbit_kernels
assert "transformers" not in sys.modules and "triton" not in sys.modules
import lowbit_kernels.conversion
assert "transformers" not in sys.modules and "triton" not in sys.modules
from transformers import AutoModelForCTC
from transformers.modeling_utils import AttentionInterface
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "lowbit_kernels" in AUTO_QUANTIZER_MAPPING
assert "lowbit_kernels" in AUTO_QUANTIZATION_CONFIG_MAPPING
assert "lowbit" in AttentionInterface._global_mapping
waiting = [f.name for f in sys.meta_path if type(f).__name__ == "_Waiting"]
assert "transformers.modeling_utils" not in waiting, waiting
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import Wav2Vec2ForCTC",
        "from lowbit_kernels import LowbitConfig",
        "from lowbit_kernels.integrations.huggingface_attention import lowbit_attention",
        "import lowbit_kernels.integrations.adapters",
    ],
)
def test_registers_whatever_comes_first(first: str) -> None:
    code = f"""
{first}
import lowbit_kernels, transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "lowbit_kernels" in AUTO_QUANTIZER_MAPPING
assert "lowbit" in transformers.modeling_utils.AttentionInterface._global_mapping
from lowbit_kernels.conversion import ADAPTERS
assert len(ADAPTERS) == len({{adapter.matches for adapter in ADAPTERS}}) > 3
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_loading_without_the_import_is_loud(family: Family, tmp_path: Path) -> None:
    model = family.build()
    quantize(model)
    model.save_pretrained(tmp_path)
    load = f"Wav2Vec2ForCTC.from_pretrained({str(tmp_path)!r})"
    result = run(f"from transformers import Wav2Vec2ForCTC; {load}")
    said = result.stdout + result.stderr
    assert "Unknown quantization type, got lowbit_kernels" in said
    assert "MISSING" in said, said
    assert "q_proj" in said


# from_pretrained and back


@pytest.mark.parametrize(
    "config",
    [
        LowbitConfig(),
        LowbitConfig(bits=2, method="search"),
        LowbitConfig(preset="fast"),
        LowbitConfig(config=QuantConfig.fast(8).to_dict()),
        LowbitConfig(symmetric=False),
    ],
    ids=["default", "2bit-search", "fast", "dict", "asymmetric"],
)
def test_quantizes_at_load(
    config: LowbitConfig, family: Family, float_checkpoint: Path, tmp_path: Path
) -> None:
    before = json.dumps(config.to_dict())
    loaded = transformers.AutoModelForCTC.from_pretrained(
        float_checkpoint, quantization_config=config
    )
    assert json.dumps(config.to_dict()) == before, "the caller's config is not written to"
    assert type(loaded).__name__ == "Wav2Vec2ForCTC"
    expected = family.build()
    quantize(expected, config.quant_config, method=config.method)
    output = logits(loaded, family.inputs())
    assert torch.equal(output, logits(expected, family.inputs()))
    # asymmetric weights cannot be grouped
    symmetric = config.quant_config.default.symmetric
    assert isinstance(loaded.wav2vec2.encoder.pos_conv_embed.conv, QConv1d) == symmetric
    assert type(loaded.lm_head) is torch.nn.Linear

    loaded.save_pretrained(tmp_path / "low")
    again = transformers.AutoModelForCTC.from_pretrained(tmp_path / "low")
    assert torch.equal(logits(again, family.inputs()), output)


def test_encoder_and_head_checkpoints_fit_each_other(family: Family, tmp_path: Path) -> None:
    model = family.build()
    quantize(model, QuantConfig(QuantSpec(), skip=()))  # the head too
    assert isinstance(model.lm_head, QLinear)
    model.save_pretrained(tmp_path / "ctc")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "ctc")
    inputs = family.inputs()
    with torch.no_grad():
        states = encoder(**inputs).last_hidden_state
        assert torch.equal(states, model.wav2vec2(**inputs).last_hidden_state)
    encoder.save_pretrained(tmp_path / "encoder")
    with_head = transformers.AutoModelForCTC.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        assert torch.equal(with_head.wav2vec2(**inputs).last_hidden_state, states)


def test_static_scales_are_saved(family: Family, tmp_path: Path) -> None:
    model = family.build()
    clips = [torch.randn(2000) for _ in range(4)]
    quantize(model, QuantConfig.fast(), calibration=clips)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = transformers.AutoModelForCTC.from_pretrained(tmp_path, dtype=dtype)
        old, new = dict(model.named_buffers()), dict(loaded.named_buffers())
        static = [name for name in old if name.endswith("input_scale")]
        assert static
        for name in static:
            assert new[name].dtype == torch.float32
            assert torch.equal(old[name], new[name])


def test_old_weight_norm_names_load(family: Family, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = family.build()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    names = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    state = {}
    for key, value in load_file(file).items():
        for new, old in names.items():
            key = key.replace(new, old)
        state[key] = value
    assert any(key.endswith("weight_g") for key in state)
    save_file(state, file, metadata={"format": "pt"})
    loaded = transformers.AutoModelForCTC.from_pretrained(
        tmp_path, quantization_config=LowbitConfig()
    )
    quantize(model)
    assert torch.equal(logits(loaded, family.inputs()), logits(model, family.inputs()))


def test_dequantize_gives_a_float_model_back(family: Family, tmp_path: Path) -> None:
    model = family.build()
    quantize(model)
    inputs = family.full_inputs()
    low = logits(model, inputs)
    dequantize(model)
    assert not getattr(model, "is_quantized", False)
    assert_as_accurate(
        low, logits(model, inputs), logits(copy.deepcopy(model).double(), _double(inputs))
    )
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(plain, inputs), logits(model, inputs))
    assert type(plain.wav2vec2.feature_projection.projection) is torch.nn.Linear
    loaded = type(model).from_pretrained(tmp_path, quantization_config=LowbitConfig())
    loaded.dequantize()
    assert type(loaded.wav2vec2.feature_projection.projection) is torch.nn.Linear


def _double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


def test_modules_to_not_convert(float_checkpoint: Path) -> None:
    config = LowbitConfig(modules_to_not_convert=["feature_extractor", "q_proj"])
    model = transformers.AutoModelForCTC.from_pretrained(
        float_checkpoint, quantization_config=config
    )
    kinds = {name: type(module) for name, module in model.named_modules()}
    low = [name for name, kind in kinds.items() if kind in (QLinear, QConv1d)]
    assert low
    assert not [name for name in low if "feature_extractor" in name or "q_proj" in name]
    assert kinds["lm_head"] is torch.nn.Linear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits must be one of"),
        ({"preset": "tiny"}, "preset must be one of"),
        ({"preset": "fast", "group_size": 32}, "must be left out where preset"),
        ({"config": QuantConfig(), "bits": 8}, "must be left out where config"),
        ({"config": QuantConfig(), "preset": "fast"}, "preset must be None where config"),
        ({"method": "magic"}, "method must be one of"),
        ({"inputs": "int8", "input_scale": "static"}, "'static' needs calibration clips"),
        ({"version": 99, "shape": "new"}, "version must be at most 1"),
        ({"bit": 4}, "no argument .'bit'."),
        ({"quant_method": "awq"}, "quant_method must be"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names"),
    ],
)
def test_wrong_config(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowbitConfig(**arguments)


def test_checkpoint_of_another_model_is_refused(family: Family, tmp_path: Path) -> None:
    model = family.build()
    quantize(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["wav2vec2.encoder.layers.7.attention.q_proj"] = next(iter(layers.values()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"layers\.7\.attention\.q_proj' where Wav2Vec2ForCTC has nothing"
    ):
        type(model).from_pretrained(tmp_path)


# the front end


def test_layers_keep_their_classes(family: Family) -> None:
    model, plain = family.build(), family.build()
    quantize(model)
    for (name, new), (_, old) in zip(
        model.wav2vec2.feature_extractor.named_modules(),
        plain.wav2vec2.feature_extractor.named_modules(),
        strict=True,
    ):
        assert isinstance(new, type(old)), name
    dequantize(model)
    assert type(model.wav2vec2.feature_extractor) is type(plain.wav2vec2.feature_extractor)
    assert not model.wav2vec2._forward_pre_hooks


def test_interleaved_calls_keep_their_lengths_under_checkpointing(family: Family) -> None:
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
        gradients.append(
            model.wav2vec2.feature_extractor.conv_layers[0].layer_norm.weight.grad.clone()
        )
    assert torch.equal(*gradients)


def test_front_end_alone_takes_every_frame(family: Family) -> None:
    model = family.build()
    quantize(model)
    inputs = family.inputs()
    front, waveforms = model.wav2vec2.feature_extractor, inputs["input_values"]
    with torch.no_grad():
        before = front(waveforms)
        model(**inputs)
        assert torch.equal(front(waveforms), before)


def test_padded_batch_without_a_mask_warns_once(
    family: Family, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_end, "_warned", False)
    model = family.build()
    quantize(model)
    inputs = family.inputs()
    with caplog.at_level(logging.WARNING, logger="lowbit_kernels"):
        logits(model, inputs)
        logits(model, family.full_inputs())
        logits(model, {"input_values": inputs["input_values"][:1]})
        assert not caplog.records
        for _ in range(2):
            logits(model, {"input_values": inputs["input_values"]})
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "a padded batch came without attention_mask"
    ]


# heads


def test_xvector_layers_are_called(family: Family) -> None:
    config = copy.deepcopy(family.build().config)
    config.tdnn_dim, config.tdnn_kernel, config.tdnn_dilation = (24, 24), (3, 2), (1, 2)
    config.xvector_output_dim = 24
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForXVector(config).eval()
    plain_kind = type(model.tdnn[0])
    inputs = family.full_inputs()
    quantize(model, QuantConfig.fast(), calibration=[inputs])
    assert all(layer.kernel.input_scale > 0 for layer in model.tdnn)
    dequantize(model)
    assert type(model.tdnn[0]) is plain_kind

    quantize(model)
    low_bit = logits(model, inputs)
    low = logits(dequantize(model), inputs)
    assert_as_accurate(low_bit, low, logits(model.double(), _double(inputs)))
