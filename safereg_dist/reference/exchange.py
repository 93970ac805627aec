"""Active rows handed to ranks that have fewer, and their reference states handed back.

A pass of the reference takes as long as on the rank with the most rows. Token ids are small (8
bytes a token), states larger (2 H bytes a response token in bf16), a forward larger still: so it
nearly always pays where it saves a row, and `plan.costs` says where it does not.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.hardware import Rates, rates_of_device
from safereg_dist.reference.cost import exchange_pays
from safereg_dist.regions import EXCHANGE, region
from safereg_dist.types import to_device

if TYPE_CHECKING:
    from safereg_dist.reference.reference import Reference, TokenRow


class Lent(NamedTuple):
    """A row of another rank: all that the reference reads of it."""

    input_ids: list[int]
    loss_mask: list[int]


def even_moves(counts: Sequence[int]) -> list[list[int]]:
    """[W, W] rows that rank i gives to rank j, so that counts differ by at most one in the end.

    The fewest rows that can: a rank that has many keeps one more than the mean where it may.
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


def exchanged_states(
    reference: "Reference", rows: Sequence["TokenRow"]
) -> tuple[list[Tensor], int]:
    """[t, H_ref] states of each of this rank's rows, and the rows that it ran, own or lent.

    Collectives: an all-gather of 16 bytes from each rank and the engine's; where the exchange pays,
    two all-to-alls around them.
    """
    per_pass, ranks = reference.packing.rows_per_pass, reference.ranks
    longest_here = max((len(row.input_ids) for row in rows), default=0)
    table = ranks.all_gather_async([len(rows), longest_here], count=2).result()
    counts, longest = table[0::2], max(table[1::2])
    moves = even_moves(counts)
    after = [n - sum(moves[r]) + sum(m[r] for m in moves) for r, n in enumerate(counts)]
    if not _pays(reference, counts, after, moves, longest):
        return reference.response_states(rows, passes=-(-max(counts) // per_pass)), len(rows)

    given, taken = moves[ranks.rank], [move[ranks.rank] for move in moves]
    num_kept = len(rows) - sum(given)
    lent = _lend(reference, rows[num_kept:], given, taken, longest)
    states = reference.response_states([*rows[:num_kept], *lent], passes=-(-max(after) // per_pass))
    returned = _give_back(reference, states[num_kept:], lent, rows[num_kept:], given, taken)
    return [*states[:num_kept], *returned], num_kept + len(lent)


@region(EXCHANGE)
def _lend(
    reference: "Reference",
    rows: Sequence["TokenRow"],
    given: list[int],
    taken: list[int],
    longest: int,
) -> list[Lent]:
    """The rows that others lend to this rank; one all-to-all, one host sync."""
    sent = torch.zeros(len(rows), 1 + longest, dtype=torch.int64)
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        sent[place, 0] = length
        # A token and its place in the response, in one number.
        tokens, mask = torch.tensor(row.input_ids), torch.tensor(row.loss_mask)
        sent[place, 1 : 1 + length] = 2 * tokens + mask
    device = reference.ranks.device
    received = reference.ranks.all_to_all(to_device(sent, device), given, taken)
    lent = []
    for length, *codes in received.tolist():
        lent.append(Lent([c >> 1 for c in codes[:length]], [c & 1 for c in codes[:length]]))
    return lent


@region(EXCHANGE)
def _give_back(
    reference: "Reference",
    states: Sequence[Tensor],
    lent: Sequence["TokenRow"],
    own: Sequence["TokenRow"],
    given: list[int],
    taken: list[int],
) -> Sequence[Tensor]:
    """The states of this rank's rows that others ran; one all-to-all."""
    head = reference.head.weight
    assert head is not None
    nothing = torch.empty(0, reference.state_size, dtype=head.dtype, device=reference.ranks.device)
    returned = reference.ranks.all_to_all(
        torch.cat([nothing, *states]), _tokens_by_rank(lent, taken), _tokens_by_rank(own, given)
    )
    return returned.split([_num_states(row) for row in own])


def _tokens_by_rank(rows: Sequence["TokenRow"], counts: list[int]) -> list[int]:
    """Response tokens of so many rows in turn, for each rank."""
    left = iter(rows)
    return [sum(_num_states(next(left)) for _ in range(count)) for count in counts]


def _num_states(row: "TokenRow") -> int:
    return sum(row.loss_mask[1:])


def _pays(
    reference: "Reference",
    counts: list[int],
    after: list[int],
    moves: list[list[int]],
    longest: int,
) -> bool:
    """The cost model's answer, from numbers that all ranks have."""
    head = reference.head.weight
    assert head is not None
    assert reference.rates is not None
    most_moved = max(max(map(sum, moves)), max(map(sum, zip(*moves, strict=True))))
    per_pass = reference.packing.rows_per_pass
    return most_moved > 0 and exchange_pays(
        rows_before=max(counts),
        rows_after=max(after),
        passes_before=-(-max(counts) // per_pass),
        passes_after=-(-max(after) // per_pass),
        tokens_per_row=longest,
        moved_bytes=most_moved * longest * (8 + reference.state_size * head.itemsize),
        trunk_parameters=reference.trunk_parameters,
        parameter_bytes=head.itemsize,
        rates=reference.rates,
    )


def slowest_rates(ranks: Ranks) -> Rates:
    """The rates of the slowest rank, so that all decide alike. Collectives: two all-gathers."""
    device = ranks.device
    local_ranks = ranks.gather(torch.tensor([ranks.local_rank], device=device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    own = rates_of_device(name, spans_nodes=int((local_ranks == 0).sum()) > 1)
    numbers = torch.tensor([own.flops_per_s, own.link_bytes_per_s], dtype=torch.float64)
    flops, link_bytes = ranks.gather(numbers.to(device)).amin(0).tolist()
    return Rates(flops_per_s=flops, link_bytes_per_s=link_bytes)
