"""Curves of a Megatron layout over GPUs: overhead, and memory of the fullest stage."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import GIB
from safereg_dist.plan.figures import ARM_STYLES, GPU_COUNTS, STYLE
from safereg_dist.plan.megatron.plan import LayoutPlan, make_layout_plan
from safereg_dist.plan.megatron.proposal import propose
from safereg_dist.plan.megatron.report import ARM_NAMES
from safereg_dist.plan.megatron.stages import pipeline_of
from safereg_dist.screen.progress import progress_bar

COLOURS = {
    **{arm: ARM_STYLES[arm][1] for arm in ("sft", "routed", "always_on")},
    "bubble": ARM_STYLES["stored"][1],
}


def layout_curve(
    plan: LayoutPlan,
    values: Mapping[str, Any],
    counts: Sequence[int] = GPU_COUNTS,
    *,
    keeps_rows: bool = False,
) -> list[LayoutPlan]:
    """The plans on other numbers of GPUs; sizes that `values` leaves open are proposed for each.

    A replica's micro-batches stay the same, or with `keeps_rows` the rows of a step, as far as each
    replica has a micro-batch. Numbers that no layout divides are left out.
    """
    found = []
    for count in progress_bar(counts, desc="plan", unit=" layouts", leave=False):
        try:
            settings, _ = propose(plan.shape, {**values, "world_size": count}, plan.gpu)
        except ConfigError:
            continue
        if keeps_rows:
            batches = plan.settings.grad_accum * plan.settings.data_parallel
            each = max(1, batches // settings.data_parallel)
            settings = replace(settings, grad_accum=pipeline_of(settings).whole_groups(each))
        found.append(make_layout_plan(plan.shape, settings, plan.gpu))
    return found or [plan]


def draw_layouts(plan: LayoutPlan, values: Mapping[str, Any], *, name: str) -> Any:
    """A matplotlib figure: time over plain training, and memory, over GPUs from 8 to 4096."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    s = plan.settings
    same_batches = layout_curve(plan, values)
    same_rows = layout_curve(plan, values, keeps_rows=True)
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
        _draw_time(left, same_batches, f"{s.grad_accum} micro-batches a replica")
        _draw_time(middle, same_rows, f"{s.data_parallel * s.window_rows} rows a step")
        _draw_memory(right, same_batches)
        figure.suptitle(_message(plan, name), fontsize=11, fontweight="bold")
        return figure


def _draw_time(axes: Any, plans: list[LayoutPlan], title: str) -> None:
    from matplotlib.ticker import PercentFormatter

    for arm in ("routed", "bubble", "always_on"):
        shares = [plan.overhead(arm)["seconds"] for plan in plans]
        axes.plot(_gpus(plans), shares, color=COLOURS[arm], label=ARM_NAMES[arm])
    bubble = [plan.pipeline.idle_slots / plan.pipeline.slots for plan in plans]
    axes.plot(_gpus(plans), bubble, color="#999999", linestyle=":", label="share of idle slots")
    axes.set_title(title, fontsize=9)
    axes.set_ylabel("time over plain training, share of slots")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(axes, plans)


def _draw_memory(axes: Any, plans: list[LayoutPlan]) -> None:
    from matplotlib.ticker import ScalarFormatter

    for arm, width in (("always_on", 4.0), ("routed", 1.6), ("sft", 1.6)):
        sizes = [plan.arms[arm].fullest[1] / GIB for plan in plans]
        axes.plot(_gpus(plans), sizes, color=COLOURS[arm], linewidth=width, label=ARM_NAMES[arm])
    axes.axhline(plans[0].usable_bytes / GIB, color="#999999", linestyle=":", label="usable")
    axes.set_title("memory of the fullest stage", fontsize=9)
    axes.set_ylabel("GiB a GPU")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    _finish(axes, plans)


def _finish(axes: Any, plans: list[LayoutPlan]) -> None:
    axes.set_xscale("log", base=2)
    labels = [f"{plan.settings.world_size}\n{_sizes(plan)}" for plan in plans]
    axes.set_xticks(_gpus(plans), labels, fontsize=6)
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_xlabel("GPUs, and tensor x pipeline x context")
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.25)}
    axes.legend(frameon=False, fontsize=8, ncols=2, **below)


def _gpus(plans: list[LayoutPlan]) -> list[int]:
    return [plan.settings.world_size for plan in plans]


def _sizes(plan: LayoutPlan) -> str:
    s = plan.settings
    return f"{s.tensor_parallel}x{s.pipeline_parallel}x{s.context_parallel}"


def _message(plan: LayoutPlan, name: str) -> str:
    s = plan.settings
    ours, beside, always = (
        plan.overhead(arm)["seconds"] for arm in ("routed", "bubble", "always_on")
    )
    return (
        f"{name} on {s.world_size} {plan.gpu.name} as {_sizes(plan)}, {s.risky_fraction:.3g} of "
        f"rows risky: a step takes {ours:+.1%},\n{beside:+.1%} with the reference in the bubble, "
        f"always on {always:+.1%} (planned)"
    )
