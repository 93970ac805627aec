"""A plan of a Megatron layout as text: tables to read in a terminal."""

from collections.abc import Sequence

from safereg_dist.plan.length import RunLength, length_text
from safereg_dist.plan.megatron.memory import active_law, mean_of
from safereg_dist.plan.megatron.plan import LayoutPlan
from safereg_dist.plan.megatron.proposal import NONE_FITS, Remedy
from safereg_dist.plan.megatron.stages import layers_of, parameters
from safereg_dist.plan.megatron.traffic import group_of, link_of
from safereg_dist.plan.pipeline import bubble_room
from safereg_dist.plan.report import gib, rates_text
from safereg_dist.plan.risky_rows import active_share
from safereg_dist.screen.table import table

ARM_NAMES = {
    "sft": "plain training",
    "routed": "reference before the step",
    "bubble": "reference in the bubble",
    "always_on": "always on, whole logits",
}
GROUPS = ("tensor", "context", "optimizer", "pipeline")


def text_of(
    plan: LayoutPlan,
    length: RunLength,
    notes: Sequence[str] = (),
    left: Sequence[Remedy] = (),
) -> str:
    """All tables, one under another; `notes` are further assumptions, `left` what may help."""
    parts = [_head(plan), _links(plan), _memory(plan, left), _slots(plan), _flops(plan)]
    parts += [_traffic(plan), f"{_overheads(plan)}\n{length_text(length, fits=plan.fits)}"]
    parts.append("\n".join([_assumptions(plan), *(f"  {note}" for note in notes)]))
    return "\n\n".join(parts) + "\n"


def _head(plan: LayoutPlan) -> str:
    s, shape = plan.settings, plan.shape
    chunks = f" of {s.virtual_pipeline} chunks" if s.virtual_pipeline > 1 else ""
    lines = [
        f"{shape.model_type}, {shape.parameters:,} parameters, on {s.world_size} x "
        f"{plan.gpu.name}, {s.precision}, Megatron",
        f"tensor {s.tensor_parallel} x pipeline {s.pipeline_parallel}{chunks} x context "
        f"{s.context_parallel} x data {s.data_parallel}; each replica {s.grad_accum} "
        f"micro-batches of {s.micro_batch} x {s.seq_length} tokens a step",
        f"{s.risky_fraction:.3g} of the rows risky: {active_share(s):.3g} of the micro-batches "
        "hold one",
    ]
    lines += [r if r == NONE_FITS else f"proposed {r}" for r in plan.proposed]
    return "\n".join(lines)


def _links(plan: LayoutPlan) -> str:
    rows = []
    for name in GROUPS:
        ranks, stride = group_of(name, plan.settings)
        title = "data and context" if name == "optimizer" else name
        rows.append((title, str(ranks), str(stride), link_of(name, plan.settings)))
    return table("Groups", ("", "ranks", "apart", "link"), rows)


def _shown(plan: LayoutPlan) -> dict[int, str]:
    """Stage -> its heading: all of a short pipeline, else the ends and the fullest."""
    last = plan.settings.pipeline_parallel - 1
    shown = range(last + 1) if last < 4 else sorted({0, 1, plan.chosen.fullest[0], last})
    return {stage: f"stage {stage}" for stage in shown}


def _memory(plan: LayoutPlan, left: Sequence[Remedy]) -> str:
    costs, shown = plan.chosen, _shown(plan)
    rows = [
        ("layers", *(str(layers_of(plan.shape, plan.settings, stage)) for stage in shown)),
        ("parameters a GPU", *(f"{_held(plan, stage):,}" for stage in shown)),
    ]
    for part in costs.memory[0]:
        sizes = [costs.memory[stage][part] for stage in shown]
        if any(own[part] for own in costs.memory):
            rows.append((part, *map(gib, sizes)))
    rows.append(("together", *(gib(sum(costs.memory[stage].values())) for stage in shown)))
    text = table("Memory of a GPU (GiB)", ("", *shown.values()), rows)
    stage, size = costs.fullest
    verdict = "It fits" if plan.fits else "It does not fit"
    usable = f"{gib(plan.usable_bytes)} of {gib(plan.gpu.memory_bytes)}"
    text = f"{text}\n{verdict}: stage {stage} needs {gib(size)} GiB, usable {usable}"
    if not left:
        return text
    tried = [(r.text, gib(r.needs_bytes), "fits" if r.fits else "not enough") for r in left]
    return f"{text}\n\n{table('What to change, and what a GPU needs then', ('', 'GiB', ''), tried)}"


def _held(plan: LayoutPlan, stage: int) -> int:
    return sum(parameters(plan.shape, plan.settings, stage).values())


def _slots(plan: LayoutPlan) -> str:
    s, pipeline = plan.settings, plan.pipeline
    most = mean_of(active_law(s, replicas=s.data_parallel), float)
    count = round(most)
    rows = [
        ("a step", f"{pipeline.slots}"),
        (
            "idle on each stage",
            f"{pipeline.idle_slots} ({pipeline.idle_slots / pipeline.slots:.1%})",
        ),
        (f"reference of {count} micro-batches, a pass alone", f"{pipeline.pass_slots(count)}"),
        ("the pass directly before the step adds", f"{pipeline.added_slots(count)}"),
        ("micro-batches that fit into the idle slots", f"{bubble_room(pipeline)}"),
        ("the rest of the pass adds", f"{pipeline.added_beside_bubble(count)}"),
    ]
    title = f"Slots: a chunk's forward is 1, its backward {pipeline.backward}"
    fullest = f"  {count} is what the fullest of {s.data_parallel} replicas is expected to have"
    return table(title, ("", "slots"), rows) + "\n" + fullest


def _flops(plan: LayoutPlan) -> str:
    costs = plan.chosen
    rows = [
        (name, f"{value / 1e12:,.2f}", f"{value / costs.total_flops:.2%}")
        for name, value in costs.flops.items()
        if value
    ]
    rows.append(("total", f"{costs.total_flops / 1e12:,.2f}", ""))
    return table("FLOPs of a step, all GPUs (10^12)", ("", "TFLOP", "share"), rows)


def _traffic(plan: LayoutPlan) -> str:
    """One row an item: within and between nodes for each shown stage."""
    shown, moved = _shown(plan), plan.chosen.traffic
    rows = []
    for item in moved[0]:
        links = [
            value
            for stage in shown
            for value in (moved[stage][item].inside, moved[stage][item].between)
        ]
        if any(links):
            rows.append((item, *map(gib, links)))
    sums = [
        sum(getattr(part, link) for part in moved[stage].values())
        for stage in shown
        for link in ("inside", "between")
    ]
    rows.append(("together", *map(gib, sums)))
    columns = [f"{name[6:]} {link}" for name in shown.values() for link in ("in", "out")]
    title = "Bytes that a GPU receives in a step, by stage, in its node and out of it (GiB)"
    return table(title, ("", *columns), rows)


def _overheads(plan: LayoutPlan) -> str:
    rows = []
    for arm, costs in plan.arms.items():
        extra = plan.overhead(arm)
        shares = [f"{extra[name]:+.2%}" for name in ("flops", "bytes", "seconds")]
        name = ARM_NAMES[arm] + (" (this plan)" if costs is plan.chosen else "")
        rows.append((name, *shares, f"{costs.seconds:.3f}", gib(costs.fullest[1])))
    columns = ("", "FLOPs", "bytes", "time", "s a step", "GiB a GPU")
    return table("Against plain training", columns, rows)


def _assumptions(plan: LayoutPlan) -> str:
    return "\n".join(
        (
            "Assumed",
            rates_text(plan.gpu, plan.settings),
            "  tensor-parallel exchanges after the products, context-parallel ones beside them;",
            "  gradients beside the last backward, weights beside the first forward; all wait for",
            "  the replica with the most active micro-batches; no time for data and optimizer",
            "  the fused loss multiplies the tokens that are trained on, Megatron's own head all;",
            "  fused attention and no dropout; in the bubble the reference is "
            f"{plan.pipeline.chunks} step{'s' if plan.pipeline.chunks > 1 else ''} ahead",
        )
    )
