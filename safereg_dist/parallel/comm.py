"""The ranks of a run and the few collectives they share.

Everything that ranks agree on goes through here, so that the order of collectives can be read (and
tested) in one place. In a single process every method works without a process group.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from safereg_dist import errors
from safereg_dist.parts import AGREEMENT, part

T = TypeVar("T")

_FAILED = 1 << 62  # above any number of passes, so MAX carries a failure to every rank


def held(stage: Callable[..., T], *args: Any) -> T:
    """The stage's result, or its error in place of it, to be raised by all ranks at once.

    The next agreement (`Ranks.agree_on_passes`) takes either, so that a rank that fails does not
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

    @part(AGREEMENT)
    def agree_on_passes(self, need: int | Exception) -> int:
        """The largest number of passes that any rank needs; an int known to the host.

        A rank that has failed gives its error instead, and every rank raises together.
        Collectives: one MAX all-reduce of 8 bytes (three more only on the way to raising).
        """
        failed = isinstance(need, Exception)
        if self.dp_group is None:
            if failed:
                raise need
            return need
        agreed = torch.tensor([_FAILED if failed else need], device=self.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.dp_group)
        passes = int(agreed.item())
        if passes >= _FAILED:
            self.raise_together(need if failed else None)
        return passes

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
