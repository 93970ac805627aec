"""Training rows that are read when they are needed, for data sets that no disk holds."""

import sys
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from safereg_dist.config import DataConfig
from safereg_dist.data.shares import Shares
from safereg_dist.data.tokenized import shorten, source_rows, tokenize_row
from safereg_dist.errors import DataError, printable
from safereg_dist.types import Row


class StreamedRows:
    """This rank's training rows, tokenised as they are asked for, in an endless order.

    Row i of a file or data set belongs to rank i mod W. Each rank shuffles its own within a buffer,
    anew in each pass, so that (seed, position) determines the row. Positions are asked for in
    ascending order, give or take the `keep` latest; any other is found by reading from the start.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rank: int,
        world_size: int,
        seed: int,
        keep: int,
        needs_risk: bool = False,
    ) -> None:
        """Reads nothing yet. `needs_risk`: a row without `risk` is an error.

        Raises:
            DataError: two files of one name, after which rows without an id would be named alike.
        """
        self._config, self._tokenizer, self._needs_risk = config, tokenizer, needs_risk
        self._warns = rank == 0
        paths = [each.path for each in config.train_sets]
        if len({Path(path).stem for path in paths}) < len(paths):
            raise DataError(
                f"data.train={config.train_names} has two sets of one name, after which rows "
                "without `id` are named: rename one"
            )
        weights = config.train_weights
        self._shares = Shares(weights or [1.0])
        self._streams = [
            _Stream(
                group,
                rank=rank,
                world_size=world_size,
                seed=seed,
                buffer=config.shuffle_buffer,
            )
            for group in ([[path] for path in paths] if weights else [paths])
        ]
        self._keep = keep
        self._recent: dict[int, Row | None] = {}

    def row(self, position: int) -> Row | None:
        """The row at a position of this rank's order; None where it is left out as too long.

        Raises:
            DataError: a row that cannot be used, with file and line; or no row for this rank.
        """
        if position not in self._recent:
            part, ordinal = self._shares.place(position)
            self._recent[position] = self._tokenized(self._streams[part].raw(ordinal))
            for old in [p for p in self._recent if abs(p - position) >= self._keep]:
                del self._recent[old]
        return self._recent[position]

    def _tokenized(self, found: dict[str, Any]) -> Row | None:
        where, config = found["where"], self._config
        row = tokenize_row(found["row"], where, self._tokenizer, default_id=found["id"])
        if self._needs_risk and row.risk is None:
            raise DataError(
                f"{where}: risk.estimator=column needs `risk` in every row: add it, or choose "
                "another estimator"
            )
        if len(row.input_ids) <= config.max_length:
            return row
        kept = shorten(row, where, config)
        if kept is None and self._warns:
            self._warns = False
            print(
                f"safereg: {printable(where)} is longer than data.max_length={config.max_length}: "
                "its place in the batch stays empty, as that of all such rows",
                file=sys.stderr,
                flush=True,
            )
        return kept


class _Stream:
    """The raw rows of some files or data sets, one after the other, that belong to one rank."""

    def __init__(
        self, paths: Sequence[str], *, rank: int, world_size: int, seed: int, buffer: int
    ) -> None:
        self._paths = paths
        # As a tuple: `datasets` takes a list for shards, and shuffles those.
        own = {"paths": tuple(paths), "rank": rank, "world_size": world_size}
        self._rows = IterableDataset.from_generator(_own_rows, gen_kwargs=own)
        if buffer > 1:
            self._rows = self._rows.shuffle(seed=seed, buffer_size=buffer)
        self._next = 0
        self._coming = self._passes()

    def raw(self, ordinal: int) -> dict[str, Any]:
        """The `row` at an ordinal of the order, with `where` it stands and an `id`."""
        if ordinal < self._next:
            self._next, self._coming = 0, self._passes()
        skipped = ordinal - self._next
        self._next = sys.maxsize  # after an error nothing comes any more: begin again
        found = next(islice(self._coming, skipped, None))
        self._next = ordinal + 1
        return found

    def _passes(self) -> Iterator[dict[str, Any]]:
        return chain.from_iterable(self._pass(epoch) for epoch in count())

    def _pass(self, epoch: int) -> Iterator[dict[str, Any]]:
        self._rows.set_epoch(epoch)
        is_empty = True
        for row in self._rows:
            is_empty = False
            yield row
        if is_empty:
            raise DataError(
                f"{', '.join(self._paths)} has fewer rows than there are ranks: give at least one "
                "a rank"
            )


def _own_rows(paths: Sequence[str], rank: int, world_size: int) -> Iterator[dict[str, Any]]:
    rows = (
        {"row": row, "where": where, "id": f"{Path(path).stem}-{index}"}
        for path in paths
        for index, (where, row) in enumerate(source_rows(path, streaming=True))
    )
    return islice(rows, rank, None, world_size)
