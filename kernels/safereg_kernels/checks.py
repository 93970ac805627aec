"""Refuses bad input before anything is computed: expected, got, where, remedy.

On CUDA only shapes, dtypes and devices are looked at, which costs no synchronisation. Values
(weights, labels) are looked at on the CPU, and on CUDA with SAFEREG_KERNELS_CHECK=1.
"""

import os

import torch
from torch import Tensor

from safereg_kernels.errors import ShapeError
from safereg_kernels.products import is_same_tensor
from safereg_kernels.spec import DIRECTIONS, LossSpec


def check_spec(spec: LossSpec) -> None:
    """ValueError unless every number of the formula is one that it is defined for."""
    if spec.direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {spec.direction!r}")
    check_positive(
        temperature=spec.temperature,
        policy_softcap=spec.policy_softcap,
        reference_softcap=spec.reference_softcap,
        policy_logit_scale=spec.policy_logit_scale,
        reference_logit_scale=spec.reference_logit_scale,
    )
    if spec.direction == "jsd" and not 0 < spec.beta < 1:
        raise ValueError(
            f"beta must lie in (0, 1), got {spec.beta}: its ends are direction='forward' and "
            "'reverse'"
        )
    if not 0 <= spec.z_loss < float("inf"):
        raise ValueError(f"z_loss must be finite and >= 0, got {spec.z_loss}: 0 leaves it off")


def check_positive(**numbers: float | None) -> None:
    """ValueError unless every number is positive and finite, or None."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_reduction(reduction: str) -> None:
    """ValueError unless the reduction is known."""
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction must be 'sum', 'mean' or 'none', got {reduction!r}")


def check_shift(labels: Tensor, shift: bool) -> None:
    """ShapeError unless labels that are to be shifted have a sequence to be shifted in."""
    if shift and labels.ndim != 2:
        raise ShapeError(
            f"shift=True needs labels [B, S], got {tuple(labels.shape)}: in flat input the end of "
            "one sequence is the begin of the next; shift the labels before flattening"
        )


def check_one_per_label(hidden: Tensor, labels: Tensor, **tensors: Tensor | None) -> None:
    """ShapeError unless there is a label for each hidden state, and an element for each label."""
    if labels.shape != hidden.shape[:-1]:
        raise ShapeError(
            f"labels {tuple(labels.shape)} must be {list(hidden.shape[:-1])}, one per token of "
            f"policy_hidden {tuple(hidden.shape)}"
        )
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != labels.shape:
            raise ShapeError(
                f"{name} {tuple(tensor.shape)} must be {list(labels.shape)} like the labels, one "
                "per token"
            )


def check_topk_ids(ids: Tensor, kl_weights: Tensor, vocab_size: int | None) -> None:
    """ValueError unless every id in use is a token id, where values are looked at."""
    if vocab_size is None or not _looks_at_values(ids):
        return
    is_bad = ((ids < 0) | (ids >= vocab_size)) & (kl_weights.to(ids.device) != 0)[:, None]
    if bool(is_bad.any()):
        row, place = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"reference_topk.ids must lie in [0, {vocab_size}), got {ids[row, place].item()} at "
            f"token {row}"
        )


def check_topk(
    ids: Tensor, logits: Tensor, hidden: Tensor, spec: LossSpec, reference_hidden: Tensor | None
) -> None:
    """ShapeError or ValueError unless a stored teacher fits the policy and the formula."""
    if ids.ndim != 2 or ids.shape != logits.shape or len(ids) != len(hidden):
        raise ShapeError(
            f"reference_topk has ids {tuple(ids.shape)} and logits {tuple(logits.shape)}: both "
            f"must be [{len(hidden)}, k], one row per token"
        )
    if ids.dtype != torch.int64:
        raise ValueError(f"reference_topk.ids must be int64 token ids, got {ids.dtype}")
    _check_same("device", policy_hidden=hidden.device, ids=ids.device, logits=logits.device)
    if spec.direction != "forward":
        raise ValueError(
            f"reference_topk needs direction='forward', got {spec.direction!r}: of the other "
            "tokens nothing is known but that the teacher gives them 0"
        )
    if reference_hidden is not None or spec.is_difference:
        raise ValueError(
            "reference_topk takes the place of reference_hidden, reference_head and "
            "is_difference: pass one of them"
        )


def check_logits(
    policy_logits: Tensor, reference_logits: Tensor, weights: Tensor, reference_lse: Tensor | None
) -> None:
    """ShapeError or ValueError unless the arguments of `masked_kl` fit together."""
    if policy_logits.ndim != 2 or policy_logits.shape != reference_logits.shape:
        raise ShapeError(
            f"policy logits {tuple(policy_logits.shape)} and reference logits "
            f"{tuple(reference_logits.shape)} must both be [tokens, vocab] and equal: both models "
            "must use the same padded vocabulary (narrow the larger one to the smaller)"
        )
    _check_one_per_token("weights", weights, policy_logits.shape[0])
    if reference_lse is not None:
        _check_one_per_token("reference_lse", reference_lse, policy_logits.shape[0])
        _check_same("device", weights=weights.device, reference_lse=reference_lse.device)
    for name, logits in (("policy_logits", policy_logits), ("reference_logits", reference_logits)):
        _check_unit_stride(name, logits)
    _check_same("dtype", policy_logits=policy_logits.dtype, reference_logits=reference_logits.dtype)
    _check_same(
        "device",
        policy_logits=policy_logits.device,
        reference_logits=reference_logits.device,
        weights=weights.device,
    )
    _check_floating("policy_logits", policy_logits)
    check_weights("weights", weights)


def check_policy(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ce_weights: Tensor,
    kl_weights: Tensor,
    ce_report: Tensor | None,
    reference_lse: Tensor | None,
) -> None:
    """ShapeError or ValueError unless hidden states, head, labels and weights fit together."""
    _check_projection("policy", hidden, head, bias)
    _check_one_per_token("labels", labels, hidden.shape[0])
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 token ids, got {labels.dtype}: call .long()")
    _check_same("device", policy_hidden=hidden.device, labels=labels.device)
    weights = {"ce_weights": ce_weights, "kl_weights": kl_weights}
    per_token = weights if ce_report is None else {**weights, "ce_report": ce_report}
    for name, tensor in per_token.items():
        _check_one_per_token(name, tensor, hidden.shape[0])
        if tensor.device not in (hidden.device, torch.device("cpu")):
            raise ValueError(
                f"{name} is on {tensor.device} but policy_hidden on {hidden.device}: put it there, "
                "or on the CPU, where its rows are counted without waiting for the device"
            )
    for name, tensor in weights.items():
        check_weights(name, tensor)
    if reference_lse is not None:
        _check_one_per_token("reference_lse", reference_lse, hidden.shape[0])
        _check_same("device", policy_hidden=hidden.device, reference_lse=reference_lse.device)


def check_reference(
    hidden: Tensor, policy_head: Tensor, ref_hidden: Tensor, ref_head: Tensor, bias: Tensor | None
) -> None:
    """ShapeError or ValueError unless the reference fits the policy."""
    if ref_hidden.shape[:1] != hidden.shape[:1]:
        raise ShapeError(
            f"reference_hidden {tuple(ref_hidden.shape)} must be [{hidden.shape[0]}, H_ref], one "
            "row per policy hidden state (rows of KL weight 0 are never read)"
        )
    _check_projection("reference", ref_hidden, ref_head, bias)
    if ref_head.shape[0] != policy_head.shape[0]:
        raise ShapeError(
            f"reference_head has vocab {ref_head.shape[0]} but policy_head has "
            f"{policy_head.shape[0]}: both models must use the same padded vocabulary (narrow the "
            "larger one to the smaller)"
        )
    _check_same("device", policy_hidden=hidden.device, reference_hidden=ref_hidden.device)


def check_reference_is_there(num_kl: int, *, is_there: bool) -> None:
    """ShapeError where rows have a KL weight and there is nothing to diverge from."""
    if num_kl > 0 and not is_there:
        raise ShapeError(
            f"{num_kl} kl_weights are not 0 but reference_hidden or reference_head is None: pass "
            "both, or reference_topk"
        )


def check_difference(
    policy_head: Tensor, policy_bias: Tensor | None, ref_head: Tensor, ref_bias: Tensor | None
) -> None:
    """ValueError unless both models have one head, as `is_difference` requires."""
    for what, ours, theirs in (
        ("head", policy_head, ref_head),
        ("bias", policy_bias, ref_bias),
    ):
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None or not is_same_tensor(ours, theirs):
            raise ValueError(
                f"is_difference needs one {what} for both models, but policy_{what} and "
                f"reference_{what} are different tensors: pass the same tensor, or leave it off"
            )


def check_vocab_size(vocab_size: int | None, columns: int | None) -> None:
    """ShapeError unless 1 <= vocab_size <= columns (None = no bound known here)."""
    if vocab_size is None:
        return
    if vocab_size < 1 or (columns is not None and vocab_size > columns):
        raise ShapeError(
            f"vocab_size {vocab_size} must lie in [1, {columns or 'total columns'}]: it is the "
            "number of tokens, without the padding of the vocabulary"
        )


def check_logits_dtype(logits_dtype: torch.dtype, head: Tensor) -> None:
    """ValueError unless a chunk's logits can be kept in this dtype."""
    if logits_dtype not in (torch.float32, head.dtype):
        raise ValueError(
            f"logits_dtype must be torch.float32 or the head's own {head.dtype}, got {logits_dtype}"
        )


def check_weights(name: str, weights: Tensor) -> None:
    """ValueError unless the weights are finite and not negative, where values are looked at."""
    if not weights.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {weights.dtype}: call .float()")
    if not _looks_at_values(weights):
        return
    is_bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(is_bad.any()):
        at = int(is_bad.nonzero()[0])
        raise ValueError(
            f"{name} must be finite and >= 0, got {weights[at].item()} at token {at}: a weight "
            "says how much a token counts, 0 skips it"
        )


def check_labels(
    labels: Tensor,
    ce_weights: Tensor,
    ce_report: Tensor | None,
    ignore_index: int,
    vocab_size: int | None,
) -> None:
    """ValueError unless every label in use is a token id, where values are looked at."""
    if vocab_size is None or not _looks_at_values(labels):
        return
    is_used = ce_weights.to(labels.device) != 0
    if ce_report is not None:
        is_used = is_used | ce_report.to(labels.device)
    is_bad = is_used & (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bool(is_bad.any()):
        at = int(is_bad.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {vocab_size}), got {labels[at].item()} at token {at}: give "
            "tokens that have no label a cross-entropy weight of 0, or ignore_index"
        )


def _looks_at_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return not tensor.is_cuda or os.environ.get("SAFEREG_KERNELS_CHECK") == "1"


def _check_projection(model: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ShapeError(
            f"{model}_hidden {tuple(hidden.shape)} and {model}_head {tuple(head.shape)} must be "
            "[tokens, H] and [vocab, H] with one H (an empty head is a sharded one that was not "
            "gathered: call inside the engine's forward)"
        )
    _check_floating(f"{model}_hidden", hidden)
    tensors = {f"{model}_hidden": hidden, f"{model}_head": head}
    if bias is not None:
        if bias.shape != head.shape[:1]:
            raise ShapeError(
                f"{model}_bias {tuple(bias.shape)} must be [{head.shape[0]}], one per token id"
            )
        tensors[f"{model}_bias"] = bias
    _check_same("device", **{name: tensor.device for name, tensor in tensors.items()})
    _check_same("dtype", **{name: tensor.dtype for name, tensor in tensors.items()})


def _check_one_per_token(name: str, tensor: Tensor, tokens: int) -> None:
    if tensor.shape != (tokens,):
        raise ShapeError(f"{name} {tuple(tensor.shape)} must be [{tokens}], one per token")


def _check_unit_stride(name: str, logits: Tensor) -> None:
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        size = logits.numel() * logits.element_size() / 2**20
        raise ShapeError(
            f"{name} has strides {logits.stride()}, but a row of logits must lie in one piece "
            f"(last stride 1): call .contiguous(), a copy of {size:.0f} MiB"
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}: call .float()")


def _check_same(what: str, **values: object) -> None:
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        raise ValueError(f"expected one {what}, got {listed}: convert them to the same {what}")
