"""A teacher that was stored as its k largest logits: q is their softmax, and 0 elsewhere."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safereg_kernels.block import DIVERGENCE, LABEL_LOGIT, MAX_P, REF_B, SUM_P, SUM_PT, Block
from safereg_kernels.logits_transform import LogitsTransform
from safereg_kernels.spec import LossSpec


class TopK(NamedTuple):
    """The reference's largest logits of each token."""

    ids: Tensor
    """[tokens, k] int64 token ids, each once in a row; unread where the KL weight is 0."""
    logits: Tensor
    """[tokens, k], any float dtype; a number that all of a row share may be added (log-probs)."""


class TopKRows(NamedTuple):
    """The same of the rows with a KL weight, in working order; ids are columns here."""

    ids: Tensor
    """[num_kl, k], -1 where the token is in another shard."""
    logits: Tensor
    """[num_kl, k]."""

    def look_at(
        self, block: Block, spec: LossSpec, kl_rows: slice, statistics: Tensor
    ) -> "AtTeacher":
        """Writes the divergence of a chunk's first rows into their statistics.

        KL(q||p) = sum_k q (log q - log p), over the tokens that are columns here. Returns what
        overwrites the gradient at these tokens.
        """
        num_rows = kl_rows.stop - kl_rows.start
        ids, own = self.ids[kl_rows], statistics[:num_rows]
        is_here = ids >= 0
        transform = LogitsTransform(spec.policy_logit_scale, spec.policy_softcap)
        x = transform(block.policy[:num_rows].gather(1, ids.clamp_min(0)).float())
        log_q = torch.log_softmax(self.logits[kl_rows].float() / spec.temperature, -1)
        log_p = (x - own[:, MAX_P, None]) / spec.temperature - own[:, SUM_PT, None].log()
        q = log_q.exp()
        terms = torch.where(is_here & (q > 0), q * (log_q - log_p), 0.0)
        statistics[:num_rows, DIVERGENCE] = terms.sum(-1)
        statistics[:num_rows, REF_B] = 1.0  # the teacher has mass
        grad = block.kl_weights[:num_rows, None] / spec.temperature * (log_p.exp() - q)
        if block.labels is not None and block.ce_weights is not None:
            labels, weights = block.labels[:num_rows, None], block.ce_weights[:num_rows, None]
            lse = own[:, MAX_P, None] + own[:, SUM_P, None].log()
            weights = torch.where(own[:, LABEL_LOGIT, None].isnan(), torch.nan * weights, weights)
            p = (x - lse).exp()
            of_ce = weights * (p * (1 + 2 * spec.z_loss * lse) - (ids == labels).float())
            grad = grad + torch.where(block.ce_weights[:num_rows, None] != 0, of_ce, 0.0)
        if spec.policy_softcap is not None:
            grad = grad * (1 - (x / spec.policy_softcap) ** 2)
        return AtTeacher(ids=ids, is_here=is_here, grad=grad * spec.policy_logit_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtTeacher:
    """Gradients in the raw logits of the teacher's tokens, [rows, k]."""

    ids: Tensor
    is_here: Tensor
    grad: Tensor

    def overwrite(self, grad: Tensor) -> None:
        """Puts them in the place of p's part alone: rounded once, not added to a rounded number."""
        rows = grad[: len(self.ids)]
        # A token of another shard repeats what is written for one that is here, or, where none is,
        # what column 0 holds: so whatever the order of writes, each column gets one value.
        first = self.is_here.int().argmax(-1, keepdim=True)
        spare = self.ids.gather(1, first).clamp_min(0)
        here = self.is_here.gather(1, first)
        value = torch.where(here, self.grad.gather(1, first).to(rows.dtype), rows.gather(1, spare))
        at = torch.where(self.is_here, self.ids, spare)
        rows.scatter_(1, at, torch.where(self.is_here, self.grad.to(rows.dtype), value))


def topk_rows(topk: TopK, order: Tensor, start: int, columns: int) -> TopKRows:
    """The rows of `order`, with ids as columns of [start, start + columns)."""
    ids = topk.ids[order] - start
    return TopKRows(torch.where((ids >= 0) & (ids < columns), ids, -1), topk.logits[order])
