"""The smallest layout that fits: tensor parallelism first, then pipeline, then context."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import GIB, USABLE_MEMORY, Gpu
from safereg_dist.plan.megatron.memory import fullest_stage
from safereg_dist.plan.megatron.stages import check_layout
from safereg_dist.plan.settings import Settings, with_rows
from safereg_dist.plan.shape import ModelShape

SIZES = ("context_parallel", "pipeline_parallel", "tensor_parallel")
"""What is proposed, the last varying first; the rest of the GPUs is data-parallel."""


NONE_FITS = "no layout fits; this one needs least"


class Remedy(NamedTuple):
    """A change of the options and what it makes a GPU need."""

    text: str
    needs_bytes: float
    fits: bool


def remedies(
    shape: ModelShape, values: Mapping[str, Any], settings: Settings, gpu: Gpu
) -> list[Remedy]:
    """What to change where the `settings` that `values` led to do not fit: each change alone, all
    of them, and with all of them the fewest GPUs that fit, by doubling."""
    changes: dict[str, dict[str, Any]] = {}
    if any(name in values for name in SIZES):
        changes["sizes left out, so that they are proposed"] = dict.fromkeys(SIZES)
    if not settings.activation_checkpointing:
        changes["--activation-checkpointing"] = {"activation_checkpointing": True}
    if settings.micro_batch > 1:
        accum = settings.window_rows
        changes[f"--micro-batch 1 --grad-accum {accum}"] = {"micro_batch": 1, "grad_accum": accum}
    tried = list(changes.items())
    everything = {name: value for change in changes.values() for name, value in change.items()}
    if len(changes) > 1:
        tried.append(("all of these", everything))
    kept = {**values, "grad_accum": settings.grad_accum}
    found = [_tried(text, shape, {**kept, **change}, gpu) for text, change in tried]
    count, known = settings.world_size, [remedy for remedy in found if remedy is not None]
    while not any(remedy.fits for remedy in known) and count < _MOST_GPUS:
        count *= 2
        text = f"{count} GPUs{' and all of these' if changes else ''}"
        more = _tried(text, shape, {**kept, **everything, "world_size": count}, gpu)
        if more is not None and (more.fits or count == _MOST_GPUS):
            known.append(more)
    return known


_MOST_GPUS = 8192


def _tried(text: str, shape: ModelShape, values: Mapping[str, Any], gpu: Gpu) -> Remedy | None:
    given = {name: value for name, value in values.items() if value is not None}
    try:
        settings, _ = propose(shape, given, gpu)
    except ConfigError:
        return None
    needs = fullest_stage(shape, settings)[1]
    return Remedy(text, needs, needs <= USABLE_MEMORY * gpu.memory_bytes)


def propose(
    shape: ModelShape, values: Mapping[str, Any], gpu: Gpu, *, rows_per_step: int | None = None
) -> tuple[Settings, tuple[str, ...]]:
    """The first layout that fits, else the one that needs least; and why none smaller does.

    Args:
        values: what `Settings` takes; of `SIZES` those that are given.
        rows_per_step: rows of a step on all GPUs, in place of `grad_accum`.
    Returns:
        (settings, for each proposed size above 1 what the next smaller one needs).
    Raises:
        ConfigError: no layout divides the model, the batch and the GPUs; says why the first did
            not.
    """
    if all(name in values for name in SIZES):
        return with_rows(Settings(**values), rows_per_step), ()
    needs: dict[tuple[int, ...], float] = {}
    least, found, failed = float("inf"), None, None
    for sizes in _candidates(shape, values):
        try:
            settings = _settings(shape, values, sizes, rows_per_step)
        except ConfigError as err:
            failed = failed or err
            continue
        needs[sizes] = fullest_stage(shape, settings)[1]
        if needs[sizes] < least:
            least, found = needs[sizes], settings
        if needs[sizes] <= USABLE_MEMORY * gpu.memory_bytes:
            return settings, _reasons(sizes, needs, values)
    if found is None:
        given = ", ".join(f"{_option(name)} {values[name]}" for name in SIZES if name in values)
        raise failed or ConfigError(
            f"--world-size {values['world_size']} is no multiple of the sizes that are given "
            f"({given}): change one of them"
        )
    return found, (NONE_FITS,)


def _candidates(shape: ModelShape, values: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """Sizes that divide the GPUs, by `SIZES`, smaller ones first; tensor ones within a node."""
    world, node = values["world_size"], values.get("gpus_per_node", 8)
    most = {"context_parallel": world, "pipeline_parallel": min(world, shape.num_layers + 2)}
    ranges = [
        [values[name]]
        if name in values
        else [n for n in range(1, most.get(name, min(world, node)) + 1) if world % n == 0]
        for name in SIZES
    ]
    for context in ranges[0]:
        for stages in ranges[1]:
            for tensor in ranges[2]:
                if world % (context * stages * tensor) == 0:
                    yield context, stages, tensor


def _settings(
    shape: ModelShape, values: Mapping[str, Any], sizes: tuple[int, ...], rows: int | None
) -> Settings:
    """Checked settings; ends count as layers where only with them the layers divide."""
    places = sizes[1] * values.get("virtual_pipeline", 1)
    only_so = shape.num_layers % places != 0 and (shape.num_layers + 2) % places == 0
    ends = values.get("ends_as_layers", False) or only_so
    own = dict(zip(SIZES, sizes, strict=True))
    settings = with_rows(Settings(**{**values, **own, "ends_as_layers": ends}), rows)
    check_layout(shape, settings)
    return settings


def _reasons(
    sizes: tuple[int, ...], needs: dict[tuple[int, ...], float], values: Mapping[str, Any]
) -> tuple[str, ...]:
    """For each proposed size above 1, what the next smaller one needs beside the others."""
    found = []
    for index, name in reversed(list(enumerate(SIZES))):
        rest = (sizes[:index], sizes[index + 1 :])
        smaller = [s for s in needs if (s[:index], s[index + 1 :]) == rest and s < sizes]
        if name in values or not smaller:
            continue
        nearest = max(smaller)
        found.append(
            f"{_option(name)} {sizes[index]}: with {nearest[index]} a GPU needs "
            f"{needs[nearest] / GIB:.1f} GiB"
        )
    return tuple(found)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
