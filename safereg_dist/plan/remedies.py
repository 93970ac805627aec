"""Changes that make a run fit: each one alone, and as many together as needed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from safereg_dist.plan.memory import memory
from safereg_dist.plan.plan import Plan, arm_costs
from safereg_dist.plan.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One change and what it does."""

    text: str
    saved_bytes: float
    """Reduction of the GPU's peak memory, in bytes."""
    added_seconds: float
    """What it adds to the time of a step."""
    fits: bool


def remedies(plan: Plan) -> tuple[list[Remedy], Remedy | None]:
    """Changes that free memory, most effective first; and those that together make it fit.

    The second is None where it fits already, where one change is enough, or where none are.
    """
    found = [_remedy(plan, text, settings) for text, settings in _changes(plan.settings)]
    alone = [remedy for remedy in found if remedy.saved_bytes > 0]
    alone.sort(key=lambda remedy: -remedy.saved_bytes)
    if plan.fits or any(remedy.fits for remedy in alone):
        return alone, None
    return alone, _together(plan)


def _remedy(plan: Plan, text: str, settings: Settings) -> Remedy:
    before, after = plan.chosen, arm_costs(plan.shape, settings, plan.gpu)
    return Remedy(
        text=text,
        saved_bytes=before.memory.gpu - after.memory.gpu,
        added_seconds=after.seconds - before.seconds,
        fits=after.memory.gpu <= plan.usable_bytes,
    )


def _together(plan: Plan) -> Remedy | None:
    """The most effective change, and on top of it the next, until it fits."""
    settings, texts = plan.settings, []
    current = plan.chosen.memory.gpu
    while current > plan.usable_bytes:
        found = [(memory(plan.shape, new).gpu, text, new) for text, new in _changes(settings)]
        after, text, new = min(found, key=lambda change: change[0], default=(current, "", settings))
        if after >= current:
            return None
        current, settings = after, new
        texts.append(text)
    return _remedy(plan, " and ".join(texts), settings)


def _changes(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Settings with one change each; the batch of an optimizer step stays, but with more GPUs."""
    if not settings.activation_checkpointing:
        yield (
            "train.activation_checkpointing=true",
            replace(settings, activation_checkpointing=True),
        )
    if settings.micro_batch > 1:
        accum = settings.grad_accum * settings.micro_batch
        smaller = replace(settings, micro_batch=1, grad_accum=accum)
        yield f"train.micro_batch_size=1 train.grad_accum_steps={accum}", smaller
    if settings.chunk_tokens is None:
        if settings.head_bytes_held > 1 << 29:
            yield f"train.head_bytes={1 << 29}", replace(settings, head_bytes=1 << 29)
    elif settings.chunk_tokens > 256:
        yield "train.chunk_tokens=256", replace(settings, chunk_tokens=256)
    if settings.arm == "routed":
        yield "a stored reference (reference.cache)", replace(settings, arm="stored")
    for key, field in (
        ("reference.offload", "offload_reference"),
        ("engine.offload_optimizer", "offload_optimizer"),
        ("engine.offload_params", "offload_params"),
    ):
        if field == "offload_reference" and settings.has_adapters_off:
            continue
        if getattr(settings, field) == "none":
            yield f"{key}=cpu", replace(settings, **{field: "cpu"})
    if settings.hpz > 1:
        yield "engine.hpz_partition_size=1", replace(settings, hpz=1)
    if settings.world_size < settings.gpus_per_node:
        more = min(2 * settings.world_size, settings.gpus_per_node)
    else:
        more = 2 * settings.world_size
    if more % settings.world_size == 0 and more <= 8192:
        times = more // settings.world_size
        yield f"{more} GPUs, {times} x the rows a step", replace(settings, world_size=more)
