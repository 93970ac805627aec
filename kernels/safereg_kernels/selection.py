"""Which rows reach a matrix product, those with a KL weight first, and what each of them weighs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The active rows in the order in which they are worked on, and their weights in that order."""

    order: Tensor
    """[num_active] int64 on the device of the hidden states."""
    ce_weights: Tensor
    """[num_active] float32."""
    kl_weights: Tensor
    """[num_active] float32."""
    is_ce_wanted: Tensor
    """[num_active] bool: the cross-entropy has a weight, or is to be reported."""
    num_active: int
    num_kl: int
    """The first so many have a KL weight."""
    num_ce: int
    """So many want a cross-entropy."""
    num_tokens: int

    @property
    def is_in_order(self) -> bool:
        """True where the order is 0, 1, 2, ...: the sort that made it is stable."""
        return self.num_active == self.num_tokens and self.num_kl in (0, self.num_tokens)

    def weighted(self, is_ignored: Tensor, upstream: Tensor | None) -> "Selection":
        """The same rows with no cross-entropy where it is ignored, all weights times `upstream`.

        Args:
            is_ignored: [num_active] bool.
            upstream: [num_tokens], or None = 1.
        """
        ce_weights, kl_weights = torch.where(is_ignored, 0.0, self.ce_weights), self.kl_weights
        if upstream is not None:
            of_rows = upstream.float()[self.order]
            ce_weights, kl_weights = ce_weights * of_rows, kl_weights * of_rows
        return replace(
            self,
            ce_weights=ce_weights,
            kl_weights=kl_weights,
            is_ce_wanted=self.is_ce_wanted & ~is_ignored,
        )


def select_rows(
    ce_weights: Tensor, kl_weights: Tensor, ce_report: Tensor | None, device: torch.device
) -> Selection:
    """The selection for weights [tokens].

    Weights on the host are sorted there and cross to the device in one copy, without waiting for
    it. Weights on the device cost one wait, to count rows.
    """
    if ce_report is not None and ce_report.device != ce_weights.device:
        ce_report = ce_report.to(ce_weights.device)
    kl_weights = kl_weights.to(ce_weights.device)
    is_wanted, has_kl = ce_weights != 0, kl_weights != 0
    if ce_report is not None:
        is_wanted = is_wanted | ce_report
    is_active = is_wanted | has_kl
    order = torch.where(has_kl, 0, torch.where(is_active, 1, 2)).argsort(stable=True)
    counts = torch.stack([is_active.sum(), has_kl.sum(), is_wanted.sum()]).tolist()
    num_active, num_kl, num_ce = counts
    order = order[:num_active]
    order, ce, kl, wanted = to_device(
        [order, ce_weights.detach().float()[order], kl_weights.detach().float()[order],
         is_wanted[order]],
        device,
    )  # fmt: skip
    return Selection(
        order=order,
        ce_weights=ce,
        kl_weights=kl,
        is_ce_wanted=wanted,
        num_active=num_active,
        num_kl=num_kl,
        num_ce=num_ce,
        num_tokens=len(ce_weights),
    )


def to_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The same on the device. From the host in one pinned buffer and one copy that nobody awaits.

    Copies from ordinary memory may make the host wait for the stream. Sizes of elements must not
    grow from one tensor to the next, so that each one starts at a multiple of its own.
    """
    if tensors[0].device == device:
        return tensors
    raw = [tensor.contiguous().view(torch.uint8) for tensor in tensors]
    buffer = torch.empty(sum(map(len, raw)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    torch.cat(raw, out=buffer)
    pieces = buffer.to(device, non_blocking=True).split([len(piece) for piece in raw])
    return [piece.view(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]
