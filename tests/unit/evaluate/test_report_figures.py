"""What a report draws: names touch nothing, gaps are gaps, and the law is the one that we state.

Claimed: on the Pareto plot and the plot of the law no name lies on another name, a point, an
interval or a drawn line, and every arm is named there or below; the front is that of a brute-force
search; a step without active rows has no divergence; (1-b)CE + b KL is the cross-entropy against
(1-b) onehot + b ref but for a constant (float64 NumPy, values and gradients), whose optimum gives
the P(refuse) that the report says. Geometry is checked from what matplotlib has drawn; the plots of
the two recorded demonstrations are among them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from record_demo import recorded_arms
from support.figures import touches
from support.reports import metrics, write_run

from safereg_dist.evaluate.report.arms import Arm
from safereg_dist.evaluate.report.frame import DARK, LIGHT, lay_out, rc_of, short, stacked
from safereg_dist.evaluate.report.reading import read_arms
from safereg_dist.evaluate.report.steps import binned, draw_divergence
from safereg_dist.evaluate.report.tradeoff import draw_law, draw_safety, law_of, pareto

LONG = ("base", "sft", "adaptive_probe_no_anchor", "static_low", "adaptive_probe_more_anchors")


def judged(name: str, task: float, success: float, *, width: float = 0.06) -> Arm:
    around = lambda x: [max(0.0, x - width), min(1.0, x + width)]  # noqa: E731
    role = "reference" if name == "base" else "ours" if "adaptive" in name else "baseline"
    figures = {"task_score": task, "attack_success_rate": success}
    intervals = {key: around(value) for key, value in figures.items()}
    return Arm(name=name, role=role, evaluation={**figures, "intervals": intervals})


def scattered(count: int, seed: int, *, spread: float) -> list[Arm]:
    """Arms around a few places, as arms that do nearly the same are."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 1, (4, 2))
    points = np.clip(centres[rng.integers(0, 4, count)] + rng.normal(0, spread, (count, 2)), 0, 1)
    names = [LONG[i] if i < len(LONG) else f"arm_{i}_of_many" for i in range(count)]
    return [judged(name, *point) for name, point in zip(names, points.tolist(), strict=True)]


CASES = {
    "few": [judged("base", 0, 0.04), judged("sft", 1, 1), judged("adaptive_probe", 0.99, 0.05)],
    "one place": [judged(name, 0.5, 0.5) for name in LONG],
    "corner": [judged(name, 1, at / 50) for at, name in enumerate(LONG)],
    "spread": scattered(9, 1, spread=0.15),
    "close": scattered(14, 2, spread=0.03),
    "recorded demo": recorded_arms("demo"),
    "recorded real demo": recorded_arms("real"),
}


def drawn(maker: Any, arms: list[Arm]) -> Any:
    with matplotlib.rc_context(cast(Any, rc_of(LIGHT))):
        plot = maker(arms, LIGHT)
        assert plot is not None
        lay_out(plot)
    return plot


@pytest.mark.parametrize("case", CASES)
def test_names_touch_nothing(case: str) -> None:
    arms = CASES[case]
    plot = drawn(draw_safety, arms)
    assert touches(plot.figure) == []
    (axes,) = plot.figure.axes
    at_points = {text.get_text() for text in axes.texts} - {""}
    below = {text.get_text() for legend in plot.figure.legends for text in legend.get_texts()}
    for arm in arms:
        assert (stacked(arm.name) in at_points) != (short(arm.name) in below), arm.name
    if case in ("few", "spread"):
        assert len(at_points) >= 3  # not all of them in the legend


def test_the_check_of_names_sees_what_is_wrong() -> None:
    plot = drawn(draw_safety, CASES["few"])
    (axes,) = plot.figure.axes
    axes.texts[0].set_position((99.0, 5.0))  # on the arm's point
    assert touches(plot.figure)


def test_a_name_beside_another_point_has_a_line_of_its_own() -> None:
    arms = [judged("adaptive_probe", 1, 0.07), judged("adaptive_critic", 0.99, 0.11)]
    plot = drawn(draw_safety, arms)
    (axes,) = plot.figure.axes
    points = {
        a.name: axes.transData.transform((a.rate("task_score"), a.rate("attack_success_rate")))
        for a in arms
    }
    leaders = [axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_gid()]
    for text in axes.texts:
        box, own = text.get_window_extent(), points[text.get_text()]
        gaps = {
            name: np.hypot(max(box.x0 - x, x - box.x1, 0.0), max(box.y0 - y, y - box.y1, 0.0))
            for name, (x, y) in points.items()
        }
        is_nearest = min(gaps, key=lambda name: gaps[name]) == text.get_text()
        assert is_nearest or any(np.allclose(leader[0], own) for leader in leaders)


def test_the_front_is_what_no_other_beats() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = rng.integers(0, 5, (rng.integers(1, 9), 2)).astype(float)
        beaten = [
            any((b[0] >= a[0]) and (b[1] <= a[1]) and (b != a).any() for b in points)
            for a in points
        ]
        assert pareto([tuple(p) for p in points.tolist()]) == [
            i for i, is_beaten in enumerate(beaten) if not is_beaten
        ]


def test_colours_stand_out_from_both_grounds() -> None:
    """WCAG 2: 4.5 : 1 for text, 3 : 1 for what is drawn."""

    def light(colour: str) -> float:
        parts = np.array(to_rgb(colour))
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(one: str, other: str) -> float:
        low, high = sorted((light(one), light(other)))
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    for theme in (LIGHT, DARK):
        assert min(contrast(text, theme.ground) for text in (theme.ink, theme.soft)) >= 4.5
        shades = [shade for shades in theme.shades.values() for shade in shades]
        assert min(contrast(shade, theme.ground) for shade in shades) >= 3


# ---- over steps


def test_no_active_rows_are_a_gap_not_a_zero(tmp_path: Path) -> None:
    rows = metrics(coefficient=1.0, active=2, seconds=1.0, steps=10)
    for row in rows[3:6]:
        row.update(active_rows=0, active_tokens=0, divergence=0.0)
    for row in rows[:3] + rows[6:]:
        row.update(active_tokens=5)
    rows[8].update(active_rows=1, active_tokens=7, divergence=0.0)  # a true zero
    (arm,) = read_arms([write_run(tmp_path / "run", rows)], may_be_empty=set())
    plot = drawn(draw_divergence, [arm])
    line = np.asarray(plot.figure.axes[0].lines[0].get_ydata(), dtype=float)
    expected = np.array([0.1] * 3 + [np.nan] * 3 + [0.1] * 2 + [0.0, 0.1])
    np.testing.assert_array_equal(line, expected)
    assert "0.1 nats" in plot.title


def test_an_older_run_has_gaps_by_its_rows(tmp_path: Path) -> None:
    rows = metrics(coefficient=1.0, active=0, seconds=1.0, steps=4)
    (arm,) = read_arms([write_run(tmp_path / "run", rows)], may_be_empty=set())
    assert np.isnan(arm.column("divergence")).all()
    assert draw_divergence([arm], LIGHT) is None


def test_a_single_active_step_is_seen() -> None:
    values = np.array([np.nan, 0.5, np.nan, 0.2, 0.3])
    arm = Arm(name="a", role="ours", metrics={"step": np.arange(5.0), "divergence": values})
    _, dots = drawn(draw_divergence, [arm]).figure.axes[0].lines
    assert list(dots.get_xydata()[0]) == [1.0, 0.5]
    assert len(dots.get_xydata()) == 1


def test_many_steps_are_binned_and_keep_their_gaps() -> None:
    steps = np.arange(2400.0)
    values = np.where((steps >= 1200) & (steps < 1300), np.nan, steps)
    at, means = binned(steps, values, np.mean)
    assert len(at) == 240
    np.testing.assert_allclose(at, steps.reshape(240, 10).mean(1))
    expected = values.reshape(240, 10)
    np.testing.assert_array_equal(np.isnan(means), np.isnan(expected).all(1))
    np.testing.assert_allclose(means[:120], expected[:120].mean(1))


def test_a_budget_is_drawn_where_it_is_aimed_at() -> None:
    columns = {"step": np.arange(4.0), "divergence": np.array([0.3, 0.2, 0.1, 0.1])}
    config = {"regularizer": {"schedule": "budget", "budget": 0.125}}
    arm = Arm(name="a", role="ours", metrics=columns, config=config)
    plot = drawn(draw_divergence, [arm])
    heights = [set(np.asarray(line.get_ydata(), float)) for line in plot.figure.axes[0].lines]
    assert {0.125} in heights
    assert "budget of 0.125" in plot.title
    without = drawn(draw_divergence, [replace(arm, config={})])
    heights = [set(np.asarray(line.get_ydata(), float)) for line in without.figure.axes[0].lines]
    assert {0.125} not in heights


# ---- the law of mixtures


def static(name: str, b: float | None, refusal: float, **regularizer: Any) -> Arm:
    config = {"data": {"anchor": None}, "regularizer": {"objective": "none"}}
    if b is not None:
        rule = {"objective": "static", "divergence": "kl_forward", "ceiling": b}
        config["regularizer"] = {**rule, **regularizer}
    figures = {"refusal_probability": refusal}
    return Arm(name=name, role="baseline", evaluation=figures, config=cast(Any, config))


def test_the_law_is_the_optimum_of_the_loss() -> None:
    """Gradient descent on (1-b)CE + b KL(ref||policy) over logits, with its own equations."""
    rng = np.random.default_rng(3)
    b, target = 0.3, 4
    ref = rng.dirichlet(np.ones(7))
    logits = np.zeros(7)
    mixed = (1 - b) * np.eye(7)[target] + b * ref
    constants = []
    for _ in range(4000):
        policy = np.exp(logits - logits.max())
        policy /= policy.sum()
        loss = -(1 - b) * np.log(policy[target]) + b * np.sum(ref * np.log(ref / policy))
        constants.append(loss - (-np.sum(mixed * np.log(policy))))
        gradient = (1 - b) * (policy - np.eye(7)[target]) + b * (policy - ref)
        np.testing.assert_allclose(gradient, policy - mixed, atol=1e-12)
        logits -= gradient
    np.testing.assert_allclose(constants, constants[0], atol=1e-9)
    refusal = 2  # any token that is not the trained answer's
    base = Arm(name="base", role="reference", evaluation={"refusal_probability": ref[refusal]})
    ((_, known, said),) = law_of([base, static("static_low", b, 0.5)])
    assert known == b
    assert said == pytest.approx(100 * policy[refusal], abs=1e-4)


def test_only_arms_with_one_known_coefficient_are_held_against_the_law() -> None:
    base = Arm(name="base", role="reference", evaluation={"refusal_probability": 0.8})
    arms = [
        static("sft", None, 0.01),
        static("static", 0.5, 0.3),
        static("l2", 0.5, 0.3, divergence="l2_logits"),
        static("adaptive", 1.0, 0.8, objective="convex"),
        Arm(name="unknown", role="baseline", evaluation={"refusal_probability": 0.4}),
        replace(
            static("with_anchors", 0.5, 0.3),
            config={"data": {"anchor": "a.jsonl"}, "regularizer": {"objective": "static"}},
        ),
    ]
    assert [(arm.name, b, said) for arm, b, said in law_of([base, *arms])] == [
        ("sft", 0.0, 0.0),
        ("static", 0.5, pytest.approx(40.0)),
    ]
    assert law_of(arms) == []  # no base
    assert law_of([base, arms[0]]) == []
    assert draw_law([base, arms[0]], LIGHT) is None
    plot = drawn(draw_law, [base, *arms])
    assert touches(plot.figure) == []
    assert plot.title == (
        "At b = 0.5 the mixture law says P(refuse) 40\u00a0%; static has 30\u00a0%, the arm "
        "furthest from it"
    )
