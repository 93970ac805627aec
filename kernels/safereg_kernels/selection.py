"""Which rows reach a matrix product: those with a KL weight first, so they lie in one piece."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The active rows in the order in which they are worked on."""

    order: Tensor
    """[num_active] int64 on the device of the hidden states."""
    num_kl: int
    """The first so many have a KL weight."""
    num_active: int

    def chunks(self, chunk_tokens: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, rows with a KL weight) of each chunk; integers the host knows already."""
        for begin in range(0, self.num_active, chunk_tokens):
            end = min(begin + chunk_tokens, self.num_active)
            yield begin, end, max(0, min(end, self.num_kl) - begin)


def select_rows(ce_is_wanted: Tensor, kl_weights: Tensor, device: torch.device) -> Selection:
    """The selection for masks [tokens]; no synchronisation where they are on the CPU, else one."""
    has_kl = kl_weights != 0
    is_active = ce_is_wanted | has_kl
    rank = torch.where(has_kl, 0, torch.where(is_active, 1, 2))
    order = rank.argsort(stable=True)
    num_kl, num_active = torch.stack([has_kl.sum(), is_active.sum()]).tolist()
    return Selection(
        order=order[:num_active].to(device, non_blocking=True),
        num_kl=num_kl,
        num_active=num_active,
    )
