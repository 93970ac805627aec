"""FLOPs of an optimizer step over all ranks, by item: matrix products, 2 per multiply-add.

Attention counts its scores over the whole square of a row, as torch's counter does; a kernel that
skips the masked half does less. Every row has `seq_length` tokens.
"""

from safereg_dist.plan.adapters import adapter_numels
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape


def flops(shape: ModelShape, settings: Settings) -> dict[str, float]:
    """FLOPs by item.

    trunk = rows (2 M s + 4 s^2 A L);  backward twice that;  a head's product 2 t H V, and for a
    trained head two more: of its gradient in the states and in the weight. With adapters of P
    elements the policy's forward has 2 P s more, its backward twice that; of a frozen weight, that
    of the head too, no gradient is worked out.

    M multiplied elements of all layers, s tokens, A width of the queries, L layers, t trained
    tokens (`always_on`: all tokens, of both models), H hidden size, V vocabulary.
    """
    rows = settings.data_parallel * settings.window_rows
    is_always = settings.arm == "always_on"
    risky = {"sft": 0.0, "always_on": 1.0}.get(settings.arm, settings.risky_fraction) * rows
    row = trunk_flops(shape, settings.seq_length)
    head = head_flops(shape, settings.seq_length if is_always else settings.response_tokens)
    adapters = 2 * sum(adapter_numels(shape, settings)) * settings.seq_length
    frozen = 2 * shape.layer_products * settings.seq_length if settings.lora_rank else 0.0
    prompt = settings.seq_length - settings.response_tokens
    probes = settings.arm == "routed"
    return {
        "policy forward": rows * (row + adapters),
        "policy backward": rows * (2 * (row + adapters) - frozen),
        "recomputation": rows * _recomputed(shape, settings),
        "head, cross-entropy": (2 if settings.lora_rank else 3) * rows * head,
        "reference trunk": 0.0 if settings.arm == "stored" else risky * row,
        "head, divergence": risky * head,
        "probe, first epoch": probes * rows * settings.probe_depth * trunk_flops(shape, prompt),
    }


def trunk_flops(shape: ModelShape, tokens: float) -> float:
    """FLOPs of one forward of all layers over a row."""
    scores = 4 * tokens**2 * shape.attention_width * shape.num_layers
    return 2 * shape.layer_products * tokens + scores


def head_flops(shape: ModelShape, tokens: float) -> float:
    """FLOPs of one product of hidden states with the head."""
    return 2 * tokens * shape.head_parameters


def _recomputed(shape: ModelShape, settings: Settings) -> float:
    """FLOPs of recomputing a row's layers, without the unneeded last product of each layer."""
    if not settings.activation_checkpointing:
        return 0.0
    last = {m.layer: m.products for m in shape.modules if m.layer is not None and m.products}
    skipped = 2 * settings.seq_length * (0 if shape.num_chosen > 1 else sum(last.values()))
    return trunk_flops(shape, settings.seq_length) - skipped
