"""A plan as text: tables to read in a terminal."""

from collections.abc import Sequence

from safereg_dist.parallel.hardware import (
    GIB,
    HOST_LINK_BYTES_PER_S,
    HOST_MEMORY_BYTES_PER_S,
    LINK_EFFICIENCY,
    USABLE_MEMORY,
    Gpu,
)
from safereg_dist.plan.adapters import adapter_numels
from safereg_dist.plan.length import RunLength, after_the_probe, length_text, time_text
from safereg_dist.plan.plan import Plan, overhead
from safereg_dist.plan.remedies import Remedy, remedies
from safereg_dist.plan.risky_rows import expected_rows
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.stored import StoredPrice
from safereg_dist.plan.traffic import group_batches
from safereg_dist.screen.table import gigabytes, table

ARM_NAMES = {
    "sft": "plain fine-tuning",
    "routed": "reference on risky rows",
    "stored": "stored reference",
    "always_on": "always on, full logits",
}


def text_of(
    plan: Plan, price: StoredPrice, length: RunLength, notes: Sequence[str] = (), *, in_yaml: bool
) -> str:
    """All tables, one under another.

    Args:
        notes: further assumptions.
        in_yaml: the run has a configuration, whose keys the remedies name; else options.
    """
    parts = [_head(plan), _parameters(plan), _memory(plan), _fit(plan, in_yaml=in_yaml)]
    parts += [
        _flops(plan),
        _traffic(plan),
        f"{_overheads(plan)}\n{length_text(length, fits=plan.fits)}",
    ]
    if plan.settings.arm != "sft":
        parts.append(_stored(plan, price))
    parts.append("\n".join([_assumptions(plan), *(f"  {note}" for note in notes)]))
    return "\n\n".join(parts) + "\n"


def _head(plan: Plan) -> str:
    s, shape = plan.settings, plan.shape
    nodes = max(1, s.world_size // s.gpus_per_node)
    rows = s.data_parallel * s.window_rows
    if s.lora_rank:
        adapters = sum(adapter_numels(shape, s))
        rank = f"; trained: {adapters:,} of adapters of rank {s.lora_rank}"
    else:
        rank = ""
    return (
        f"{shape.model_type}, {shape.parameters:,} parameters, on {s.world_size} x "
        f"{plan.gpu.name} ({nodes} node{'s' if nodes > 1 else ''}), {s.precision}\n"
        f"{rows} rows of {s.seq_length} tokens a step ({s.response_share:.0%} trained on), "
        f"{s.risky_fraction:.3g} of them risky or anchors: {ARM_NAMES[s.arm]}{rank}"
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
    if memory.host:
        ranks = min(plan.settings.world_size, plan.settings.gpus_per_node)
        rows.append(("", gib(ranks * memory.host), "a machine"))
    text = table("Memory of a GPU (GiB)", ("", "GiB", "when"), rows)
    return (
        f"{text}\nDisk: {gigabytes(plan.checkpoint_bytes)} a checkpoint (about; one more than "
        f"train.keep_checkpoints while one is written),\n  {gigabytes(plan.export_bytes)} the "
        "model at the end"
    )


def _fit(plan: Plan, *, in_yaml: bool) -> str:
    whole = 2.0 * plan.shape.parameters
    before = ""
    if whole > plan.usable_bytes:
        before = (
            "\nBefore and after training `probe fit`, `anchor build` and `eval` load the whole "
            f"model ({gigabytes(whole)}) into\none GPU, which has less: docs/multi_node.md says "
            "what to do with models larger than a GPU"
        )
    if plan.fits:
        return f"It fits.{before}"
    alone, together = remedies(plan, as_options=not in_yaml)
    rows = [
        (
            *(r.text, f"-{gib(r.saved_bytes)}", _added(r.added_seconds)),
            _verdict(plan, r),
        )
        for r in alone
    ]
    columns = ("", "GiB a GPU", "s a step", "")
    text = table("It does not fit. Remedies, and what they add to a step", columns, rows)
    if together is not None:
        text += (
            f"\ntogether: {together.text}: -{gib(together.saved_bytes)} GiB, "
            f"{_added(together.added_seconds)} s a step, {_verdict(plan, together)}"
        )
    elif not any(remedy.fits for remedy in alone):
        text += "\nnot even all of them together are enough: more memory a GPU, or a smaller model"
    return text + before


def _verdict(plan: Plan, remedy: Remedy) -> str:
    if not remedy.host_bytes:
        return "fits" if remedy.fits else "not enough"
    ranks = min(plan.settings.world_size, plan.settings.gpus_per_node)
    verdict = "fits" if remedy.fits else "not enough"
    return f"{verdict}, {ranks * remedy.host_bytes / GIB:.0f} GiB of a machine"


def _added(seconds: float) -> str:
    return f"{seconds:+.3f}" if abs(seconds) >= 0.0005 else "0"


def _stored(plan: Plan, price: StoredPrice) -> str:
    """The price of a store; in one line where the plan has none."""
    disk, building = gigabytes(price.num_bytes), time_text(price.seconds)
    pays = f"after {price.epochs:.2g} epochs" if price.epochs < float("inf") else "never"
    if plan.settings.arm == "routed":
        probing = ""
        if price.probe_seconds:
            probing = f" and {time_text(price.probe_seconds)} for the probe before"
        return (
            f"A stored reference (--stored-reference), of {price.data_rows:,} rows (--data-rows): "
            f"{disk} of disk,\n  {building} to build on these GPUs{probing}, "
            f"{_added(-price.saved_seconds)} s a step later on; it has paid {pays}"
            + ("; the probe runs either way" if price.probe_seconds else "")
        )
    rows = [
        ("rows of the data set (--data-rows)", f"{price.data_rows:,}"),
        ("rows in it, risky ones and anchors", f"{price.stored_rows:,.0f}"),
        ("disk", disk),
        ("FLOPs to build it (10^12)", f"{price.flops / 1e12:,.0f}"),
        ("time to build it on these GPUs, each pass as long as its fullest rank", building),
    ]
    if price.probe_seconds:
        rows.append(("the probe on all rows, once, as in training", time_text(price.probe_seconds)))
    rows += [
        ("seconds less a step, after a first epoch", f"{price.saved_seconds:.3f}"),
        ("it has paid", pays),
    ]
    return table("Stored reference (`safereg reference build`)", ("", "number"), rows)


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
        if arm == "routed" and plan.settings.probe_depth:
            rows.append(_after_the_probe(plan))
    columns = ("", "FLOPs", "bytes", "time", "s a step", "GiB a GPU")
    return table("Against plain fine-tuning", columns, rows)


def _after_the_probe(plan: Plan) -> tuple[str, ...]:
    """The reference on risky rows, once the probe has seen all rows."""
    costs = after_the_probe(plan)
    extra = overhead(costs, plan.arms["sft"])
    shares = [f"{extra[name]:+.2%}" for name in ("flops", "bytes", "seconds")]
    return ("  after the first epoch", *shares, f"{costs.seconds:.3f}", gib(costs.memory.gpu))


def _assumptions(plan: Plan) -> str:
    s = plan.settings
    expected = expected_rows(s, group_batches=group_batches(plan.shape, s))
    return "\n".join(
        (
            "Assumed",
            rates_text(plan.gpu, s),
            "  communication and products overlap within the policy's passes and within the",
            "  reference's, not across; no time for data and the optimizer on the GPU",
            f"  offloading: {HOST_LINK_BYTES_PER_S / 1e9:.0f} GB/s between a GPU and its host, "
            f"{HOST_MEMORY_BYTES_PER_S / 1e9:.0f} GB/s of a host's memory; nothing overlaps",
            f"  a rank has {expected.mean_rows:.3g} risky rows a step, the fullest "
            f"{expected.most_rows:.3g}:",
            f"  {expected.passes:.3g} passes of the reference, "
            f"{expected.head_gathers:.3g} gathers of its head",
            f"  rows fall on ranks {_BALANCES[s.balance]};",
            "  all have the same length; attention counts the whole square",
            *_of_adapters(plan),
        )
    )


def rates_text(gpu: Gpu, settings: Settings) -> str:
    """The rates that a plan assumes, and the options that change them."""
    node = gpu.network_bytes_per_s * settings.gpus_per_node
    return (
        f"  {settings.mfu:.0%} of the GPU's peak (--mfu), {LINK_EFFICIENCY:.0%} of a link's peak, "
        f"{USABLE_MEMORY:.0%} of its memory for tensors\n"
        f"  peaks: {gpu.flops_per_s / 1e12:.0f} TFLOP/s; {gpu.node_bytes_per_s / 1e9:.0f} GB/s a "
        f"GPU in the node ({gpu.node_bytes_per_s / 1.25e8:,.0f} Gbit/s: --nvlink-gbps);\n"
        f"  {gpu.network_bytes_per_s / 1e9:.1f} GB/s of network a GPU "
        f"({node / 1.25e8:,.0f} Gbit/s a node: --link-gbps)"
    )


_BALANCES = {
    "none": "by chance (with a risk column training deals them: --balance deal)",
    "deal": "evenly, as training deals them with a risk column (else --balance none)",
}


def _of_adapters(plan: Plan) -> list[str]:
    if not plan.settings.lora_rank:
        return []
    return [
        "  with adapters the bytes of gathers are an upper bound: small models moved 0.77 to 1 of",
        "  the total; activations are those of full fine-tuning",
    ]


def gib(size: float) -> str:
    """Bytes as a number of GiB."""
    number = size / GIB
    return f"{number:.2f}" if number >= 0.01 or number == 0 else f"{number:.1e}"
