"""Which parameters DeepSpeed's ZeRO-3 gathers in one micro-batch, and how many are whole at once.

A module's parameters are gathered when it runs and let go afterwards, unless they are used again
before `stage3_max_reuse_distance` more parameters have run (deepspeed 0.19, partitioned parameter
coordinator). So a model below a billion parameters is gathered once, a larger one nearly twice:
what runs last is still whole when the backward pass begins. With activation checkpointing the
recomputation is a third use, which finds large layers gone again. Parameters up to the persistence
threshold never go.
"""

from dataclasses import dataclass

from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape, Module


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathers:
    """Elements that one micro-batch of the policy gathers, padded to whole shards."""

    first: int
    """For their first use in it."""
    again: int
    """For a later use, after they were let go."""
    peak: int
    """Most that are whole at once, without those that stay."""


def threshold(shape: ModelShape) -> int:
    """Elements up to which a parameter stays whole; as `parallel.deepspeed` sets it."""
    return 10 * shape.hidden_size


def padded(numels: tuple[int, ...], shape: ModelShape, world_size: int) -> int:
    """Elements of all shards together, of the parameters that do not stay whole."""
    limit = threshold(shape)
    return sum(-(-n // world_size) * world_size for n in numels if n > limit)


def staying(modules: tuple[Module, ...], shape: ModelShape) -> int:
    """Elements of the parameters that stay whole on every rank."""
    limit = threshold(shape)
    return sum(n for module in modules for n in module.numels if n <= limit)


def policy_gathers(shape: ModelShape, settings: Settings) -> Gathers:
    """What a micro-batch gathers, by the rule above, walking through forward and backward."""
    sizes = [padded(module.numels, shape, settings.data_parallel) for module in shape.modules]
    head = _holder_of_head(shape)
    order = _order_of_use(shape, head, recompute=settings.activation_checkpointing)
    before = [0]  # parameters that ran before each place
    for index in order:
        before.append(before[-1] + shape.modules[index].numel)
    next_use = _next_use(order)
    whole: set[int] = set()
    gathered: list[int] = []
    peak = 0
    for place, index in enumerate(order):
        if index not in whole:
            whole.add(index)
            gathered.append(index)
            peak = max(peak, sum(sizes[i] for i in whole))
        later = next_use[place]
        is_near = later is not None and before[later] - before[place + 1] < settings.reuse_distance
        # The step itself uses the head's weight, from its start to its end.
        if not is_near and (index != head or later is None):
            whole.discard(index)
    first = sum(sizes[index] for index in set(gathered))
    return Gathers(first=first, again=sum(sizes[i] for i in gathered) - first, peak=peak)


def _holder_of_head(shape: ModelShape) -> int:
    part = "embedding" if shape.is_tied else "head"
    return next(i for i, module in enumerate(shape.modules) if module.part == part)


def _order_of_use(shape: ModelShape, head: int, *, recompute: bool) -> list[int]:
    """Modules as forward and backward use them; the step's own use of the head begins both.

    With recomputation a layer's backward begins at its last product, whose input asks for it.
    """
    trunk = [i for i, module in enumerate(shape.modules) if module.part != "head"]
    embedding, final = ([i for i in trunk if _part(shape, i) == p] for p in ("embedding", "final"))
    layers: dict[int | None, list[int]] = {}
    for i in trunk:
        layers.setdefault(shape.modules[i].layer, []).append(i)
    layers.pop(None, None)
    backward = [*reversed(final)]
    for layer in reversed(layers.values()):
        backward += _backward_of_layer(shape, layer) if recompute else reversed(layer)
    return [head, *trunk, head, *backward, *embedding]


def _backward_of_layer(shape: ModelShape, layer: list[int]) -> list[int]:
    last = max((i for i in layer if shape.modules[i].products), default=layer[-1])
    before_last = [i for i in layer if i != last]
    return [*before_last, last, *reversed(before_last)]


def _part(shape: ModelShape, index: int) -> str:
    return shape.modules[index].part


def _next_use(order: list[int]) -> list[int | None]:
    later: dict[int, int] = {}
    found: list[int | None] = [None] * len(order)
    for place in range(len(order) - 1, -1, -1):
        found[place] = later.get(order[place])
        later[order[place]] = place
    return found
