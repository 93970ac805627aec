"""Draws the figures of results/kernels and results/probe from their CSV files, from nothing else.

    python benchmarks/plot.py [FOLDER ...]

kernels.png/.svg: time as a multiple of ours, and peak memory, of each implementation (cuda.csv, or
cpu.csv where there is none). logits_error.png/.svg: error of the gradient against how far the two
models are apart. Those of probes are in `plot_probe`. Each title is worked out from the rows that
are drawn.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safereg_dist.plan.figures import STYLE

RESULTS = [Path(__file__).resolve().parent / "results" / name for name in ("kernels", "probe")]
Row = dict[str, str]

OURS = "ours"
COLOURS = {
    OURS: "#E69F00",
    "torch eager": "#4D4D4D",
    "torch compile": "#999999",
    "torch linear_cross_entropy": "#C4C4C4",
    "Liger KLDIVLoss": "#0072B2",
    "Liger chunked JSDLoss": "#0072B2",
    "Liger FLCE + FLJSD": "#56B4E9",
}
"""Ours is orange, torch is grey, Liger is blue; told apart by the colour-blind, and in print."""
VARIANTS = {
    ("float32", "False"): ("float32 (default)", COLOURS[OURS], "-", "o"),
    ("float32", "True"): ("float32, difference", "#999999", ":", "s"),
    ("bfloat16", "True"): ("bfloat16, difference", "#56B4E9", "--", "^"),
    ("bfloat16", "False"): ("bfloat16", "#0072B2", "-.", "D"),
}
"""By logits_dtype and is_difference: label, colour, dashes, marker."""


def read_csv(path: Path) -> list[Row]:
    """The rows of one results file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def case_of(row: Row) -> str:
    """What was computed, in two short lines."""
    if row["what"].startswith("masked_kl"):
        return row["what"].replace(" ", "\n")
    active = f", {float(row['active_fraction']):.0%}" if row["what"] != "ce" else ""
    return f"{row['what']}{active}\n{row['head']} head"


def draw_kernels(rows: list[Row], device: str) -> Figure:
    """Time and memory of each implementation, case by case; no bar where nothing was measured."""
    rows = [row for row in rows if row["median_ms"]]
    figure, (times, memory) = plt.subplots(2, 1, figsize=(9, 6.4), layout="constrained")
    _bars(times, rows, {_key(row): float(row["ratio_to_ours"]) for row in rows}, "{:.2g}")
    times.axhline(1, color=COLOURS[OURS], linewidth=0.8, zorder=0)
    times.set_ylabel("time (multiple of ours)")
    scale, unit = _unit(max(float(row["peak_extra_bytes"]) for row in rows))
    peaks = {_key(row): float(row["peak_extra_bytes"]) / scale for row in rows}
    _bars(memory, rows, peaks, "{:.2g}")
    memory.set_ylabel(f"peak extra memory ({unit})")
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    first = rows[0]
    sizes = f"N={first['N']} tokens, V={first['V']}, {first['dtype']}"
    figure.suptitle(f"{device}: {_kernels_message(rows)}", fontsize=11, fontweight="bold")
    times.set_title(f"{first['hardware']}; {sizes}; torch {first['torch']}", fontsize=8)
    return figure


def _key(row: Row) -> tuple[str, str]:
    return case_of(row), row["implementation"]


def _bars(axes: Axes, rows: list[Row], values: dict[tuple[str, str], float], text: str) -> None:
    cases = list(dict.fromkeys(case_of(row) for row in rows))
    for name, colour in COLOURS.items():
        drawn = [case for case in cases if (case, name) in values]
        if not drawn:
            continue
        places, width = [], 0.2
        for case in drawn:
            present = [other for other in COLOURS if (case, other) in values]
            offset = present.index(name) - (len(present) - 1) / 2
            places.append(cases.index(case) + offset * width)
        heights = [values[case, name] for case in drawn]
        bars = axes.bar(places, heights, width * 0.95, color=colour, label=name)
        axes.bar_label(bars, [text.format(h) for h in heights], fontsize=6, padding=1)
    axes.set_yscale("log")  # a multiple of 1/2 is as far from 1 as one of 2
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    axes.grid(axis="y")


def _unit(largest: float) -> tuple[float, str]:
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")


def _kernels_message(rows: list[Row]) -> str:
    """Ours next to the fastest other implementation, over the cases in which there is one."""
    best: dict[str, float] = {}
    for row in rows:
        if row["implementation"] != OURS:
            ratio = float(row["ratio_to_ours"])
            best[case_of(row)] = min(ratio, best.get(case_of(row), ratio))
    won = sum(ratio >= 1 for ratio in best.values())
    low, high = min(best.values()), max(best.values())
    return (
        f"ours is fastest in {won} of {len(best)} cases: the best other one takes "
        f"{low:.2g} to {high:.2g} times as long"
    )


def draw_logits_error(rows: list[Row]) -> Figure:
    """Error of the gradient in the hidden states against the spread of the logits' difference."""
    rows = [row for row in rows if row["direction"] == "forward"]
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for key, (label, colour, dashes, marker) in VARIANTS.items():
        chosen = [row for row in rows if (row["logits_dtype"], row["is_difference"]) == key]
        x = [float(row["logit_difference_std"]) for row in chosen]
        median = [float(row["grad_error_median"]) for row in chosen]
        upper = [float(row["grad_error_p90"]) for row in chosen]
        axes.plot(x, median, color=colour, linestyle=dashes, marker=marker, label=label)
        axes.plot(x, upper, color=colour, linestyle=dashes, linewidth=0.6, marker=marker, ms=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("std of the difference of policy and reference logits (logit units, median)")
    axes.set_ylabel("relative error of the gradient\n(per token; thick: median, thin: 90th pct.)")
    axes.grid()
    axes.legend(title="dtype of the logits", frameon=False)
    axes.set_title(_error_message(rows), fontsize=10, fontweight="bold")
    return figure


def _error_message(rows: list[Row]) -> str:
    """What is lost where the two models are closest."""
    nearest = min(float(row["logit_difference_std"]) for row in rows)
    error = {
        (row["logits_dtype"], row["is_difference"]): float(row["grad_error_median"])
        for row in rows
        if float(row["logit_difference_std"]) == nearest
    }
    return (
        f"Logits {nearest:.2g} apart: bfloat16 errs by {error['bfloat16', 'False']:.0%} in the "
        f"gradient,\nits difference by {error['bfloat16', 'True']:.1%}, "
        f"float32 by {error['float32', 'False']:.1%}"
    )


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes PNG and SVG."""
    figure.savefig(folder / f"{name}.png", dpi=160)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    print(f"written: {folder / name}.png and .svg")


def figures_of(folder: Path) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what the folder holds results for."""
    from plot_probe import figures_of as probe_figures  # which imports this module

    kernels = [path for name in ("cuda", "cpu") if (path := folder / f"{name}.csv").is_file()]
    if kernels:
        yield "kernels", draw_kernels(read_csv(kernels[0]), kernels[0].stem.upper())
    if (errors := folder / "logits_error.csv").is_file():
        yield "logits_error", draw_logits_error(read_csv(errors))
    yield from probe_figures(folder)


def main() -> int:
    """Draws what the folders have results for; the exit status."""
    drawn = 0
    folders = [Path(name) for name in sys.argv[1:]] or RESULTS
    with plt.rc_context(STYLE):
        for folder in folders:
            for name, figure in figures_of(folder):
                save(figure, folder, name)
                drawn += 1
    if not drawn:
        print(f"{', '.join(map(str, folders))}: no results: run a bench_*.py first")
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
