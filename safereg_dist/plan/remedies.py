"""Changes that make a run fit: each one alone, and as many together as needed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

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
    host_bytes: float
    """What a rank then holds in its machine's memory."""
    fits: bool


_KEYS = {
    "activation_checkpointing": "train.activation_checkpointing",
    "micro_batch": "train.micro_batch_size",
    "grad_accum": "train.grad_accum_steps",
    "head_bytes": "train.head_bytes",
    "chunk_tokens": "train.chunk_tokens",
    "offload_reference": "reference.offload",
    "offload_optimizer": "engine.offload_optimizer",
    "offload_params": "engine.offload_params",
    "hpz": "engine.hpz_partition_size",
}
"""Field of `Settings` -> key of a configuration; the option of `safereg plan` has its own name."""
_OPTIONS = {"hpz": "--hpz-partition-size"}


def remedies(plan: Plan, *, as_options: bool = False) -> tuple[list[Remedy], Remedy | None]:
    """Changes that free memory, most effective first; and those that together make it fit.

    The second is None where it fits already, where one change is enough, or where none are. Texts
    are keys of a configuration, or `as_options` of `safereg plan`.
    """
    changes = list(_changes(plan.settings))
    found = [_remedy(plan, _text(change, as_options), change) for change in changes]
    alone = [remedy for remedy in found if remedy.saved_bytes > 0]
    alone.sort(key=lambda remedy: -remedy.saved_bytes)
    if plan.fits or any(remedy.fits for remedy in alone):
        return alone, None
    return alone, _together(plan, as_options)


def _remedy(plan: Plan, text: str, change: dict[str, Any]) -> Remedy:
    before = plan.chosen
    after = arm_costs(plan.shape, replace(plan.settings, **change), plan.gpu)
    return Remedy(
        text=text,
        saved_bytes=before.memory.gpu - after.memory.gpu,
        added_seconds=after.seconds - before.seconds,
        host_bytes=after.memory.host,
        fits=after.memory.gpu <= plan.usable_bytes,
    )


def _together(plan: Plan, as_options: bool) -> Remedy | None:
    """The most effective change, and on top of it the next, until it fits."""
    settings, texts, all_changes = plan.settings, [], {}
    current = plan.chosen.memory.gpu
    while current > plan.usable_bytes:
        found = [(memory(plan.shape, replace(settings, **c)).gpu, c) for c in _changes(settings)]
        after, change = min(found, key=lambda each: each[0], default=(current, {}))
        if after >= current:
            return None
        current, settings = after, replace(settings, **change)
        all_changes |= change
        texts.append(_text(change, as_options))
    return _remedy(plan, (" " if as_options else " and ").join(texts), all_changes)


def _text(change: dict[str, Any], as_options: bool) -> str:
    if "arm" in change:
        return "--stored-reference" if as_options else "a stored reference (reference.cache)"
    if "world_size" in change:
        return f"{change['world_size']} GPUs, and so more rows a step"
    found = []
    for field, value in change.items():
        option = _OPTIONS.get(field, f"--{field.replace('_', '-')}")
        text = str(value).lower()
        if as_options:
            found.append(option if value is True else f"{option} {text}")
        else:
            found.append(f"{_KEYS[field]}={text}")
    return " ".join(found)


def _changes(settings: Settings) -> Iterator[dict[str, Any]]:
    """One change each; the batch of an optimizer step stays, but with more GPUs."""
    if not settings.activation_checkpointing:
        yield {"activation_checkpointing": True}
    if settings.micro_batch > 1:
        yield {"micro_batch": 1, "grad_accum": settings.window_rows}
    if settings.chunk_tokens is None:
        if settings.head_bytes_held > 1 << 29:
            yield {"head_bytes": 1 << 29}
    elif settings.chunk_tokens > 256:
        yield {"chunk_tokens": 256}
    if settings.arm == "routed":
        yield {"arm": "stored"}
    for field in ("offload_reference", "offload_optimizer", "offload_params"):
        if field == "offload_reference" and settings.has_adapters_off:
            continue
        if getattr(settings, field) == "none":
            yield {field: "cpu"}
    if settings.hpz > 1:
        yield {"hpz": 1}
    if settings.world_size < settings.gpus_per_node:
        more = min(2 * settings.world_size, settings.gpus_per_node)
    else:
        more = 2 * settings.world_size
    if more % settings.world_size == 0 and more <= 8192:
        yield {"world_size": more}
