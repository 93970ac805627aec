"""`LossSpec`: which loss, of which function of the raw logits. One object from door to kernel."""

from dataclasses import dataclass

DIRECTIONS = ("forward", "reverse", "l2", "jsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """The formula of one call.

    raw   what the head gives, hidden @ head.T + bias
    x, y  policy's and reference's logits: scale * raw, then cap * tanh(. / cap) where there is one
    p, q  softmax(x / T), softmax(y / T) in the divergence D; the cross-entropy stays at T = 1

        loss of a row = ce_weight (CE + z_loss * lse^2) + kl_weight D,   lse = log sum exp x
    """

    direction: str = "forward"
    """D: `forward` KL(q||p), `reverse` KL(p||q), `l2` mean square of centred (x - y) / T, `jsd`
    beta KL(q||m) + (1 - beta) KL(p||m) with m = beta q + (1 - beta) p."""
    beta: float = 0.5
    """Share of the reference in the mixture of `jsd`, in (0, 1)."""
    temperature: float = 1.0
    """T > 0; no factor T^2."""
    z_loss: float = 0.0
    """Factor >= 0 of lse^2, in the cross-entropy's share of the loss."""
    policy_softcap: float | None = None
    """Cap of the policy's logits, > 0, or None."""
    reference_softcap: float | None = None
    """The same of the reference."""
    policy_logit_scale: float = 1.0
    """Factor of the policy's raw logits (Cohere; one over Granite's `logits_scaling`), > 0."""
    reference_logit_scale: float = 1.0
    """The same of the reference."""
    is_difference: bool = False
    """True where the policy's raw logits of rows with a divergence are given as their difference
    from the reference's."""
    has_entropy: bool = False
    """True where the entropy of softmax(x) is wanted."""
