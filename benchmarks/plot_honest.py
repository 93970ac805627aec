"""The figure of `results/probe/honest.csv`, drawn by `plot.py`: every attempt, and more pairs."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from plot_style import COLOURS, OURS, Row

XSTEST, OWN = "XSTest unsafe, safe", "own pairs, out of fold"
CURVE = "learning curve"
CONTROL = "control: bag of words"
FIGURE = "recall_at_fpr_5"


def draw_honest(rows: list[Row]) -> Figure:
    """Recall at 5 % false positives on XSTest by attempt, as written, and over the pairs."""
    rows = [row for row in rows if row["text"] == "as written"]
    tried = [row for row in rows if row["test"] == XSTEST and row["attempt"] != CURVE]
    tried.sort(key=lambda row: float(row[FIGURE]))
    figure, (bars, curve) = plt.subplots(
        1, 2, figsize=(10.5, 6.4), layout="constrained", width_ratios=[1.5, 1]
    )
    for place, row in enumerate(tried):
        value, low, high = (float(row[FIGURE + end]) for end in ("", "_low", "_high"))
        bars.plot([low, high], [place, place], color=_colour(row), linewidth=1)
        bars.plot(value, place, "o", color=_colour(row), ms=5)
    bars.set_yticks(range(len(tried)), [_label(row) for row in tried], fontsize=7)
    bars.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bars.set_xlim(0, 1)
    bars.set_xlabel("recall at 5 % false positives, XSTest unsafe against safe (95 % intervals)")
    bars.grid(axis="x")
    _draw_curve(curve, rows)
    figure.suptitle(_message(tried), fontsize=11, fontweight="bold")
    return figure


def _colour(row: Row) -> str:
    if row["is_picked"] == "True":
        return COLOURS[OURS]
    return "#4D4D4D" if row["attempt"] == CONTROL else "#0072B2"


def _label(row: Row) -> str:
    marks = {"is_picked": " (picked on our pairs)", "is_best_on_test": " (best on this test)"}
    return row["attempt"] + "".join(text for name, text in marks.items() if row[name] == "True")


def _draw_curve(axes: Axes, rows: list[Row]) -> None:
    """AUROC over the number of pairs; a point is one draw of them."""
    rows = [row for row in rows if row["attempt"] == CURVE]
    for test, colour in ((XSTEST, "#0072B2"), (OWN, COLOURS[OURS])):
        mine = [row for row in rows if row["test"] == test]
        x, y = (np.array([float(row[name]) for row in mine]) for name in ("pairs", "auroc"))
        counts = np.unique(x)
        axes.plot(x, y, "o", color=colour, ms=3, fillstyle="none")
        label = "our pairs that were left out" if test == OWN else test
        axes.plot(counts, [y[x == count].mean() for count in counts], color=colour, label=label)
    axes.set_xlabel("matched pairs in the fit")
    axes.set_ylabel("AUROC")
    axes.set_ylim(0.5, 1)
    axes.grid(axis="y")
    axes.legend(frameon=False, loc="lower right", fontsize=8)


def _message(tried: list[Row]) -> str:
    by_name = {row["attempt"]: float(row[FIGURE]) for row in tried}
    picked = next(float(row[FIGURE]) for row in tried if row["is_picked"] == "True")
    return (
        f"XSTest, 5 % false positives: counted words find {by_name[CONTROL]:.0%} of the unsafe "
        f"prompts,\nthe probe that our own pairs pick {picked:.0%}, the best of {len(tried)} "
        f"attempts {max(by_name.values()):.0%}"
    )
