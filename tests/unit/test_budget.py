"""Claimed: schedule `budget` gives risky rows the coefficient that the controller's equations give,
step for step, from the divergence that the run itself logs, and goes on with it after a stop.

The judge is NumPy, from the equations. Exact to 1e-12 from the same divergences; a resumed run
gives the same bits.
"""

import json
import shutil

import numpy as np
import pytest
import yaml
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.ranks import ALONE
from support.results import TIMES

from safereg_dist import row_of
from safereg_dist.cli import main as safereg
from safereg_dist.coefficient import BudgetController, Coefficient
from safereg_dist.config import RegularizerConfig, config_from_dict
from safereg_dist.errors import ConfigError
from safereg_dist.parallel.comm import Result
from safereg_dist.types import RowRisks


def by_hand(divergences, *, budget, gains, floor, ceiling):
    """The coefficient of each step: that of the first, and after each divergence."""
    kp, ki, kd = gains
    span = ceiling - floor
    errors = (np.asarray(divergences) - budget) / budget
    found, integral, before = [ceiling], span, 0.0
    for error in errors:
        integral = np.clip(integral + ki * error, 0, span)
        value = kp * error + integral + kd * max(0.0, error - before)
        found.append(floor + np.clip(value, span / 100, span))
        before = error
    return found


@pytest.mark.parametrize("gains", [(0.1, 0.05, 0.0), (0.5, 0.2, 0.3), (0.0, 0.3, 0.0)])
@pytest.mark.parametrize(("floor", "ceiling"), [(0.0, 1.0), (0.2, 0.9)])
def test_the_controller_is_the_equations(gains, floor, ceiling):
    draw = np.random.default_rng(1)
    divergences = draw.uniform(0, 0.4, 60).tolist()
    config = RegularizerConfig(
        schedule="budget", budget=0.1, budget_gains=gains, floor=floor, ceiling=ceiling
    )
    controller = BudgetController(config)
    found = [controller.coefficient]
    for step, divergence in enumerate(divergences):
        controller.observe(divergence)
        controller.observe(float("nan"))  # a step that was not finite changes nothing
        found.append(controller.coefficient)
        if step == 30:
            state = json.loads(json.dumps(controller.state_dict()))
            controller = BudgetController(config)
            controller.load_state_dict(state)
    wanted = by_hand(divergences, budget=0.1, gains=gains, floor=floor, ceiling=ceiling)
    assert found == pytest.approx(wanted, abs=1e-12)
    assert min(found) >= floor + 0.01 * (ceiling - floor) - 1e-12
    assert len(set(found)) > 5


def test_it_holds_a_divergence_that_answers_to_it():
    """A plant whose divergence falls with the coefficient: the budget is met from both sides."""
    for budget in (0.05, 0.2):
        controller = BudgetController(RegularizerConfig(schedule="budget", budget=budget))
        divergence = 0.0
        for _ in range(400):
            divergence += 0.2 * (0.3 * (1 - controller.coefficient) - divergence)
            controller.observe(divergence)
        assert divergence == pytest.approx(budget, rel=0.02)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    save_model(folder / "model", tiny_model(seed=0))
    save_model(folder / "reference", tiny_model(seed=5))
    write_jsonl(folder / "train.jsonl", random_rows(60))
    config = {
        "model": str(folder / "model"),
        "reference": {"model": str(folder / "reference")},
        "data": {"train": str(folder / "train.jsonl")},
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "regularizer": {"schedule": "budget", "budget": 4.0, "budget_gains": [0.2, 0.1, 0.1]},
        "optimizer": {"lr": 5e-3},
        "train": {"steps": 8, "micro_batch_size": 4, "precision": "fp32", "save_every": 5},
        "engine": {"name": "single"},
        "output_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert safereg(["train", str(folder / "run.yaml")]) == 0
    return folder


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_follows_the_equations(world):
    rows = metrics(world / "run")
    active = [row for row in rows if row["active_tokens"]]
    divergences = [row["divergence"] for row in active]
    wanted = by_hand(divergences, budget=4.0, gains=(0.2, 0.1, 0.1), floor=0.0, ceiling=1.0)
    assert [row["budget_coef"] for row in active] == pytest.approx(wanted[:-1], abs=1e-6)
    assert [row["kl_coef_max"] for row in active] == pytest.approx(wanted[:-1], abs=1e-6)
    assert len({row["budget_coef"] for row in active}) > 1


def test_a_resumed_run_gives_the_same_bits(world):
    again = world / "again"
    shutil.copytree(world / "run", again)
    shutil.rmtree(again / "model")
    (again / "summary.json").unlink()
    assert safereg(["train", str(world / "run.yaml"), f"output_dir={again}"]) == 0
    one, two = ([{k: v for k, v in r.items() if k not in TIMES} for r in metrics(world / name)]
                for name in ("run", "again"))  # fmt: skip
    assert one == two


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": "budget"}, "go together"),
        ({"budget": 0.1}, "go together"),
        ({"schedule": "budget", "budget": 0.0}, "budget"),
        ({"schedule": "budget", "budget": 0.1, "budget_gains": [0.1, -1.0, 0.0]}, ">= 0"),
        ({"schedule": "budget", "budget": 0.1, "objective": "static"}, "objective=convex"),
        ({"schedule": "budget", "budget": 0.1, "granularity": "batch"}, "granularity=sequence"),
    ],
)
def test_what_is_refused(changes, says):
    raw = {"model": "m", "data": {"train": "t"}, "risk": {"estimator": "column"}}
    with pytest.raises(ConfigError, match=says):
        config_from_dict(raw | {"regularizer": changes})


def test_harmless_rows_keep_the_floor():
    config = RegularizerConfig(schedule="budget", budget=1.0, floor=0.1)
    coefficient = Coefficient(config, threshold=0.5, ranks=ALONE)
    assert coefficient.observe(0.2) == {"budget_coef": 1.0}
    row = row_of("r", [7, 8, 9], [0, 1, 1])
    anchor = row_of("a", [7, 8], [0, 1], is_anchor=True)
    risk = Result(RowRisks([0.4, 0.5, None], {}, ["test"] * 3, {}, {}))
    harmless, risky, own = coefficient([row, row, anchor], risk)
    (wanted,) = by_hand([0.2], budget=1.0, gains=(0.1, 0.05, 0.0), floor=0.1, ceiling=1.0)[1:]
    assert (harmless, own) == (0.1, 1.0)
    assert risky == pytest.approx(wanted)
    assert coefficient.observe(0.2) == {"budget_coef": pytest.approx(wanted)}


def test_without_a_budget_nothing_is_observed():
    plain = Coefficient(RegularizerConfig(), threshold=None, ranks=ALONE)
    assert plain.observe(0.3) == {}
    assert plain.state_dict() == {"ema": None}
