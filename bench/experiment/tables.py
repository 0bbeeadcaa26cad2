"""The experiment's numbers as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.experiment.arms import WIDTHS
from bench.experiment.cells import TRAINED, TUNED
from bench.experiment.measure import NOISE_LEVELS


def tables(summary: Mapping[str, Any]) -> str:
    """All tables, each under a line that says what it shows."""
    parts = []
    if found := summary["mixing"]:
        rows = []
        for name in (*(f"w{b}" for b in WIDTHS), *(f"noise{level}" for level in NOISE_LEVELS)):
            each = found[name]
            rows.append(
                [
                    name, *(_mean(each["J"][model]) for model in ("AC", "AA", "CC")),
                    _signed(each["mean"]), ", ".join(map(_signed, each["replicates"])),
                    _interval(each["t_interval"]), _interval(each["bootstrap_interval"]),
                    f"{each['holm_p']:.3f}" if "holm_p" in each else "",
                    each.get("verdict", ""),
                ]
            )  # fmt: skip
        head = ["arm", "J of AC", "J of AA", "J of CC", "M", "replicates", "t interval",
                "bootstrap interval", "p (Holm)", "by the rules"]  # fmt: skip
        parts += [
            f"Verdict: **{found['verdict']}** (decibels, after the last block)",
            _table(head, rows),
        ]
    if models := summary["models"]:
        rows = []
        for name, model in models.items():
            for bits in WIDTHS:
                each = model[f"w{bits}"]
                numbers = (
                    each["nsr_db"], each["gaussian_nsr_db"], each["account_db"],
                    each["front_end_nsr_db"],
                )  # fmt: skip
                rows.append(
                    [
                        name, f"w{bits}a8", *(f"{value:.1f}" for value in numbers),
                        f"{each['ratio']:.2f}", f"{each['interaction']:.2f}",
                        f"{each['disagreement']:.1%}", _decibels(each, "attention_matmuls_nsr_db"),
                    ]
                )  # fmt: skip
        head = ["model", "arm", "error, dB", "Gaussian of the same size", "account over error",
                "front end alone", "R", "interaction", "other tokens",
                "products of attention alone"]  # fmt: skip
        parts += [
            "Error after the last block, all branches quantized, in dB; its account is the sum of "
            "each branch's own error times its gain. Beside them the front end alone, and the "
            "products of attention alone in as many bits, as BiT-LA starts to train them",
            _table(head, rows),
        ]
        parts += ["Each kind of branch: own error at 4 bits, the same on the quantized model's "
                  "inputs, and gain to the last block, dB", _kinds(models)]  # fmt: skip
        checks = [
            [name, *(f"{value:.3f}" for value in model["checks"].values())]
            for name, model in models.items()
        ]
        head = ["model", "R of noise at 40 dB", "its interaction", "J of one noise twice, dB"]
        parts += ["Checks of the measures", _table(head, checks)]
    if sizes := summary["storage_mb"]:
        rows = [[name, *(f"{mb:.3f}" for mb in each.values())] for name, each in sizes.items()]
        bits = next(iter(sizes.values()))
        head = ["model", *(f"{each} bits" for each in bits)]
        parts += ["Storage in MB, by the bits of the branches' weights", _table(head, rows)]
    if read := summary["read"]:
        parts += ["Word error rates of digits, a speaker never heard", _words(read)]
    if found := summary["trained_drop"]:
        rows = [
            [
                stage, f"{each['mean']:+.1%}", ", ".join(f"{v:+.1%}" for v in each["replicates"]),
                *(f"{low:+.1%} to {high:+.1%}"
                  for low, high in (each["t_interval"], each["bootstrap_interval"])),
            ]
            for stage, each in found.items()
        ]  # fmt: skip
        head = ["trained", "AC over AA and CC", "replicates", "t interval", "bootstrap interval"]
        parts += ["What training in low bits loses, in errors a word of each string: AC over the "
                  "mean of AA and CC", _table(head, rows)]  # fmt: skip
    if found := summary["pretraining"]:
        parts += ["Pre-training on read speech: masked frames of utterances never heard, and word "
                  "error rates of digits after as much training", _pretraining(found)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def real_tables(real: Mapping[str, Any]) -> str:
    """Tables of the models with real weights, as ``summarize_real`` gives them."""
    parts = []
    for name, found in real.items():
        if "J" in found:
            rows = []
            for arm in (*(f"w{b}" for b in WIDTHS), *(f"noise{level}" for level in NOISE_LEVELS)):
                pairs = (found["J"][f"{arm}/J({pair})"] for pair in ("X,Y", "X,F", "Y,F"))
                each = found["all"].get(arm, {})
                numbers = [
                    f"{each[key]:.2f}" for key in ("nsr_db", "gaussian_nsr_db") if key in each
                ]
                rows.append([arm, *map(_signed, pairs), *(numbers or ["", ""])])
            head = ["arm", "J(A, C)", "J(A, F)", "J(F, C)", "error", "Gaussian of the same size"]
            parts += [f"{name}: attention A, convolution C, feed-forward F; dB", _table(head, rows)]
            parts += ["Own errors at 4 bits, on the quantized model's inputs, and gains, dB",
                      _kinds({name: found["all"]})]  # fmt: skip
            continue
        rows = [
            [arm, kind, f"{error['noise_to_signal_db'][-1]:.1f}", f"{error['end_db']:.1f}"]
            for arm, each in found.items()
            for kind, error in each["kinds"].items()
        ]
        parts += [f"{name}: error after the last block and at the end, dB",
                  _table(["arm", "quantized", "last block", "end"], rows)]  # fmt: skip
        ratios = [f"{arm} {each['ratio'][-1]:.2f}" for arm, each in found.items()]
        parts.append(f"Error of all kinds over the sum of their energies: {', '.join(ratios)}")
    return "\n\n".join(parts) + "\n"


def _kinds(models: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            kind,
            *(f"{part[kind]:.1f}" for part in (m["w4"]["local"], m["w4"]["fed"], m["gain"])),
        ]
        for name, m in models.items()
        for kind in m["gain"]
    ]
    return _table(["model", "kind", "own error", "on its inputs", "gain"], rows)


def _words(read: Mapping[str, Any]) -> str:
    stages = [*(f"w{bits}" for bits in WIDTHS), *TRAINED]
    rows = []
    for name, seeds in read.items():
        for seed, found in seeds.items():
            cells = [found.get(stage) for stage in stages]
            rows.append(
                [name, seed, f"{found['float']:.1%}"]
                + ["" if c is None else f"{c['wer']:.1%} ({_points(c)})" for c in cells]
            )
    head = [
        "model",
        "seed",
        "float",
        *(f"{s}a8" if s in ("w8", "w4", "w2") else f"{s}, trained" for s in stages),
    ]
    return _table(head, rows)


def _pretraining(found: Mapping[str, Any]) -> str:
    rows = []
    for name, model in found.items():
        seeds = sorted({seed for part in model.get("wer", {}).values() for seed in part}
                       | model.get("accuracy", {}).keys())  # fmt: skip
        for seed in seeds:
            row = [name, seed]
            row += [_percent(model.get(key, {}).get(seed)) for key in ("accuracy", "majority")]
            for stage in TUNED:
                text = _percent(model.get("wer", {}).get(stage, {}).get(seed))
                if change := model.get("change", {}).get(stage, {}).get(seed):
                    text += f" ({100 * change[1]:+.1f} to {100 * change[2]:+.1f})"
                row.append(text)
            rows.append(row)
    head = ["model", "seed", "accuracy", "largest cluster", "random weights", "pre-trained",
            "random, w4a8", "pre-trained, w4a8"]  # fmt: skip
    return _table(head, rows)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _decibels(found: Mapping[str, Any], key: str) -> str:
    return f"{found[key]:.1f}" if key in found else ""


def _points(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _interval(interval: Sequence[float]) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
