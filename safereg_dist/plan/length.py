"""How long a run takes, from the time of its steps."""

import math
from dataclasses import dataclass, replace

from safereg_dist.config import Config
from safereg_dist.plan.plan import Costs, Plan, arm_costs


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLength:
    """All steps of a run together."""

    what: str
    """Where the number of steps comes from."""
    steps: int
    seconds: float
    """Of the steps; loading, saving and evaluation not counted."""
    gpu_seconds: float


def run_length(plan: Plan, config: Config | None, data_rows: int, rows_from: str) -> RunLength:
    """The length of the configured run, else of an epoch of `data_rows` (as `rows_from` says).

    A probe on the reference runs in the steps of the first epoch alone.
    """
    s = plan.settings
    epochs, anchors, fixed = 1.0, 0.0, None
    if config is not None:
        epochs, fixed = config.train.epochs or 1.0, config.train.steps
        anchors = config.data.anchor_fraction if config.data.anchor is not None else 0.0
    positions = data_rows / (1 - anchors)  # anchor rows stand between those of the data
    an_epoch, steps = (
        math.ceil(count * positions / (s.data_parallel * s.window_rows)) for count in (1, epochs)
    )
    name = "epoch" if epochs == 1 else "epochs"
    what = f"{epochs:.3g} {name} of {data_rows:,} rows ({rows_from}), {steps:,} steps"
    if fixed is not None:
        steps, what = fixed, f"{fixed:,} steps (train.steps)"
    first = min(steps, an_epoch)
    later = after_the_probe(plan).seconds if s.arm == "routed" else plan.chosen.seconds
    seconds = first * plan.chosen.seconds + (steps - first) * later
    return RunLength(
        what=what,
        steps=steps,
        seconds=seconds,
        gpu_seconds=seconds * s.world_size,
    )


def after_the_probe(plan: Plan) -> Costs:
    """Of the reference on risky rows, once the probe has seen all rows."""
    settings = replace(plan.settings, arm="routed", probe_depth=0.0)
    return arm_costs(plan.shape, settings, plan.gpu)
