"""Peak memory of one GPU in a step, by item.

With adapters, gradients and the optimizer's states are theirs alone, and the reference has no
weights of its own.

For ZeRO-3 in deepspeed 0.19: shards and accumulated gradients in the model's dtype, float32 master
weights (a separate copy even of float32 shards), two Adam moments, and in the update the float32
gradients of one sub-group.
"""

from dataclasses import dataclass

from safereg_dist.parallel.zero_config import prefetched_elements
from safereg_dist.plan.adapters import adapter_numels, padded_shard, trained_numels
from safereg_dist.plan.gathers import padded, policy_gathers, staying, threshold
from safereg_dist.plan.risky_rows import expected_rows
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape
from safereg_dist.plan.traffic import group_batches
from safereg_kernels import budget

SUB_GROUP = 1_000_000_000
"""DeepSpeed's `sub_group_size`, in parameters."""


CHECKPOINT_BYTES = 16
"""A trained parameter in a checkpoint: master weight, two moments, and room for the layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank, by item."""

    resting: dict[str, float]
    """On the GPU all the time."""
    working: dict[str, float]
    """On the GPU while a micro-batch runs."""
    updating: float
    """On the GPU in the update instead."""
    host: float
    """In host memory, for offloading."""

    @property
    def gpu(self) -> float:
        """Peak memory of the GPU."""
        return sum(self.resting.values()) + max(sum(self.working.values()), self.updating)


def memory(shape: ModelShape, settings: Settings) -> Memory:
    """Memory of the rank that keeps the most reference states."""
    resting, host = _states(shape, settings)
    shard = trained_shard(shape, settings)
    return Memory(
        resting={name: size for name, size in resting.items() if size},
        working={name: size for name, size in _working(shape, settings).items() if size},
        updating=0.0 if settings.offload_optimizer == "cpu" else 4.0 * min(shard, SUB_GROUP),
        host=host,
    )


def shard_elements(shape: ModelShape, settings: Settings) -> float:
    """Elements of one rank's shard of a model without adapters."""
    numels = tuple(n for module in shape.modules for n in module.numels)
    return padded_shard(numels, settings)


def trained_shard(shape: ModelShape, settings: Settings) -> float:
    """Elements of one rank's shard of what is trained."""
    return padded_shard(trained_numels(shape, settings), settings)


def _states(shape: ModelShape, settings: Settings) -> tuple[dict[str, float], float]:
    """Permanent memory on the GPU and on the host, by item."""
    shard, size = trained_shard(shape, settings), settings.itemsize
    adapters = adapter_numels(shape, settings)
    weights = shard_elements(shape, settings) + padded_shard(adapters, settings)
    whole = staying(shape.modules, shape) * (1 if _has_one_copy(settings) else 2)
    whole += sum(n for n in adapters if n <= threshold(shape))
    parts = {
        "policy shards": (weights * size, settings.offload_params),
        "master weights": (4 * shard, settings.offload_optimizer),
        "Adam moments": (8 * shard, settings.offload_optimizer),
        "gradients": (shard * size, settings.offload_optimizer),
        # With the optimizer's state, a gradient of each sub-group stays with it.
        "gradients to update with": (
            4 * shard if settings.offload_optimizer == "cpu" else 0.0,
            settings.offload_optimizer,
        ),
        "policy's second shards (hpZ)": (
            weights * settings.data_parallel / settings.hpz * size if settings.hpz > 1 else 0.0,
            "none",
        ),
        "reference shards": (_reference_shard(shape, settings) * size, settings.offload_reference),
        "small parameters, whole": (whole * size, "none"),
    }
    return (
        {name: size for name, (size, place) in parts.items() if place == "none"},
        sum(size for size, place in parts.values() if place == "cpu"),
    )


def _has_one_copy(settings: Settings) -> bool:
    return settings.arm == "sft" or settings.has_adapters_off


def _reference_shard(shape: ModelShape, settings: Settings) -> float:
    if _has_one_copy(settings):
        return 0.0
    if settings.arm == "stored":
        return shape.head_parameters / settings.world_size
    return shard_elements(shape, settings)


def _working(shape: ModelShape, settings: Settings) -> dict[str, float]:
    size = settings.itemsize
    tokens = settings.micro_batch * settings.seq_length
    largest = max(sum(module.numels) for module in shape.modules)
    if settings.lora_rank:
        largest = max(adapter_numels(shape, settings))
    prefetched = prefetched_elements(shape.hidden_size)
    whole = policy_gathers(shape, settings).peak + prefetched
    return {
        "gathered parameters": whole * size,
        "gradients before reduction": (largest + shape.hidden_size**2) * size,
        "activations": activation_bytes(shape, settings),
        "head": _head(shape, settings, tokens),
        "reference pass": _reference_pass(shape, settings),
        "kept reference states": _kept_states(shape, settings),
    }


def activation_bytes(shape: ModelShape, settings: Settings) -> float:
    """Activations that a micro-batch keeps for its backward pass.

    Per token and layer, of e bytes an element: a norm 4 H + 2 e H (it computes in float32); queries
    and attention's result 2 e A, keys and values 2 e K; an MLP 4 e I if gated, else 2 e I; experts
    also their inputs and outputs. Tested against what autograd saves.
    """
    tokens = settings.micro_batch * settings.seq_length
    layer = _layer_bytes(shape, settings)
    count = shape.num_layers
    ends = (4 + 3 * settings.itemsize) * shape.hidden_size
    if settings.activation_checkpointing:
        return tokens * (count * settings.itemsize * shape.hidden_size + layer + ends)
    return tokens * (count * layer + ends)


def _layer_bytes(shape: ModelShape, settings: Settings) -> float:
    e, h = settings.itemsize, shape.hidden_size
    modules = [module for module in shape.modules if module.layer == 0]
    root_norms = sum(1 for m in modules if m.numels == (h,))
    layer_norms = sum(1 for m in modules if m.numels == (h, h))
    head_norms = any(len(m.numels) == 1 and m.products == 0 and m.numel < h for m in modules)
    attention = 2 * e * (shape.attention_width + shape.key_value_width)
    if head_norms:
        attention += (4 + e) * (shape.attention_width + shape.key_value_width)
    if shape.keeps_scores:
        attention += 8 * shape.num_heads * settings.seq_length
    experts = 2 * e * h * shape.num_chosen if shape.num_chosen > 1 else 0
    mlp = 2 * (mlp_matrices(shape) - 1) * e * shape.mlp_width
    return root_norms * (4 + 2 * e) * h + layer_norms * 1.5 * e * h + attention + mlp + experts


def mlp_matrices(shape: ModelShape) -> int:
    """3 with a gate, else 2; derived from the elements that do not belong to attention."""
    layer = shape.layer_products / shape.num_layers
    attention = 2 * shape.hidden_size * (shape.attention_width + shape.key_value_width)
    return min(3, max(2, round((layer - attention) / (shape.hidden_size * shape.mlp_width))))


def _head(shape: ModelShape, settings: Settings, tokens: int) -> float:
    """Float32 logits and their gradient as the head takes them at a time, and that of its weight.

    `always_on`: the logits and log-probabilities of all tokens and both models, in float32.
    """
    columns, size = shape.vocab_size, settings.itemsize
    if settings.arm == "always_on":
        heads = 0 if settings.lora_rank else 2
        return tokens * columns * 16.0 + heads * shape.head_parameters * size
    trained = round(settings.response_share * tokens)
    head = 0.0 if _has_one_copy(settings) else shape.head_parameters * size
    return head + fused_head_bytes(
        columns, shape.hidden_size, trained, settings, chunk_tokens=settings.chunk_tokens
    )


def fused_head_bytes(
    columns: int, hidden_size: int, trained: int, settings: Settings, *, chunk_tokens: int | None
) -> float:
    """Bytes that the fused head works in: logits of some tokens, and all gradients.

    Float32 logits (of both models with a reference), their gradient in the model's dtype, dW, and
    the float32 gradient of the states [trained, H].
    """
    size, stride = settings.itemsize, budget.padded(columns)
    is_trained = not settings.lora_rank
    elements = columns * hidden_size if is_trained else 0
    logits_bytes = stride * (4 if settings.arm == "sft" else 8)
    rows = budget.chunk_sizes(
        trained,
        logits_bytes=logits_bytes,
        grad_bytes=stride * size,
        is_collected=is_trained,
        head_bytes=settings.head_bytes_held,
        chunk_tokens=chunk_tokens,
    )
    logits, gradient = rows.logits_rows * logits_bytes, rows.grad_rows * stride * size
    if trained <= rows.grad_rows:  # one pass: dW takes the logits' place, in its own dtype
        working = gradient + max(logits, size * elements)
    else:
        working = gradient + logits + 4.0 * elements * (1 + size / 4)
    return working + 4.0 * trained * hidden_size


def _reference_pass(shape: ModelShape, settings: Settings) -> float:
    """Peak while the reference runs: two gathered modules, one layer's activations, no gradient."""
    if settings.arm in ("sft", "stored"):
        return 0.0
    rows = settings.rows_per_pass or settings.micro_batch
    largest = max(padded(m.numels, shape, settings.data_parallel) for m in shape.trunk)
    states = 4 * shape.hidden_size + 3 * shape.mlp_width
    return settings.itemsize * (largest + rows * settings.seq_length * states)


def _kept_states(shape: ModelShape, settings: Settings) -> float:
    """Reference states of a group's risky rows, expected on the fullest rank."""
    if settings.arm == "sft":
        return 0.0
    rows = float(settings.micro_batch)
    if settings.arm == "routed":
        group = group_batches(shape, settings) * settings.micro_batch
        rows = min(expected_rows(settings).most_rows, group)
    return rows * settings.response_tokens * shape.hidden_size * settings.itemsize
