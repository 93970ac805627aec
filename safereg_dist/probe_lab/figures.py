"""The laboratory's figures: sweep, ROC and reliability. Each title states the figure's message."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from safereg_dist.probe_lab.layer_fit import LayerReport
from safereg_dist.probe_lab.scores import auroc, calibration_error, curve_of
from safereg_dist.storage.atomic import write_atomically

BLUE, ORANGE, GREY = "#0072B2", "#E07B00", "#7A7A7A"  # told apart by colour-blind readers too
_COLOURS = {"linear": BLUE, "mlp": ORANGE, "direction": GREY}
_LINES = (("-", "o"), ("--", "s"))  # by pooling
_BINS = 10


def draw_sweep(reports: Sequence[LayerReport], chosen: LayerReport, path: Path) -> None:
    """AUROC, recall and background false positives of the chosen kind over layers."""
    shown = [r for r in reports if (r.kind, r.pooling) == (chosen.kind, chosen.pooling)]
    figure, axes = _figure()
    layer = [r.layer for r in shown]
    _band(axes, layer, [r.intervals["auroc"] for r in shown], BLUE)
    axes.plot(layer, [r.auroc for r in shown], "o-", color=BLUE, label="AUROC")
    axes.plot(layer, [r.recall for r in shown], "s-", color=ORANGE, label="recall")
    axes.plot(
        layer,
        [r.background_false_positive_rate for r in shown],
        "^-",
        color=GREY,
        label="background false positives",
    )
    axes.axvline(chosen.layer, color="black", linewidth=0.8, linestyle=":")
    _layer_axis(axes)
    axes.set(ylabel="share of held-out rows", ylim=(-0.03, 1.03))
    axes.set_title(
        f"Layer {chosen.layer} is the earliest as good as the best out-of-fold,\n"
        "in AUROC and log loss of the fit part; drawn are held-out rows"
    )
    axes.legend(frameon=False, loc="center right")
    _write(figure, path)


def draw_comparison(reports: Sequence[LayerReport], chosen: LayerReport, path: Path) -> None:
    """AUROC over layers of each kind (colour) and pooling (line), with 95 % intervals."""
    figure, axes = _figure()
    poolings = sorted({r.pooling for r in reports})
    for kind, pooling in sorted({(r.kind, r.pooling) for r in reports}):
        shown = [r for r in reports if (r.kind, r.pooling) == (kind, pooling)]
        dash, marker = _LINES[poolings.index(pooling) % len(_LINES)]
        layer = [r.layer for r in shown]
        _band(axes, layer, [r.intervals["auroc"] for r in shown], _COLOURS[kind])
        axes.plot(
            layer,
            [r.auroc for r in shown],
            linestyle=dash,
            marker=marker,
            color=_COLOURS[kind],
            label=f"{kind}, {pooling}",
        )
    _layer_axis(axes)
    axes.set_ylabel("AUROC on held-out rows")
    axes.set_title(f"The {chosen.kind} probe on {chosen.pooling} of layer {chosen.layer} is enough")
    axes.legend(frameon=False, loc="lower right")
    _write(figure, path)


def draw_roc(probability: np.ndarray, labels: np.ndarray, threshold: float, path: Path) -> None:
    """Recall over false positives, with the threshold marked."""
    curve = curve_of(probability, labels)
    recall = np.pad(curve.true[0] / max(curve.true[0, -1], 1), (1, 0))
    false = np.pad(curve.false[0] / max(curve.false[0, -1], 1), (1, 0))
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="chance")
    axes.plot(false, recall, color=BLUE, label="probe")
    at = [float(np.mean(probability[labels == kind] >= threshold)) for kind in (0, 1)]
    axes.plot(*at, "D", color=ORANGE, label=f"threshold {threshold:.3f}")
    axes.set(xlabel="false-positive rate", ylabel="recall", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(
        f"AUROC {auroc(probability, labels):.3f}; the threshold finds {at[1]:.0%} at {at[0]:.0%} "
        "false positives"
    )
    axes.legend(frameon=False, loc="lower right")
    _write(figure, path)


def draw_reliability(probability: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Observed share of harmful rows over the claimed probability, in ten bins."""
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    filled = sorted(set(bins.tolist()))
    claimed = [float(probability[bins == b].mean()) for b in filled]
    observed = [float(labels[bins == b].mean()) for b in filled]
    count = np.array([(bins == b).sum() for b in filled])
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="perfect")
    axes.plot(claimed, observed, color=BLUE, linewidth=1)
    axes.scatter(claimed, observed, s=15 + 200 * count / count.max(), color=BLUE, label="probe")
    axes.set(xlabel="claimed probability of harm", ylabel="observed share of harmful rows")
    error = float(calibration_error(probability, labels)[0])
    axes.set_title(f"Claimed and observed differ by {error:.3f} on average (area: rows)")
    axes.legend(frameon=False, loc="upper left")
    _write(figure, path)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)
    return figure, axes


def _layer_axis(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _band(axes: Axes, layer: list[int], intervals: Sequence[Any], colour: str) -> None:
    low, high = zip(*intervals, strict=True)
    axes.fill_between(layer, low, high, color=colour, alpha=0.15, linewidth=0)


def _write(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    write_atomically(path, image.getvalue())
