"""One check for each kind of case: runs it, and compares all it yields with float64."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from device_truth import in_slices, rows_of_logits
from gate_inputs import (
    Case,
    Inputs,
    LinearCase,
    LogitsCase,
    ShardCase,
    linear_tensors,
    logits_pair,
    of_rows,
    producing,
    row_inputs,
    vars_of,
)
from gate_measures import (
    GRADIENT,
    LAST_COLUMNS,
    VALUE,
    Measure,
    compared,
    compared_by_kind,
    compared_logits_grad,
    tolerance,
    zeros,
)
from torch import Tensor

from safereg_kernels import linear_ce_kl, masked_kl
from safereg_kernels.block import (
    DIVERGENCE,
    ENTROPY,
    LABEL_ELSEWHERE,
    LABEL_LOGIT,
    MAX_P,
    MIXTURE,
    SUM_P,
    Block,
)
from safereg_kernels.path import path_for
from safereg_kernels.spec import LossSpec


def check(case: Case, device: torch.device) -> list[Measure]:
    """All comparisons of one case."""
    if isinstance(case, LogitsCase):
        return check_logits(case, device)
    if isinstance(case, LinearCase):
        return check_linear(case, device)
    assert isinstance(case, ShardCase)
    return check_shards(case, device)


# ---- masked_kl -----------------------------------------------------------------------------------


def check_logits(case: LogitsCase, device: torch.device) -> list[Measure]:
    """`masked_kl`, forward and backward."""
    generator = torch.Generator(device).manual_seed(case.seed)
    upstream = 4096.0 if case.dtype == torch.float16 else 3.0
    with producing(case, device):
        inputs = row_inputs(case, generator)
        policy, reference = logits_pair(case, inputs, generator)
        weights = inputs.kl_weights
        options = vars_of(case.formula, without=("z_loss",))
        policy.requires_grad_()
        loss, divergence = masked_kl(policy, reference, weights, **options)
        (loss * upstream).backward()
        got = policy.grad
    assert got is not None
    at = rows_checked(case, device)
    inputs = of_rows(inputs, at)
    policy, reference, got = policy.detach()[at], reference[at], got[at]
    scaled = inputs.kl_weights * upstream
    grads, truths = [], []
    for rows in in_slices(len(policy)):
        truth = rows_of_logits(
            policy[rows], reference[rows], None, None, scaled[rows], case.formula
        )
        grads.append(truth.grad)
        truths.append(truth.divergence)
    want_divergence, want = torch.cat(truths), torch.cat(grads)
    value = tolerance(case, device, VALUE, torch.float32)
    relative = tolerance(case, device, GRADIENT, case.dtype)
    floor = 2.0**-25 if case.dtype == torch.float16 else 0.0
    columns = case.tokens
    label_free = replace(inputs, labels=torch.full_like(inputs.labels, -100))
    measures = [
        *compared_by_kind("divergence", divergence[at], want_divergence, inputs.kind, value),
        *compared_logits_grad(got, want, label_free, relative, floor, columns),
    ]
    if case.rows_checked is None:
        total = (inputs.kl_weights.double() * want_divergence).sum()
        measures.append(compared("loss", loss.detach(), total, value))
    return measures


def rows_checked(case: LogitsCase, device: torch.device) -> Tensor:
    """Row numbers in the beginning, the middle and the end."""
    every = torch.arange(case.rows, device=device)
    if case.rows_checked is None:
        return every
    n, middle = case.rows_checked, case.rows // 2
    return torch.cat([every[:n], every[middle : middle + n], every[-n:]])


# ---- linear_ce_kl --------------------------------------------------------------------------------


def check_linear(case: LinearCase, device: torch.device) -> list[Measure]:
    """`linear_ce_kl`, forward and backward, with gradients in hidden states, head and bias."""
    generator = torch.Generator(device).manual_seed(case.seed)
    with producing(case, device):
        inputs = row_inputs(case, generator)
        tensors = linear_tensors(case, inputs, generator)
        upstream = torch.tensor(3.0, device=device)
        if case.reduction == "none":
            upstream = torch.randn(case.rows, device=device, generator=generator)
        weights = inputs.ce_weights, inputs.kl_weights
        if case.weights_on_host:
            weights = weights[0].cpu(), weights[1].cpu()
        loss, ce, divergence, metrics = linear_ce_kl(
            **tensors,
            labels=inputs.labels,
            ce_weights=weights[0],
            kl_weights=weights[1],
            **vars_of(case.formula),
            logits_dtype=case.logits_dtype,
            is_difference=case.is_difference,
            reduction=case.reduction,
            chunk_tokens=case.chunk_tokens,
            return_lse=True,
            return_entropy=True,
        )
        (loss * upstream).sum().backward()
    want = linear_truth(case, inputs, tensors, upstream)
    rounded = case.logits_dtype if case.logits_dtype != torch.float32 else case.dtype
    value = tolerance(case, device, VALUE, torch.float32)
    relative = tolerance(case, device, GRADIENT, rounded)
    if case.logits_dtype != torch.float32:
        value, relative = value + relative, 2 * relative
    measures = []
    for what, got in (
        ("ce", ce),
        ("divergence", divergence),
        ("lse", metrics.lse),
        ("entropy", metrics.entropy),
    ):
        measures += compared_by_kind(what, got, want[what], inputs.kind, value)
    total = want["loss"] if case.reduction == "none" else want["loss"].sum()
    measures.append(compared("loss", loss.detach(), total, value))
    got = grad_of(tensors["policy_hidden"])
    measures += compared_by_kind("gradient", got, want["hidden"], inputs.kind, relative)
    if case.is_head_trained:
        measures += head_measures(case, inputs, tensors, want, relative)
    return measures


def linear_truth(
    case: LinearCase, inputs: Inputs, tensors: dict[str, Any], upstream: Tensor
) -> dict[str, Tensor]:
    """Values of every row, and the gradients of hidden states, head and bias, in float64."""
    head = tensors["policy_head"].detach().double()
    hidden = torch.where(inputs.kind[:, None] != 3, tensors["policy_hidden"].detach(), 0.0)
    factor = upstream.expand(case.rows)
    found: dict[str, list[Tensor]] = {}
    of_head, of_bias = torch.zeros_like(head), head.new_zeros(case.vocab)
    for rows in in_slices(case.rows):
        policy, reference = raw_logits(case, inputs, tensors, hidden, rows)
        weighted = [w[rows] * factor[rows] for w in (inputs.ce_weights, inputs.kl_weights)]
        truth = rows_of_logits(policy, reference, inputs.labels[rows], *weighted, case.formula)
        of_head += truth.grad.T @ hidden[rows].double()
        of_bias += truth.grad.sum(0)
        parts = {"hidden": truth.grad @ head, "ce": truth.ce, "divergence": truth.divergence}
        parts |= {"lse": truth.lse, "entropy": truth.entropy}
        parts["loss"] = torch.where(factor[rows] != 0, truth.loss / factor[rows], 0.0)
        for name, value in parts.items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in found.items()} | {
        "head": of_head,
        "bias": of_bias,
    }


def raw_logits(
    case: LinearCase, inputs: Inputs, tensors: dict[str, Any], hidden: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Raw logits of both models in float64, rounded where the call keeps them rounded."""

    def product(states: Tensor, head: Tensor) -> Tensor:
        return (states.double() @ head.detach().double().T).to(case.logits_dtype).double()

    bias = tensors.get("policy_bias", torch.zeros((), device=hidden.device)).detach().double()
    policy = product(hidden[rows], tensors["policy_head"]) + bias
    if case.topk is not None:
        ids, logits = (part[rows] for part in tensors["reference_topk"])
        reference = torch.full_like(policy, -torch.inf).scatter(1, ids, logits.double())
        return policy, reference
    has_kl = inputs.kl_weights[rows, None] != 0
    states = torch.where(has_kl, tensors["reference_hidden"][rows], 0.0)
    reference = product(states, tensors["reference_head"])
    if case.is_difference:
        apart = product(hidden[rows] - states, tensors["policy_head"])
        policy = torch.where(has_kl, reference + apart, policy)
    return policy, reference


def head_measures(
    case: LinearCase,
    inputs: Inputs,
    tensors: dict[str, Any],
    want: dict[str, Tensor],
    relative: float,
) -> Iterator[Measure]:
    """The head's gradient in the rows of labels, of peaks, of the last tokens and of the rest."""
    columns = case.tokens
    got, truth = grad_of(tensors["policy_head"]), want["head"]
    floor = fp16_floor(case, tensors)
    group = torch.zeros(columns, dtype=torch.int64, device=got.device)
    group[columns - max(1, int(columns * LAST_COLUMNS)) :] = 1
    group[inputs.peaks[inputs.kind != 3].flatten()] = 2
    group[inputs.labels[inputs.kind <= 1]] = 3
    for number, name in enumerate(("rest", "last tokens", "peaks", "labels")):
        at = (group == number).nonzero()[:, 0]
        pair = got[at], truth[at]
        yield compared(f"gradient of the head, {name}", *pair, relative, floor)
        if case.has_bias:
            pair = grad_of(tensors["policy_bias"])[at], want["bias"][at]
            yield compared(f"gradient of the bias, {name}", *pair, relative, floor)
    yield zeros("gradient of the head's padding", got[columns:])


def fp16_floor(case: LinearCase, tensors: dict[str, Any]) -> float:
    """What half a smallest step in each element of the gradient amounts to after the product."""
    if case.dtype != torch.float16:
        return 0.0
    per_row = torch.nan_to_num(tensors["policy_hidden"].detach().float()).norm() / math.sqrt(
        case.hidden
    )
    return 3.0 * 2.0 * 2.0**-25 * per_row.item()  # times the upstream 3 and a scale of up to 2


def grad_of(tensor: Tensor) -> Tensor:
    """The gradient, which must be there."""
    assert tensor.grad is not None
    return tensor.grad


# ---- shards --------------------------------------------------------------------------------------


def check_shards(case: ShardCase, device: torch.device) -> list[Measure]:
    """The path's own functions on parts of the columns, merged as ranks would."""
    generator = torch.Generator(device).manual_seed(case.seed)
    inputs = row_inputs(case, generator)
    policy, reference = logits_pair(case, inputs, generator)
    want = shard_truth(case, inputs, policy, reference)
    path = path_for(device)
    options = vars_of(case.formula, without=("vocab_size",))
    spec = LossSpec(**options, has_entropy=True)
    blocks = list(shard_blocks(case, inputs, policy, reference))
    partials = torch.stack([path.row_statistics(block, spec) for block in blocks], dim=1)
    statistics = path.merge_statistics(partials, spec)
    if case.formula.direction == "jsd":
        shares = []
        for block in blocks:
            own = statistics.clone()
            path.add_mixture(block, spec, own)
            shares.append(own[:, [DIVERGENCE, MIXTURE]])
        statistics[:, [DIVERGENCE, MIXTURE]] = torch.stack(shares).sum(0)
    grad = policy if case.in_place else torch.full_like(policy, torch.nan)
    for block, columns in zip(blocks, shard_columns(case), strict=True):
        path.write_gradient(grad[:, columns], block, spec, statistics)
    value = tolerance(case, device, VALUE, torch.float32)
    relative = tolerance(case, device, GRADIENT, case.dtype)
    floor = 2.0**-25 if case.dtype == torch.float16 else 0.0
    measures = list(compared_logits_grad(grad, want["grad"], inputs, relative, floor, case.tokens))
    for what, got in values_of(statistics, case, inputs).items():
        measures += compared_by_kind(what, got, want[what], inputs.kind, value)
    return measures


def values_of(statistics: Tensor, case: ShardCase, inputs: Inputs) -> dict[str, Tensor]:
    """What the statistics of whole rows say, 0 where a row has no weight."""
    divergence = statistics[:, DIVERGENCE]
    if case.formula.direction == "l2":
        divergence = divergence / case.tokens
    lse = statistics[:, MAX_P] + statistics[:, SUM_P].log()
    is_there, has_ce = inputs.kind != 3, inputs.kind <= 1
    return {
        "divergence": torch.where(inputs.kl_weights != 0, divergence, 0.0),
        "ce": torch.where(has_ce, lse - statistics[:, LABEL_LOGIT], 0.0),
        "entropy": torch.where(is_there, statistics[:, ENTROPY], 0.0),
        "lse": torch.where(is_there, lse, 0.0),
    }


def shard_columns(case: ShardCase) -> Iterator[slice]:
    """Which columns each part holds."""
    begin = 0
    for number, share in enumerate(case.parts, start=1):
        is_last = number == len(case.parts)
        end = case.vocab if is_last else begin + int(share * case.vocab)
        yield slice(begin, end)
        begin = end


def shard_blocks(
    case: ShardCase, inputs: Inputs, policy: Tensor, reference: Tensor
) -> Iterator[Block]:
    """Each part as the path takes it."""
    tokens = case.tokens
    for columns in shard_columns(case):
        is_here = (inputs.labels >= columns.start) & (inputs.labels < columns.stop)
        yield Block(
            policy=policy[:, columns],
            reference=reference[:, columns],
            labels=torch.where(is_here, inputs.labels - columns.start, LABEL_ELSEWHERE),
            ce_weights=inputs.ce_weights,
            kl_weights=inputs.kl_weights,
            num_columns=max(0, min(columns.stop, tokens) - columns.start),
        )


def shard_truth(
    case: ShardCase, inputs: Inputs, policy: Tensor, reference: Tensor
) -> dict[str, Tensor]:
    """Values and raw gradient of whole rows."""
    found = [
        rows_of_logits(
            policy[rows],
            reference[rows],
            inputs.labels[rows],
            inputs.ce_weights[rows],
            inputs.kl_weights[rows],
            case.formula,
        )
        for rows in in_slices(case.rows)
    ]
    return {
        name: torch.cat([getattr(part, name) for part in found])
        for name in ("divergence", "ce", "entropy", "lse", "grad")
    }
