"""Launches the Triton kernels: the same functions as `eager`, on CUDA tensors.

Nothing here waits for the device. Launch settings are fixed, not autotuned: a tuning run would
execute a kernel twice over a buffer that it overwrites.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from safereg_kernels import triton_kernels as kernels
from safereg_kernels.block import NUM_STATISTICS, SHARES, Block
from safereg_kernels.spec import DIRECTIONS, LossSpec

BLOCK_COLUMNS = 2048
"""Columns a program holds at a time: 8 per thread with 8 warps, so that its registers leave room
for four to five programs on a multiprocessor (kernels/tests/test_compile.py)."""
PROGRAMS_PER_PROCESSOR = 16
"""Programs wanted for each multiprocessor, about four times as many as it holds: with fewer, rows
are split, or processors would idle behind the last ones."""
PROGRAMS_ON_CPU = 8
"""The same in all under the interpreter: enough to have rows split in the tests."""


def row_statistics(block: Block, spec: LossSpec) -> Tensor:
    """Statistics of every row over this block's columns, float32 [rows, 9]."""
    policy = block.policy
    rows = policy.shape[0]
    splits, columns_per_split = _split(rows, block.num_columns, policy.device)
    partials = torch.empty(rows, splits, NUM_STATISTICS, dtype=torch.float32, device=policy.device)
    if rows > 0:
        with _on_device(policy):
            kernels.statistics_kernel[(rows, splits)](
                policy,
                policy if block.reference is None else block.reference,
                block.kl_weights if block.labels is None else block.labels,
                block.kl_weights,
                block.kl_weights if block.reference_lse is None else block.reference_lse,
                partials,
                policy.stride(0),
                0 if block.reference is None else block.reference.stride(0),
                block.num_columns,
                _readable(block),
                columns_per_split,
                **_scalars(spec),
                **statistics_constants(block, spec),
                **launch_options(num_warps(spec)),
            )
    return partials[:, 0] if splits == 1 else merge_statistics(partials, spec)


def add_mixture(block: Block, spec: LossSpec, statistics: Tensor) -> None:
    """Writes these columns' share of the Jensen-Shannon divergence and of KL(p||m)."""
    policy, reference = block.policy, block.reference
    rows = policy.shape[0]
    if rows == 0 or reference is None:
        return
    splits, columns_per_split = _split(rows, block.num_columns, policy.device)
    partials = torch.empty(rows, splits, 2, dtype=torch.float32, device=policy.device)
    with _on_device(policy):
        kernels.mixture_kernel[(rows, splits)](
            policy,
            reference,
            block.kl_weights,
            statistics,
            partials,
            policy.stride(0),
            reference.stride(0),
            block.num_columns,
            _readable(block),
            columns_per_split,
            **_scalars(spec),
            beta=spec.beta,
            **mixture_constants(spec),
            **launch_options(8),
        )
    statistics[:, SHARES] = partials.sum(1)


def merge_statistics(partials: Tensor, spec: LossSpec) -> Tensor:
    """Statistics of whole rows [rows, 9] from those of their parts, float32 [rows, parts, 9]."""
    rows, parts = partials.shape[:2]
    merged = partials.new_empty(rows, NUM_STATISTICS)
    if rows > 0:
        with _on_device(partials):
            kernels.merge_kernel[(rows,)](
                partials.contiguous(),
                merged,
                parts,
                1.0 / spec.temperature,
                **{"DIRECTION": DIRECTIONS.index(spec.direction), **launch_options(1)},
            )
    return merged


def write_gradient(out: Tensor, block: Block, spec: LossSpec, statistics: Tensor) -> None:
    """Writes ce_weight grad(CE) + kl_weight grad(D) in the raw policy logits into `out`.

    `out` [rows, columns] may be the policy's own logits; padding columns get exactly 0, and so do
    rows whose weights are both 0.
    """
    rows, width = out.shape
    if rows == 0 or width == 0:
        return
    splits, columns_per_split = _split(rows, width, out.device)
    with _on_device(out):
        kernels.gradient_kernel[(rows, splits)](
            block.policy,
            block.policy if block.reference is None else block.reference,
            block.kl_weights if block.labels is None else block.labels,
            block.kl_weights if block.ce_weights is None else block.ce_weights,
            block.kl_weights,
            statistics.contiguous(),
            out,
            block.policy.stride(0),
            0 if block.reference is None else block.reference.stride(0),
            out.stride(0),
            block.num_columns,
            _readable(block),
            width,
            columns_per_split,
            **_scalars(spec),
            beta=spec.beta,
            z_loss=spec.z_loss,
            **gradient_constants(block, spec),
            **launch_options(num_warps(spec)),
        )


def scale_in_place(tensor: Tensor, scale: Tensor) -> None:
    """tensor *= scale, a scalar on its device; a scale of 1 is seen there and costs no traffic."""
    blocks = -(-tensor.numel() // BLOCK_COLUMNS)
    programs = min(blocks, _programs(tensor.device))
    with _on_device(tensor):
        kernels.scale_kernel[(programs,)](
            tensor,
            scale.float(),
            tensor.numel(),
            **{"BLOCK": BLOCK_COLUMNS, **launch_options(8)},
        )


def _readable(block: Block) -> int:
    """Columns that may be read, a multiple of 16 where rows have room for them, else the tokens.

    A mask that ends between two vectors would split the last loads into single ones.
    """
    whole = -(-block.num_columns // 16) * 16
    logits = [block.policy] if block.reference is None else [block.policy, block.reference]
    return whole if all(_has_room(tensor, whole) for tensor in logits) else block.num_columns


def _has_room(logits: Tensor, columns: int) -> bool:
    end = logits.storage_offset() + (logits.shape[0] - 1) * logits.stride(0) + columns
    return end * logits.element_size() <= logits.untyped_storage().nbytes()


def _scalars(spec: LossSpec) -> dict[str, float]:
    return {
        "inv_temperature": 1.0 / spec.temperature,
        "policy_scale": spec.policy_logit_scale,
        "reference_scale": spec.reference_logit_scale,
        "policy_cap": spec.policy_softcap or 1.0,
        "reference_cap": spec.reference_softcap or 1.0,
    }


def _shape_of_logits(spec: LossSpec) -> dict[str, bool]:
    return {
        "IS_SCALED": spec.policy_logit_scale != 1.0 or spec.reference_logit_scale != 1.0,
        "POLICY_CAPPED": spec.policy_softcap is not None,
        "REFERENCE_CAPPED": spec.reference_softcap is not None,
        "IS_DIFFERENCE": spec.is_difference,
    }


def _constants(block: Block, spec: LossSpec) -> dict[str, Any]:
    has_labels = block.labels is not None
    return {
        "DIRECTION": DIRECTIONS.index(spec.direction),
        "HAS_LABELS": has_labels,
        "HAS_REFERENCE": block.reference is not None,
        "IS_TEMPERED": has_labels and spec.temperature != 1.0,
        **_shape_of_logits(spec),
        "BLOCK": BLOCK_COLUMNS,
    }


def statistics_constants(block: Block, spec: LossSpec) -> dict[str, Any]:
    """What the statistics kernel is compiled with."""
    return {
        **_constants(block, spec),
        "HAS_ENTROPY": spec.has_entropy,
        "HAS_REFERENCE_LSE": block.reference_lse is not None,
        "GROUP": 16 // block.policy.element_size(),  # what one load of 128 bits brings a thread
    }


def gradient_constants(block: Block, spec: LossSpec) -> dict[str, Any]:
    """What the gradient kernel is compiled with."""
    return _constants(block, spec)


def mixture_constants(spec: LossSpec) -> dict[str, Any]:
    """What the mixture kernel is compiled with."""
    return {**_shape_of_logits(spec), "BLOCK": BLOCK_COLUMNS}


def num_warps(spec: LossSpec) -> int:
    """8; 16 with soft caps, whose temporaries would spill."""
    return 8 if spec.policy_softcap is None and spec.reference_softcap is None else 16


def launch_options(warps: int) -> dict[str, Any]:
    """Options of a launch. Fusion is Triton's default until 3.10; the figures depend on it."""
    return {"num_warps": warps, "enable_fp_fusion": True}


def _split(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """(splits of a row, columns per split): few rows are spread, or most processors would idle."""
    blocks = max(1, -(-columns // BLOCK_COLUMNS))
    wanted = -(-_programs(device) // max(rows, 1))
    blocks_per_split = -(-blocks // min(blocks, wanted))
    return -(-blocks // blocks_per_split), blocks_per_split * BLOCK_COLUMNS


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_ON_CPU
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * PROGRAMS_PER_PROCESSOR


def _on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
