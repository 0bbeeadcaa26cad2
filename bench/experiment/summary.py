"""The experiment's numbers, and its verdict, from the files of its cells."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.experiment.arms import ALL, WIDTHS
from bench.experiment.cells import PRETRAINED, STAGES, TRAINED, TUNED, Cell
from bench.experiment.measure import NOISE_LEVELS, QUIET
from bench.experiment.models import CONFIGS
from bench.experiment.statistics import (
    Estimate,
    Values,
    estimate,
    holm,
    joined_verdict,
    mixing,
    paired_bootstrap,
    verdict,
)

PRIMARY = ("w4", "noise15")

Content = Mapping[str, Any]


def summarize(cells: Mapping[Cell, Content]) -> dict[str, Any]:
    """Everything that is reported; parts whose cells are missing are left out, and named.

    Args:
        cells: what the files hold.
    """
    seeds = sorted({cell.seed for cell in cells})
    measured = {
        seed: {
            name: cells[Cell(name, seed, "ptq")]
            for name in CONFIGS
            if Cell(name, seed, "ptq") in cells
        }
        for seed in seeds
    }
    complete = [seed for seed in seeds if {"AA", "AC", "CC"} <= measured[seed].keys()]
    return {
        "replicates": {"primary": complete, "any": seeds},
        "mixing": _mixing([measured[seed] for seed in complete]),
        "inside_ac": _inside([measured[seed]["AC"] for seed in complete]),
        "models": {
            name: _model([measured[s][name] for s in seeds if name in measured[s]])
            for name in CONFIGS
            if any(name in measured[seed] for seed in seeds)
        },
        "storage_mb": {
            cell.model: content["storage_mb"]
            for cell, content in cells.items()
            if cell.stage == "float"
        },
        "read": _read(cells),
        "trained_drop": _trained_drop(cells),
        "pretraining": _pretraining(cells),
    }


def summarize_real(found: Mapping[str, Content]) -> dict[str, Any]:
    """The rows of models with real weights, by name."""
    rows: dict[str, Any] = {}
    for name, content in found.items():
        if "utterances" in content and isinstance(content["utterances"], Mapping):
            rows[name] = {"all": _model([content])}
            keys = [key for key in content["utterances"] if "/J(" in key]
            rows[name]["J"] = {key: float(column(content, key).mean()) for key in keys}
        else:
            rows[name] = {key: content[key] for key in content if key in ("w8", "w4")}
    return rows


def _mixing(replicates: Sequence[Mapping[str, Content]]) -> dict[str, Any]:
    """M at each width and level of noise, and the verdict."""
    if len(replicates) < 2:
        return {}
    found: dict[str, Any] = {}
    estimates: dict[str, Estimate] = {}
    for name in (*(f"w{bits}" for bits in WIDTHS), *(f"noise{level}" for level in NOISE_LEVELS)):
        key = f"{name}/J(X,Y)"
        parts = [[column(each[model], key) for each in replicates] for model in ("AC", "AA", "CC")]
        estimates[name] = estimate(mixing(*parts))
        found[name] = asdict(estimates[name]) | {
            "J": {
                m: [float(v.mean()) for v in p]
                for m, p in zip(("AC", "AA", "CC"), parts, strict=True)
            }
        }
    adjusted = holm({f"w{bits}": estimates[f"w{bits}"].p_value for bits in WIDTHS})
    for name, value in adjusted.items():
        found[name]["holm_p"] = value
    for name in PRIMARY:
        bits = 4
        fragile = fragility([each["AC"] for each in replicates], bits)
        found[name]["verdict"] = verdict(estimates[name], fragile)
        found[name]["fragility_db"] = fragile
    found["verdict"] = joined_verdict([found[name]["verdict"] for name in PRIMARY])
    return found


def fragility(replicates: Sequence[Content], bits: int) -> dict[str, list[float]]:
    """The convolutions' own error, and their gain, over the attentions', in decibels."""
    names = {"error": f"w{bits}/local", "gain": "gain"}
    return {
        name: [
            10 * float(np.log10(_mean_of(each, key, "conv") / _mean_of(each, key, "attention")))
            for each in replicates
        ]
        for name, key in names.items()
    }


def _mean_of(content: Content, key: str, kind: str) -> float:
    values = content["sources"][key]
    own = [v for v, k in zip(values, content["kinds"], strict=True) if k == kind and v is not None]
    return float(np.exp(np.mean(np.log(own))))


def _inside(replicates: Sequence[Content]) -> dict[str, Any]:
    """J of attention and convolution against J of each with feed-forward, within AC."""
    if len(replicates) < 2:
        return {}
    found = {}
    for bits in WIDTHS:
        pairs = [
            [column(each, f"w{bits}/J({pair})") for each in replicates]
            for pair in ("X,Y", "X,F", "Y,F")
        ]
        found[f"w{bits}"] = asdict(estimate(mixing(*pairs)))
    return found


def _model(replicates: Sequence[Content]) -> dict[str, Any]:
    """Means over utterances and replicates of one model."""

    def mean(key: str) -> float:
        return float(np.mean([np.mean(column(each, key)) for each in replicates]))

    found: dict[str, Any] = {"replicates": len(replicates)}
    for bits in WIDTHS:
        name = f"w{bits}"
        found[name] = {
            "nsr_db": mean(f"{name}/{ALL}/nsr"),
            "gaussian_nsr_db": mean(f"{name}/gaussian/nsr"),
            "account_db": mean(f"{name}/account"),
            "kl": mean(f"{name}/{ALL}/kl"),
            "disagreement": mean(f"{name}/{ALL}/disagreement"),
            "front_end_nsr_db": mean(f"{name}/front_end/nsr"),
            "ratio": mean(f"{name}/ratio"),
            "alignment": mean(f"{name}/alignment"),
            "interaction": mean(f"{name}/interaction"),
            "blocks_nsr_db": _rows(replicates, "blocks", f"{name}/{ALL}/nsr"),
            "local": _kinds(replicates, f"{name}/local"),
            "fed": _kinds(replicates, f"{name}/fed"),
        }
        if f"{name}/attention/nsr" in replicates[0]["utterances"]:
            found[name]["attention_matmuls_nsr_db"] = mean(f"{name}/attention/nsr")
    found["gain"] = _kinds(replicates, "gain")
    found["noise"] = {
        str(level): {"nsr_db": mean(f"noise{level}/{ALL}/nsr")} for level in NOISE_LEVELS
    }
    found["checks"] = {
        "quiet_ratio": mean(f"noise{QUIET}/ratio"),
        "quiet_interaction": mean(f"noise{QUIET}/interaction"),
        "same_noise_twice_db": mean("twice/J"),
    }
    return found


def _rows(replicates: Sequence[Content], group: str, key: str) -> list[float | None]:
    """Means over replicates of a list; None where none has a number."""
    rows = zip(*(each[group][key] for each in replicates), strict=True)
    return [
        float(np.mean([v for v in row if v is not None]))
        if any(v is not None for v in row)
        else None
        for row in rows
    ]


def _kinds(replicates: Sequence[Content], key: str) -> dict[str, float]:
    """Geometric means over the branches of each kind, in decibels."""
    kinds = dict.fromkeys(kind for kind in replicates[0]["kinds"] if kind != "rate")
    return {
        kind: float(np.mean([10 * np.log10(_mean_of(each, key, kind)) for each in replicates]))
        for kind in kinds
    }


def _read(cells: Mapping[Cell, Content]) -> dict[str, Any]:
    """Word error rates: each seed's, and the change that quantization makes, paired by string."""
    found: dict[str, Any] = {}
    for cell, content in cells.items():
        if cell.stage not in STAGES[1:]:
            continue
        base = errors_of(content["digits"], content["read"]["float"])
        arms = (
            [arm for arm in content["read"] if arm != "float"]
            if cell.stage in TRAINED
            else [f"w{b}/{ALL}" for b in WIDTHS]
        )
        model = found.setdefault(cell.model, {}).setdefault(str(cell.seed), {})
        model["float"] = float(base[0].sum() / base[1].sum())
        for arm in arms:
            errors, words = errors_of(content["digits"], content["read"][arm])
            change, low, high = paired_bootstrap(errors, base[0], words)
            model[arm.split("/")[0] if cell.stage == "ptq" else cell.stage] = {
                "wer": float(errors.sum() / words.sum()), "change": change, "interval": (low, high),
                "trained": cell.stage in TRAINED,
            }  # fmt: skip
    return found


def _trained_drop(cells: Mapping[Cell, Content]) -> dict[str, Any]:
    """What quantization-aware training loses: word errors of AC over the mean of AA and CC.

    Errors a word, of each string, more than the float model makes.
    """
    found: dict[str, Any] = {}
    for stage in TRAINED:
        drops = {
            (cell.model, cell.seed): _drop(content, stage)
            for cell, content in cells.items()
            if cell.stage == stage
        }
        models = ("AC", "AA", "CC")
        seeds = sorted({seed for _, seed in drops})
        whole = [seed for seed in seeds if all((model, seed) in drops for model in models)]
        if len(whole) > 1:
            parts = [[drops[model, seed] for seed in whole] for model in models]
            found[stage] = asdict(estimate(mixing(*parts)))
    return found


def _drop(content: Content, stage: str) -> Values:
    base, _ = errors_of(content["digits"], content["read"]["float"])
    errors, words = errors_of(content["digits"], content["read"][stage])
    return (errors - base) / words


def _pretraining(cells: Mapping[Cell, Content]) -> dict[str, Any]:
    """Of each seed: accuracy and majority, word error rates, and what pre-training changes."""
    found: dict[str, Any] = {}
    for cell, content in cells.items():
        if cell.stage == PRETRAINED:
            model = found.setdefault(cell.model, {})
            for key in ("accuracy", "majority"):
                model.setdefault(key, {})[str(cell.seed)] = content[key]
        if cell.stage not in TUNED:
            continue
        model = found.setdefault(cell.model, {})
        errors, words = errors_of(content["digits"], content["read"][cell.stage])
        rates = model.setdefault("wer", {}).setdefault(cell.stage, {})
        rates[str(cell.seed)] = float(errors.sum() / words.sum())
        scratch = Cell(cell.model, cell.seed, cell.stage.replace("tuned", "scratch"))
        if scratch != cell and scratch in cells:
            other = cells[scratch]
            base, _ = errors_of(other["digits"], other["read"][scratch.stage])
            changes = model.setdefault("change", {}).setdefault(cell.stage, {})
            changes[str(cell.seed)] = paired_bootstrap(errors, base, words)
    return found


def errors_of(digits: Sequence[Any], read: Sequence[Sequence[int]]) -> tuple[Values, Values]:
    """Word errors and words of each string that has digits."""
    import jiwer

    pairs = [(a, b) for a, b in zip(digits, read, strict=True) if a is not None]
    found = [jiwer.process_words(" ".join(map(str, a)), " ".join(map(str, b))) for a, b in pairs]
    errors = [each.substitutions + each.deletions + each.insertions for each in found]
    return np.array(errors, dtype=float), np.array([len(a) for a, _ in pairs], dtype=float)


def column(content: Content, key: str) -> Values:
    """Numbers [U] of a measure, of the utterances that have it."""
    values = content["utterances"][key]
    return np.array([value for value in values if value is not None], dtype=float)
