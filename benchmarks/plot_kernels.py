"""Figures of what `gpu_check.sh` measured, from its CSV alone; titles come from the rows drawn.

parts       each kernel and each product alone, as a share of the limit of the machine
masked_kl   time and share of the copy bandwidth, ours and others
linear      time and peak memory from hidden states, ours and others
chunks      time and peak memory of linear_ce_kl over chunk sizes
step        an optimizer step of a whole model, as a multiple of plain fine-tuning
"""

from collections.abc import Callable, Iterable, Iterator

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_style import COLOURS, OURS, PRODUCTS, Row

from safereg_dist.plan.figures import ARM_STYLES

Bars = dict[tuple[str, str], float]

_ARMS = {"SFT": "sft", "adaptive": "routed", "stored": "stored", "always on": "always_on"}
_TARGET = 1.15
"""Goal for linear_ce_kl on all rows with a trained head, as a multiple of its four products."""


def figures_of(rows: list[Row], device: str) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each stage that has rows with a time."""
    timed = [row for row in rows if row["median_ms"]]
    draws: dict[str, tuple[tuple[str, ...], Callable[[list[Row]], Figure]]] = {
        "parts": (("parts",), draw_parts),
        "masked_kl": (("masked_kl", "peers", "compiled"), draw_masked_kl),
        "linear": (("linear",), draw_linear),
        "peers": (("peers", "compiled"), draw_peers),
        "chunks": (("chunks",), draw_chunks),
        "step": (("step",), draw_step),
    }
    for name, (stages, draw) in draws.items():
        chosen = [row for row in timed if row["stage"] in stages and _belongs(row, name)]
        if chosen:
            figure = draw(chosen)
            figure.suptitle(f"{device}: {figure.get_suptitle()}", fontsize=10, fontweight="bold")
            figure.supxlabel(_provenance(chosen[0]), fontsize=6, color="#666666")
            yield name, figure


def _belongs(row: Row, name: str) -> bool:
    is_logits = row["what"].startswith("masked_kl")
    if name == "parts":
        return row["implementation"] != "torch"  # the limits themselves
    return is_logits == (name == "masked_kl")


def _provenance(row: Row) -> str:
    sizes = ", ".join(f"{key}={row[key]}" for key in ("N", "V", "H") if row[key])
    versions = f"torch {row['torch']}, triton {row['triton']}"
    return f"{row['hardware']}; {row['dtype']}, {sizes}; {versions}; {row['date']}"


def draw_parts(rows: list[Row]) -> Figure:
    """Share of the copy bandwidth (kernels) or of the matmul rate (products)."""
    figure, pair = plt.subplots(1, 2, figsize=(10, 5.2), layout="constrained")
    columns = ("percent_of_copy_bandwidth", "percent_of_matmul_rate")
    for axes, column in zip(pair, columns, strict=True):
        chosen = [row for row in rows if row[column]]
        names = [row["what"] for row in chosen]
        shares = [float(row[column]) for row in chosen]
        colour = COLOURS[OURS] if column == columns[0] else "#999999"
        bars = axes.barh(names, shares, color=colour)
        labels = [f"{float(r[column]):.0f} %, {float(r['median_ms']):.3g} ms" for r in chosen]
        axes.bar_label(bars, labels, fontsize=6, label_type="center")  # clear of the limit
        axes.set_xlim(0, max([100.0, *shares]) * 1.05)
        axes.axvline(100, color="#4D4D4D", linewidth=0.8)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel(f"{column.replace('_', ' ').replace('percent', '%')}")
    low, high = _range(float(r[columns[0]]) for r in rows if r[columns[0]])
    figure.suptitle(f"kernels alone reach {low:.0f} to {high:.0f} % of a copy's bandwidth")
    return figure


def draw_masked_kl(rows: list[Row]) -> Figure:
    """Milliseconds and share of the copy bandwidth."""
    figure, (times, shares) = plt.subplots(2, 1, figsize=(8, 6), layout="constrained")
    _bars(times, rows, _values(rows, "median_ms"), "{:.3g}")
    times.set_ylabel("time of value and gradient (ms)")
    _bars(shares, rows, _values(rows, "percent_of_copy_bandwidth"), "{:.0f}")
    shares.set_ylabel("share of copy bandwidth (%),\n5 passes over the logits")
    shares.axhline(100, color="#4D4D4D", linewidth=0.8)
    _legend(figure, times)
    ours = [r for r in rows if r["implementation"] == OURS and r["stage"] == "masked_kl"]
    low, high = _range(float(r["percent_of_copy_bandwidth"]) for r in ours or rows)
    figure.suptitle(f"masked_kl moves its bytes at {low:.0f} to {high:.0f} % of a copy's rate")
    return figure


def draw_linear(rows: list[Row]) -> Figure:
    """Time as a multiple of the bare products."""
    figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
    _bars(axes, rows, _values(rows, "ratio_to_products"), "{:.2f}")
    axes.set_ylabel("time (multiple of the bare products)")
    axes.hlines(_TARGET, -0.45, 0.45, color="black", linewidth=0.8, linestyle="--")
    axes.text(-0.45, _TARGET + 0.01, f"goal {_TARGET}", fontsize=6)
    _legend(figure, axes)
    ratio = next(
        float(row["ratio_to_products"]) for row in rows if row["implementation"] == OURS
    )  # all rows, trained head: the first that is measured
    figure.suptitle(f"linear_ce_kl on all rows takes {ratio:.2f} times its four products")
    return figure


def draw_peers(rows: list[Row]) -> Figure:
    """Time as a multiple of the bare products, and peak memory."""
    figure, (times, memory) = plt.subplots(2, 1, figsize=(9, 6.6), layout="constrained")
    _bars(times, rows, _values(rows, "ratio_to_products"), "{:.2f}")
    times.set_ylabel("time (multiple of the bare products)")
    peaks = [row for row in rows if row["implementation"] != PRODUCTS]
    scale, unit = _unit(peaks, "peak_extra_bytes")
    _bars(memory, rows, _values(peaks, "peak_extra_bytes", scale), "{:.3g}")
    memory.set_ylabel(f"peak extra memory ({unit})")
    for axes in (times, memory):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    _legend(figure, times)
    figure.suptitle(_peers_message(rows))
    return figure


def _peers_message(rows: list[Row]) -> str:
    """The fastest other implementation, case by case."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        if row["implementation"] not in (OURS, PRODUCTS):
            found = float(row["ratio_to_ours"]), row["implementation"]
            best[row["what"], row["active_fraction"]] = min(
                found, best.get((row["what"], row["active_fraction"]), found)
            )
    low, high = _range(ratio for ratio, _ in best.values())
    return f"the fastest other implementation takes {low:.2f} to {high:.2f} times as long as ours"


def draw_chunks(rows: list[Row]) -> Figure:
    """Time and peak memory against the chunk size; the default as a line."""
    figure, (times, memory) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    swept = [row for row in rows if row["chunk_tokens"]]
    x = [float(row["chunk_tokens"]) for row in swept]
    bytes_scale, bytes_unit = _unit(rows, "peak_extra_bytes")
    for axes, column, scale, unit in (
        (times, "median_ms", 1, "time (ms)"),
        (memory, "peak_extra_bytes", bytes_scale, f"peak extra memory ({bytes_unit})"),
    ):
        y = [float(row[column]) / scale for row in swept]
        axes.plot(x, y, color=COLOURS[OURS], marker="o", label="chunk_tokens given")
        for row in rows:
            is_products = row["implementation"] == PRODUCTS
            if row["chunk_tokens"] or (is_products and axes is memory):
                continue
            value = float(row[column]) / scale
            dashes, label = (":", PRODUCTS) if is_products else ("--", "default")
            axes.axhline(value, color="#4D4D4D", linestyle=dashes, linewidth=1, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x], fontsize=7)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens a chunk")
        axes.set_ylabel(unit)
        axes.grid()
    times.legend(loc="lower left", frameon=False, fontsize=7)
    default = next(r for r in rows if r["implementation"] == OURS)
    best = min(rows, key=lambda r: float(r["median_ms"]) if r["chunk_tokens"] else 1e30)
    over = float(default["median_ms"]) / float(best["median_ms"]) - 1
    figure.suptitle(
        f"the default takes {over:+.1%} next to the best chunk size, {best['chunk_tokens']}"
    )
    return figure


def draw_step(rows: list[Row]) -> Figure:
    """Time next to plain fine-tuning, and memory, of each arm."""
    figure, (times, memory) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    shown = [row for row in rows if row["implementation"] in _ARMS]
    names = [_arm_name(row) for row in shown]
    colours = [ARM_STYLES[_ARMS[row["implementation"]]][1] for row in shown]
    sft = float(shown[0]["flops"])
    ratios = [float(row["ratio_to_sft"]) for row in shown]
    bars = times.barh(names, ratios, color=colours)
    labels = [f"{float(r['ratio_to_sft']):.2f}, {float(r['median_ms']):.0f} ms" for r in shown]
    times.bar_label(bars, labels, padding=14)
    needed = [float(row["flops"]) / sft for row in shown]
    times.plot(needed, names, "|", color="black", markersize=12)
    times.set_xlabel("time of a step (multiple of SFT; stroke: by FLOPs)")
    times.set_xlim(0, max(ratios) * 1.5)
    scale, unit = _unit(shown, "peak_memory_bytes")
    peaks = [float(row["peak_memory_bytes"]) / scale for row in shown]
    bars = memory.barh(names, peaks, color=colours)
    memory.bar_label(bars, [f"{peak:.3g}" for peak in peaks], padding=3)
    memory.set_xlabel(f"peak memory ({unit})")
    memory.set_xlim(0, max(peaks) * 1.2)
    memory.set_yticks([])
    for axes in (times, memory):
        axes.invert_yaxis()
    figure.suptitle(_step_message(shown, ratios))
    return figure


def _step_message(rows: list[Row], ratios: list[float]) -> str:
    found = {
        (row["implementation"], row["active_fraction"]): ratio
        for row, ratio in zip(rows, ratios, strict=True)
    }
    some, always = found.get(("adaptive", "0.1")), found.get(("always on", "1"))
    text = "one optimizer step"
    if some is not None:
        text += f": 10 % risky rows cost {some - 1:+.0%}"
    if always is not None:
        text += f", always on with full logits {always - 1:+.0%}"
    return text


def _arm_name(row: Row) -> str:
    if row["implementation"] in ("SFT", "always on"):
        return row["implementation"]
    return f"{row['implementation']}, {float(row['active_fraction']):.0%} risky"


def case_of(row: Row) -> str:
    """What was computed, in short lines."""
    if row["what"].startswith("masked_kl"):
        return row["what"].replace(" ", "\n")
    has_divergence = row["what"] in ("linear_ce_kl", "ce + kl")
    share = f"\nKL on {float(row['active_fraction']):.0%}" if has_divergence else ""
    name = row["what"].replace("linear_cross", "linear_\ncross")
    return f"{name}{share}\n{row['head']} head"


def _values(rows: list[Row], column: str, scale: float = 1.0) -> Bars:
    return {
        (case_of(row), row["implementation"]): float(row[column]) / scale
        for row in rows
        if row[column]
    }


def _bars(axes: Axes, rows: list[Row], values: Bars, text: str) -> None:
    cases = list(dict.fromkeys(case_of(row) for row in rows))
    width = 0.8 / max(sum((case, name) in values for name in COLOURS) for case in cases)
    for name, colour in COLOURS.items():
        drawn = [case for case in cases if (case, name) in values]
        if not drawn:
            continue
        places = []
        for case in drawn:
            present = [other for other in COLOURS if (case, other) in values]
            offset = present.index(name) - (len(present) - 1) / 2
            places.append(cases.index(case) + offset * width)
        heights = [values[case, name] for case in drawn]
        bars = axes.bar(places, heights, width * 0.95, color=colour, label=name)
        axes.bar_label(bars, [text.format(h) for h in heights], fontsize=6, padding=1)
    axes.set_xticks(range(len(cases)), cases, fontsize=7)
    axes.grid(axis="y")


def _unit(rows: list[Row], column: str) -> tuple[float, str]:
    largest = max(float(row[column]) for row in rows)
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside center right", frameon=False, fontsize=7)


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)
