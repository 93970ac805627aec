"""Masked, weighted divergence and cross-entropy from logits chunks; needs torch and triton only."""

# Imported at once, not on first use: a submodule and a function share each name, and the function
# must be the one that stays bound here.
from safereg_kernels.cross_entropy import linear_cross_entropy
from safereg_kernels.errors import ShapeError
from safereg_kernels.flops import HeadFlops, linear_ce_kl_flops
from safereg_kernels.linear_ce_kl import TokenMetrics, linear_ce_kl
from safereg_kernels.masked_kl import masked_kl
from safereg_kernels.module import LinearCEKL
from safereg_kernels.patch import patch_model, unpatch_model
from safereg_kernels.topk import TopK
from safereg_kernels.vocab_parallel import (
    vocab_parallel_linear_ce_kl,
    vocab_parallel_masked_kl,
)

__all__ = [
    "HeadFlops",
    "LinearCEKL",
    "ShapeError",
    "TokenMetrics",
    "TopK",
    "linear_ce_kl",
    "linear_ce_kl_flops",
    "linear_cross_entropy",
    "masked_kl",
    "patch_model",
    "unpatch_model",
    "vocab_parallel_linear_ce_kl",
    "vocab_parallel_masked_kl",
]
