"""How long a run takes, from the time of its steps."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from safereg_dist.config import Config
from safereg_dist.plan.plan import Costs, Plan, arm_costs
from safereg_dist.plan.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLength:
    """All steps of a run together."""

    what: str
    """Where the number of steps comes from."""
    steps: int
    seconds: float
    """Of the steps; loading, saving and evaluation not counted."""
    before_seconds: float
    """Of what is built before the first step: a stored reference, and the probe on all rows."""
    gpu_seconds: float
    """Of both, on all GPUs."""


class RowsOfRun(NamedTuple):
    """What a run trains on."""

    data_rows: int
    told_by: str
    """Where that number is from."""
    config: Config | None


def run_length(
    settings: Settings, rows: RowsOfRun, *, first: float, later: float, before: float = 0.0
) -> RunLength:
    """The length of the configured run, else of an epoch.

    Args:
        first: seconds of a step of the first epoch, in which a probe on the reference runs.
        later: seconds of a step after it.
        before: seconds of what is built before the first step.
    """
    config, epochs, anchors, fixed = rows.config, 1.0, 0.0, None
    if config is not None:
        epochs, fixed = config.train.epochs or 1.0, config.train.steps
        anchors = config.data.anchor_fraction if config.data.anchor is not None else 0.0
    # Anchor rows stand between those of the data.
    positions = rows.data_rows / (1 - anchors)
    step = settings.data_parallel * settings.window_rows
    an_epoch, steps = (math.ceil(count * positions / step) for count in (1, epochs))
    name = "epoch" if epochs == 1 else "epochs"
    what = f"{epochs:.3g} {name} of {rows.data_rows:,} rows ({rows.told_by}), {steps:,} steps"
    if fixed is not None:
        steps, what = fixed, f"{fixed:,} steps (train.steps)"
    in_first = min(steps, an_epoch)
    seconds = in_first * first + (steps - in_first) * later
    return RunLength(
        what=what,
        steps=steps,
        seconds=seconds,
        before_seconds=before,
        gpu_seconds=(seconds + before) * settings.world_size,
    )


def length_text(length: RunLength, *, fits: bool) -> str:
    """One line, without checkpoints."""
    told = f"{length.what}, without checkpoints: {time_text(length.seconds)}"
    if length.before_seconds:
        whole = time_text(length.seconds + length.before_seconds)
        told += f", with building the store (and the probe's passes) {whole}"
    told += f", {length.gpu_seconds / 3600:,.4g} GPU-hours"
    return told if fits else f"{told} (of a plan that does not fit: look again with what makes it)"


def time_text(seconds: float) -> str:
    """In the unit that fits."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s"


def after_the_probe(plan: Plan) -> Costs:
    """Of the reference on risky rows, once the probe has seen all rows."""
    settings = replace(plan.settings, arm="routed", probe_depth=0.0)
    return arm_costs(plan.shape, settings, plan.gpu)
