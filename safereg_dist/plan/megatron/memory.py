"""Peak memory of the ranks of one stage in a Megatron layout, by part, in bytes.

Weights in the run's dtype, gradients in float32; the optimizer's float32 master weights and two
moments (of float32 weights no master), spread over the data- and context-parallel ranks where it is
distributed. Activations: Korthikanti et al. 2022 (arXiv:2205.05198), with other widths, and without
dropout and scores, which fused attention does not keep.
"""

from collections.abc import Callable

from safereg_dist.plan.megatron.stages import (
    layers_at,
    padded_vocab,
    parameters,
    pipeline_of,
    places_of,
    sequence_ranks,
)
from safereg_dist.plan.memory import fused_head_bytes, mlp_matrices
from safereg_dist.plan.risky_rows import active_share, fullest_law
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape
from safereg_kernels.vocab_parallel import CHUNK_TOKENS

FLOAT32 = 4


def stage_memory(shape: ModelShape, settings: Settings, stage: int) -> dict[str, float]:
    """Bytes of a rank of the stage, by part."""
    held = sum(parameters(shape, settings, stage).values())
    sharers = settings.data_parallel * settings.context_parallel
    states = 2 * FLOAT32 + (FLOAT32 if settings.itemsize < FLOAT32 else 0)
    is_last = stage == settings.pipeline_parallel - 1
    has_reference = settings.arm != "sft"
    return {
        "weights": settings.itemsize * held,
        "gradients": FLOAT32 * held,
        "optimizer": states * held / (sharers if settings.distributed_optimizer else 1),
        "reference weights": settings.itemsize * held * has_reference,
        "activations": _activations(shape, settings, stage),
        "head": _head(shape, settings) if is_last else 0.0,
        "reference pass": _reference_pass(shape, settings),
        "kept reference states": kept_states(shape, settings) if is_last else 0.0,
    }


def fullest_stage(shape: ModelShape, settings: Settings) -> tuple[int, float]:
    """(stage, bytes) of the stage with the highest peak."""
    peaks = [
        sum(stage_memory(shape, settings, stage).values())
        for stage in range(settings.pipeline_parallel)
    ]
    return peaks.index(max(peaks)), max(peaks)


def layer_bytes(shape: ModelShape, settings: Settings) -> float:
    """Bytes of activations that one layer keeps of one token for its backward.

    e (4 H / r + (2 A + 2 K + n I) / t), of e bytes an element: what the two norms and the two
    products after them read, spread over the r = t ranks of sequence parallelism, else r = 1; then
    queries, attention's result, keys, values, and what the MLP keeps, n = 3 of gated ones and 2 of
    others. Attention that needs its scores keeps e S heads / t more (a row of S tokens).

    With A = K = H, I = 4 H, n = 2, e = 2 it is the paper's s b h (34 - 2) / t a layer; the 2 are
    dropout masks.
    """
    gated = 3 if mlp_matrices(shape) == 3 else 2
    inside = 2 * (shape.attention_width + shape.key_value_width) + gated * shape.mlp_width
    if shape.keeps_scores:
        inside += settings.seq_length * shape.num_heads
    between = 4 * shape.hidden_size / sequence_ranks(settings)
    return settings.itemsize * (between + inside / settings.tensor_parallel)


def micro_batch_tokens(settings: Settings) -> float:
    """Tokens of a micro-batch on one context-parallel rank."""
    return settings.micro_batch * settings.seq_length / settings.context_parallel


def state_bytes(shape: ModelShape, settings: Settings) -> float:
    """Bytes of a micro-batch's hidden states on one rank."""
    row = settings.itemsize * shape.hidden_size / sequence_ranks(settings)
    return micro_batch_tokens(settings) * row


def kept_states(shape: ModelShape, settings: Settings) -> float:
    """The reference's states of the fullest replica's active micro-batches, up to `keep_bytes`.

    Twice as many where a step runs the next one's reference while it still reads its own.
    """
    if settings.arm != "routed":
        return state_bytes(shape, settings) if settings.arm == "always_on" else 0.0
    most = mean_of(active_law(settings, replicas=settings.data_parallel), float)
    needed = most * state_bytes(shape, settings)
    return min(settings.keep_bytes, needed) * (2 if settings.reference_in_bubble else 1)


def active_law(settings: Settings, *, replicas: int) -> list[float]:
    """Probabilities that the fullest of so many replicas has 0, 1, ... active micro-batches."""
    if settings.arm != "routed":
        count = settings.grad_accum if settings.arm == "always_on" else 0
        return [float(n == count) for n in range(settings.grad_accum + 1)]
    return fullest_law(settings.grad_accum, active_share(settings), replicas).tolist()


def mean_of(law: list[float], value: Callable[[int], float]) -> float:
    """Expectation of a number that a count of micro-batches decides."""
    return sum(share * value(count) for count, share in enumerate(law) if share)


def _activations(shape: ModelShape, settings: Settings, stage: int) -> float:
    """What the stage's micro-batches in flight keep, each of one chunk of layers.

    With full recompute the layers' inputs, and one layer's activations while it is run again.
    """
    tokens, layer = micro_batch_tokens(settings), layer_bytes(shape, settings)
    chunk = max(layers_at(shape, settings, place) for place in places_of(settings, stage))
    held = pipeline_of(settings).in_flight(stage) * chunk
    if settings.activation_checkpointing:
        return held * state_bytes(shape, settings) + tokens * layer
    return held * tokens * layer


def _head(shape: ModelShape, settings: Settings) -> float:
    """The last stage's final norm and loss of one micro-batch.

    Plain: logits of all tokens and their float32 copy, which becomes the gradient. Fused: see
    `fused_head_bytes`, and both models' whole sequence, once as gathered and once as selected.
    Always on: both models' logits and log-probabilities in float32.
    """
    tokens, size = micro_batch_tokens(settings), settings.itemsize
    columns = padded_vocab(shape, settings) // settings.tensor_parallel
    states = 2 * state_bytes(shape, settings)
    plain = tokens * columns * (size + FLOAT32)
    if settings.arm == "always_on":
        return states + 4.0 * FLOAT32 * tokens * columns
    if settings.arm == "sft" or settings.risky_fraction == 0:
        return states + plain
    trained = round(settings.response_share * tokens)
    chunk = settings.chunk_tokens or CHUNK_TOKENS
    fused = fused_head_bytes(columns, shape.hidden_size, trained, settings, chunk_tokens=chunk)
    fused += 2 * size * shape.hidden_size * (tokens + trained)
    return states + max(plain, fused)


def _reference_pass(shape: ModelShape, settings: Settings) -> float:
    """One layer's activations of the reference, where it runs beside the policy's."""
    beside = settings.arm == "always_on" or settings.reference_in_bubble
    if not beside or settings.arm == "sft":
        return 0.0
    return micro_batch_tokens(settings) * layer_bytes(shape, settings)
