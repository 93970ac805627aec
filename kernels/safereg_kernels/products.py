"""Matrix products of the head, with a float32 result from operands of lower precision.

bfloat16 logits would make the gradient of a small divergence mostly rounding noise, so products
that feed a softmax keep float32 by default. CUDA's matrix units do that at no cost (`out_dtype`);
the CPU has no such product, so there the operands are float32 (a head of lower precision is
converted once per call).
"""

import torch
from torch import Tensor

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def is_same_tensor(a: Tensor, b: Tensor) -> bool:
    """True where both look at the same memory in the same way."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def operand_dtype(head: Tensor, logits_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the products of this head take their operands."""
    if head.dtype in _LOW_PRECISION and (head.is_cuda or logits_dtype == head.dtype):
        return head.dtype
    return torch.float32


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b; `out` may be float32 where the operands are of less."""
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif a.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out += a @ b
    else:
        out.copy_(a @ b)


def project_into(out: Tensor, hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    """Raw logits out = hidden @ head.T + bias."""
    multiply_into(out, hidden, head.T)
    if bias is not None:
        out += bias


def scaled_to(dtype: torch.dtype, tensor: Tensor, scale: Tensor) -> Tensor:
    """tensor * scale in a new tensor of `dtype`, rounded once, without a float32 copy on CUDA."""
    return torch.mul(tensor, scale, out=tensor.new_empty(tensor.shape, dtype=dtype))
