"""Claimed: the learning rate of every step is that of the written rule, and norms and biases do not
decay.

The judge is a table worked out by hand: eight steps, a quarter of them warm-up, down to a tenth.
Rounds: 1e-6, the digits of the table.
"""

import pytest
from support.builders import tiny_model

from safereg_dist.config import OptimizerConfig
from safereg_dist.parallel.optimizer import learning_rate, parameter_groups

# Of the decay's six steps the first is the whole rate; then 0.1 + 0.9 (1 + cos(k pi / 6)) / 2,
# or 0.1 + 0.9 (1 - k / 6).
TABLE = {
    "cosine": [0.5, 1.0, 1.0, 0.939711, 0.775, 0.55, 0.325, 0.160289],
    "linear": [0.5, 1.0, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25],
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("schedule", TABLE)
def test_the_rate_of_every_step(schedule):
    config = OptimizerConfig(lr=2e-3, warmup_ratio=0.25, schedule=schedule, min_lr_ratio=0.1)
    rates = [learning_rate(step, 8, config) / 2e-3 for step in range(8)]
    assert rates == pytest.approx(TABLE[schedule], abs=1e-6)


def test_a_run_without_warm_up_begins_at_the_whole_rate():
    config = OptimizerConfig(lr=0.5, warmup_ratio=0.0, schedule="linear", min_lr_ratio=0.0)
    assert [learning_rate(step, 4, config) for step in range(4)] == [0.5, 0.375, 0.25, 0.125]
    assert learning_rate(0, 1, config) == 0.5


def test_matrices_decay_norms_and_biases_do_not():
    model = tiny_model("qwen")  # its projections have biases
    model.model.embed_tokens.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = parameter_groups(model, 0.25)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.25, 0.0)
    found = {names[id(p)] for p in kept["params"]}
    assert found == {n for n in names.values() if "norm" in n or n.endswith(".bias")}
    assert {names[id(p)] for p in decayed["params"]} == (
        set(names.values()) - found - {"model.embed_tokens.weight"}
    )
