"""Changes that make a run fit: each one alone, and as many together as needed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from safereg_dist.plan.memory import memory
from safereg_dist.plan.plan import Plan
from safereg_dist.plan.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One change and what it does."""

    text: str
    saved_bytes: float
    """Reduction of the GPU's peak memory, in bytes."""
    fits: bool


def remedies(plan: Plan) -> tuple[list[Remedy], Remedy | None]:
    """Changes that free memory, most effective first; and those that together make it fit.

    The second is None where it fits already, where one change is enough, or where none are.
    """
    before = plan.chosen.memory.gpu
    alone = [
        Remedy(text=text, saved_bytes=before - after, fits=after <= plan.usable_bytes)
        for text, settings in _changes(plan.settings)
        if (after := memory(plan.shape, settings).gpu) < before
    ]
    alone.sort(key=lambda remedy: -remedy.saved_bytes)
    if plan.fits or any(remedy.fits for remedy in alone):
        return alone, None
    return alone, _together(plan)


def _together(plan: Plan) -> Remedy | None:
    """The most effective change, and on top of it the next, until it fits."""
    settings, texts = plan.settings, []
    before = current = plan.chosen.memory.gpu
    while current > plan.usable_bytes:
        found = [(memory(plan.shape, new).gpu, text, new) for text, new in _changes(settings)]
        after, text, new = min(found, key=lambda change: change[0], default=(current, "", settings))
        if after >= current:
            return None
        current, settings = after, new
        texts.append(text)
    return Remedy(text=" and ".join(texts), saved_bytes=before - current, fits=True)


def _changes(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Settings with one change each; the batch of an optimizer step stays as it is."""
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
        if getattr(settings, field) == "none":
            yield f"{key}=cpu", replace(settings, **{field: "cpu"})
    if settings.hpz > 1:
        yield "engine.hpz_partition_size=1", replace(settings, hpz=1)
    if settings.world_size < settings.gpus_per_node:
        more = min(2 * settings.world_size, settings.gpus_per_node)
    else:
        more = 2 * settings.world_size
    if more % settings.world_size == 0 and more <= 8192:
        yield f"{more} GPUs", replace(settings, world_size=more)
