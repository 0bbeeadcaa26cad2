"""``lowbit cost``: presets, files, errors."""

import pytest

from ssl_models.cost import cost
from ssl_models.presets import preset


def test_a_presets_cost_is_shown_by_kind(lowbit):
    options = ["hubert-base-fast", "--bits", "2", "--scope", "bit-la", "--final-dim", "256"]
    wanted = cost(preset("hubert-base-fast"), bits=2, scope="bit-la", final_dim=256).to_dict()
    found = lowbit("cost", *options, "--json")
    assert found.code == 0
    assert found.json == {"config": "hubert-base-fast"} | wanted
    table = lowbit("cost", *options).out
    assert "35.84" in table
    assert "estimated runtime 0.141" in table
    for kind in wanted["kinds"]:
        assert kind in table


def test_a_config_is_read_from_a_file(lowbit, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(preset("conformer-s", num_layers=2).to_json())
    found = lowbit(
        "cost", path, "--seconds", "2", "--bits", "1", "--convolutions", "--inputs", "4", "--json"
    )
    config = preset("conformer-s", num_layers=2)
    wanted = cost(config, 2.0, bits=1, convolutions=True, inputs=4).to_dict()
    assert found.json == {"config": str(path)} | wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: text must be JSON, got '{'"),
        ('{"layers": 3}', "config.json: layers must be one of"),
        ('{"num_heads": 7}', "config.json: num_heads must be a divisor of hidden_size 768, got 7"),
        (None, "config.json is no file, nor a preset: conformer-l"),
    ],
)
def test_wrong_configs_are_one_line(text, message, lowbit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    found = lowbit("cost", "config.json")
    assert found.code == 2
    assert found.out == ""
    assert message in found.err
    assert found.err.count("\n") == 1


def test_wrong_options_are_one_line(lowbit):
    found = lowbit("cost", "hubert-base", "--bits", "3")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "bits must be one of (1, 2, 4, 8), or None, got 3" in found.err
