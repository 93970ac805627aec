"""The head as operators that torch knows: one node of a graph, with a shape, a gradient and a cost.

`safereg_kernels::linear_ce_kl` forms gradients together with the loss and returns both, so its
backward multiplies by the upstream scalar. `safereg_kernels::linear_ce_kl_per_token` returns the
loss of each token and recomputes in the backward, for any upstream vector.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from safereg_kernels.call import Call
from safereg_kernels.checks import check_reference_is_there
from safereg_kernels.chunks import Gradients, Head, Inputs, Reference, grad_scale_for, run_chunks
from safereg_kernels.flops import HeadFlops, linear_ce_kl_flops, operator
from safereg_kernels.path import path_for
from safereg_kernels.products import operand_dtype, scaled_to
from safereg_kernels.results import RowResults, row_results
from safereg_kernels.selection import Selection, select_rows
from safereg_kernels.shard import local_labels
from safereg_kernels.topk import TopK, topk_rows


class HeadResults(NamedTuple):
    """What one call yields; an empty tensor stands for what was not asked for."""

    loss: Tensor
    """float32: a scalar, or [tokens] per token."""
    ce: Tensor
    """[tokens] float32, and so are the next four; the last three where metrics are wanted."""
    divergence: Tensor
    lse: Tensor
    entropy: Tensor
    accuracy: Tensor
    grad_hidden: Tensor
    """[tokens, H] float32 for an upstream scalar of 1, divided by `grad_scale`."""
    grad_weight: Tensor
    """[vocab, H] float32 or the head's dtype."""
    grad_bias: Tensor
    """[vocab] float32."""
    grad_scale: Tensor
    """float32 scalar where the head is float16, else empty."""


_Tensors = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # a schema knows no named tuple


@torch.library.custom_op("safereg_kernels::linear_ce_kl", mutates_args=())
def _linear_ce_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ce_weights: Tensor,
    kl_weights: Tensor,
    ce_report: Tensor | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    reference_lse: Tensor | None,
    topk_ids: Tensor | None,
    topk_logits: Tensor | None,
    upstream: Tensor | None,
    call: str,
    is_needed: Sequence[bool],
) -> _Tensors:
    """`HeadResults` with a scalar loss; `upstream` [tokens] multiplies every token's weights."""
    inputs, rows, grads = _run(
        hidden, Head(weight, bias), labels, ce_weights, kl_weights, ce_report,
        _reference_of(reference_hidden, reference_weight, reference_bias), reference_lse,
        _topk_of(topk_ids, topk_logits), upstream, Call.decoded(call), is_needed,
    )  # fmt: skip
    return _results(rows, rows.loss.sum(), inputs, grads)


@torch.library.custom_op("safereg_kernels::linear_ce_kl_per_token", mutates_args=())
def _linear_ce_kl_per_token(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ce_weights: Tensor,
    kl_weights: Tensor,
    ce_report: Tensor | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    reference_lse: Tensor | None,
    topk_ids: Tensor | None,
    topk_logits: Tensor | None,
    call: str,
    is_needed: Sequence[bool],
) -> _Tensors:
    """`HeadResults` with a loss [tokens] and without gradients; `is_needed` is for the backward."""
    inputs, rows, grads = _run(
        hidden, Head(weight, bias), labels, ce_weights, kl_weights, ce_report,
        _reference_of(reference_hidden, reference_weight, reference_bias), reference_lse,
        _topk_of(topk_ids, topk_logits), None, Call.decoded(call), [False] * len(is_needed),
    )  # fmt: skip
    return _results(rows, _scattered(rows.loss, inputs.selection), inputs, grads)


def _run(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    ce_weights: Tensor,
    kl_weights: Tensor,
    ce_report: Tensor | None,
    reference: Reference | None,
    reference_lse: Tensor | None,
    topk: TopK | None,
    upstream: Tensor | None,
    call: Call,
    is_needed: Sequence[bool],
) -> tuple[Inputs, RowResults, Gradients]:
    """What both operators do: select rows, run the chunks, and read the rows' results off."""
    # An autocast of the caller would turn float32 products into bfloat16 ones.
    with torch.autocast(hidden.device.type, enabled=False):
        selection = select_rows(ce_weights, kl_weights, ce_report, hidden.device)
        inputs = _inputs(
            hidden, head, labels, selection, reference, reference_lse, topk, upstream, call
        )
        with operator(_flops(inputs, is_needed)):
            statistics, grads = run_chunks(inputs, is_needed)
        if call.shard is not None:
            call.shard.sum_hidden_grad(grads.hidden)
        return inputs, row_results(statistics, inputs.selection, call), grads


def _topk_of(ids: Tensor | None, logits: Tensor | None) -> TopK | None:
    return None if ids is None or logits is None else TopK(ids, logits)


def _reference_of(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Reference | None:
    if hidden is None or weight is None:
        return None
    return Reference(hidden, Head(weight, bias))


def _inputs(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    selection: Selection,
    reference: Reference | None,
    reference_lse: Tensor | None,
    topk: TopK | None,
    upstream: Tensor | None,
    call: Call,
) -> Inputs:
    """What the chunks read, in working order and on the device of the hidden states."""
    # Here, where the rows are counted: counting them apart would wait for the device once more.
    check_reference_is_there(selection.num_kl, is_there=reference is not None or topk is not None)
    order, columns, shard = selection.order, len(head.weight), call.shard
    row_labels = labels[order]
    selection = selection.weighted(row_labels == call.ignore_index, upstream)
    scales = (selection.ce_weights, selection.kl_weights)
    start = 0 if shard is None else shard.start
    return Inputs(
        hidden=hidden,
        head=head,
        selection=selection,
        labels=local_labels(row_labels, columns, call.vocab_size, shard),
        reference=reference,
        reference_lse=None if reference_lse is None else reference_lse.float()[order],
        topk=None if topk is None else topk_rows(topk, order[: selection.num_kl], start, columns),
        grad_scale=grad_scale_for(operand_dtype(head.weight, call.logits_dtype), *scales),
        call=call,
    )


def _results(rows: RowResults, loss: Tensor, inputs: Inputs, grads: Gradients) -> _Tensors:
    def given(tensor: Tensor | None) -> Tensor:
        return loss.new_empty(0) if tensor is None else tensor

    def per_token(values: Tensor | None) -> Tensor:
        return given(None if values is None else _scattered(values, inputs.selection))

    return (
        *(loss, per_token(rows.ce), per_token(rows.divergence)),
        *(per_token(rows.lse), per_token(rows.entropy), per_token(rows.accuracy)),
        *(given(grads.hidden), given(grads.weight), given(grads.bias), given(inputs.grad_scale)),
    )


def _scattered(values: Tensor, selection: Selection) -> Tensor:
    """[tokens] from values in working order; 0 on skipped rows."""
    if selection.is_in_order:
        return values.clone()
    return values.new_zeros(selection.num_tokens).index_copy_(0, selection.order, values)


def _flops(inputs: Inputs, is_needed: Sequence[bool]) -> HeadFlops:
    reference, selection = inputs.reference, inputs.selection
    return linear_ce_kl_flops(
        num_active=selection.num_active,
        num_kl=selection.num_kl,
        columns=len(inputs.head.weight),
        hidden_size=inputs.hidden.shape[1],
        reference_hidden_size=0 if reference is None else reference.hidden.shape[1],
        is_hidden_grad_needed=is_needed[0],
        is_weight_grad_needed=is_needed[1],
    )


# ---- what a graph knows of them ----------------------------------------------------------------


def _fake_results(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: str,
    is_needed: Sequence[bool],
    loss: Tensor,
) -> _Tensors:
    def float32(like: Tensor | None, is_there: bool) -> Tensor:
        shape = (0,) if like is None or not is_there else like.shape
        return hidden.new_empty(shape, dtype=torch.float32)

    tokens, has_metrics = hidden.new_empty(hidden.shape[:1]), Call.decoded(call).has_metrics
    scale_shape = () if hidden.dtype == torch.float16 else (0,)
    return (
        *(loss, float32(tokens, True), float32(tokens, True)),
        *(float32(tokens, has_metrics), float32(tokens, has_metrics)),
        float32(tokens, has_metrics),
        float32(hidden, is_needed[0]),
        float32(weight, is_needed[1]),
        float32(bias, is_needed[2]),
        hidden.new_empty(scale_shape, dtype=torch.float32),
    )


@_linear_ce_kl.register_fake
def _(hidden, weight, bias, labels, *rest):
    loss = hidden.new_empty((), dtype=torch.float32)
    return _fake_results(hidden, weight, bias, rest[-2], rest[-1], loss)


@_linear_ce_kl_per_token.register_fake
def _(hidden, weight, bias, labels, *rest):
    loss = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
    return _fake_results(hidden, weight, bias, rest[-2], [False] * 3, loss)


_NUM_INPUTS = 16


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    results = HeadResults(*output)
    ctx.mark_non_differentiable(*results[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*results[6:])
    ctx.dtype = inputs[0].dtype
    ctx.is_needed = inputs[-1]


def _scale_gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_NUM_INPUTS - 3)
    if upstream[0] is None:
        return None, None, None, *nothing
    *grads, grad_scale = ctx.saved_tensors
    scale = upstream[0] if grad_scale.numel() == 0 else upstream[0] * grad_scale
    keeps_graph = torch.compiler.is_compiling() or _keeps_graph()
    scaled = (
        _scaled_gradient(grad, ctx.dtype, scale, keeps_graph=keeps_graph) if needed else None
        for grad, needed in zip(grads, ctx.is_needed, strict=True)
    )
    return *scaled, *nothing


def _scaled_gradient(
    grad: Tensor, dtype: torch.dtype, scale: Tensor, *, keeps_graph: bool
) -> Tensor:
    """grad * scale in `dtype`. Kept float32 numbers are rounded here, once: float16 would underflow
    before the upstream scale. What has the dtype already is multiplied where it lies."""
    if grad.dtype != dtype:
        return (grad * scale).to(dtype) if keeps_graph else scaled_to(dtype, grad, scale)
    if keeps_graph:
        return grad * scale
    torch.autograd.graph.increment_version(grad)  # a second backward is refused, never wrong
    path_for(grad.device).scale_in_place(grad, scale)
    return grad


def _keeps_graph() -> bool:
    """True where this backward was called with `retain_graph`, or nobody can tell."""
    autograd: Any = vars(torch._C)["_autograd"]
    ask = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


_linear_ce_kl.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    *tensors, ctx.call, ctx.is_needed = inputs
    ctx.save_for_backward(*tensors)


def _recompute(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_NUM_INPUTS - 4)
    if upstream[0] is None:
        return None, None, None, *nothing
    tensors = ctx.saved_tensors
    results = HeadResults(*_linear_ce_kl(*tensors, upstream[0], ctx.call, ctx.is_needed))
    grads = (results.grad_hidden, results.grad_weight, results.grad_bias)
    scale = results.grad_scale
    scaled = (
        (grad if scale.numel() == 0 else grad * scale).to(tensors[0].dtype) if needed else None
        for grad, needed in zip(grads, ctx.is_needed, strict=True)
    )
    return *scaled, *nothing


_linear_ce_kl_per_token.register_autograd(_recompute, setup_context=_keep_inputs)


@register_flop_formula(
    [torch.ops.safereg_kernels.linear_ce_kl, torch.ops.safereg_kernels.linear_ce_kl_per_token],
    get_raw=True,
)
def _counted_flops(
    hidden, weight, bias, labels, ce_weights, kl_weights, ce_report, reference_hidden,
    reference_weight, *rest, **_,
):  # fmt: skip
    has_ce = ce_weights != 0
    if ce_report is not None:
        has_ce = has_ce.to(ce_report.device) | ce_report
    has_kl = (kl_weights != 0).to(has_ce.device)
    is_per_token = len(rest) < 7
    return linear_ce_kl_flops(
        num_active=int((has_ce | has_kl).sum()),
        num_kl=int(has_kl.sum()),
        columns=weight.shape[0],
        hidden_size=hidden.shape[1],
        reference_hidden_size=0 if reference_weight is None else reference_weight.shape[1],
        is_hidden_grad_needed=not is_per_token and rest[-1][0],
        is_weight_grad_needed=not is_per_token and rest[-1][1],
    ).total


linear_ce_kl_op = torch.ops.safereg_kernels.linear_ce_kl.default
linear_ce_kl_per_token_op = torch.ops.safereg_kernels.linear_ce_kl_per_token.default
