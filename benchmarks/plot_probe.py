"""The figures of results/probe, drawn by `plot.py`.

flops_share: what the reference-side probe costs of a step, against the formula, and over epochs.
real_text: probes on real prompts, on rows like those fitted on and on other sets. layers: recall by
depth. honest: `plot_honest`. signals: `plot_signals`. Titles are worked out from the rows drawn.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, PercentFormatter
from plot_honest import draw_honest
from plot_signals import draw_signals
from plot_style import COLOURS, OURS, Row, read_csv

HEAVY_HEAD = 0.2
"""Share of a step in the head from which the trunk no longer dominates."""
LONG_ROW = 4096
"""Tokens of a row from which attention's square is no longer small."""
NEAR_BEST = 0.02
SHARE_MARKS = {
    "real steps, equal rows": (COLOURS[OURS], "o"),
    "real steps, ragged rows": (COLOURS[OURS], "x"),
    "Llama-3.1-8B": ("#0072B2", "^"),
    "Falcon-40B": ("#56B4E9", "s"),
    "Llama-3.1-8B, 16k tokens a row": ("#0072B2", "*"),
    "head heavier than the trunk": ("#4D4D4D", "D"),
}
HELD_OUT = ("AdvBench, GSM8K held out", "final mark stripped")
ELSEWHERE = ("HarmBench, XSTest-safe", "final mark stripped")
TEXT_LINES = {
    HELD_OUT: ("AdvBench, GSM8K held out", "#4D4D4D", "-"),
    ("HarmBench, XSTest-safe", "as written"): (
        "HarmBench, XSTest-safe, as written: only the benign end with `?`",
        "#0072B2",
        "--",
    ),
    ELSEWHERE: ("HarmBench, XSTest-safe, final mark stripped", "#0072B2", "-"),
    ("XSTest unsafe, safe", "final mark stripped"): (
        "XSTest unsafe, safe, final mark stripped",
        COLOURS[OURS],
        "-",
    ),
}
"""By test and text: label, colour, dashes."""
MERITS = {"auroc": "AUROC", "recall_at_fpr_5": "recall at 5 % false positives"}
LAYER_STYLES: list[dict[str, Any]] = [
    {"color": "#999999", "marker": "s"},
    *({"color": TEXT_LINES[key][1], "marker": "o"} for key in (HELD_OUT, ELSEWHERE)),
]


def draw_flops_share(rows: list[Row]) -> Figure:
    """What the reference-side probe costs of a step: against the formula, and over epochs."""
    rows = [row for row in rows if row["side"] == "reference"]
    figure, (ratios, epochs) = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    first = [row for row in rows if row["epochs"] == "1"]
    ratios.axhspan(0.9, 1.1, color="#E6E6E6", linewidth=0, zorder=0)
    for label, (colour, marker) in SHARE_MARKS.items():
        drawn = [row for row in first if _share_case(row) == label]
        x, y = (_column(drawn, name) for name in ("padded_formula", "ratio_to_padded_formula"))
        ratios.plot(x, y, marker, color=colour, label=label, fillstyle="none")
    ratios.axhline(1, color="#4D4D4D", linewidth=0.8, zorder=0)
    ratios.set_xscale("log")
    ratios.xaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2]))
    ratios.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ratios.xaxis.set_minor_formatter(NullFormatter())
    ratios.set_ylim(0, 1.2)
    ratios.set_xlabel("(k / L) x (prompt share of the padded tokens) / 3")
    ratios.set_ylabel("measured share of a step's FLOPs / formula")
    ratios.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.02))
    ratios.set_title("first epoch; grey: within 10 %", fontsize=8)
    _draw_epochs(epochs, rows)
    figure.suptitle(_share_message(first), fontsize=11, fontweight="bold")
    return figure


def _column(rows: list[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _share_case(row: Row) -> str:
    if float(row["head_share"]) > HEAVY_HEAD:
        return "head heavier than the trunk"
    if int(row["tokens"]) > LONG_ROW:
        return f"{row['model']}, {int(row['tokens']) // 1024}k tokens a row"
    return row["model"] if row["kind"] == "meta" else f"real steps, {row['rows']} rows"


def _draw_epochs(axes: Axes, rows: list[Row]) -> None:
    """One line a probed layer, of the deepest model that was trained, half of it prompt."""
    trained = [r for r in rows if r["kind"] == "cpu" and r["rows"] == "equal"]
    deepest = max(int(row["L"]) for row in trained)
    rows = [r for r in trained if int(r["L"]) == deepest and float(r["prompt_share"]) == 0.5]
    for k, dashes in zip(sorted({int(row["k"]) for row in rows}), ("-", "--", ":"), strict=False):
        line = [row for row in rows if int(row["k"]) == k]
        x = _column(line, "epochs")
        axes.plot(x, _column(line, "share"), "o", color=COLOURS[OURS], linestyle=dashes)
        axes.plot(x, _column(line, "formula"), "_", color="#4D4D4D", ms=12)
        axes.annotate(
            f"layer {k} of {deepest}",
            (x[0], float(line[0]["share"])),
            textcoords="offset points",
            xytext=(12, 0),
            fontsize=8,
        )
    axes.set_xticks(sorted(set(_column(rows, "epochs"))))
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("epochs trained (half prompt; grey dash: formula / epochs)")
    axes.set_ylabel("share of all steps so far")
    axes.grid(axis="y")


def _share_message(rows: list[Row]) -> str:
    rows = [
        row
        for row in rows
        if float(row["head_share"]) <= HEAVY_HEAD and int(row["tokens"]) <= LONG_ROW
    ]
    off = max(abs(1 - ratio) for ratio in _column(rows, "ratio_to_padded_formula"))
    return f"Light head, short rows: the probe costs its formula within {off:.0%}, and once"


def draw_real_text(rows: list[Row]) -> Figure:
    """AUROC, and recall at 5 % false positives, of linear probes on each layer, by test."""
    rows = _default_probes(rows)
    poolings = list(dict.fromkeys(row["pooling"] for row in rows))
    figure, grid = plt.subplots(
        2, len(poolings), figsize=(9, 6), layout="constrained", sharex=True, squeeze=False
    )
    for column, pooling in enumerate(poolings):
        for axes, (figure_of_merit, name) in zip(grid[:, column], MERITS.items(), strict=True):
            for (test, text), (label, colour, dashes) in TEXT_LINES.items():
                line = [
                    r for r in rows if (r["pooling"], r["test"], r["text"]) == (pooling, test, text)
                ]
                x, y = _column(line, "k"), _column(line, figure_of_merit)
                axes.plot(x, y, "o", color=colour, linestyle=dashes, label=label, ms=4)
                low, high = (_column(line, figure_of_merit + end) for end in ("_low", "_high"))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_ylabel(name)
            axes.set_ylim(-0.03, 1.03)
            axes.grid(axis="y")
        grid[0, column].set_title(pooling.replace("_", " "), fontsize=9)
        grid[-1, column].set_xlabel("layer of the encoder (bands: 95 % bootstrap intervals)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(_text_message(rows), fontsize=11, fontweight="bold")
    return figure


def _text_message(rows: list[Row]) -> str:
    """AUROC of the chosen layers, held out, and on the test sets without their final marks."""
    chosen = [row for row in rows if row["is_chosen"] == "True"]
    first, second = (
        _column([r for r in chosen if (r["test"], r["text"]) == key], "auroc")
        for key in (HELD_OUT, ELSEWHERE)
    )
    return (
        f"AUROC {min(first):.3f} on held-out rows, {min(second):.2f} to {max(second):.2f} on "
        "HarmBench against XSTest-safe"
    )


def draw_layers(world: list[Row], text: list[Row]) -> Figure:
    """Recall at the calibrated threshold by depth, in the demo's world and on real text."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    lines = _layer_lines(world, text)
    for (source, line), style in zip(lines.items(), LAYER_STYLES, strict=False):
        axes.plot(*zip(*line, strict=True), label=source, **style)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("depth of the probed layer, k / L (the reference side's cost is proportional)")
    axes.set_ylabel("recall at the calibrated threshold")
    axes.grid()
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(_layers_message(lines), fontsize=10, fontweight="bold")
    return figure


def _layer_lines(world: list[Row], text: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """(depth, recall) of each layer, by where the prompts are from."""
    text = [r for r in _default_probes(text) if r["pooling"] == "last_prompt_token"]
    sources = {"demo world, held out": world}
    for test, form in (HELD_OUT, ELSEWHERE):
        rows = [r for r in text if (r["test"], r["text"]) == (test, form)]
        sources[TEXT_LINES[test, form][0]] = rows
    return {
        name: [(float(r["k"]) / float(r["L"]), float(r["recall"])) for r in rows]
        for name, rows in sources.items()
        if rows
    }


def _layers_message(lines: dict[str, list[tuple[float, float]]]) -> str:
    """The depth from which recall is near the best layer's; the best on the last source drawn."""
    first = [
        min(depth for depth, recall in line if recall >= max(r for _, r in line) - NEAR_BEST)
        for line in list(lines.values())[:2]
    ]
    best = max(recall for _, recall in list(lines.values())[-1])
    return (
        f"Recall is near its best from {max(first):.0%} of the depth on, on held-out rows;\n"
        f"on {list(lines)[-1].split(',')[0]} it is {best:.2f} at most, at any depth"
    )


def _default_probes(rows: list[Row]) -> list[Row]:
    """Linear, temperature, with background negatives and near-duplicates kept together."""
    default = {"kind": "linear", "calibration": "temperature", "is_grouped": "True"}
    return [
        row
        for row in rows
        if row["background"] != "0" and all(row[key] == value for key, value in default.items())
    ]


def figures_of(folder: Path) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what the folder holds results for."""
    found = {
        name: read_csv(path) if (path := folder / f"{name}.csv").is_file() else []
        for name in (
            "flops_share",
            "flops_layers",
            "real_text",
            "honest",
            "response_risk",
            "influence",
        )
    }
    if found["flops_share"]:
        yield "flops_share", draw_flops_share(found["flops_share"])
    if found["real_text"]:
        yield "real_text", draw_real_text(found["real_text"])
    if found["honest"]:
        yield "honest", draw_honest(found["honest"])
    if found["real_text"] and found["flops_layers"]:
        yield "layers", draw_layers(found["flops_layers"], found["real_text"])
    if found["response_risk"] and found["influence"]:
        yield "signals", draw_signals(found["response_risk"], found["influence"])
