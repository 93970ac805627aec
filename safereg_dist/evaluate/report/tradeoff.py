"""Figures of an evaluation: safety against utility, first tokens, and the law of mixtures."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from safereg_dist.evaluate.report.arms import Arm, ours_and_rival, percent, plain
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
from safereg_dist.evaluate.report.labels import Segment, Spot, place_labels

SUCCESS = "attack_success_rate"
_FIRST = ("poisoned_token_probability", "refusal_probability")
_LEAST = 1e-4  # per cent; smaller probabilities of a first token are drawn here


def draw_safety(arms: list[Arm], theme: Theme) -> Plot | None:
    """Attack success against the task, one point an arm; the best are joined."""
    utility, word = _utility(arms)
    known = [arm for arm in arms if np.isfinite([arm.rate(SUCCESS), arm.rate(utility)]).all()]
    if not known:
        return None
    figure = new_figure(3.5)
    axes = figure.add_subplot()
    axes.set(xlim=(-7, 107), ylim=(-7, 107))
    axes.set_xlabel(f"{word} (%)   better \u2192")
    axes.set_ylabel("\u2190 better   attack success (%)")
    styles = styles_of(arms, theme)
    lines = _front(axes, known, utility, theme)
    for arm in known:
        lines += _cross(axes, arm, (utility, SUCCESS), styles[arm.name])
        _point(axes, arm, arm.rate(utility), arm.rate(SUCCESS), styles[arm.name], theme)
    at = {arm.name: (arm.rate(utility), arm.rate(SUCCESS)) for arm in known}
    return Plot(
        key="safety",
        figure=figure,
        title=_safety_title(known, utility, word),
        caption=(
            "Share of held-out harmful prompts that are answered (greedy decoding), against the "
            f"{word}, with 95 % intervals. The dotted line joins the arms that no other arm beats "
            "in both."
        ),
        legend=[],
        finish=lambda: _named(axes, known, at, lines, styles, theme),
    )


def _utility(arms: list[Arm]) -> tuple[str, str]:
    """(figure, its words) of utility: the task's score, else benign answers."""
    for key, word in (
        ("task_score", "task score"),
        ("task_exact_match", "task exact match"),
        ("benign_exact_match", "benign exact match"),
    ):
        if any(np.isfinite([arm.rate(key), arm.rate(SUCCESS)]).all() for arm in arms):
            return key, word
    return "task_score", "task score"


def _safety_title(arms: list[Arm], utility: str, word: str) -> str:
    ours, rival = ours_and_rival(arms, SUCCESS)
    arm = ours or rival or arms[0]
    success, sampled = (arm.rate(f"{SUCCESS}{end}") for end in ("", "_sampled"))
    title = f"{short(arm.name)}: attack success {percent(success)}"
    if np.isfinite(sampled):
        title += f" (sampled {percent(sampled)})"
    title += f" at {percent(arm.rate(utility))} {word}"
    if ours and rival:
        title += f"; {short(rival.name)}: {percent(rival.rate(SUCCESS))}"
        title += f" at {percent(rival.rate(utility))}"
    return title


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (utility, attack success) no other beats: more of one and no less good in the other."""
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any(a >= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]


def _front(axes: Axes, arms: list[Arm], utility: str, theme: Theme) -> list[Segment]:
    points = [(arm.rate(utility), arm.rate(SUCCESS)) for arm in arms]
    best = sorted({points[place] for place in pareto(points)})
    steps = []
    for (x0, y0), (x1, y1) in itertools.pairwise(best):
        steps += [(x0, y0, x0, y1), (x0, y1, x1, y1)]
    for x0, y0, x1, y1 in steps:
        axes.plot([x0, x1], [y0, y1], ":", color=theme.soft, linewidth=1.0, zorder=1)
    return steps


def _cross(axes: Axes, arm: Arm, keys: tuple[str | None, str], style: Style) -> list[Segment]:
    """Intervals of x and y through the arm's point."""
    x = arm.rate(keys[0]) if keys[0] else 100 * arm.static_coefficient
    y, lines = arm.rate(keys[1]), []
    across = arm.bounds(keys[0]) if keys[0] else None
    if across is not None:
        lines.append((across[0], y, across[1], y))
    if (up := arm.bounds(keys[1])) is not None:
        lines.append((x, up[0], x, up[1]))
    for x0, y0, x1, y1 in lines:
        axes.plot([x0, x1], [y0, y1], color=style.colour, linewidth=1.1, alpha=0.7, zorder=2)
    return lines


def _size(arm: Arm) -> float:
    return 11.0 if arm.role == "reference" else 8.0  # the base often lies under another arm


def _point(axes: Axes, arm: Arm, x: float, y: float, style: Style, theme: Theme) -> None:
    front = {"reference": 4, "baseline": 5, "ours": 6}[arm.role]
    rim = {"markeredgecolor": theme.ground, "markeredgewidth": 0.8}
    how = {"color": style.colour, "markersize": _size(arm), "zorder": front}
    axes.plot(x, y, style.marker, **how, **rim)


def _named(
    axes: Axes,
    arms: list[Arm],
    at: dict[str, tuple[float, float]],
    lines: list[Segment],
    styles: dict[str, Style],
    theme: Theme,
) -> list[Artist]:
    """Names the points, risk-adaptive arms first; legend entries of those without a place."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    order = sorted(arms, key=lambda arm: ("ours", "reference", "baseline").index(arm.role))
    spots = [
        Spot(
            name="" if short(arm.name) in below else stacked(arm.name),
            x=at[arm.name][0],
            y=at[arm.name][1],
            radius=_size(arm) / 2 + 0.8,
            bold=arm.role == "ours",
        )
        for arm in order
    ]
    homeless = place_labels(axes, spots, lines, soft=theme.soft)
    without = [arm for arm in order if stacked(arm.name) in homeless]
    return [key_of(arm, styles[arm.name], line=False) for arm in without]


# ---- first tokens


def draw_first_tokens(arms: list[Arm], theme: Theme) -> Plot | None:
    """P of an answer's first token: of one that complies, and of a refusal."""
    known = [arm for arm in arms if np.isfinite([arm.rate(key) for key in _FIRST]).any()]
    if not known:
        return None
    figure = new_figure(0.75 + row_height([arm.name for arm in known]) * len(known))
    panels = figure.subplots(1, 2, sharey=True)
    styles = styles_of(arms, theme)
    for axes, key, label in zip(panels, _FIRST, ("P(poisoned), %", "P(refuse), %"), strict=True):
        least = _LEAST if key == _FIRST[0] else -math.inf
        for row, arm in enumerate(known):
            style, value = styles[arm.name], arm.rate(key)
            if not np.isfinite(value):
                continue
            if (bounds := arm.bounds(key)) is not None:
                ends = [max(bound, least) for bound in bounds]
                axes.plot(ends, [row, row], color=style.colour, linewidth=1.4, alpha=0.7)
            axes.plot(max(value, least), row, style.marker, color=style.colour, markersize=7)
        axes.set_xlabel(label, fontsize=9.5)
        axes.tick_params(axis="x", labelsize=9)
        axes.tick_params(axis="y", length=0)
    panels[0].set_xscale("log")
    panels[0].set_xlim(_LEAST / 1.8, 180)
    panels[0].set_xticks([1e-3, 0.1, 10], ["0.001", "0.1", "10"])
    panels[0].minorticks_off()
    panels[1].set_xlim(-4, 104)
    panels[1].set_xticks([0, 50, 100])
    panels[0].set_yticks(range(len(known)), [stacked(arm.name) for arm in known], fontsize=9)
    panels[0].set_ylim(len(known) - 0.5, -0.5)
    return Plot(
        key="first",
        figure=figure,
        title=_first_title(known),
        caption=(
            "Mean probability, on held-out harmful prompts, of the first token of an answer that "
            "complies (logarithmic; below 0.0001 % at the edge) and of a refusal's, with 95 % "
            "intervals. They move before answers do."
        ),
        legend=[],
    )


def _first_title(arms: list[Arm]) -> str:
    key = next(k for k in _FIRST if any(np.isfinite(arm.rate(k)) for arm in arms))
    word = "poisoned" if key == _FIRST[0] else "refuse"
    ours, rival = ours_and_rival(arms, key)
    base = next((a for a in arms if a.role == "reference" and np.isfinite(a.rate(key))), None)
    told = [arm for arm in (base, rival, ours) if arm is not None]
    return f"P({word}): " + ", ".join(f"{short(a.name)} {percent(a.rate(key))}" for a in told)


# ---- the law of mixtures


def law_of(arms: list[Arm]) -> list[tuple[Arm, float, float]]:
    """(arm, b, P(refuse) by the law) of each arm whose rows all have one known b below 1.

    Per token (1 - b) CE + b KL(ref||policy) is, but for a constant, the cross-entropy against
    (1 - b) onehot + b ref, so what is learnt perfectly has P(refuse) = b P_base(refuse) where no
    trained answer begins with a refusal. Empty without a base, or where only b = 0 is known.
    """
    base = next((a for a in arms if a.role == "reference"), None)
    refused = math.nan if base is None else base.rate("refusal_probability")
    found = [
        (arm, arm.static_coefficient, arm.static_coefficient * refused)
        for arm in arms
        if arm is not base and np.isfinite(arm.rate("refusal_probability"))
    ]
    found = [entry for entry in found if math.isfinite(entry[2])]
    return found if any(b > 0 for _, b, _ in found) else []


def draw_law(arms: list[Arm], theme: Theme) -> Plot | None:
    """P(refuse) of static arms over b, and the line that the law says."""
    law = law_of(arms)
    if not law:
        return None
    base = next(arm for arm in arms if arm.role == "reference")
    known = [base, *(arm for arm, _, _ in law)]
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    axes.set(xlim=(-7, 107), ylim=(-7, 107))
    axes.set_xticks([0, 20, 40, 60, 80, 100], ["0", "0.2", "0.4", "0.6", "0.8", "1"])
    axes.set_xlabel("coefficient b of every row")
    axes.set_ylabel("P(refuse), %")
    refused, styles = base.rate("refusal_probability"), styles_of(arms, theme)
    axes.plot([0, 100], [0, refused], "--", color=theme.soft, linewidth=1.2, zorder=1)
    lines: list[Segment] = [(0.0, 0.0, 100.0, refused)]
    at = {
        arm.name: (100 * arm.static_coefficient, arm.rate("refusal_probability")) for arm in known
    }
    for arm in known:
        lines += _cross(axes, arm, (None, "refusal_probability"), styles[arm.name])
        _point(axes, arm, *at[arm.name], styles[arm.name], theme)
    far, b, said = max(law, key=lambda entry: abs(entry[0].rate("refusal_probability") - entry[2]))
    return Plot(
        key="law",
        figure=figure,
        title=(
            f"At b = {plain(b, '.2g')} the mixture law says P(refuse) {percent(said)}; "
            f"{short(far.name)} has {percent(far.rate('refusal_probability'))}"
            + (", the arm furthest from it" if len(law) > 1 else "")
        ),
        caption=(
            "Per token, (1 - b) CE + b KL(ref||policy) is the cross-entropy against (1 - b) onehot "
            "+ b ref, but for a constant. Learnt perfectly, P(refuse) is b times the base model's "
            "(dashed) where no trained answer begins with a refusal. Points: measured on held-out "
            "prompts, 95 % intervals."
        ),
        legend=[Line2D([], [], ls="--", color=theme.soft, label="b \u00d7 P(refuse) of the base")],
        finish=lambda: _named(axes, known, at, lines, styles, theme),
    )
