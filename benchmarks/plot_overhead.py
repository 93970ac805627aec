"""Draws the figures of results/overhead from overhead.csv, from nothing else.

    python benchmarks/plot_overhead.py [overhead.csv [FOLDER]]

overhead: what each arm costs over plain fine-tuning, against the share of risky rows: FLOPs on real
shapes, FLOPs and step time of real steps. bytes: what all ranks move, and with it the safety path's
share. Titles are worked out from the rows that are drawn.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from plot_style import COLOURS, OURS, STYLE, Row, read_csv, save

RESULTS = Path(__file__).resolve().parent / "results"
ARM_STYLES: dict[str, dict[str, Any]] = {
    "always_on": dict(color="#4D4D4D", linestyle="--", marker="s", label="always on, full logits"),
    "routed_first_epoch": dict(
        color="#56B4E9", linestyle="-.", marker="^", label="routed, first epoch of a probe"
    ),
    "routed": dict(color=COLOURS[OURS], linestyle="-", marker="o", label="routed"),
    "stored": dict(color="#0072B2", linestyle=":", marker="D", label="stored reference"),
}
REAL_MODEL, STEP_MODEL = "Llama-3.1-8B", "wide"
"""Whose FLOPs and whose time the first figure shows."""


def draw_overhead(rows: list[Row]) -> Figure:
    """FLOPs of a real shape, FLOPs and time of real steps, by risky fraction and arm."""
    ranks = min(int(row["ranks"]) for row in rows if row["device"] != "meta")
    meta = [row for row in rows if row["device"] == "meta" and row["model"] == REAL_MODEL]
    steps = [
        row
        for row in rows
        if row["model"] == STEP_MODEL and int(row["ranks"]) == ranks and row["seconds"]
    ]
    figure, (real, small, times) = plt.subplots(
        1, 3, figsize=(10, 4), layout="constrained", sharex=True, sharey=True
    )
    _draw_arms(real, meta, "flops_ratio_to_sft")
    _draw_arms(small, steps, "flops_ratio_to_sft")
    _draw_arms(times, steps, "time_ratio_to_sft", has_band=True)
    _draw_noise(times, steps)
    real.set_ylabel("cost beyond plain fine-tuning")
    real.set_title(f"FLOPs, {REAL_MODEL}, {meta[0]['sequence_tokens']} tokens a row", fontsize=8)
    first = steps[0]
    where = f"{first['layers']} layers of {first['hidden_size']}, {ranks} {first['device']} ranks"
    small.set_title(f"FLOPs, {where}", fontsize=8)
    times.set_title(f"step time, {where}; 20-80 %", fontsize=8)
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(_overhead_message(meta), fontsize=11, fontweight="bold")
    return figure


def _draw_arms(axes: Axes, rows: list[Row], column: str, *, has_band: bool = False) -> None:
    for arm, style in ARM_STYLES.items():
        line = _line_of(rows, arm)
        x = [float(row["risky_fraction"]) for row in line]
        axes.plot(x, _beyond_one(line, column), ms=4, **style)
        if has_band:
            low, high = (_beyond_one(line, f"time_ratio_{q}") for q in ("q20", "q80"))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.axhline(0, color="#4D4D4D", linewidth=0.8, zorder=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("risky rows")
    axes.grid(axis="y")


def _line_of(rows: list[Row], arm: str) -> list[Row]:
    """One row a fraction, by fraction; risk from a column where several sources were measured."""
    line = [
        row
        for row in rows
        if row["arm"] == arm and (arm != "routed" or row["risk_source"] == "column")
    ]
    return sorted(line, key=lambda row: float(row["risky_fraction"]))


def _beyond_one(rows: Sequence[Row], column: str) -> list[float]:
    return [float(row[column]) - 1 for row in rows]


def _draw_noise(axes: Axes, rows: list[Row]) -> None:
    """Plain fine-tuning against itself."""
    line = [row for row in _line_of(rows, "sft") if row["time_ratio_q20"]]
    x = [float(row["risky_fraction"]) for row in line]
    low, high = (_beyond_one(line, f"time_ratio_{q}") for q in ("q20", "q80"))
    how = {"color": "#C4C4C4", "alpha": 0.5, "linewidth": 0, "zorder": 0}
    axes.fill_between(x, low, high, label="plain against itself", **how)


def _overhead_message(rows: list[Row]) -> str:
    """At a tenth of risky rows, on the real shape."""
    share = {
        arm: float(row["flops_ratio_to_sft"]) - 1
        for arm in ("routed", "stored", "always_on")
        for row in _line_of(rows, arm)
        if float(row["risky_fraction"]) == 0.1
    }
    return (
        f"With 10 % of the rows risky: +{share['routed']:.1%} FLOPs, +{share['stored']:.1%} with a "
        f"stored reference; an always-on one pays +{share['always_on']:.0%}"
    )


def draw_bytes(rows: list[Row]) -> Figure:
    """Bytes of all collectives beyond plain fine-tuning, by risky fraction, ranks and arm."""
    rows = [row for row in rows if row["bytes_ratio_to_sft"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(
        1, len(models), figsize=(9, 4), layout="constrained", sharey=True, squeeze=False
    )
    ranks = sorted({int(row["ranks"]) for row in rows})
    for axes, model in zip(panels[0], models, strict=True):
        for count, dashes in zip(ranks, ("-", "--"), strict=False):
            _draw_bytes(axes, [r for r in rows if r["model"] == model], count, dashes)
        first = next(row for row in rows if row["model"] == model)
        axes.set_title(
            f"{model}: {first['layers']} layers of {first['hidden_size']}, "
            f"{first['rows_per_step']} rows a step in {first['grad_accum_steps']} micro-batches",
            fontsize=8,
        )
        axes.set_xscale("symlog", linthresh=0.05)
        axes.set_xticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("risky rows (star: a step of 512 rows)")
        axes.grid(axis="y")
    panels[0, 0].set_ylabel("bytes of collectives beyond plain ZeRO-3 fine-tuning")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(_bytes_message(rows), fontsize=11, fontweight="bold")
    return figure


def _draw_bytes(axes: Axes, rows: list[Row], ranks: int, dashes: str) -> None:
    largest = max(int(row["rows_per_step"]) for row in rows)
    for arm in ("always_on", "routed", "stored"):
        style = {**ARM_STYLES[arm], "linestyle": dashes}
        style["label"] = f"{style['label']}, {ranks} ranks"
        line = [row for row in _line_of(rows, arm) if int(row["ranks"]) == ranks]
        small = [row for row in line if int(row["rows_per_step"]) < largest]
        x = [float(row["risky_fraction"]) for row in small]
        axes.plot(x, _beyond_one(small, "bytes_ratio_to_sft"), ms=4, **style)
        for row in line:
            if int(row["rows_per_step"]) == largest:
                y = float(row["bytes_ratio_to_sft"]) - 1
                axes.plot([float(row["risky_fraction"])], [y], "*", color=style["color"], ms=9)


def _bytes_message(rows: list[Row]) -> str:
    """The largest step: 1 % of risky rows."""
    largest = max(int(row["rows_per_step"]) for row in rows)
    worst = {
        arm: max(
            float(row["bytes_ratio_to_sft"]) - 1
            for row in _line_of(rows, arm)
            if int(row["rows_per_step"]) == largest
        )
        for arm in ("routed", "always_on")
    }
    return (
        f"1 % risky of {largest} rows a step: +{worst['routed']:.1%} bytes at most; "
        f"an always-on reference pays +{worst['always_on']:.0%}"
    )


def draw_all(table: Path, folder: Path) -> None:
    """Writes all figures of a table to a folder."""
    rows = read_csv(table)
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        save(draw_overhead(rows), folder, "overhead")
        save(draw_bytes(rows), folder, "bytes")


def main() -> int:
    """Draws what the table holds; the exit status."""
    table = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "overhead.csv"
    if not table.is_file():
        print(f"{table}: no results: run benchmarks/bench_overhead.py first")
        return 1
    draw_all(table, Path(sys.argv[2]) if len(sys.argv) > 2 else table.with_suffix(""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
