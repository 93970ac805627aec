"""Claimed: optimizer state that ZeRO wrote on some ranks is put together in the shards of any
others: as if they had cut it themselves. Each group has a counter of steps of its own.

Exact, bit for bit. The judge cuts whole tensors, without the module's own arithmetic. What real
files of deepspeed hold, and that a run goes on from them, is `test_other_ranks`'.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from safereg_dist.parallel.zero_files import (
    WEIGHTS,
    WrittenShards,
    parts_of_mappings,
    parts_of_shapes,
)

SHAPES = [{"a": (5, 7), "b": (1,), "c": (3,)}, {"d": (2, 2), "e": (11,)}]
KEYS = (WEIGHTS, "exp_avg", "exp_avg_sq")


def whole_tensors():
    generator = torch.Generator().manual_seed(7)
    return {
        (key, name): torch.randn(math.prod(shape), generator=generator)
        for key in KEYS
        for group in SHAPES
        for name, shape in group.items()
    }


def padded(tensor, size):
    return torch.cat([tensor, tensor.new_zeros(size - tensor.numel())])


def cut_each(whole, ranks, regroup):
    """[rank][group] tensors of ZeRO-3: every parameter padded and cut by itself."""
    found = []
    for rank in range(ranks):
        groups = []
        for group in regroup(SHAPES):
            state = {}
            for key in KEYS:
                shards = []
                for name in group:
                    tensor = whole[key, name]
                    size = -(-tensor.numel() // ranks)
                    shards.append(padded(tensor, size * ranks).view(ranks, size)[rank])
                state[key] = torch.cat(shards)
            groups.append(state | {"step": torch.tensor(4.0)})
        found.append(groups)
    return found


def joined(shapes):
    """The same parameters in other groups, as deepspeed forms them where shards are larger."""
    return [{name: shape for group in shapes for name, shape in group.items()}]


def apart(shapes):
    return shapes


@pytest.mark.parametrize("before", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("now", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("regroup", [apart, joined])
def test_shards_of_each_parameter(before, now, regroup):
    whole = whole_tensors()
    written = WrittenShards(
        cut_each(whole, before, apart),
        [parts_of_shapes(sizes(SHAPES), rank, before) for rank in range(before)],
    )
    for rank, expected in enumerate(cut_each(whole, now, regroup)):
        own = parts_of_shapes(sizes(regroup(SHAPES)), rank, now)
        found = [written.group(own, i, each[WEIGHTS].numel()) for i, each in enumerate(expected)]
        check_same(found, expected)


def sizes(shapes):
    return [{name: torch.Size(shape) for name, shape in group.items()} for group in shapes]


def check_same(found, expected):
    for own, wanted in zip(found, expected, strict=True):
        assert own.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(own[key], tensor), key
    assert len({each["step"].data_ptr() for each in found}) == len(found)  # each counts by itself


def cut_rows(whole, ranks):
    """([rank][group] tensors, [rank][group] maps) of ZeRO-1: parameters in a row, cut anywhere."""
    tensors = [[{"step": torch.tensor(4.0)} for _ in SHAPES] for _ in range(ranks)]
    maps = [[{} for _ in SHAPES] for _ in range(ranks)]
    for i, group in enumerate(SHAPES):
        for key in KEYS:
            row = torch.cat([whole[key, name] for name in group])
            size = -(-row.numel() // ranks)
            for rank, shard in enumerate(padded(row, size * ranks).view(ranks, size)):
                tensors[rank][i][key] = shard
        owner = [(name, at) for name, s in group.items() for at in range(math.prod(s))]
        for place, (name, _) in enumerate(owner):
            rank, start = divmod(place, size)
            known = maps[rank][i].setdefault(name, SimpleNamespace(start=start, numel=0))
            known.numel += 1
    return tensors, maps


@pytest.mark.parametrize("before", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("now", [1, 2, 3, 4, 7])
def test_shards_of_all_parameters_in_a_row(before, now):
    whole = whole_tensors()
    tensors, maps = cut_rows(whole, before)
    written = WrittenShards(tensors, parts_of_mappings(maps))
    expected, maps = cut_rows(whole, now)
    for own, wanted in zip(parts_of_mappings(maps), expected, strict=True):
        found = [written.group(own, i, each[WEIGHTS].numel()) for i, each in enumerate(wanted)]
        check_same(found, wanted)
