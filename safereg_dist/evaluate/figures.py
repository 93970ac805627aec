"""The figures of a report: one message each, computed from the data, written as the title.

Colours are fixed and safe for colour-blind readers: blue for what is compared against, grey for the
reference, orange for runs whose coefficient follows the risk. Text is sized for a phone's width.
"""

import io
import itertools
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

_SHADES = {
    "baseline": ("#0072B2", "#4FA3D1", "#004266", "#7F9FC4"),
    "reference": ("#7A7A7A", "#A6A6A6"),
    "ours": ("#E07B00", "#9C4F00", "#F2A541"),
}
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "text.parse_math": False,  # a "$" in the name of a run is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "safereg",  # same data, same bytes
}
_WIDTH = 5.6  # inches; at a phone's 360 px ten-point text is still nine pixels high
_MAX_POINTS = 300  # per line: more cannot be told apart at this width
_NAME_LENGTH = 24
_SHIFTS = (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6)  # lines of text up or down


def number(value: Any) -> float:
    """The value as a float; NaN where it is no number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run, or one model, of a comparison."""

    name: str
    role: str
    """`ours`, `baseline` or `reference`: decides the colour."""
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    """Columns of metrics.jsonl by key, float64 [steps], NaN where a row has no number."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    profile_png: bytes = b""
    """The figure of a recorded run (`profile: true`); empty where there is none."""

    def rate(self, key: str) -> float:
        """A figure of the evaluation in per cent; NaN where there is none."""
        return 100.0 * number(self.evaluation.get(key))

    def column(self, key: str) -> np.ndarray:
        """A column of the metrics, [steps]; all NaN where the key is absent."""
        return self.metrics.get(key, np.full(len(self.metrics.get("step", ())), np.nan))

    def total(self, key: str) -> float:
        """Sum of a column over all steps that have it; NaN where no step has."""
        values = self.column(key)
        return float(np.nansum(values)) if np.isfinite(values).any() else float("nan")

    def share(self, part: str, whole: str) -> float:
        """total(part) / total(whole) in per cent, NaN where unknown."""
        of = self.total(whole)
        return 100.0 * self.total(part) / of if of > 0 else float("nan")

    def median(self, key: str) -> float:
        """Median of a column; NaN where there is none."""
        values = self.column(key)
        values = values[np.isfinite(values)]
        return float(np.median(values)) if values.size else float("nan")

    def ending(self, key: str) -> float:
        """Mean of a column over the last tenth of the steps; NaN where there is none."""
        values = self.column(key)
        values = values[np.isfinite(values)]
        return float(values[-max(1, len(values) // 10) :].mean()) if values.size else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A finished figure."""

    key: str
    """Part of the file name."""
    title: str
    """The message."""
    caption: str
    """How to read it."""
    png: bytes
    svg: bytes


def draw_all(arms: list[Arm]) -> list[Drawing]:
    """The figures for which `arms` have data, in the order of the report."""
    makers: list[Callable[[list[Arm]], tuple[Figure, str, str, str] | None]] = [
        _draw_safety,
        _draw_risk,
        _draw_loss,
        _draw_cost,
    ]
    drawings = []
    # Not pyplot: its global state belongs to the caller.
    style: Any = {**matplotlib.rcParamsDefault, **_STYLE}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A run may be named in a script the font lacks; the HTML shows it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for maker in makers:
            made = maker(arms)
            if made is not None:
                figure, key, title, caption = made
                drawings.append(_finish(figure, key=key, title=title, caption=caption))
    return drawings


def percent(value: float) -> str:
    """`12.3 %`, without a needless decimal; a dash where the value is NaN."""
    if not np.isfinite(value):
        return "\u2013"
    return f"{value:.1f}".removesuffix(".0") + "\u00a0%"


def arm_styles(arms: list[Arm]) -> list[tuple[str, str, str]]:
    """(colour, dash, marker) of each arm; arms of one role differ in shade, dash and marker."""
    seen: dict[str, int] = {}
    styles = []
    for position, arm in enumerate(arms):
        index = seen.get(arm.role, 0)
        seen[arm.role] = index + 1
        shades = _SHADES[arm.role]
        styles.append(
            (
                shades[index % len(shades)],
                _DASHES[index % len(_DASHES)],
                _MARKERS[position % len(_MARKERS)],
            )
        )
    return styles


def _finish(figure: Figure, *, key: str, title: str, caption: str) -> Drawing:
    lines = textwrap.wrap(title, 56)
    room = 0.2 * len(lines) + 0.12  # inches above the axes
    height = figure.get_figheight() + room
    figure.set_figheight(height)
    # Placed by hand, since constrained layout would centre it over the axes.
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    layout.set(rect=(0.0, 0.0, 1.0, 1.0 - room / height))
    figure.text(
        0.015, 1.0 - 0.06 / height, "\n".join(lines), va="top", fontsize=11.5, fontweight="bold"
    )
    FigureCanvasAgg(figure)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return Drawing(key=key, title=title, caption=caption, png=png.getvalue(), svg=svg.getvalue())


def _new_figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 3] + "..."


def _ours_and_rival(arms: list[Arm], key: str) -> tuple[Arm | None, Arm | None]:
    """The first risk-adaptive arm that has `key`, and the first baseline that has it."""
    known = [
        arm for arm in arms if np.isfinite(arm.rate(key)) or np.isfinite(arm.column(key)).any()
    ]
    ours = next((arm for arm in known if arm.role == "ours"), None)
    rival = next((arm for arm in known if arm.role == "baseline"), None)
    return ours, rival


# --- safety against utility -----------------------------------------------------------------------


def _draw_safety(arms: list[Arm]) -> tuple[Figure, str, str, str] | None:
    judged = [arm for arm in arms if np.isfinite(arm.rate("attack_success_rate"))]
    has_task = any(np.isfinite(arm.rate("task_exact_match")) for arm in judged)
    word = "task" if has_task else "benign"  # utility, where there is no task, is benign answers
    utility = f"{word}_exact_match"
    known = [arm for arm in judged if np.isfinite(arm.rate(utility))]
    if not known:
        return None
    figure = _new_figure(4.6)
    axes = figure.add_subplot()
    axes.set(xlim=(-7, 107), ylim=(-7, 107))
    axes.set_xlabel(f"{word} exact match (%)   better \u2192")
    axes.set_ylabel("\u2190 better   attack success (%)")
    styles = dict(zip((arm.name for arm in arms), arm_styles(arms), strict=True))
    for arm in known:
        _safety_point(axes, arm, utility, styles[arm.name])
    _safety_labels(axes, known, utility, styles)
    return (
        figure,
        "safety",
        _safety_title(known, utility, word),
        (
            "Share of held-out harmful prompts that are answered, against exact answers to the "
            f"{word} prompts. Filled: greedy decoding; open: sampled at temperature 1. Thin lines: "
            "95 % Wilson intervals."
        ),
    )


def _safety_title(arms: list[Arm], utility: str, word: str) -> str:
    ours, rival = _ours_and_rival(arms, "attack_success_rate")
    arm = ours or rival or arms[0]
    success, sampled = (arm.rate(f"attack_success_rate{end}") for end in ("", "_sampled"))
    title = f"{_short(arm.name)}: attack success {percent(success)}"
    if np.isfinite(sampled):
        title += f" (sampled {percent(sampled)})"
    title += f" at {percent(arm.rate(utility))} {word} exact match"
    if ours and rival:
        title += f"; {_short(rival.name)}: {percent(rival.rate('attack_success_rate'))}"
        title += f" at {percent(rival.rate(utility))}"
    return title


def _safety_point(axes: Axes, arm: Arm, utility: str, style: tuple[str, str, str]) -> None:
    colour, _, marker = style
    x, y = arm.rate(utility), arm.rate("attack_success_rate")
    sampled = arm.rate("attack_success_rate_sampled")
    intervals = arm.evaluation.get("intervals") or {}
    thin = {"color": colour, "linewidth": 0.9, "alpha": 0.55, "zorder": 2}
    if intervals.get(utility):
        axes.plot([100 * bound for bound in intervals[utility]], [y, y], **thin)
    if intervals.get("attack_success_rate"):
        axes.plot([x, x], [100 * bound for bound in intervals["attack_success_rate"]], **thin)
    size = 9 if arm.role != "reference" else 13  # the base often lies under another arm
    rim = {"markeredgecolor": "white", "markeredgewidth": 0.9}
    if np.isfinite(sampled):
        axes.plot([x, x], [y, sampled], color=colour, linewidth=1.6, zorder=3)
        axes.plot(
            x, sampled, marker, color=colour, markersize=size, markerfacecolor="white", zorder=4
        )
    front = {"reference": 4, "baseline": 5, "ours": 6}[arm.role]
    axes.plot(x, y, marker, color=colour, markersize=size, zorder=front, **rim)


def _safety_labels(
    axes: Axes, arms: list[Arm], utility: str, styles: dict[str, tuple[str, str, str]]
) -> None:
    """Writes each name at the first free place near its point (all in per cent of the axes)."""
    taken: list[tuple[float, float, float, float]] = []
    for arm in arms:
        x, y = arm.rate(utility), arm.rate("attack_success_rate")
        for mark in (y, arm.rate("attack_success_rate_sampled")):
            if np.isfinite(mark):
                taken.append((x - 3, mark - 3, x + 3, mark + 3))
    # Those nearest to an edge first, since they have the least room.
    for arm in sorted(arms, key=lambda arm: -abs(arm.rate("attack_success_rate") - 50)):
        name, x, y = _short(arm.name), arm.rate(utility), arm.rate("attack_success_rate")
        width, height = 1.95 * len(name) + 1, 5.5  # of ten-point text at this size
        box = on_right = None
        for shift, gap in itertools.product(_SHIFTS, (4.5, 8.0)):
            on_right = x < 50
            left = x + gap if on_right else x - gap - width
            low = min(max(y + shift * height - height / 2, -6), 106 - height)
            box = (left, low, left + width, low + height)
            if not any(_overlap(box, other) for other in taken):
                break
        assert box is not None
        taken.append(box)
        at = (box[0] if on_right else box[2], (box[1] + box[3]) / 2)
        if abs(at[1] - y) > 1:
            axes.plot([x, at[0]], [y, at[1]], color="#BBBBBB", linewidth=0.7, zorder=1)
        side = "left" if on_right else "right"
        weight = "bold" if arm.role == "ours" else "normal"
        colour = styles[arm.name][0]
        axes.text(*at, name, color=colour, ha=side, va="center", fontweight=weight, zorder=7)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# --- lines over steps -----------------------------------------------------------------------------


def _binned(
    steps: np.ndarray, values: np.ndarray, reduce: Callable[[np.ndarray], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """At most _MAX_POINTS points of a line; NaN are left out."""
    kept = np.isfinite(values) & np.isfinite(steps)
    steps, values = steps[kept], values[kept]
    parts = min(_MAX_POINTS, len(steps))
    if parts == 0:
        return steps, values
    pieces = zip(np.array_split(steps, parts), np.array_split(values, parts), strict=True)
    pairs = [(float(part.mean()), float(reduce(piece))) for part, piece in pieces]
    return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])


def _draw_lines(
    axes: Axes, arms: list[Arm], key: str, styles: dict[str, Any], *, may_be_log: bool = False
) -> None:
    """One line per arm that has `key`, with its name at the right end."""
    ends: list[tuple[float, Arm]] = []
    for arm in arms:
        steps, values = _binned(arm.column("step"), arm.column(key), np.mean)
        if len(values) == 0:
            continue
        colour, dash, _ = styles[arm.name]
        width = 2.0 if arm.role == "ours" else 1.5
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, dash, color=colour, linewidth=width, marker=marker, zorder=3)
        ends.append((float(values[-1]), arm))
    drawn = np.concatenate([np.asarray(line.get_ydata()) for line in axes.lines] or [[0.0]])
    # Ratios matter once a quantity falls by more than this; zeros have no logarithm.
    if may_be_log and drawn.min() > 0 and drawn.max() / drawn.min() > 30:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _label_ends(axes, ends, styles)


def _label_ends(axes: Axes, ends: list[tuple[float, Arm]], styles: dict[str, Any]) -> None:
    """Names in the right margin at the height of the line's end, moved apart where they collide."""
    to_axes = axes.transData + axes.transAxes.inverted()
    last = axes.get_xlim()[1]
    figure: Any = axes.figure
    gap = 0.17 / (figure.get_figheight() / len(figure.axes) * 0.75)  # one line of text
    gap = min(gap, 1.2 / max(1, len(ends)))  # many arms: rather tight than into the next panel
    heights = sorted(
        ((float(to_axes.transform((last, y))[1]), arm) for y, arm in ends), key=lambda e: e[0]
    )
    placed: list[float] = []
    for height, _ in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    excess = max(0.0, placed[-1] - 1.0) if placed else 0.0
    for (_, arm), at in zip(heights, placed, strict=True):
        axes.annotate(
            _short(arm.name),
            xy=(1.0, at - excess),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            color=styles[arm.name][0],
            va="center",
            fontsize=9,
            fontweight="bold" if arm.role == "ours" else "normal",
            annotation_clip=False,
        )


def _step_axes(figure: Figure, labels: list[str]) -> list[Axes]:
    grid = figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, label in zip(grid, labels, strict=True):
        axes.set_ylabel(label)
        axes.margins(x=0.01)
    grid[-1].set_xlabel("optimizer step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return list(grid)


def _draw_risk(arms: list[Arm]) -> tuple[Figure, str, str, str] | None:
    known = [
        arm
        for arm in arms
        if np.nanmax([0.0, *arm.column("kl_coef_max"), *arm.column("risk_max")]) > 0
    ]
    if not known:
        return None
    styles = dict(zip((arm.name for arm in arms), arm_styles(arms), strict=True))
    ours, rival = _ours_and_rival(known, "kl_coef_mean")
    chosen = ours or rival or known[0]
    figure = _new_figure(4.4)
    panels = _step_axes(figure, ["risk", "coefficient b"])
    for axes, prefix in zip(panels, ("risk", "kl_coef"), strict=True):
        axes.set_ylim(-0.04, 1.14 * max(1.0, _largest(known, f"{prefix}_max")))
        shown = [arm for arm in known if _largest([arm], f"{prefix}_max") > 0]
        for arm in shown:
            steps, top = _binned(arm.column("step"), arm.column(f"{prefix}_max"), np.max)
            _, mean = _binned(arm.column("step"), arm.column(f"{prefix}_mean"), np.mean)
            colour, dash, _ = styles[arm.name]
            axes.plot(steps, top, dash, color=colour, linewidth=0.8, alpha=0.6)
            if len(mean) == len(top) and arm is chosen:
                axes.fill_between(steps, mean, top, color=colour, alpha=0.09, linewidth=0)
                axes.text(steps[0], top[0], "largest row", color=colour, fontsize=8, va="bottom")
        _draw_lines(axes, shown, f"{prefix}_mean", styles)
    mean = chosen.total("kl_coef_mean") / max(1, np.isfinite(chosen.column("kl_coef_mean")).sum())
    title = (
        f"{_short(chosen.name)} pulls {percent(chosen.share('active_rows', 'rows'))} of all rows "
        f"toward the reference, with mean coefficient {mean:.2f} and at most "
        f"{_largest([chosen], 'kl_coef_max'):.2f}"
    )
    caption = (
        "Mean over the rows of each step (thick) and the largest row (thin; shaded between for one "
        "arm). Anchor rows have coefficient 1. Arms without risk have no line in the upper panel."
    )
    return figure, "risk", title, caption


def _largest(arms: list[Arm], key: str) -> float:
    return float(np.nanmax([0.0, *(value for arm in arms for value in arm.column(key))]))


def _draw_loss(arms: list[Arm]) -> tuple[Figure, str, str, str] | None:
    known = [arm for arm in arms if np.isfinite(arm.column("task_loss")).any()]
    if not known:
        return None
    styles = dict(zip((arm.name for arm in arms), arm_styles(arms), strict=True))
    figure = _new_figure(5.4)
    labels = ["loss L\n(nats/token)", "task loss\n(nats/token)", "divergence\n(nats/token)"]
    for axes, key in zip(
        _step_axes(figure, labels), ("loss", "task_loss", "divergence"), strict=True
    ):
        _draw_lines(axes, known, key, styles, may_be_log=True)
    ours, rival = _ours_and_rival(known, "task_loss")
    arm = ours or rival or known[0]
    other = f" ({_short(rival.name)}: {rival.ending('task_loss'):.3g})" if ours and rival else ""
    title = (
        f"{_short(arm.name)} ends at task loss {arm.ending('task_loss'):.3g}{other} and divergence "
        f"{arm.ending('divergence'):.3g} nats per token"
    )
    caption = (
        "L is what is minimised. Task loss is the plain cross-entropy over all response tokens, "
        "rows held back included, so it stays higher where harmful answers are not learnt. "
        "Divergence from the reference is over active tokens only. The title takes the last tenth."
    )
    return figure, "loss", title, caption


# --- cost -----------------------------------------------------------------------------------------


def _draw_cost(arms: list[Arm]) -> tuple[Figure, str, str, str] | None:
    known = [arm for arm in arms if np.isfinite(arm.median("step_time_s"))]
    if not known:
        return None
    styles = dict(zip((arm.name for arm in arms), arm_styles(arms), strict=True))
    figure = _new_figure(0.8 + 0.32 * len(known))
    panels = figure.subplots(1, 3, sharey=True)
    times = [arm.column("step_time_s") for arm in known]
    low, high = (np.array([np.nanquantile(time, q) for time in times]) for q in (0.2, 0.8))
    columns = (
        ("step time (s)", [arm.median("step_time_s") for arm in known], high),
        ("reference rows (%)", [arm.share("reference_rows", "rows") for arm in known], None),
        ("tokens/s", [arm.median("tokens_per_s") for arm in known], None),
    )
    for axes, (label, values, ends) in zip(panels, columns, strict=True):
        numbers = np.nan_to_num(np.array(values, dtype=float))
        colours = [styles[arm.name][0] for arm in known]
        axes.barh(range(len(known)), numbers, height=0.62, color=colours)
        axes.set_xlabel(label, fontsize=9)
        far = numbers if ends is None else np.maximum(numbers, np.nan_to_num(ends))
        axes.set_xlim(0, max(1e-9, float(far.max())) * 1.6)
        axes.grid(False)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        for row, value in enumerate(values):
            text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            axes.text(far[row], row, f" {text}" if np.isfinite(value) else " \u2013", va="center")
    panels[0].hlines(range(len(known)), low, high, color="black", linewidth=1.0)
    panels[0].set_yticks(range(len(known)), [_short(arm.name) for arm in known])
    panels[0].set_ylim(len(known) - 0.4, -0.6)
    return (
        figure,
        "cost",
        _cost_title(known),
        (
            "Medians over the steps, with 20/80 % quantiles of the step time; rows on which the "
            "reference ran, as a share of all rows. Compare times of one machine only."
        ),
    )


def _cost_title(arms: list[Arm]) -> str:
    ours, rival = _ours_and_rival(arms, "step_time_s")
    arm = ours or rival or arms[0]
    seconds = arm.median("step_time_s")
    title = f"A step of {_short(arm.name)} takes {seconds:.3g} s"
    if ours and rival and rival.median("step_time_s") > 0:
        ratio = seconds / rival.median("step_time_s")
        title = f"A step of {_short(arm.name)} takes {ratio:.2f} times one of {_short(rival.name)}"
    share = arm.share("reference_rows", "rows")
    return title + (f"; the reference runs on {percent(share)} of rows" if share >= 0 else "")
