"""Claimed: coefficients are those of the written schedules, anchors get 1, rows without response
tokens 0, an unknown risk counts as full risk, and the batch's mean and moving average are the sums
one would write by hand.

The judge of schedules is `oracles.coefficients` in float64. Rounds: 1e-12 relative. The collective
of granularity `batch` on several ranks is in tests/distributed; here the process is alone.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import oracles

from safereg_dist.coefficient import Coefficient, resolved_threshold, scheduled
from safereg_dist.config import RegularizerConfig
from safereg_dist.config.messages import choices_of
from safereg_dist.errors import DataError
from safereg_dist.parallel.comm import Ranks, Result
from safereg_dist.types import Row, RowRisks, known_risk

ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), dp_group=None)
UNIT = st.floats(0, 1)
SCHEDULES = [
    schedule
    for schedule in choices_of(RegularizerConfig.model_fields["schedule"].annotation)
    if schedule != "budget"  # which hangs on the divergence: test_budget.py
]


def row(*, anchor=False, tokens=2):
    mask = [0] + [1] * tokens
    return Row(
        id="r",
        input_ids=[1] * len(mask),
        loss_mask=mask,
        prompt_ends=[1],
        risk=None,
        prompt_key="",
        is_anchor=anchor,
    )


def coefficient(threshold=None, *, ceilings=None, **changes):
    config = RegularizerConfig(**changes)
    return Coefficient(config, threshold=threshold, ranks=ALONE, ceilings=ceilings)


def risks(values, **by_category):
    return Result(RowRisks(list(values), by_category, ["test"] * len(values), {}, {}))


def test_the_oracle_knows_the_same_schedules():
    assert set(SCHEDULES) == set(oracles.SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(deadline=None, max_examples=200)
@given(
    risk=UNIT,
    threshold=st.one_of(UNIT, st.sampled_from([0.0, 0.5, 1.0])),
    ends=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    slope=st.floats(0.01, 200),
)
def test_schedules_are_the_equations(schedule, risk, threshold, ends, slope):
    floor, ceiling = sorted(ends)
    # Within a few ulp of threshold 1 the line's 0/0 has no value to compare.
    assume(schedule != "threshold" or threshold in (0.0, 1.0) or threshold < 1 - 1e-6)
    config = RegularizerConfig(
        objective="additive", schedule=schedule, floor=floor, ceiling=ceiling, slope=slope
    )
    expected = oracles.coefficients(
        np.array([risk]), schedule, threshold=threshold, floor=floor, ceiling=ceiling, slope=slope
    )[0]
    got = scheduled(risk, config, threshold)
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert floor - 1e-12 <= got <= ceiling + 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_coefficients_never_fall_with_risk(schedule):
    config = RegularizerConfig(schedule=schedule, floor=0.1, ceiling=0.9)
    for threshold in (0.0, 0.3, 1.0):
        values = [scheduled(r, config, threshold) for r in np.linspace(0, 1, 101)]
        assert values == sorted(values)


def test_thresholds_at_the_ends():
    step = RegularizerConfig(schedule="step", floor=0.1, ceiling=0.9)
    assert [scheduled(r, step, 0.0) for r in (0.0, 1.0)] == [0.9, 0.9]
    assert [scheduled(r, step, 1.0) for r in (0.0, 0.999, 1.0)] == [0.1, 0.1, 0.9]
    line = RegularizerConfig(schedule="threshold", floor=0.1, ceiling=0.9)
    assert [scheduled(r, line, 0.0) for r in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.5, 0.9])
    assert [scheduled(r, line, 1.0) for r in (0.0, 0.999, 1.0)] == pytest.approx([0.1, 0.1, 0.9])


@pytest.mark.parametrize("slope", [1e3, 1e4, 1e300])
def test_a_steep_sigmoid_is_a_step(slope):
    config = RegularizerConfig(schedule="sigmoid", slope=slope)
    assert scheduled(0.0, config, 0.5) == pytest.approx(0, abs=1e-12)
    assert scheduled(0.5, config, 0.5) == 0.5
    assert scheduled(1.0, config, 0.5) == pytest.approx(1)


def test_which_threshold_counts():
    assert coefficient().threshold == 0.5
    assert coefficient(threshold=0.2).threshold == 0.2
    assert coefficient(threshold=0.2, **{"schedule": "step"}).threshold == 0.2
    explicit = Coefficient(RegularizerConfig(threshold=0.0), threshold=0.2, ranks=ALONE)
    assert explicit.threshold == 0.0
    config = RegularizerConfig()
    assert (resolved_threshold(config), resolved_threshold(config, 0.0)) == (0.5, 0.0)


def test_what_could_not_be_judged_counts_as_risky():
    assert [known_risk(risk) for risk in (None, math.nan, 0.0, 0.25, 1.0)] == [0, 1, 0, 0.25, 1]


def test_each_micro_batch_has_its_own_mean():
    """Of a step's rows at once: as one call for each micro-batch, one after the other."""
    options = {"schedule": "linear", "granularity": "batch", "ema": 0.5}
    together, apart = coefficient(**options), coefficient(**options)
    values, rows = [0.2, 0.6, 1.0, None, math.nan, 0.5], tuple(row() for _ in range(6))
    found = together(rows, risks(values), sizes=[len(rows) // 3] * 3)
    assert found == [b for i in (0, 2, 4) for b in apart(rows[i : i + 2], risks(values[i : i + 2]))]
    assert found == pytest.approx([0.4, 0.4, 0.45, 0.45, 0.6, 0.6])
    assert together.state_dict() == apart.state_dict()


@pytest.mark.parametrize("granularity", ["sequence", "batch"])
@pytest.mark.parametrize("objective", ["convex", "additive"])
def test_special_rows(objective, granularity):
    b = coefficient(objective=objective, granularity=granularity, floor=0.25, ceiling=0.75)
    rows = (row(), row(anchor=True), row(tokens=0), row(), row(), row(anchor=True, tokens=0))
    got = b(rows, risks([0.9, None, 0.9, math.nan, None, None]))
    if granularity == "sequence":
        assert got == [0.75, 1.0, 0.0, 0.75, 0.25, 1.0]
    else:  # mean of 0.9, 1 and 0 over the rows with response tokens that are no anchors
        assert got == [0.75, 1.0, 0.0, 0.75, 0.75, 1.0]


def test_static_and_none():
    rows = (row(), row(anchor=True), row(tokens=0))
    assert coefficient(objective="static", ceiling=0.3)(rows, risks([None] * 3)) == [0.3, 1.0, 0.0]
    assert coefficient(objective="none")(rows, risks([None] * 3)) == [0.0] * 3
    token_wise = coefficient(objective="token_wise", ceiling=0.3)
    assert token_wise(rows, risks([None] * 3)) == [1.0, 1.0, 0.0]
    batch = coefficient(objective="static", ceiling=0.3, granularity="batch")
    assert batch(rows, risks([None] * 3)) == [0.3, 1.0, 0.0]


def test_unknown_risk_is_full_risk():
    b = coefficient(schedule="linear")
    assert b((row(), row(), row()), risks([math.nan, None, 1.0])) == [1.0, 0.0, 1.0]


@settings(deadline=None, max_examples=50)
@given(
    batches=st.lists(st.lists(UNIT, min_size=1, max_size=4), min_size=1, max_size=5),
    ema=st.floats(0, 0.99),
)
def test_batch_mean_and_moving_average(batches, ema):
    b = coefficient(schedule="linear", granularity="batch", ema=ema)
    smooth = None
    for values in batches:
        mean = np.mean(values)
        smooth = mean if smooth is None else ema * smooth + (1 - ema) * mean
        got = b(tuple(row() for _ in values), risks(values))
        assert got == pytest.approx([smooth] * len(values), rel=1e-12, abs=1e-15)


def test_a_batch_without_rows_leaves_the_average_alone():
    b = coefficient(schedule="linear", granularity="batch", ema=0.5)
    assert b((row(anchor=True), row(tokens=0)), risks([None, None])) == [1.0, 0.0]
    assert b((row(),), risks([0.8])) == [0.8]  # the first observation begins the average
    assert b((row(anchor=True),), risks([None])) == [1.0]
    assert b((row(),), risks([0.4])) == pytest.approx([0.6])


def test_state_goes_through_a_checkpoint():
    before = coefficient(schedule="linear", granularity="batch", ema=0.9)
    assert before.state_dict() == {"ema": None}
    before((row(), row()), risks([0.2, 0.7]))
    state = before.state_dict()
    assert state == {"ema": pytest.approx(0.45)}
    fresh = coefficient(schedule="linear", granularity="batch", ema=0.9)
    fresh.load_state_dict(state)
    assert fresh((row(),), risks([0.1])) == before((row(),), risks([0.1]))


@pytest.mark.parametrize("granularity", ["sequence", "batch"])
def test_an_error_in_place_of_risk_is_raised(granularity):
    with pytest.raises(DataError, match="lost"):
        coefficient(granularity=granularity)((row(),), Result(error=DataError("lost")))


def test_lists_that_do_not_match():
    for values in ([0.5], [0.5] * 3):
        with pytest.raises(ValueError, match=rf"each of 2 rows, got {len(values)}"):
            coefficient()((row(), row()), risks(values))


def test_categories_with_ceilings_of_their_own():
    b = coefficient(ceilings={"mild": 0.4}, floor=0.1, ceiling=0.9)
    rows = tuple(row() for _ in range(5))
    found = risks(
        [0.7, 0.7, 0.9, 0.2, math.nan],
        mild=[0.7, 0.2, 0.6, 0.2, 0.1],
        grave=[0.3, 0.7, 0.9, 0.1, math.nan],
    )
    assert b(rows, found) == [0.4, 0.9, 0.9, 0.1, 0.9]
    line = coefficient(ceilings={"mild": 0.4}, schedule="linear")
    expected = [
        max(0.4 * m, g) for m, g in zip([0.7, 0.2, 0.6, 0.2], [0.3, 0.7, 0.9, 0.1], strict=True)
    ]
    assert line(rows, found)[:4] == pytest.approx(expected, rel=1e-12)
