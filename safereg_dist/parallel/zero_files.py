"""Optimizer state that ZeRO wrote on another number of ranks, read in the shards of now.

Each rank's file holds flat float32 tensors: master weights and Adam's two moments. Where in them a
parameter lies follows from the file itself. A rank of now reads the elements that are its own, and
no others, from files that are mapped into memory.

DeepSpeed's universal checkpoint does the same by a copy on disk that every rank then reads whole;
deepspeed 0.19.8 loads it with one counter of steps shared by all sub-groups, and with the first
group's weight decay in all of them.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHTS = "weights"
"""The key of the master weights among the tensors of a group; others are the optimizer's own."""
FlatTensors = list[dict[str, Tensor]]
"""The tensors of each group of a rank, by key."""


class Part(NamedTuple):
    """Consecutive elements of a parameter within one rank's flat tensors."""

    group: int
    """Index of the flat tensors."""
    begin: int
    """Its first element in them."""
    at: int
    """The same element's index in the parameter."""
    numel: int


Parts = dict[str, Part]
"""Name of a parameter -> its part on one rank."""


def parts_of_shapes(
    shapes: Sequence[Mapping[str, torch.Size]], rank: int, world_size: int
) -> Parts:
    """ZeRO-3: every parameter lies in equal, padded shards on all ranks."""
    parts = {}
    for group, named in enumerate(shapes):
        begin = 0
        for name, shape in named.items():
            size = math.ceil(shape.numel() / world_size)
            at = min(rank * size, shape.numel())
            parts[name] = Part(group, begin, at, min(size, shape.numel() - at))
            begin += size
    return parts


def parts_of_mappings(mappings: Sequence[Sequence[Mapping[str, Any]]]) -> list[Parts]:
    """ZeRO-1 and 2: all parameters in a row, cut into equal shards; from the maps of all ranks."""
    parts, seen = [], Counter[str]()
    for of_rank in mappings:
        own = {}
        for group, named in enumerate(of_rank):
            for name, address in named.items():
                own[name] = Part(group, address.start, seen[name], address.numel)
                seen[name] += address.numel
        parts.append(own)
    return parts


class WrittenShards:
    """The flat tensors of all ranks that wrote a checkpoint."""

    def __init__(self, tensors: Sequence[FlatTensors], parts: Sequence[Parts]) -> None:
        """The tensors of each rank, and where the parameters lie in them."""
        self._ranks = list(zip(tensors, parts, strict=True))
        first = tensors[0][0]
        self._keys = [key for key, value in first.items() if value.shape == first[WEIGHTS].shape]
        self._others = {key: value for key, value in first.items() if key not in self._keys}

    def group(self, own: Parts, group: int, numel: int) -> dict[str, Any]:
        """The tensors [numel] of one group of a rank of now, zero where no parameter lies.

        What is no shard, as the optimizer's counter of steps, is a copy for each group.
        """
        found: dict[str, Any] = {key: torch.zeros(numel) for key in self._keys}
        for name, part in own.items():
            if part.group == group:
                for key, flat in found.items():
                    flat[part.begin : part.begin + part.numel] = self._read(key, name, part)
        return found | {key: value.clone() for key, value in self._others.items()}

    def _read(self, key: str, name: str, wanted: Part) -> Tensor:
        pieces = [torch.empty(0)]
        for tensors, parts in self._ranks:
            known = parts.get(name)
            if known is None:
                continue
            first = max(wanted.at, known.at)
            last = min(wanted.at + wanted.numel, known.at + known.numel)
            if first < last:
                shift = known.begin - known.at
                pieces.append(tensors[known.group][key][first + shift : last + shift])
        return torch.cat(pieces)
