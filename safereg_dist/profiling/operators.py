"""The cost of a dispatched operator: FLOPs of matrix products, bytes of collectives.

FLOPs follow torch's formulas and those below, which torch 2.13 lacks; a multiply-add counts as two,
elementwise work is not counted. The bytes of a collective are its payload on this rank, the size of
the whole tensor that it moves for this rank, independent of the algorithm.

    all_reduce, reduce, broadcast     the tensor
    all_gather                        the gathered output
    reduce_scatter                    the input
    all_to_all, gather, send          the input
    scatter, recv                     the output
    barrier                           0
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN, _C10D = torch.ops.aten, torch.ops.c10d


def _addmm_flops(_: Any, a: Sequence[int], b: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _mv_flops(matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _cpu_attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _cpu_attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


UNKNOWN_TO_TORCH: dict[Any, Callable[..., int]] = {
    _ATEN.addmm: _addmm_flops,  # torch's own fails on the form with a dtype of the result
    _ATEN.addmm_: _addmm_flops,  # the gradient of the fused head's weight
    _ATEN.mv: _mv_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}
"""Formulas over the shapes of an operator's arguments; without them steps on CPU are
undercounted."""

_PAYLOAD: dict[Any, tuple[str, int]] = {
    _C10D.allreduce_: ("all_reduce", 0),
    _C10D.allreduce_coalesced_: ("all_reduce", 0),
    _C10D.reduce_: ("reduce", 0),
    _C10D.broadcast_: ("broadcast", 0),
    _C10D._allgather_base_: ("all_gather", 0),
    _C10D.allgather_: ("all_gather", 0),
    _C10D.allgather_coalesced_: ("all_gather", 0),
    _C10D.allgather_into_tensor_coalesced_: ("all_gather", 0),
    _C10D._reduce_scatter_base_: ("reduce_scatter", 1),
    _C10D.reduce_scatter_: ("reduce_scatter", 1),
    _C10D.reduce_scatter_tensor_coalesced_: ("reduce_scatter", 1),
    _C10D.alltoall_base_: ("all_to_all", 1),
    _C10D.alltoall_: ("all_to_all", 1),
    _C10D.gather_: ("gather", 1),
    _C10D.scatter_: ("scatter", 0),
    _C10D.send: ("send", 0),
    _C10D.recv_: ("recv", 0),
    _C10D.recv_any_source_: ("recv", 0),
}
"""Kind of every collective, and the index of the argument that is its payload."""


KINDS = (*dict.fromkeys(kind for kind, _ in _PAYLOAD.values()), "barrier")
"""All kinds of collectives that are counted."""


@cache
def is_composite(operator: torch._ops.OpOverload) -> bool:
    """True if an operator only calls other operators.

    Some operators have both a composite form and a kernel (`silu_backward`), which differ in the
    last bit: these run unchanged, so that counting changes no result.
    """
    has_kernel = partial(torch._C._dispatch_has_kernel_for_dispatch_key, operator.name())
    return has_kernel("CompositeImplicitAutograd") and not any(map(has_kernel, ("CPU", "CUDA")))


def flops_of(operator: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int | None:
    """FLOPs of one call of an operator packet that has a formula, else None."""
    if getattr(operator, "_qualified_op_name", "").startswith("safereg_kernels::"):
        return None  # reports its FLOPs itself, by term
    own = UNKNOWN_TO_TORCH.get(operator)
    if own is not None:
        return own(*(a.shape if isinstance(a, torch.Tensor) else a for a in args))
    formula = flop_registry.get(operator)
    return None if formula is None else formula(*args, **kwargs, out_val=out)


def payload_of(operator: Any, args: Sequence[Any]) -> tuple[str, int] | None:
    """(kind, bytes) of one call of an operator packet that is a collective, else None."""
    if operator is _C10D.barrier or operator is _C10D.monitored_barrier_:
        return "barrier", 0
    found = _PAYLOAD.get(operator)
    if found is None:
        return None
    kind, place = found
    return kind, sum(t.numel() * t.element_size() for t in _tensors(args[place]))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)
