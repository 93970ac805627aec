"""Curves of a plan: overhead against the risky fraction, and against the number of GPUs."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safereg_dist.plan.length import after_the_probe
from safereg_dist.plan.plan import Plan, arm_costs, overhead
from safereg_dist.plan.settings import Settings
from safereg_dist.storage.atomic import write_atomically

ARM_STYLES = {
    "sft": ("plain fine-tuning", "#0072B2"),
    "routed": ("risky rows", "#E69F00"),
    "stored": ("stored", "#B87900"),
    "always_on": ("always on", "#4D4D4D"),
}
"""Label and colour: ours orange, the policy alone blue, the reference on every row grey."""
FRACTIONS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0)
GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MEASURES = {"flops": "FLOPs", "bytes": "bytes", "seconds": "time"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "svg.hashsalt": "safereg",  # same data, same bytes
}
Curve = list[tuple[float, dict[str, dict[str, float]]]]


def fraction_curve(plan: Plan, fractions: Sequence[float] = FRACTIONS) -> Curve:
    """(risky fraction, arm -> measure -> share over plain fine-tuning)."""
    return [
        (fraction, _overheads(plan, replace(plan.settings, risky_fraction=fraction)))
        for fraction in fractions
    ]


def scaling_curve(plan: Plan, counts: Sequence[int] = GPU_COUNTS) -> Curve:
    """(GPUs, arm -> measure -> share), the same micro-batches on every GPU."""
    fitting = [count for count in counts if _divides(plan.settings, count)]
    # Without a suitable power of two (six GPUs a node): as many steps up from the plan's size.
    fitting = fitting or [plan.settings.world_size << doubling for doubling in range(4)]
    return [
        (float(count), _overheads(plan, replace(plan.settings, world_size=count)))
        for count in fitting
    ]


def _divides(settings: Settings, count: int) -> bool:
    whole_nodes = count <= settings.gpus_per_node or count % settings.gpus_per_node == 0
    return whole_nodes and count % settings.hpz == 0


def _overheads(plan: Plan, settings: Settings) -> dict[str, dict[str, float]]:
    costs = {arm: arm_costs(plan.shape, replace(settings, arm=arm), plan.gpu) for arm in ARM_STYLES}
    changed = replace(plan, settings=settings, arms=costs)
    return {arm: changed.overhead(arm) for arm in ARM_STYLES}


def draw(plan: Plan, *, name: str) -> Any:
    """A matplotlib figure: FLOPs, bytes and time over the risky fraction, above those over GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            2, 3, figsize=(10, 6), sharey="row", sharex="row", layout="constrained"
        )
        fractions, scaling = fraction_curve(plan), scaling_curve(plan)
        for axes, measure in zip(grid[0], MEASURES, strict=True):
            _lines(axes, fractions, measure)
            axes.set_xscale("symlog", linthresh=0.001)
            axes.set_xticks([0, 0.001, 0.01, 0.1, 1], ["0", "0.1 %", "1 %", "10 %", "100 %"])
            axes.set_xlim(0, 4)
            axes.set_xlabel(f"risky rows ({plan.settings.world_size} GPUs)")
            axes.set_title(MEASURES[measure], fontsize=9)
        for axes, measure in zip(grid[1], MEASURES, strict=True):
            _lines(axes, scaling, measure)
            axes.set_xscale("log", base=2)
            axes.set_xlim(8, 30000)
            axes.set_xticks([8, 64, 512, 4096], ["8", "64", "512", "4096"])
            axes.set_xlabel(f"GPUs ({plan.settings.risky_fraction:.3g} of rows risky)")
        for axes in grid[:, 0]:
            axes.set_ylabel("over plain fine-tuning")
        figure.suptitle(_message(plan, name), fontsize=11, fontweight="bold")
        return figure


def _lines(axes: Any, curve: Curve, measure: str) -> None:
    from matplotlib.ticker import PercentFormatter

    ends = []
    for arm, (label, colour) in ARM_STYLES.items():
        x = [point for point, _ in curve]
        y = [shares[arm][measure] for _, shares in curve]
        axes.plot(x, y, color=colour, linestyle="--" if arm == "stored" else "-")
        ends.append((y[-1], x[-1], label, colour))
    top = max(max(end[0] for end in ends), 0.01)
    low = -1.0
    for y, x, label, colour in sorted(ends):
        low = max(y, low + 0.09 * top)  # labels of lines that meet are set apart
        axes.annotate(
            label,
            (x, low),
            (4, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
            fontsize=8,
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")


def _message(plan: Plan, name: str) -> str:
    s = plan.settings
    ours, stored, theirs = (
        plan.overhead(arm)["seconds"] for arm in ("routed", "stored", "always_on")
    )
    adapters = f", adapters of rank {s.lora_rank}," if s.lora_rank else ""
    later = ""
    if s.probe_depth:
        after = overhead(after_the_probe(plan), plan.arms["sft"])["seconds"]
        later = f" in a probe's first epoch, {after:+.1%} after it"
    return (
        f"{name}{adapters} on {s.world_size} {plan.gpu.name}, {s.risky_fraction:.3g} of rows "
        f"risky: a step takes {ours:+.1%}{later},\nwith a stored reference {stored:+.1%}, "
        f"always on {theirs:+.1%} (planned)"
    )


def save(figure: Any, path: Path) -> None:
    """Writes the figure, in the format of the file's ending; all of it or nothing."""
    import matplotlib.pyplot as plt

    kind = path.suffix.lstrip(".") or "png"
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=160, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, drawn.getvalue())
    plt.close(figure)
