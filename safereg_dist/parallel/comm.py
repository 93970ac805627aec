"""The ranks of a run and their collectives.

All agreements of ranks go through this module, so that the order of collectives can be read (and
tested) in one place. In a single process every method works without a process group.
"""

import functools
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from safereg_dist import errors
from safereg_dist.regions import AGREEMENT, region
from safereg_dist.types import to_device

T = TypeVar("T")
U = TypeVar("U")

_FAILED = 1 << 62  # above any number of passes, so MAX carries a failure to every rank


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """The value that a stage returned on this rank, or the error that it raised.

    A rank that fails must not leave the others waiting in a collective: it keeps the error as a
    value, and the next agreement (`Ranks.all_reduce_max_async`) raises it on all ranks.
    """

    _value: T | None = None
    error: Exception | None = None

    @property
    def value(self) -> T:
        """The value; raises the error, with its original traceback, if there is one."""
        if self.error is not None:
            raise self.error
        return cast(T, self._value)  # None only where T is None

    def or_else(self, value: T) -> T:
        """The value, or the argument if there is an error; an agreement raises that later."""
        return value if self.error is not None else self.value

    def then(self, stage: Callable[..., U], *args: Any, **kwargs: Any) -> "Result[U]":
        """The result of `stage(value, ...)`; keeps an existing error without calling it."""
        if self.error is not None:
            return Result(error=self.error)
        return capture(stage, self._value, *args, **kwargs)


def capture(stage: Callable[..., T], *args: Any, **kwargs: Any) -> Result[T]:
    """Calls `stage(...)` and returns its value or its error as a `Result`."""
    try:
        return Result(stage(*args, **kwargs))
    except Exception as error:
        return Result(error=error)


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
    def max_over_ranks(self, own: Result[int]) -> int:
        """The largest of the ranks' numbers, as a Python int.

        A failed rank passes its error instead, and every rank raises it.
        Collectives: one MAX all-reduce of 8 bytes (three gathers on the way to raising).
        """
        return self.all_reduce_max_async(own.then(lambda number: [number])).result()[0]

    @region(AGREEMENT)
    def raise_if_any_failed(self, result: Result[Any]) -> None:
        """Returns where no rank has failed; else raises the first rank's error on all ranks.

        As `raise_together`, but cheap where nothing failed.
        Collectives: one MAX all-reduce of 8 bytes (three gathers on the way to raising).
        """
        self.max_over_ranks(result.then(lambda _: 0))

    def all_reduce_max_async(self, own: Result[list[int]], *, count: int = 1) -> "Agreement":
        """Starts an agreement on the largest value over ranks of each of `count` numbers.

        A failed rank passes its error instead; reading the agreement raises it on every rank.
        Collectives: one MAX all-reduce of 8 bytes a number.
        """
        return Agreement.start(self, own, count, is_table=False)

    def all_gather_async(self, own: Result[list[int]], *, count: int) -> "Agreement":
        """Starts gathering every rank's `count` numbers, in rank order.

        Errors as in `all_reduce_max_async`. Collectives: one all-gather of 8 bytes a number and
        rank.
        """
        return Agreement.start(self, own, count, is_table=True)

    def all_to_all(self, sent: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        """The pieces that all ranks sent to this one, in rank order; sizes are along dim 0.

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

    def total(self, count: int) -> Tensor:
        """The sum of the ranks' counts, float32 on the device. Collectives: one SUM of 8 bytes."""
        own = to_device(torch.tensor(count, dtype=torch.int64), self.device)
        return self.sum_(own).float()

    def gather(self, vector: Tensor) -> Tensor:
        """[world_size, k] from every rank's [k], in rank order. Collectives: one all-gather."""
        if self.dp_group is None:
            return vector.unsqueeze(0)
        rows = [torch.empty_like(vector) for _ in range(self.world_size)]
        dist.all_gather(rows, vector, group=self.dp_group)
        return torch.stack(rows)

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's text, in rank order. Collectives: one all_gather_object; not for a step."""
        if self.dp_group is None:
            return [text]
        texts = [""] * self.world_size
        dist.all_gather_object(texts, text, group=self.dp_group)
        return texts

    def from_main(self, text: str) -> str:
        """The main rank's text, on every rank. Collectives: one broadcast; not for a step."""
        if self.dp_group is None:
            return text
        texts = [text]
        dist.broadcast_object_list(texts, group=self.dp_group, group_src=0)
        return texts[0]

    def raise_together(self, error: Exception | None) -> None:
        """Returns where no rank has an error; else raises the first rank's error on all ranks.

        Collectives: one gather of short texts (all_gather_object). Not for the hot path.
        """
        if self.dp_group is None:
            if error is not None:
                raise error
            return
        own = socket.gethostname()
        text = None if error is None else (type(error).__name__, _describe(error), own)
        texts: list[tuple[str, str, str] | None] = [None] * self.world_size
        dist.all_gather_object(texts, text, group=self.dp_group)
        first = next((r for r, t in enumerate(texts) if t is not None), None)
        if first is None:
            return
        if error is not None and first == self.rank:
            raise error
        kind, message, host = texts[first] or ("", "", "")
        cls = getattr(errors, kind, errors.RemoteRankError)
        where = f"rank {first}" if host == own else f"rank {first} on {host}"
        raise cls(message if first == 0 else f"{where}: {message}") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that may fail on one rank: then all ranks raise the same error at its end.

        The block must not run a collective: the other ranks would wait in it for the failed one.
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
    """A collective in flight over a few integers; read its result as late as possible.

    On a GPU it runs on its own stream: reading it waits for this collective (and for earlier ones
    on the same communicator), not for work queued on the device since.
    """

    def __init__(self, ranks: Ranks, error: Exception | None) -> None:
        self._ranks = ranks
        self._error = error
        self._numbers: list[int] | None = None
        self._tensor: Tensor | None = None
        self._work: Any = None

    @classmethod
    @region(AGREEMENT)
    def start(
        cls, ranks: Ranks, own: Result[list[int]], count: int, *, is_table: bool
    ) -> "Agreement":
        """Starts the collective and returns at once; see `Ranks.all_reduce_max_async`."""
        agreement = cls(ranks, own.error)
        values = [_FAILED] * count if own.error is not None else own.value
        assert len(values) == count
        if ranks.dp_group is None:
            agreement._numbers = values
            return agreement
        with _own_stream(ranks.device):
            sent = to_device(torch.tensor(values, dtype=torch.int64), ranks.device)
            if is_table:
                table = sent.new_empty(ranks.world_size, count)
                agreement._work = dist.all_gather(
                    list(table.unbind()), sent, group=ranks.dp_group, async_op=True
                )
                agreement._tensor = table
            else:
                agreement._work = dist.all_reduce(
                    sent, op=dist.ReduceOp.MAX, group=ranks.dp_group, async_op=True
                )
                agreement._tensor = sent
        return agreement

    @region(AGREEMENT)
    def result(self) -> list[int]:
        """[count] maxima, or [world_size * count] numbers of all ranks. One host sync.

        Raises:
            The first failed rank's error, on all ranks.
        Collectives: none (three gathers on the way to raising).
        """
        if self._numbers is None:
            assert self._tensor is not None
            with _own_stream(self._ranks.device):
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
