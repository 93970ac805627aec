"""A rank's part of a vocabulary that is spread over a tensor-parallel group."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from safereg_kernels.block import LABEL_ELSEWHERE, LABEL_INVALID, SHARES
from safereg_kernels.spec import LossSpec

if TYPE_CHECKING:
    from safereg_kernels.path import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Columns [start, start + columns) of the logits are here, the rest on the other ranks."""

    group_name: str
    """Name of the tensor-parallel group, as torch registers it."""
    start: int
    """Token id of this rank's first column."""
    is_hidden_grad_summed: bool = True
    """True where the gradient of the hidden states is to be summed over the group here."""

    @property
    def group(self) -> distributed.ProcessGroup:
        """The tensor-parallel group."""
        resolve: Any = vars(distributed.distributed_c10d)["_resolve_process_group"]
        return resolve(self.group_name)

    def merged(self, statistics: Tensor, path: "Path", spec: LossSpec) -> Tensor:
        """Statistics of whole rows [rows, 9] from this rank's, the same on every rank.

        Collectives: one all-gather of 9 float32 per row.
        """
        size = distributed.get_world_size(self.group)
        rows, width = statistics.shape
        gathered = statistics.new_empty(size * rows, width)
        distributed.all_gather_into_tensor(gathered, statistics.contiguous(), group=self.group)
        parts = gathered.view(size, rows, width).transpose(0, 1)
        return path.merge_statistics(parts, spec)

    def sum_shares(self, statistics: Tensor) -> None:
        """Sums what was computed from whole-row statistics: the divergence and the mixture's.

        Collectives: one SUM all-reduce of 2 float32 per row.
        """
        shares = statistics[:, SHARES].contiguous()
        distributed.all_reduce(shares, group=self.group)
        statistics[:, SHARES] = shares

    def sum_hidden_grad(self, grad: Tensor | None) -> None:
        """The hidden states' gradient summed over the group, in place, unless the caller does it.

        Collectives: one SUM all-reduce of the tensor, or none.
        """
        if grad is not None and self.is_hidden_grad_summed:
            distributed.all_reduce(grad, group=self.group)


def local_columns(columns: int, vocab_size: int | None, shard: VocabShard | None) -> int:
    """How many of the columns here are tokens, the rest being padding of the vocabulary."""
    if vocab_size is None:
        return columns
    start = 0 if shard is None else shard.start
    return max(0, min(columns, vocab_size - start))


def local_labels(
    labels: Tensor, columns: int, vocab_size: int | None, shard: VocabShard | None
) -> Tensor:
    """Labels [tokens] as columns here, or LABEL_ELSEWHERE, or LABEL_INVALID.

    Without a shard every label must be one of the `columns`; with one, a label past the end is
    known for invalid only where `vocab_size` is given.
    """
    if shard is None:
        end = columns if vocab_size is None else vocab_size
        return torch.where((labels >= 0) & (labels < end), labels, LABEL_INVALID)
    local = labels - shard.start
    local = torch.where((local >= 0) & (local < columns), local, LABEL_ELSEWHERE)
    is_invalid = labels < 0
    if vocab_size is not None:
        is_invalid = is_invalid | (labels >= vocab_size)
    return torch.where(is_invalid, LABEL_INVALID, local)
