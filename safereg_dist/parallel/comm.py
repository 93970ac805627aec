"""The ranks of a run and the few collectives they share.

Everything that ranks agree on goes through here, so that the order of collectives can be read (and
tested) in one place. In a single process every method works without a process group.
"""

import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from safereg_dist import errors
from safereg_dist.regions import AGREEMENT, region
from safereg_dist.types import to_device

T = TypeVar("T")

_FAILED = 1 << 62  # above any number of passes, so MAX carries a failure to every rank


def held(stage: Callable[..., T], *args: Any) -> T:
    """The stage's result, or its error in place of it, to be raised by all ranks at once.

    The next agreement (`Ranks.max_over_ranks`) takes either, so that a rank that fails does not
    leave the others waiting in a collective. (Typed as the result: an error never gets past that.)
    """
    try:
        return stage(*args)
    except Exception as error:
        return error  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the data-parallel ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    dp_group: dist.ProcessGroup | None
    """None in a single process."""

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes shared files."""
        return self.rank == 0

    @region(AGREEMENT)
    def max_over_ranks(self, need: int | Exception) -> int:
        """The largest number of passes that any rank needs; an int known to the host.

        A rank that has failed gives its error instead, and every rank raises together.
        Collectives: one MAX all-reduce of 8 bytes (three more only on the way to raising).
        """
        own = need if isinstance(need, Exception) else [need]
        return self.all_reduce_max_async(own).result()[0]

    def all_reduce_max_async(
        self, own: Sequence[int] | Exception, *, count: int = 1
    ) -> "Agreement":
        """The largest of each of `count` numbers over ranks, under way until its result is read.

        A rank that has failed gives its error instead, and every rank raises on reading.
        Collectives: one MAX all-reduce of 8 bytes a number.
        """
        return Agreement(self, own, count, is_table=False)

    def all_gather_async(self, own: Sequence[int] | Exception, *, count: int) -> "Agreement":
        """Every rank's `count` numbers, in rank order; else as `all_reduce_max_async`.

        Collectives: one all-gather of 8 bytes a number and rank.
        """
        return Agreement(self, own, count, is_table=True)

    def all_to_all(self, sent: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        """The pieces that all ranks have for this one, in rank order; sizes count along dim 0.

        Collectives: one all-to-all.
        """
        received = sent.new_empty(sum(receive_sizes), *sent.shape[1:])
        dist.all_to_all_single(
            received, sent.contiguous(), receive_sizes, send_sizes, group=self.dp_group
        )
        return received

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place, left on the device. Collectives: one SUM."""
        if self.dp_group is not None:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def gather(self, vector: Tensor) -> Tensor:
        """[world_size, k] from every rank's [k], in rank order. Collectives: one all-gather."""
        if self.dp_group is None:
            return vector.unsqueeze(0)
        rows = [torch.empty_like(vector) for _ in range(self.world_size)]
        dist.all_gather(rows, vector, group=self.dp_group)
        return torch.stack(rows)

    def raise_together(self, error: Exception | None) -> None:
        """Returns where no rank has an error; else raises the first rank's error on all ranks.

        Collectives: one gather of short texts (all_gather_object). Not for the hot path.
        """
        if self.dp_group is None:
            if error is not None:
                raise error
            return
        text = None if error is None else (type(error).__name__, _describe(error))
        texts: list[tuple[str, str] | None] = [None] * self.world_size
        dist.all_gather_object(texts, text, group=self.dp_group)
        first = next((r for r, t in enumerate(texts) if t is not None), None)
        if first is None:
            return
        if error is not None and first == self.rank:
            raise error
        kind, message = texts[first] or ("", "")
        cls = getattr(errors, kind, errors.RemoteRankError)
        raise cls(message if first == 0 else f"rank {first}: {message}") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that one rank may fail in: either all leave it, or all raise the same error.

        The block itself must not hold a collective, or the ranks that did not fail would wait.
        Collectives: one `raise_together`.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as err:
            error = err
        self.raise_together(error)

    def main_first(self) -> "_MainFirst":
        """A block that the first rank of each node runs before the others (shared caches).

        Collectives: two `raise_together`.
        """
        return _MainFirst(self)


class Agreement:
    """Numbers that all ranks will have agreed on; read it as late as possible.

    On a GPU it has a stream of its own: reading it waits for this collective (and for those before
    it on the same communicator), not for the work that was queued on the device meanwhile.
    """

    @region(AGREEMENT)
    def __init__(
        self, ranks: Ranks, own: Sequence[int] | Exception, count: int, *, is_table: bool
    ) -> None:
        self._ranks = ranks
        self._error = own if isinstance(own, Exception) else None
        self._is_table = is_table
        values = [_FAILED] * count if isinstance(own, Exception) else list(own)
        assert len(values) == count
        if ranks.dp_group is None:
            self._numbers: list[int] | None = values
            return
        self._numbers = None
        with _own_stream(ranks.device):
            sent = to_device(torch.tensor(values, dtype=torch.int64), ranks.device)
            if is_table:
                self._tensor = sent.new_empty(ranks.world_size, count)
                self._work = dist.all_gather(
                    list(self._tensor.unbind()), sent, group=ranks.dp_group, async_op=True
                )
            else:
                self._tensor = sent
                self._work = dist.all_reduce(
                    sent, op=dist.ReduceOp.MAX, group=ranks.dp_group, async_op=True
                )

    @region(AGREEMENT)
    def result(self) -> list[int]:
        """[count] largest numbers, or [world_size * count] numbers of all ranks. One host sync.

        Raises:
            The first failed rank's error, on all ranks.
        Collectives: none (three gathers on the way to raising).
        """
        if self._numbers is None:
            with _own_stream(self._ranks.device):
                assert self._work is not None
                self._work.wait()
                self._numbers = self._tensor.flatten().tolist()
        if max(self._numbers) >= _FAILED:
            if self._ranks.dp_group is None:
                assert self._error is not None
                raise self._error
            self._ranks.raise_together(self._error)
        return self._numbers


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_agreement_stream(device)):
        yield


@functools.cache
def _agreement_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _MainFirst:
    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __enter__(self) -> None:
        if self._ranks.local_rank != 0:
            self._ranks.raise_together(None)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        own = error if isinstance(error, Exception) else None
        self._ranks.raise_together(own)
        if self._ranks.local_rank == 0:
            self._ranks.raise_together(None)


def _describe(error: Exception) -> str:
    if isinstance(error, errors.SafeRegError | errors.ShapeError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {last[0].filename}:{last[0].lineno}" if last else ""
    return f"{type(error).__name__}: {error}{where}"
