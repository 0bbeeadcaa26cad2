"""The numbers in the checkpoint's card and in README are those of its evaluation."""

import hashlib
import json
from pathlib import Path

import pytest

from ssl_models.digits import checkpoint_path
from ssl_models.digits.train import RECIPE

README = Path(__file__).parent.parent / "README.md"
MEAN, HELD_OUT = "mean of training speakers", "theo (held out)"


@pytest.fixture(scope="module")
def measured():
    return json.loads((checkpoint_path() / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def card():
    return (checkpoint_path() / "README.md").read_text()


def change(rate):
    return f"{rate['value']:+.1%} [{rate['low']:+.1%}, {rate['high']:+.1%}]"


def test_the_evaluation_is_of_these_weights(measured):
    weights = (checkpoint_path() / "model.safetensors").read_bytes()
    assert measured["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_the_card_states_the_recipe(card):
    assert f"Seed {RECIPE.seed}, {RECIPE.steps} steps" in card


def test_the_card_states_the_float_rates(card, measured):
    for name, rate in measured["rates"].items():
        assert f"| {name} | {rate['value']:.1%} | {rate['low']:.1%} to {rate['high']:.1%} |" in card


def test_the_card_states_the_quantized_rates(card, measured):
    assert len(measured["quantized"]) >= 6
    for name, row in measured["quantized"].items():
        cells = [name]
        for speaker in (MEAN, HELD_OUT):
            rate, differs = row["rate"][speaker]["value"], row["disagreement"][speaker]["value"]
            cells += [f"{rate:.1%}", change(row["change"][speaker]), f"{differs:.1%}"]
        assert f"| {' | '.join(cells)} |" in card


def test_the_readme_states_the_quantized_rates(measured):
    text = README.read_text()
    block = text[text.index("<!-- digits -->") : text.index("<!-- /digits -->")]
    rates = measured["rates"]
    expected = [("float32", rates[MEAN]["value"], rates[HELD_OUT]["value"], None)]
    for name, row in measured["quantized"].items():
        values = (row["rate"][speaker]["value"] for speaker in (MEAN, HELD_OUT))
        expected.append((name, *values, row["disagreement"][HELD_OUT]["value"]))
    for name, mean, held_out, differs in expected:
        last = "" if differs is None else f"{differs:.1%}"
        assert f"| {name} | {mean:.1%} | {held_out:.1%} | {last} |" in block
    assert block.count("\n| ") == len(expected) + 2
