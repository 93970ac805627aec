"""A plan as text: tables to read in a terminal."""

from safereg_dist.parallel.hardware import GIB, LINK_EFFICIENCY, MFU, USABLE_MEMORY
from safereg_dist.plan.plan import Plan
from safereg_dist.plan.remedies import remedies
from safereg_dist.plan.risky_rows import expected_rows
from safereg_dist.plan.traffic import group_batches
from safereg_dist.screen.table import table

ARM_NAMES = {
    "sft": "plain fine-tuning",
    "routed": "reference on risky rows",
    "stored": "stored reference",
    "always_on": "always on, full logits",
}


def text_of(plan: Plan) -> str:
    """All tables, one under another."""
    parts = [_head(plan), _parameters(plan), _memory(plan), _fit(plan)]
    parts += [_flops(plan), _traffic(plan), _overheads(plan), _assumptions(plan)]
    return "\n\n".join(parts) + "\n"


def _head(plan: Plan) -> str:
    s, shape = plan.settings, plan.shape
    nodes = max(1, s.world_size // s.gpus_per_node)
    rows = s.data_parallel * s.window_rows
    return (
        f"{shape.model_type}, {shape.parameters:,} parameters, on {s.world_size} x "
        f"{plan.gpu.name} ({nodes} node{'s' if nodes > 1 else ''}), {s.precision}\n"
        f"{rows} rows of {s.seq_length} tokens a step ({s.response_share:.0%} trained on), "
        f"{s.risky_fraction:.3g} of them risky: {ARM_NAMES[s.arm]}"
    )


def _parameters(plan: Plan) -> str:
    shape = plan.shape
    rows = [
        ("embedding", f"{shape.part('embedding'):,}"),
        (f"{shape.num_layers} layers", f"{shape.part('layers'):,}"),
        ("final norm and others", f"{shape.part('final'):,}"),
        ("head", "tied to the embedding" if shape.is_tied else f"{shape.part('head'):,}"),
        ("total", f"{shape.parameters:,}"),
    ]
    if shape.num_chosen > 1:
        rows.append(("active for one token", f"{shape.active_parameters:,}"))
    return table("Parameters", ("", "number"), rows)


def _memory(plan: Plan) -> str:
    memory = plan.chosen.memory
    rows = [(name, gib(size), "always") for name, size in memory.resting.items()]
    rows += [(name, gib(size), "micro-batch") for name, size in memory.working.items()]
    if memory.updating:
        rows.append(("float32 gradients of a sub-group", gib(memory.updating), "update"))
    rows.append(("fullest moment", gib(memory.gpu), ""))
    usable = f"of {gib(plan.gpu.memory_bytes)}"
    rows.append(("usable on this GPU", gib(plan.usable_bytes), usable))
    if memory.host:
        rows.append(("in the machine's memory", gib(memory.host), "a rank"))
    return table("Memory of a GPU (GiB)", ("", "GiB", "when"), rows)


def _fit(plan: Plan) -> str:
    if plan.fits:
        return "It fits."
    alone, together = remedies(plan)
    rows = [(r.text, f"-{gib(r.saved_bytes)}", "fits" if r.fits else "not enough") for r in alone]
    text = table("It does not fit. Remedies", ("", "GiB", ""), rows)
    if together is not None:
        text += f"\ntogether: {together.text}: -{gib(together.saved_bytes)} GiB, fits"
    elif not any(remedy.fits for remedy in alone):
        text += "\nnot even all of them together are enough: more memory a GPU, or a smaller model"
    return text


def _flops(plan: Plan) -> str:
    costs = plan.chosen
    rows = [
        (name, f"{value / 1e12:,.2f}", f"{value / costs.total_flops:.2%}")
        for name, value in costs.flops.items()
    ]
    rows.append(("total", f"{costs.total_flops / 1e12:,.2f}", ""))
    return table("FLOPs of a step, all GPUs (10^12)", ("", "TFLOP", "share"), rows)


def _traffic(plan: Plan) -> str:
    costs = plan.chosen
    rows = [(name, gib(moved.inside), gib(moved.between)) for name, moved in costs.traffic.items()]
    inside, between = (
        sum(getattr(moved, link) for moved in costs.traffic.values())
        for link in ("inside", "between")
    )
    rows.append(("total", gib(inside), gib(between)))
    columns = ("", "in the node", "between nodes")
    return table("Bytes that a GPU receives in a step (GiB)", columns, rows)


def _overheads(plan: Plan) -> str:
    rows = []
    for arm, costs in plan.arms.items():
        extra = plan.overhead(arm)
        shares = [f"{extra[name]:+.2%}" for name in ("flops", "bytes", "seconds")]
        name = ARM_NAMES[arm] + (" (this plan)" if arm == plan.settings.arm else "")
        rows.append((name, *shares, f"{costs.seconds:.3f}", gib(costs.memory.gpu)))
    columns = ("", "FLOPs", "bytes", "time", "s a step", "GiB a GPU")
    return table("Against plain fine-tuning", columns, rows)


def _assumptions(plan: Plan) -> str:
    s = plan.settings
    expected = expected_rows(s, group_batches=group_batches(plan.shape, s))
    return "\n".join(
        (
            "Assumed",
            f"  {MFU:.0%} of the GPU's peak, {LINK_EFFICIENCY:.0%} of a link's peak, "
            f"{USABLE_MEMORY:.0%} of its memory for tensors",
            f"  peaks: {plan.gpu.flops_per_s / 1e12:.0f} TFLOP/s, "
            f"{plan.gpu.node_bytes_per_s / 1e9:.0f} GB/s in the node, "
            f"{plan.gpu.network_bytes_per_s / 1e9:.1f} GB/s of network a GPU",
            "  communication and products overlap within the policy's passes and within the",
            "  reference's, not across; no time for data, optimizer and offloading",
            f"  a rank has {expected.mean_rows:.3g} risky rows a step, the fullest "
            f"{expected.most_rows:.3g}: {expected.passes:.3g} passes of the reference, "
            f"{expected.head_gathers:.3g} gathers of its head",
            f"  rows fall on ranks {_BALANCES[s.balance]}; "
            "all have the same length; attention counts the whole square",
            *_unsupported(plan),
        )
    )


_BALANCES = {
    "none": "by chance (with a risk column training deals them: --balance deal)",
    "deal": "evenly (deal)",
}


def _unsupported(plan: Plan) -> list[str]:
    if plan.settings.model_parallel == 1:
        return []
    return ["  tensor and pipeline parallelism divide the model evenly; no bubble is counted"]


def gib(size: float) -> str:
    """Bytes as a number of GiB."""
    number = size / GIB
    return f"{number:.2f}" if number >= 0.01 or number == 0 else f"{number:.1e}"
