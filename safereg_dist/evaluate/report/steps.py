"""Figures over the steps of a training, and what a step costs."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from safereg_dist.evaluate.report.arms import Arm, number, ours_and_rival, percent
from safereg_dist.evaluate.report.frame import (
    Plot,
    Style,
    Theme,
    key_of,
    new_figure,
    row_height,
    short,
    stacked,
    styles_of,
)

_MAX_POINTS = 240  # per line: more cannot be told apart at this width


def binned(
    steps: np.ndarray, values: np.ndarray, reduce: Callable[[np.ndarray], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """At most _MAX_POINTS points of a line; NaN, a gap, where a part has no finite value."""
    kept = np.isfinite(steps)
    steps, values = steps[kept], values[kept]
    parts = min(_MAX_POINTS, len(steps))
    if parts == 0:
        return steps, values
    middles, heights = [], []
    for at, piece in zip(np.array_split(steps, parts), np.array_split(values, parts), strict=True):
        finite = piece[np.isfinite(piece)]
        middles.append(float(at.mean()))
        heights.append(float(reduce(finite)) if finite.size else np.nan)
    return np.array(middles), np.array(heights)


def _lines(
    axes: Axes, arms: list[Arm], key: str, styles: dict[str, Style], *, may_be_log: bool = False
) -> None:
    """One line per arm that has `key`; a dot where both neighbours are missing."""
    for arm in arms:
        steps, values = binned(arm.column("step"), arm.column(key), np.mean)
        known = np.isfinite(values)
        if not known.any():
            continue
        style, width = styles[arm.name], 1.6 if arm.role == "ours" else 1.2
        axes.plot(steps, values, style.dash, color=style.colour, linewidth=width, zorder=3)
        beside = np.append(known[1:], False) | np.append(False, known[:-1])
        alone = known & ~beside
        axes.plot(steps[alone], values[alone], "o", color=style.colour, markersize=2.5, zorder=3)
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [[0.0]])
    drawn = drawn[np.isfinite(drawn)]
    # Ratios matter once a quantity falls by more than this; zeros have no logarithm.
    if may_be_log and drawn.min() > 0 and drawn.max() / drawn.min() > 30:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _step_axes(figure: Figure, labels: list[str]) -> list[Axes]:
    grid = figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, label in zip(grid, labels, strict=True):
        axes.set_ylabel(label)
        axes.margins(x=0.02)
    figure.align_ylabels()
    grid[-1].set_xlabel("optimizer step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return list(grid)


def _largest(arms: list[Arm], key: str) -> float:
    return float(np.nanmax([0.0, *(value for arm in arms for value in arm.column(key))]))


def draw_risk(arms: list[Arm], theme: Theme) -> Plot | None:
    """Risk and coefficient: the mean row of each step, and the largest."""
    known = [a for a in arms if _largest([a], "kl_coef_max") > 0 or _largest([a], "risk_max") > 0]
    if not known:
        return None
    styles = styles_of(arms, theme)
    ours, rival = ours_and_rival(known, "kl_coef_mean")
    chosen = ours or rival or known[0]
    figure = new_figure(3.7)
    panels = _step_axes(figure, ["risk", "coefficient b"])
    for axes, prefix in zip(panels, ("risk", "kl_coef"), strict=True):
        axes.set_ylim(-0.04, 1.08 * max(1.0, _largest(known, f"{prefix}_max")))
        shown = [arm for arm in known if _largest([arm], f"{prefix}_max") > 0]
        for arm in shown:
            steps, top = binned(arm.column("step"), arm.column(f"{prefix}_max"), np.max)
            style = styles[arm.name]
            axes.plot(steps, top, style.dash, color=style.colour, linewidth=0.7, alpha=0.65)
        _lines(axes, shown, f"{prefix}_mean", styles)
    mean = chosen.total("kl_coef_mean") / max(1, np.isfinite(chosen.column("kl_coef_mean")).sum())
    return Plot(
        key="risk",
        figure=figure,
        title=(
            f"{short(chosen.name)} pulls {percent(chosen.share('active_rows', 'rows'))} of all "
            f"rows toward the reference, with mean coefficient {mean:.2f} and at most "
            f"{_largest([chosen], 'kl_coef_max'):.2f}"
        ),
        caption=(
            "Mean over the rows of each step (thick) and the largest row (thin). Anchor rows have "
            "coefficient 1. Arms without risk have no line in the upper panel."
        ),
        legend=[key_of(arm, styles[arm.name], line=True) for arm in known],
    )


def draw_loss(arms: list[Arm], theme: Theme) -> Plot | None:
    """What is minimised, and plain cross-entropy."""
    known = [arm for arm in arms if np.isfinite(arm.column("task_loss")).any()]
    if not known:
        return None
    styles = styles_of(arms, theme)
    figure = new_figure(3.7)
    panels = _step_axes(figure, ["loss L\n(nats/token)", "task loss\n(nats/token)"])
    for axes, key in zip(panels, ("loss", "task_loss"), strict=True):
        _lines(axes, known, key, styles, may_be_log=True)
    ours, rival = ours_and_rival(known, "task_loss")
    arm = ours or rival or known[0]
    other = f"; {short(rival.name)} at {rival.ending('task_loss'):.3g}" if ours and rival else ""
    return Plot(
        key="loss",
        figure=figure,
        title=f"{short(arm.name)} ends at task loss {arm.ending('task_loss'):.3g}{other}",
        caption=(
            "L is what is minimised. Task loss is the plain cross-entropy over all response tokens "
            "in nats per token, rows held back included, so it stays higher where harmful answers "
            "are not learnt. The title takes the mean of the last tenth."
        ),
        legend=[key_of(arm, styles[arm.name], line=True) for arm in known],
    )


def budget_of(arm: Arm) -> float:
    """The divergence that schedule `budget` aims at, nats a token; NaN with another schedule."""
    return number(arm.setting("regularizer", "budget"))


def draw_divergence(arms: list[Arm], theme: Theme) -> Plot | None:
    """Divergence of active tokens, and what a budget aims at."""
    known = [arm for arm in arms if np.isfinite(arm.column("divergence")).any()]
    if not known:
        return None
    styles = styles_of(arms, theme)
    figure = new_figure(2.5)
    (axes,) = _step_axes(figure, ["divergence\n(nats/token)"])
    _lines(axes, known, "divergence", styles, may_be_log=True)
    legend: list[Any] = [key_of(arm, styles[arm.name], line=True) for arm in known]
    aimed = [arm for arm in known if np.isfinite(budget_of(arm))]
    for arm in aimed:
        look = {"color": styles[arm.name].colour, "ls": (0, (1, 1.5)), "lw": 1.3}
        axes.axhline(budget_of(arm), zorder=2, **look)
        legend.append(Line2D([], [], label=f"budget: {budget_of(arm):g}", **look))
    ours, rival = ours_and_rival(aimed or known, "divergence")
    arm = ours or rival or known[0]
    aim = f", with a budget of {budget_of(arm):g}" if arm in aimed else ""
    return Plot(
        key="divergence",
        figure=figure,
        title=(
            f"{short(arm.name)} ends {arm.ending('divergence'):.3g} nats per active token from the "
            f"reference{aim}"
        ),
        caption=(
            "Mean divergence from the reference over the active tokens of a step; a gap, or dots, "
            "where steps have none."
        ),
        legend=legend,
    )


def draw_cost(arms: list[Arm], theme: Theme) -> Plot | None:
    """Seconds of a step, and how often the reference runs."""
    known = [arm for arm in arms if np.isfinite(arm.median("step_time_s"))]
    if not known:
        return None
    styles = styles_of(arms, theme)
    figure = new_figure(0.6 + row_height([arm.name for arm in known]) * len(known))
    panels = figure.subplots(1, 2, sharey=True)
    times = [arm.column("step_time_s") for arm in known]
    low, high = (np.array([np.nanquantile(time, q) for time in times]) for q in (0.2, 0.8))
    columns = (
        ("step time (s)", [arm.median("step_time_s") for arm in known], high),
        ("reference rows (%)", [arm.share("reference_rows", "rows") for arm in known], None),
    )
    for axes, (label, values, ends) in zip(panels, columns, strict=True):
        numbers = np.nan_to_num(np.array(values, dtype=float))
        colours = [styles[arm.name].colour for arm in known]
        axes.barh(range(len(known)), numbers, height=0.62, color=colours)
        axes.set_xlabel(label, fontsize=9.5)
        far = numbers if ends is None else np.maximum(numbers, np.nan_to_num(ends))
        axes.set_xlim(0, max(1e-9, float(far.max())) * 1.7)
        axes.grid(False)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        for row, value in enumerate(values):
            text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            axes.text(far[row], row, f" {text}" if np.isfinite(value) else " \u2013", va="center")
    panels[0].hlines(range(len(known)), low, high, color=theme.ink, linewidth=1.0)
    panels[0].set_yticks(range(len(known)), [stacked(arm.name) for arm in known], fontsize=9)
    panels[0].set_ylim(len(known) - 0.4, -0.6)
    return Plot(
        key="cost",
        figure=figure,
        title=_cost_title(known),
        caption=(
            "Medians over the steps, with 20/80 % quantiles of the step time; rows on which the "
            "reference ran, as a share of all rows. Compare times of one machine only."
        ),
        legend=[],
    )


def _cost_title(arms: list[Arm]) -> str:
    ours, rival = ours_and_rival(arms, "step_time_s")
    arm = ours or rival or arms[0]
    seconds = arm.median("step_time_s")
    title = f"A step of {short(arm.name)} takes {seconds:.3g} s"
    if ours and rival and rival.median("step_time_s") > 0:
        ratio = seconds / rival.median("step_time_s")
        title = f"A step of {short(arm.name)} takes {ratio:.2f} times one of {short(rival.name)}"
    share = arm.share("reference_rows", "rows")
    return title + (f"; the reference runs on {percent(share)} of rows" if share >= 0 else "")
