"""Claimed: an alert is raised in the last of so many steps in a row outside a band, once, and again
after the number has been inside; bands left open are those of a known baseline; a run that goes on
knows what the steps before it saw.

The judge of the steps in a row is a loop over windows. Exact.
"""

import json
import math

import numpy as np
import pytest
from scipy.stats import binom

from safereg_dist.config import AlertsConfig, section_from_dict
from safereg_dist.run.alerts import Alert, AlertFile, Alerts, most_by_chance, read_alerts

GOOD = {"loss": 1.0, "grad_norm": 1.0, "risky_fraction": 0.0, "divergence": 0.1, "active_tokens": 9}


def alerts(*, rows_per_step=8, counted=None, **bands):
    config = section_from_dict(AlertsConfig, bands)
    return Alerts(config, rows_per_step=rows_per_step, held_back=counted)


def raised(watched, rows):
    """(step, name) of every alert over these rows."""
    found = [watched.observe({**GOOD, "step": step, **row}) for step, row in enumerate(rows)]
    return [(alert.step, alert.name) for each in found for alert in each]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_so_many_steps_in_a_row(steps):
    chance = np.random.default_rng(steps)
    values = chance.choice([0.05, 0.5, 0.9, math.nan], size=400, p=[0.2, 0.3, 0.3, 0.2])
    found = raised(
        alerts(held_back={"min": 0.1, "max": 0.6, "steps": steps}),
        [{"risky_fraction": float(value)} for value in values],
    )
    outside = [not 0.1 <= value <= 0.6 for value in values]
    expected = [
        step
        for step in range(steps - 1, 400)
        if all(outside[step - steps + 1 : step + 1])
        and (step == steps - 1 or not outside[step - steps])
    ]
    assert found == [(step, "held_back") for step in expected]
    assert len(expected) > 10


def test_the_text_says_what_left_which_limit():
    watched = alerts(divergence={"max": 0.5, "steps": 2}, canary_refusal={"min": 0.9, "steps": 1})
    rows = [{"divergence": 0.75}, {"divergence": 0.75, "canary_refusal": 0.25}]
    found = [watched.observe({**GOOD, "step": step, **row}) for step, row in enumerate(rows)]
    assert found[0] == []
    assert [str(alert) for alert in found[1]] == [
        "alert at step 1: divergence 0.75 is above 0.5 for 2 in a row (tracking.alerts.divergence)",
        "alert at step 1: canary_refusal 0.25 is below 0.9 (tracking.alerts.canary_refusal)",
    ]


def test_without_a_baseline_or_a_band_only_lost_steps_count():
    rows = [{"risky_fraction": 1.0, "divergence": 1e9}] * 5
    rows += [{"loss": None}, {}, {"grad_norm": math.inf}, {"grad_norm": math.nan}]
    assert raised(alerts(), rows) == [(5, "non_finite"), (7, "non_finite")]
    assert raised(alerts(non_finite={"max": 1}), rows) == []


def test_the_held_back_share_is_held_against_what_was_counted_before():
    """With 10 % of rows counted, 4 of 8 in a step are by chance in one of 200, 5 in one of 2000."""
    rows = [{"risky_fraction": 4 / 8}] * 5 + [{"risky_fraction": 5 / 8}] * 3
    assert most_by_chance(8, 0.1) == 4 / 8
    assert binom.sf(4, 8, 0.1) < 0.001 < binom.sf(3, 8, 0.1)
    assert raised(alerts(counted=0.1), rows) == [(7, "held_back")]
    assert raised(alerts(counted=0.1), rows[:7]) == []


def test_rows_at_the_share_that_was_counted_raise_nothing():
    chance = np.random.default_rng(0)
    for share, count in ((0.0, 8), (0.15, 4), (0.15, 64), (0.5, 16)):
        rows = [{"risky_fraction": n / count} for n in chance.binomial(count, share, size=5000)]
        assert raised(alerts(rows_per_step=count, counted=share), rows) == []


def test_the_first_look_at_the_canary_is_its_baseline():
    looks = [0.8, 0.41, 0.39, 0.41, 0.39, 0.38, 0.37]
    rows = [row for look in looks for row in ({"canary_refusal": look}, {})]
    assert raised(alerts(), rows) == [(10, "canary_refusal")]
    assert raised(alerts(canary_refusal={"min": 0.0}), rows) == []


def test_steps_without_active_tokens_say_nothing_of_the_divergence():
    rows = [{"divergence": 2.0}, {"divergence": 0.0, "active_tokens": 0}, {"divergence": 2.0}]
    assert raised(alerts(divergence={"max": 1, "steps": 2}), rows) == [(2, "divergence")]


def test_the_file_goes_on_where_the_run_does(tmp_path):
    def alert(step):
        return Alert(step=step, name="held_back", value=math.nan, limit=0.5, is_above=True, steps=1)

    file = AlertFile(tmp_path, first_step=0)
    assert not (tmp_path / "alerts.jsonl").exists()
    for step in (3, 7):
        file.write(alert(step))
    with (tmp_path / "alerts.jsonl").open("a") as cut:
        cut.write('{"step": 9, "alert": "held_')
    assert [each["step"] for each in read_alerts(tmp_path / "alerts.jsonl")] == [3, 7]
    again = AlertFile(tmp_path, first_step=5)
    assert again.counts == {"held_back": 1}
    again.write(alert(6))
    lines = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["value"]) for line in lines] == [(3, None), (6, None)]
