"""Which path runs: Triton on CUDA, eager torch elsewhere, or what SAFEREG_KERNELS says."""

import os
from typing import Protocol

import torch
from torch import Tensor

from safereg_kernels import eager
from safereg_kernels.block import Block
from safereg_kernels.spec import LossSpec

_CHOICES = ("auto", "eager", "triton")


class Path(Protocol):
    """The functions that a path provides (see `eager` for what they compute)."""

    def row_statistics(self, block: Block, spec: LossSpec) -> Tensor:
        """Statistics of every row, float32 [rows, 9]."""
        ...

    def add_mixture(self, block: Block, spec: LossSpec, statistics: Tensor) -> None:
        """Writes these columns' share of the Jensen-Shannon divergence into the statistics."""
        ...

    def merge_statistics(self, partials: Tensor, spec: LossSpec) -> Tensor:
        """[rows, 9] from [rows, parts, 9]."""
        ...

    def write_gradient(self, out: Tensor, block: Block, spec: LossSpec, statistics: Tensor) -> None:
        """Writes the gradient in the raw policy logits into `out`."""
        ...

    def scale_in_place(self, tensor: Tensor, scale: Tensor) -> None:
        """tensor *= scale, a scalar on its device; contiguous."""
        ...


def path_for(device: torch.device) -> Path:
    """The path that works on tensors of this device.

    Raises:
        ValueError: SAFEREG_KERNELS is none of `auto`, `eager`, `triton`.
        RuntimeError: it says `triton` but neither CUDA tensors nor the interpreter are there; the
            Triton path never falls back in silence.
    """
    choice = os.environ.get("SAFEREG_KERNELS", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"SAFEREG_KERNELS must be one of {_CHOICES}, got {choice!r}")
    if choice == "eager" or (choice == "auto" and device.type != "cuda"):
        return eager
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"SAFEREG_KERNELS=triton, but the tensors are on {device.type!r}: pass CUDA tensors, "
            "set TRITON_INTERPRET=1 to interpret the kernels on the CPU, or choose auto"
        )
    from safereg_kernels import fused  # imports triton, which a CPU-only machine may lack

    return fused
