"""Active rows handed to ranks that have fewer, and their reference states handed back.

A pass of the reference takes as long as on the rank with the most rows. Token ids are small (8
bytes a token), states larger (2 H bytes a response token in bf16), a forward larger still: so it
nearly always pays where it saves a row, and `exchange_pays` says where it does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from safereg_dist.parallel.comm import Ranks, Result
from safereg_dist.parallel.hardware import Rates, rates_of_device
from safereg_dist.regions import EXCHANGE, region
from safereg_dist.types import Head, to_device


class TokenRow(Protocol):
    """What the reference reads of a row."""

    @property
    def input_ids(self) -> list[int]:
        """[length] token ids."""
        ...

    @property
    def loss_mask(self) -> list[int]:
        """[length] 1 on response tokens."""
        ...


class RunRows(Protocol):
    """Runs the reference on rows, e.g. `Reference.response_states`."""

    def __call__(self, rows: Sequence[TokenRow], *, passes: int) -> list[Tensor]:
        """[t, H_ref] states of each row, computed in `passes` passes."""
        ...


class Lent(NamedTuple):
    """A row of another rank, as far as the reference reads it."""

    input_ids: list[int]
    loss_mask: list[int]


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Moves rows between ranks if that shortens the reference's passes."""

    ranks: Ranks
    rates: Rates
    """Rates of the slowest rank, the same on all ranks, so that all decide alike."""
    trunk_parameters: int
    """Weights of the trunk that one token is multiplied by."""
    head: Head
    """The reference's head: gives size and dtype of the states."""
    rows_per_pass: int

    def states(self, rows: Sequence[TokenRow], run: RunRows) -> tuple[list[Tensor], int]:
        """[t, H_ref] states of each of this rank's rows, and the number of rows that it ran.

        Collectives: an all-gather of 16 bytes from each rank and those of `run`; where the exchange
        pays, two all-to-alls around them.
        """
        longest_here = max((len(row.input_ids) for row in rows), default=0)
        own = Result([len(rows), longest_here])
        table = self.ranks.all_gather_async(own, count=2).result()
        counts, longest = table[0::2], max(table[1::2])
        moves = even_moves(counts)
        after = [n - sum(moves[r]) + sum(m[r] for m in moves) for r, n in enumerate(counts)]
        if not self._pays(counts, after, moves, longest):
            return run(rows, passes=self._passes(counts)), len(rows)

        given, taken = moves[self.ranks.rank], [move[self.ranks.rank] for move in moves]
        num_kept = len(rows) - sum(given)
        lent = self._lend(rows[num_kept:], given, taken, longest)
        states = run([*rows[:num_kept], *lent], passes=self._passes(after))
        returned = self._give_back(states[num_kept:], lent, rows[num_kept:], given, taken)
        return [*states[:num_kept], *returned], num_kept + len(lent)

    def _passes(self, counts: list[int]) -> int:
        return -(-max(counts) // self.rows_per_pass)

    @region(EXCHANGE)
    def _lend(
        self, rows: Sequence[TokenRow], given: list[int], taken: list[int], longest: int
    ) -> list[Lent]:
        """The rows that other ranks lend here. Collectives: one all-to-all. One host sync."""
        sent = torch.zeros(len(rows), 1 + longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            length = len(row.input_ids)
            sent[place, 0] = length
            # One number holds a token and its mask bit.
            tokens, mask = torch.tensor(row.input_ids), torch.tensor(row.loss_mask)
            sent[place, 1 : 1 + length] = 2 * tokens + mask
        received = self.ranks.all_to_all(to_device(sent, self.ranks.device), given, taken)
        lent = []
        for length, *codes in received.tolist():
            lent.append(Lent([c >> 1 for c in codes[:length]], [c & 1 for c in codes[:length]]))
        return lent

    @region(EXCHANGE)
    def _give_back(
        self,
        states: Sequence[Tensor],
        lent: Sequence[TokenRow],
        own: Sequence[TokenRow],
        given: list[int],
        taken: list[int],
    ) -> Sequence[Tensor]:
        """The states of this rank's rows that other ranks ran. Collectives: one all-to-all."""
        weight = self.head.weight
        assert weight is not None
        size = self.head.state_size
        nothing = torch.empty(0, size, dtype=weight.dtype, device=self.ranks.device)
        returned = self.ranks.all_to_all(
            torch.cat([nothing, *states]), _tokens_by_rank(lent, taken), _tokens_by_rank(own, given)
        )
        return returned.split([_num_states(row) for row in own])

    def _pays(
        self, counts: list[int], after: list[int], moves: list[list[int]], longest: int
    ) -> bool:
        """The decision of `exchange_pays`, the same on all ranks."""
        weight = self.head.weight
        assert weight is not None
        most_moved = max(max(map(sum, moves)), max(map(sum, zip(*moves, strict=True))))
        return most_moved > 0 and exchange_pays(
            rows_before=max(counts),
            rows_after=max(after),
            passes_before=self._passes(counts),
            passes_after=self._passes(after),
            tokens_per_row=longest,
            moved_bytes=most_moved * longest * (8 + self.head.state_size * weight.itemsize),
            trunk_parameters=self.trunk_parameters,
            parameter_bytes=weight.itemsize,
            rates=self.rates,
        )


def even_moves(counts: Sequence[int]) -> list[list[int]]:
    """[W, W] number of rows that rank i gives to rank j; after it counts differ by at most one.

    It moves as few rows as possible: the remainder stays on the ranks that have most.
    """
    world_size, (share, left) = len(counts), divmod(sum(counts), len(counts))
    largest = sorted(range(world_size), key=lambda rank: -counts[rank])[:left]
    surplus = [count - share - (rank in largest) for rank, count in enumerate(counts)]
    moves = [[0] * world_size for _ in counts]
    for giver in range(world_size):
        for taker in range(world_size):
            rows = min(max(surplus[giver], 0), max(-surplus[taker], 0))
            moves[giver][taker] = rows
            surplus[giver] -= rows
            surplus[taker] += rows
    return moves


def _tokens_by_rank(rows: Sequence[TokenRow], counts: list[int]) -> list[int]:
    """Response tokens of the next `counts[r]` rows, for each rank r."""
    left = iter(rows)
    return [sum(_num_states(next(left)) for _ in range(count)) for count in counts]


def _num_states(row: TokenRow) -> int:
    return sum(row.loss_mask[1:])


def exchange_pays(
    *,
    rows_before: int,
    rows_after: int,
    passes_before: int,
    passes_after: int,
    tokens_per_row: float,
    moved_bytes: int,
    trunk_parameters: int,
    parameter_bytes: int,
    rates: Rates,
) -> bool:
    """True if the exchange saves more time of the reference than it takes.

        saved = (rows_before - rows_after) * 2 P tokens_per_row / flops_per_s
              + (passes_before - passes_after) * P parameter_bytes / link_bytes_per_s
        cost  = moved_bytes / link_bytes_per_s

    All ranks wait for the slowest one, whose rows cost 2 FLOPs per parameter and token. Each pass
    saved saves one gather of the trunk. The latency of collectives is not counted: an exchange has
    two collectives, a pass has one for every layer.

    Args:
        rows_before, rows_after: risky rows of the rank that has most, without and with exchange.
        passes_before, passes_after: passes that every rank makes.
        tokens_per_row: length of a risky row.
        moved_bytes: token ids there and hidden states back, of the rank that moves most.
        trunk_parameters: P, those used by one token. Of a mixture of experts the active ones: its
            gathers are larger, so the saving is underestimated, never overestimated.
        parameter_bytes: of one parameter of the reference, 2 in bf16.
        rates: the same on every rank, so that all decide alike.
    """
    shorter = (rows_before - rows_after) * 2 * trunk_parameters * tokens_per_row
    fewer = (passes_before - passes_after) * trunk_parameters * parameter_bytes
    saved = shorter / rates.flops_per_s + fewer / rates.link_bytes_per_s
    return saved > moved_bytes / rates.link_bytes_per_s


def slowest_rates(ranks: Ranks) -> Rates:
    """The smallest rates over all ranks, so that all decide alike. Collectives: two all-gathers."""
    device = ranks.device
    local_ranks = ranks.gather(torch.tensor([ranks.local_rank], device=device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    own = rates_of_device(name, spans_nodes=int((local_ranks == 0).sum()) > 1)
    numbers = torch.tensor([own.flops_per_s, own.link_bytes_per_s], dtype=torch.float64)
    flops, link_bytes = ranks.gather(numbers.to(device)).amin(0).tolist()
    return Rates(flops_per_s=flops, link_bytes_per_s=link_bytes)
