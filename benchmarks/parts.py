"""What a loss is made of, each alone: kernels over rows of logits, and matrix products."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from peers import ours_cross_entropy, ours_linear, value_and_gradients
from problems import LinearProblem, LogitsProblem
from torch import Tensor

from safereg_kernels import linear_ce_kl, masked_kl
from safereg_kernels.block import Block
from safereg_kernels.path import path_for
from safereg_kernels.spec import LossSpec


class Part(NamedTuple):
    """A call, and the least it must do: bytes of a kernel, FLOPs of a product."""

    name: str
    call: Callable[[], Any]
    amount: float


def kernels(
    shape: tuple[int, int],
    logits_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
    *,
    with_ce: bool,
) -> Iterator[Part]:
    """The kernels of the path over so many rows, each logit read once and each gradient written."""
    policy, reference = (
        torch.randn(shape, device=device).to(logits_dtype).mul_(2) for _ in range(2)
    )
    out = torch.empty(shape, dtype=grad_dtype, device=device)
    weights = torch.full(shape[:1], 1 / shape[0], device=device)
    labels = torch.randint(shape[1], shape[:1], device=device)
    path, read, written = path_for(device), policy.nbytes, out.nbytes

    def block(with_reference: bool) -> Block:
        return Block(
            policy=policy,
            reference=reference if with_reference else None,
            labels=labels if with_ce else None,
            ce_weights=weights if with_ce else None,
            kl_weights=weights if with_reference else torch.zeros_like(weights),
            num_columns=shape[1],
        )

    directions = ("forward", "reverse", "jsd", "ce") if with_ce else ("forward", "reverse", "jsd")
    for direction in directions:
        spec = LossSpec(direction="forward" if direction == "ce" else direction)
        rows, inputs = block(direction != "ce"), read * (1 + (direction != "ce"))
        statistics = path.row_statistics(rows, spec)
        yield Part(f"row_statistics {direction}", partial(path.row_statistics, rows, spec), inputs)
        if direction == "jsd":
            path.add_mixture(rows, spec, statistics)
            again = statistics.clone()
            yield Part("add_mixture jsd", partial(path.add_mixture, rows, spec, again), inputs)
        yield Part(
            f"write_gradient {direction}",
            partial(path.write_gradient, out, rows, spec, statistics),
            inputs + written,
        )


def products(problem: LinearProblem, rows: int) -> Iterator[Part]:
    """The four products over the first rows, float32 logits from operands of the head's dtype."""
    hidden, reference = problem.hidden.detach()[:rows], problem.reference_hidden[:rows]
    head, flops = problem.head.detach(), 2.0 * rows * problem.head.numel()
    for name, states, weight in (
        ("policy logits", hidden, head),
        ("reference logits", reference, problem.reference_head),
    ):
        logits = torch.empty(rows, len(head), dtype=torch.float32, device=head.device)
        yield Part(name, partial(multiply, states, weight.T, logits), flops)
        del logits
    grad = torch.randn(rows, len(head), device=head.device, dtype=head.dtype)
    for dtype in dict.fromkeys((head.dtype, torch.float32)):
        name = str(dtype).removeprefix("torch.")
        of_hidden = torch.empty(hidden.shape, dtype=dtype, device=head.device)
        of_head = torch.empty(head.shape, dtype=dtype, device=head.device)
        yield Part(f"dX to {name}", partial(multiply, grad, head, of_hidden), flops)
        yield Part(f"dW to {name}", partial(multiply, grad.T, hidden, of_head), flops)


def all_products(problem: LinearProblem, rows: int) -> Callable[[], None]:
    """The products that a problem cannot do without, alone and in the best arrangement known.

    Logits `rows` at a time into one float32 buffer, the gradients once over all rows.
    """
    hidden, head = problem.hidden.detach(), problem.head.detach()
    theirs, their_head = problem.reference_hidden[problem.active], problem.reference_head
    grad = torch.randn(len(hidden), len(head), device=head.device, dtype=head.dtype)
    logits = torch.empty(rows, len(head), dtype=torch.float32, device=head.device)

    def run() -> None:
        for states, weight in ((hidden, head), (theirs, their_head)):
            for begin in range(0, len(states), rows):
                piece = states[begin : begin + rows]
                multiply(piece, weight.T, logits[: len(piece)])
        multiply(grad, head, torch.empty_like(hidden))
        if problem.head.requires_grad:
            multiply(grad.T, hidden, torch.empty_like(head))

    return run


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b; `out` may be float32 where the operands are of less (on CUDA)."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def linear_in_chunks(chunk_tokens: int | None) -> Callable[[LinearProblem], Tensor]:
    """`linear_ce_kl` with this chunk size; None = its default."""
    return lambda problem: linear_ce_kl(
        problem.hidden,
        problem.head,
        problem.labels,
        ce_weights=problem.ce_weights,
        kl_weights=problem.kl_weights,
        reference_hidden=problem.reference_hidden,
        reference_head=problem.reference_head,
        chunk_tokens=chunk_tokens,
    )[0]


def watched_calls(sizes: Any, device: torch.device) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """(name, call, how often its host may wait) of value and gradients, weights here or there."""
    linear = sizes.linear(device, 0.1, is_trained=True)
    yield "linear_ce_kl, weights on the host", value_and_gradients(ours_linear, linear), 0

    def on_device(problem: LinearProblem) -> Tensor:
        return linear_ce_kl(
            problem.hidden,
            problem.head,
            problem.labels,
            ce_weights=ce_weights,
            kl_weights=kl_weights,
            reference_hidden=problem.reference_hidden,
            reference_head=problem.reference_head,
            chunk_tokens=problem.chunk_tokens,
        )[0]

    ce_weights, kl_weights = (w.to(device) for w in (linear.ce_weights, linear.kl_weights))
    yield "linear_ce_kl, weights on the device", value_and_gradients(on_device, linear), 1
    yield "linear_cross_entropy", value_and_gradients(ours_cross_entropy, linear), 1
    logits = LogitsProblem.random((sizes.block_rows, sizes.vocab), sizes.dtype, device, "forward")
    yield (
        "masked_kl, weights on the device",
        value_and_gradients(
            lambda problem: masked_kl(problem.policy, problem.reference, problem.weights)[0], logits
        ),
        0,
    )
