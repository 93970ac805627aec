"""Bytes that a rank of one stage receives in a step of a Megatron layout, by item and link.

Ranks are numbered as megatron-core does: tensor-parallel ones are neighbours, then context, data,
and pipeline; a group of n ranks that are `stride` apart lies within a node while n x stride is at
most its GPUs. Rings and collectives as in `plan.traffic`. The policy's items and the reference's
are apart; `agreement`, `weights of tokens` and `losses` are this package's own.
"""

from safereg_dist.plan.megatron.memory import FLOAT32, micro_batch_tokens, state_bytes
from safereg_dist.plan.megatron.stages import (
    layers_of,
    parameters,
    places_of,
    sequence_ranks,
    whole_elements,
)
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape
from safereg_dist.plan.traffic import Traffic, over_ring

FLAGS = 60
"""Micro-batches whose flags one word of the agreement carries; the replica's sums are 4 words."""
WORD = 8
STATISTICS = 9 * FLOAT32
"""Bytes of a token's statistics that merge over a vocabulary's ranks."""
TOKEN_WEIGHTS = 3 * FLOAT32
"""Bytes of a token's weights: cross-entropy, divergence, mask."""


def group_of(name: str, settings: Settings) -> tuple[int, int]:
    """(ranks, stride) of a kind of group: `tensor`, `context`, `data`, `optimizer`, `pipeline`.

    `optimizer` is data and context together, over which gradients are summed; `head` tensor and
    context; `tied` the two ends of the pipeline; `all` every rank.
    """
    t, c, d = settings.tensor_parallel, settings.context_parallel, settings.data_parallel
    p = settings.pipeline_parallel
    return {
        "tensor": (t, 1),
        "context": (c, t),
        "data": (d, t * c),
        "pipeline": (p, t * c * d),
        "optimizer": (c * d, t),
        "head": (t * c, 1),
        "tied": (2, t * c * d * (p - 1)) if p > 1 else (1, 1),
        "all": (settings.world_size, 1),
    }[name]


def link_of(name: str, settings: Settings) -> str:
    """Where a kind of group lies, in words."""
    ranks, stride = group_of(name, settings)
    if ranks == 1:
        return "no other rank"
    if ranks * stride <= settings.gpus_per_node:
        return "within a node"
    return "between nodes" if stride >= settings.gpus_per_node else "within and between nodes"


def stage_traffic(
    shape: ModelShape, settings: Settings, stage: int, *, active: float, run: float
) -> dict[str, Traffic]:
    """Bytes of one step on a rank of the stage, by item.

    Of a replica's micro-batches, `active` ones read the reference, which runs on `run`.
    """
    items = _policy(shape, settings, stage, active) | _gradients(shape, settings, stage)
    if settings.arm != "sft":
        items |= _reference(shape, settings, stage, active, run)
    if settings.arm == "routed":
        items |= _own(settings, stage, active)
    return {item: over(settings, group, received) for item, (group, received) in items.items()}


def over(settings: Settings, group: str, received: float) -> Traffic:
    """Bytes that a rank receives from its group of that kind, by link."""
    ranks, stride = group_of(group, settings)
    return over_ring(received, ranks, stride, settings.gpus_per_node)


def _share(size: float, ranks: int) -> float:
    """Received in an all-gather or a reduce-scatter of `size` bytes; in an all-reduce twice it."""
    return size * (ranks - 1) / ranks


def _gathered(shape: ModelShape, settings: Settings) -> float:
    """Received in gathering a micro-batch's states over the tensor-parallel ranks."""
    whole = micro_batch_tokens(settings) * settings.itemsize * shape.hidden_size
    return _share(whole, settings.tensor_parallel)


def forward_bytes(shape: ModelShape, settings: Settings, layers: int) -> dict[str, float]:
    """Received in one forward of a micro-batch through so many layers, by group.

    Tensor: each of a layer's two blocks ends in an all-reduce, or begins with a gather and ends in
    a reduce-scatter, the same bytes. Context: keys and values of the c - 1 other ranks; a backward
    moves them and their gradients.
    """
    keys = micro_batch_tokens(settings) * settings.itemsize * 2 * shape.key_value_width
    return {
        "tensor": 4 * layers * _gathered(shape, settings),
        "context": layers * (settings.context_parallel - 1) * keys / settings.tensor_parallel,
    }


Items = dict[str, tuple[str, float]]
"""Item -> (group, bytes that one rank receives from it)."""


def _policy(shape: ModelShape, settings: Settings, stage: int, active: float) -> Items:
    """Forward, backward and recomputation of all micro-batches, but for the loss of active ones."""
    batches, again = settings.grad_accum, 1 if settings.activation_checkpointing else 0
    forward = forward_bytes(shape, settings, layers_of(shape, settings, stage))
    plain = batches - active if settings.arm == "routed" else batches
    ends = batches * _embedding(shape, settings, stage, backward=True)
    ends += plain * _plain_head(shape, settings, stage)
    tensor = (2 + again) * forward["tensor"] + _inputs_again(shape, settings, stage)
    return {
        "tensor, layers": ("tensor", batches * tensor),
        "tensor, ends": ("tensor", ends),
        "context, keys and values": ("context", batches * (3 + again) * forward["context"]),
        "pipeline, states": ("pipeline", batches * _passed(shape, settings, stage, backward=True)),
    }


def _reference(
    shape: ModelShape, settings: Settings, stage: int, active: float, run: float
) -> Items:
    """Forwards of the reference; and the loss that reads both models."""
    forward = forward_bytes(shape, settings, layers_of(shape, settings, stage))
    tensor = forward["tensor"] + _embedding(shape, settings, stage, backward=False)
    return {
        "reference: tensor": ("tensor", run * tensor),
        "reference: context": ("context", run * forward["context"]),
        "reference: pipeline": ("pipeline", run * _passed(shape, settings, stage, backward=False)),
        "loss of both": ("tensor", active * _both_heads(shape, settings, stage)),
    }


def _passed(shape: ModelShape, settings: Settings, stage: int, *, backward: bool) -> float:
    """States that reach the stage's chunks, and gradients that come back to them."""
    places = settings.pipeline_parallel * settings.virtual_pipeline
    own = places_of(settings, stage)
    arrivals = sum(place > 0 for place in own)
    arrivals += backward * sum(place < places - 1 for place in own)
    return arrivals * state_bytes(shape, settings)


def _inputs_again(shape: ModelShape, settings: Settings, stage: int) -> float:
    """With sequence parallelism a backward gathers the blocks' inputs again, for weights."""
    if sequence_ranks(settings) == 1:
        return 0.0
    return 2 * layers_of(shape, settings, stage) * _gathered(shape, settings)


def _embedding(shape: ModelShape, settings: Settings, stage: int, *, backward: bool) -> float:
    """Sum over the vocabulary's parts: an all-reduce, or a reduce-scatter, then a gather back."""
    if stage > 0:
        return 0.0
    gathered = _gathered(shape, settings)
    return gathered * (1 + backward if sequence_ranks(settings) > 1 else 2)


def _plain_head(shape: ModelShape, settings: Settings, stage: int) -> float:
    """The states' gradient summed (or a gather, a reduce-scatter, a gather again); three sums."""
    if stage < settings.pipeline_parallel - 1:
        return 0.0
    sums = 3 * 2 * _share(FLOAT32 * micro_batch_tokens(settings), settings.tensor_parallel)
    return sums + _gathered(shape, settings) * (3 if sequence_ranks(settings) > 1 else 2)


def _both_heads(shape: ModelShape, settings: Settings, stage: int) -> float:
    """Of a micro-batch whose loss reads the reference: see `vocab_parallel_linear_ce_kl`.

    Always on: the plain head's sums a second time, and the reference's states.
    """
    if stage < settings.pipeline_parallel - 1:
        return 0.0
    tensor, is_spread = settings.tensor_parallel, sequence_ranks(settings) > 1
    tokens, gathered = micro_batch_tokens(settings), _gathered(shape, settings)
    if settings.arm == "always_on":
        return 3 * 2 * _share(FLOAT32 * tokens, tensor) + gathered * is_spread
    trained = settings.response_share * tokens
    statistics = (tensor - 1) * STATISTICS * trained
    gradient = 2 * _share(FLOAT32 * trained * shape.hidden_size, tensor)
    return statistics + (3 * gathered if is_spread else gradient)


def _gradients(shape: ModelShape, settings: Settings, stage: int) -> Items:
    """Once a step: float32 gradients, weights back from a distributed optimizer, what is shared."""
    held = parameters(shape, settings, stage)
    elements = sum(held.values())
    ranks, _ = group_of("optimizer", settings)
    at_end = stage in (0, settings.pipeline_parallel - 1)
    ends = held["embedding"] or held["head"] if shape.is_tied and at_end else 0
    norms = whole_elements(shape, settings, stage) if sequence_ranks(settings) > 1 else 0
    reduced = _share(FLOAT32 * elements, ranks)
    weights = _share(settings.itemsize * elements, ranks)
    return {
        "data, gradients": ("optimizer", reduced * (1 if settings.distributed_optimizer else 2)),
        "data, weights": ("optimizer", weights if settings.distributed_optimizer else 0.0),
        "norms' gradients": ("tensor", 2 * _share(FLOAT32 * norms, settings.tensor_parallel)),
        "tied ends": ("tied", 2 * _share(FLOAT32 * ends, group_of("tied", settings)[0])),
    }


def _own(settings: Settings, stage: int, active: float) -> Items:
    """The agreement over all ranks; weights of an active micro-batch's tokens; reported losses."""
    words = -(-settings.grad_accum // FLAGS) + 4
    table = WORD * words * settings.data_parallel
    agreed = {"agreement": ("all", 2 * _share(table, settings.world_size))}
    if stage < settings.pipeline_parallel - 1:
        return agreed | {"weights of tokens": ("head", 0.0), "losses": ("context", 0.0)}
    row = settings.micro_batch * settings.seq_length
    is_shared = group_of("head", settings)[0] > 1
    losses = settings.grad_accum * 2 * FLOAT32 * row
    return agreed | {
        "weights of tokens": ("head", active * TOKEN_WEIGHTS * row * is_shared),
        "losses": ("context", _share(losses, settings.context_parallel)),
    }
