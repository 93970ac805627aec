"""Launches the Triton kernels: the same three functions as `eager`, on CUDA tensors.

Nothing here waits for the device. Launch settings are fixed, not autotuned: a tuning run would
execute a kernel twice over a buffer that it overwrites.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from safereg_kernels import triton_kernels as kernels
from safereg_kernels.block import DIRECTIONS, NUM_STATISTICS, Block, Formula

BLOCK_COLUMNS = 4096
"""Columns a program holds at a time: 16 per thread with 8 warps, which leaves no register spilled
(tests/unit/test_compile.py)."""
PROGRAMS_PER_PROCESSOR = 4
"""Programs wanted on each multiprocessor, so that one's reductions hide behind another's loads."""
PROGRAMS_ON_CPU = 8
"""The same in all under the interpreter: enough to have rows split in the tests."""


def row_statistics(block: Block, formula: Formula) -> Tensor:
    """Statistics of every row over this block's columns, float32 [rows, 6]."""
    policy = block.policy
    rows, columns = policy.shape[0], formula.num_columns
    splits, columns_per_split = _split(rows, columns, policy.device)
    partials = torch.empty(rows, splits, NUM_STATISTICS, dtype=torch.float32, device=policy.device)
    if rows > 0:
        with _on_device(policy):
            kernels.statistics_kernel[(rows, splits)](
                policy,
                policy if block.reference is None else block.reference,
                block.kl_weights if block.labels is None else block.labels,
                block.kl_weights,
                partials,
                policy.stride(0),
                0 if block.reference is None else block.reference.stride(0),
                columns,
                columns_per_split,
                **_settings(block, formula),
            )
    return partials[:, 0] if splits == 1 else merge_statistics(partials, formula.direction)


def merge_statistics(partials: Tensor, direction: str) -> Tensor:
    """Statistics of whole rows [rows, 6] from those of their parts, float32 [rows, parts, 6]."""
    rows, parts = partials.shape[:2]
    merged = partials.new_empty(rows, NUM_STATISTICS)
    if rows > 0:
        with _on_device(partials):
            kernels.merge_kernel[(rows,)](
                partials.contiguous(),
                merged,
                parts,
                **{"DIRECTION": DIRECTIONS.index(direction), **launch_options(1)},
            )
    return merged


def write_gradient(out: Tensor, block: Block, formula: Formula, statistics: Tensor) -> None:
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
            formula.num_columns,
            width,
            columns_per_split,
            **_settings(block, formula),
        )


def _settings(block: Block, formula: Formula) -> dict[str, Any]:
    """What both kernels share: the formula's numbers, and the constants they compile with."""
    return {
        "inv_temperature": 1.0 / formula.temperature,
        "policy_cap": formula.policy_softcap or 1.0,
        "reference_cap": formula.reference_softcap or 1.0,
        "DIRECTION": DIRECTIONS.index(formula.direction),
        "HAS_LABELS": block.labels is not None,
        "POLICY_CAPPED": formula.policy_softcap is not None,
        "REFERENCE_CAPPED": formula.reference_softcap is not None,
        "IS_DIFFERENCE": formula.is_difference,
        "BLOCK": BLOCK_COLUMNS,
        **launch_options(num_warps(formula)),
    }


def num_warps(formula: Formula) -> int:
    """8; 16 with soft caps, whose temporaries would spill."""
    return 8 if formula.policy_softcap is None and formula.reference_softcap is None else 16


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
