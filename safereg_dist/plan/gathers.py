"""Which parameters DeepSpeed's ZeRO-3 gathers in one micro-batch, and how many are whole at once.

A module's parameters are gathered when it runs or a little before, and let go afterwards, unless
they are used again before `stage3_max_reuse_distance` more parameters have run, or the prefetcher
has passed over that use since they were whole (deepspeed 0.19, partitioned parameter coordinator).
So a model below a billion parameters is gathered once, a larger one nearly twice: what runs last is
still whole when the backward pass begins. With activation checkpointing the recomputation is a
third use, which may find large layers gone. Parameters up to the persistence threshold never go.
"""

from collections import deque
from dataclasses import dataclass

from safereg_dist.parallel.zero_config import persistence_threshold, prefetched_elements
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape, Module


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathers:
    """Elements that one micro-batch of the policy gathers, padded to whole shards."""

    first: int
    """Elements gathered for their first use in it."""
    again: int
    """Elements gathered again for a later use, after their release."""
    peak: int
    """Largest number of elements whole at once, without the persistent ones."""


def threshold(shape: ModelShape) -> int:
    """Elements up to which a parameter stays whole; as `parallel.deepspeed` sets it."""
    return persistence_threshold(shape.hidden_size)


def padded(numels: tuple[int, ...], shape: ModelShape, world_size: int) -> int:
    """Padded elements over all shards of the parameters that do not stay whole."""
    limit = threshold(shape)
    return sum(-(-n // world_size) * world_size for n in numels if n > limit)


def staying(modules: tuple[Module, ...], shape: ModelShape) -> int:
    """Elements of the parameters that stay whole on every rank."""
    limit = threshold(shape)
    return sum(n for module in modules for n in module.numels if n <= limit)


def policy_gathers(shape: ModelShape, settings: Settings) -> Gathers:
    """Simulates forward and backward of a micro-batch by the rules above."""
    head = _holder_of_head(shape)
    order = _order_of_use(shape, head, recompute=settings.activation_checkpointing)
    walk = _Walk(shape, settings, order, head)
    for place in range(len(order)):
        walk.use(place)
        walk.prefetch()
        walk.let_go(place)
    world_size = settings.data_parallel
    sizes = {p: -(-numel // world_size) * world_size for p, numel in walk.numels.items()}
    first = sum(sizes[parameter] for parameter in set(walk.gathered))
    everything = sum(sizes[parameter] for parameter in walk.gathered)
    return Gathers(first=first, again=everything - first, peak=walk.peak)


class _Walk:
    """Simulates DeepSpeed's coordinator in a micro-batch; parameters are named (module, index)."""

    def __init__(self, shape: ModelShape, settings: Settings, order: list[int], head: int) -> None:
        limit = threshold(shape)
        self.numels = {
            (i, j): numel
            for i, module in enumerate(shape.modules)
            for j, numel in enumerate(module.numels)
            if numel > limit
        }
        self.gathered: list[tuple[int, int]] = []
        self.peak = 0
        self._settings, self._order, self._head = settings, order, head
        self._of_module: dict[int, list[tuple[int, int]]] = {i: [] for i in order}
        for parameter in self.numels:
            self._of_module[parameter[0]].append(parameter)
        self._bucket = prefetched_elements(shape.hidden_size)
        # The head is whole all the time and must not count against the prefetch limit.
        self._most_live = settings.max_live_parameters + shape.modules[head].numel
        self._queue = deque((p, at) for at, i in enumerate(order) for p in self._of_module[i])
        self._noted: dict[tuple[int, int], int] = {}  # the last use that is taken care of
        self._whole: set[tuple[int, int]] = set()
        self._live = 0
        self._next_use = _next_use(order)
        self._before = [0]  # parameters that ran before each place
        for i in order:
            self._before.append(self._before[-1] + shape.modules[i].numel)

    def use(self, place: int) -> None:
        """Gathers the parameters of the module at this place."""
        parameters = self._of_module[self._order[place]]
        for parameter in parameters:
            self._gather(parameter)
        for _ in [p for p in parameters if self._noted.get(p, -1) < place]:
            parameter, at = self._queue.popleft()
            self._noted[parameter] = at

    def prefetch(self) -> None:
        """Prefetches up to a bucket; marks parameters that are still whole, so that they stay."""
        most = min(self._most_live - self._live, self._bucket)
        ahead = 0
        while self._queue and ahead < most:
            parameter, at = self._queue.popleft()
            self._noted[parameter] = max(self._noted.get(parameter, -1), at)
            if self._gather(parameter):
                ahead += self.numels[parameter]

    def let_go(self, place: int) -> None:
        """Releases the module's parameters unless they are needed soon."""
        index, later = self._order[place], self._next_use[place]
        if later is not None:
            distance = self._before[later] - self._before[place + 1]
            # The step itself uses the head's weight, from its start to its end.
            if index == self._head or distance < self._settings.reuse_distance:
                return
        for parameter in self._of_module[index]:
            if self._noted[parameter] <= place + 1 and parameter in self._whole:
                self._whole.discard(parameter)
                self._live -= self.numels[parameter]

    def _gather(self, parameter: tuple[int, int]) -> bool:
        if parameter in self._whole:
            return False
        self._whole.add(parameter)
        self.gathered.append(parameter)
        self._live += self.numels[parameter]
        self.peak = max(self.peak, self._live)
        return True


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
