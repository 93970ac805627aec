"""What the fused operators cost in FLOPs, told to whoever counts.

A counter that watches matrix products cannot say which of an operator's products belong to which
term. So each operator hands over its formula, and where its work for the divergence begins and
ends. `masked_kl` has no matrix product: its formula is 0.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol


class HeadFlops(NamedTuple):
    """FLOPs of one call's matrix products; a multiplication and an addition are two."""

    cross_entropy: int
    """The policy's logits and their gradients: what a head without a reference costs too."""
    divergence: int
    """The reference's logits."""

    @property
    def total(self) -> int:
        """Both."""
        return self.cross_entropy + self.divergence


def linear_ce_kl_flops(
    *,
    num_active: int,
    num_kl: int,
    columns: int,
    hidden_size: int,
    reference_hidden_size: int = 0,
    is_hidden_grad_needed: bool = True,
    is_weight_grad_needed: bool = True,
) -> HeadFlops:
    """FLOPs of `linear_ce_kl` (and of a rank's share of `vocab_parallel_linear_ce_kl`).

    cross_entropy = 2 T V H (1 + g_hidden + g_weight),   divergence = 2 T_kl V H_ref

    T is the number of rows that reach a product (a weight is positive, or a report asks for their
    cross-entropy), T_kl of those with a KL weight, V the columns here, g = 1 where a gradient is
    needed. All is done in the forward; the backward has no product. The difference form
    (`is_difference`) has as many.

    Args:
        num_active, num_kl: T and T_kl, rows.
        columns: V, rows of the head on this rank.
        hidden_size, reference_hidden_size: H and H_ref.
        is_hidden_grad_needed, is_weight_grad_needed: False under `no_grad`, or for a frozen one.
    """
    products = 1 + is_hidden_grad_needed + is_weight_grad_needed
    return HeadFlops(
        cross_entropy=2 * num_active * columns * hidden_size * products,
        divergence=2 * num_kl * columns * reference_hidden_size,
    )


class FlopListener(Protocol):
    """What is told of fused operators while it listens."""

    def operator(self, flops: HeadFlops) -> AbstractContextManager[None]:
        """Around an operator of this cost: its products are in it, not to be counted again."""
        ...

    def divergence(self) -> AbstractContextManager[None]:
        """Around what an operator does for the divergence alone."""
        ...


_listener: FlopListener | None = None


@contextmanager
def listening(listener: FlopListener) -> Iterator[None]:
    """A block in which `listener` is told of every fused operator of this process."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def operator(flops: HeadFlops) -> AbstractContextManager[None]:
    """Around the products of a fused operator, whose formula gives `flops`."""
    return nullcontext() if _listener is None else _listener.operator(flops)


def divergence() -> AbstractContextManager[None]:
    """Around the products that an operator makes for the divergence alone."""
    return nullcontext() if _listener is None else _listener.divergence()
