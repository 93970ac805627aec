"""Claimed: of a sequence that lies over context- and tensor-parallel ranks each position is held
once, in the order in which Megatron's layers have it. Exact.
"""

from types import SimpleNamespace

import torch

from safereg_dist.parallel.megatron import Layout

LENGTH, TP, CP = 24, 2, 3


def layout(tp: int, cp: int) -> Layout:
    def group(size: int, rank: int) -> SimpleNamespace:
        return SimpleNamespace(size=lambda: size, rank=lambda: rank)

    others = dict.fromkeys(("world", "data", "pp_group", "head_group"))
    return Layout(
        **others,
        tp_group=group(TP, tp),
        cp_group=group(CP, cp),
        is_last_stage=True,
        shares_experts=False,
        group_of_micro_batches=1,
    )


def test_positions_are_held_once_and_in_the_order_of_the_states():
    """Context-parallel rank r has pieces r and 2 cp - 1 - r; sequence parallelism halves that."""
    pieces = torch.arange(LENGTH).chunk(2 * CP)
    for cp in range(CP):
        whole = torch.cat([pieces[cp], pieces[2 * CP - 1 - cp]])
        spread = [layout(tp, cp).positions(LENGTH, is_spread=True) for tp in range(TP)]
        assert torch.equal(torch.cat(spread), whole)
        for tp in range(TP):
            assert torch.equal(layout(tp, cp).positions(LENGTH, is_spread=False), whole)
