"""`safereg reference build`: computes the reference states of a run's active rows in advance.

Ranks deal all training and anchor rows among them and go through their share once, in windows: risk
and schedule say which rows are active (b > 0), the reference runs on those, longest first, and
their states go to disk. Memory holds the tokens of a window, the states of one pass, and a shard.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from safereg_dist.coefficient import Coefficient
from safereg_dist.commands.options import add_action, add_config, add_json, add_quiet, example
from safereg_dist.commands.outcome import Outcome, command, training_verb
from safereg_dist.config import load_config, replace
from safereg_dist.data import TokenizedDataset
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.factory import RiskContext, RowSources, build_risk_context, start_backend
from safereg_dist.models.fingerprint import row_key
from safereg_dist.parallel.comm import Ranks, Result, capture
from safereg_dist.parallel.distributed import leave_group, share_cores
from safereg_dist.reference import Reference, active_rows
from safereg_dist.reference.store import StoreIdentity
from safereg_dist.reference.store_writer import (
    SHARD_BYTES,
    WINDOW_PASSES,
    StoreSize,
    StoreWriter,
    begin_store,
    finish_store,
    partial_folder,
    require_absent,
)
from safereg_dist.screen.progress import progress_bar
from safereg_dist.screen.table import table
from safereg_dist.storage.signing import signing_key
from safereg_dist.types import Row


def build_store(
    parts: RiskContext, out: Path, *, shard_bytes: int = SHARD_BYTES
) -> StoreSize | None:
    """Writes the states of all active rows of the data to `out`; their size, on rank 0.

    Raises:
        ConfigError: `out` exists, is not one folder for all nodes, or the key is missing.
        DataError: states of a row are not finite.
        CheckpointError: the states cannot be written.
    Collectives: for each window those of risk and reference, and agreements of 8 bytes.
    """
    ranks, reference = parts.ranks, parts.reference
    assert isinstance(reference, Reference)
    signing = parts.config.signing
    with ranks.together():
        if ranks.is_main:
            signing_key(signing)  # refused now, not once all states are there
            begin_store(out)
    writer = StoreWriter(
        partial_folder(out), ranks.rank, shard_bytes=shard_bytes, is_signed=signing is not None
    )
    _Build(parts, reference, writer).run()
    with ranks.together():
        writer.flush()
    rows = int(ranks.sum_(torch.tensor(len(writer), device=ranks.device)).item())
    identity = StoreIdentity.of(
        parts.fingerprints["reference"],
        parts.tokenizer,
        parts.sources.content_hashes,
        precision=parts.config.train.precision,
    )
    size = None
    with ranks.together():
        if ranks.is_main:
            hidden_size = reference.state_size
            key = signing_key(signing)
            size = finish_store(out, identity, hidden_size=hidden_size, rows=rows, key=key)
            print(_summary(size, out))
    return size


def _summary(size: StoreSize, out: Path) -> str:
    rows = [
        ("rows", f"{size.rows:,}"),
        ("response tokens", f"{size.tokens:,}"),
        ("bytes", f"{size.num_bytes:,}"),
        ("bytes a token", f"{size.num_bytes / max(size.tokens, 1):.0f}"),
    ]
    text = table("Reference states", ("", "number"), rows)
    return f"{text}\nwritten to {out}: train with reference.cache={out}"


class _Build:
    """Builds one rank's shards, window by window."""

    def __init__(self, parts: RiskContext, reference: Reference, writer: StoreWriter) -> None:
        self._parts = parts
        self._ranks: Ranks = parts.ranks
        self._reference = reference
        self._writer = writer
        self._coefficient = Coefficient(
            parts.config.regularizer,
            threshold=parts.threshold,
            ranks=parts.ranks,
            ceilings=parts.ceilings,
        )

    def run(self) -> None:
        """Stores the active rows of each window; every rank has the same number of windows."""
        rows = own_rows(self._parts.sources, self._ranks)
        size = WINDOW_PASSES * self._reference.packing.rows_per_pass
        share = -(-_num_rows(self._parts.sources) // self._ranks.world_size)
        with progress_bar(
            total=share, desc="reference states", unit=" rows", shown=self._ranks.is_main
        ) as bar:
            while window := list(islice(rows, size)):
                self._store(self._active(window))
                bar.update(len(window))

    def _active(self, window: list[Row | None]) -> list[Row]:
        """Rows of the window with b > 0, or that may have it beside other rows.

        Collectives: those of the risk stage and one 8-byte MAX all-reduce for each micro-batch.
        """
        config, risk, filler = self._parts.config, self._parts.risk, self._parts.sources.filler
        if config.regularizer.granularity == "batch":
            return [row for row in window if row is not None and any(row.loss_mask)]
        risk.prefetch(row for row in window if row is not None)
        size = config.train.micro_batch_size
        active = []
        for begin in range(0, len(window), size):
            rows = [filler if row is None else row for row in window[begin : begin + size]]
            found = capture(risk, rows, in_first_epoch=True)
            kl_coef = capture(self._coefficient, rows, found)
            self._ranks.raise_if_any_failed(kl_coef)
            active += [rows[row] for row in active_rows(kl_coef.value, rows)]
        return active

    def _store(self, active: list[Row]) -> None:
        """Runs the reference on rows that are new to this rank, and writes their states.

        Collectives: the engine's, for each pass, and two 8-byte MAX all-reduces.
        """
        keys = {row_key(row.input_ids, row.loss_mask): row for row in active}
        new = [(key, row) for key, row in keys.items() if not self._writer.holds(key)]
        new.sort(key=lambda item: -len(item[1].input_ids))
        size = self._reference.packing.rows_per_pass
        passes = self._ranks.max_over_ranks(Result(-(-len(new) // size)))
        written: Result[None] = Result()
        for begin in range(0, passes * size, size):
            group = new[begin : begin + size]
            states = self._reference.response_states([row for _, row in group], passes=1)
            if written.error is None:
                written = capture(self._keep, group, states)
        self._ranks.raise_if_any_failed(written)

    def _keep(self, group: list[tuple[str, Row]], states: list[Tensor]) -> None:
        for (key, row), hidden in zip(group, states, strict=True):
            on_host = hidden.cpu()
            if not on_host.isfinite().all():
                raise DataError(
                    f"the reference's states of row {row.id!r} are not finite: check its weights, "
                    "or run it with train.precision=fp32"
                )
            self._writer.add(key, on_host)


def own_rows(sources: RowSources, ranks: Ranks) -> Iterator[Row | None]:
    """This rank's share of the training rows and, after them, the anchor rows.

    Ends with None where another rank has one row more.
    """
    total, train = _num_rows(sources), _train_rows(sources)
    for place in range(
        ranks.rank, -(-total // ranks.world_size) * ranks.world_size, ranks.world_size
    ):
        if place < len(train):
            yield train.row(place)
        elif sources.anchor is not None and place < total:
            yield sources.anchor.row(place - len(train), is_anchor=True)
        else:
            yield None


def _num_rows(sources: RowSources) -> int:
    return len(_train_rows(sources)) + (0 if sources.anchor is None else len(sources.anchor))


def _train_rows(sources: RowSources) -> TokenizedDataset:
    assert sources.train is not None  # rows are not streamed here
    return sources.train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its actions and their options."""
    shows = "safereg reference build run.yaml --out runs/reference"
    parser.epilog = example(shows)
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    build = add_action(
        actions, "build", "run the reference once, on all rows that need it", shows=shows
    )
    add_config(build)
    build.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder, for reference.cache"
    )
    add_json(build)
    add_quiet(build)


def run(arguments: argparse.Namespace) -> Outcome:
    """Writes the reference's states of the rows that a run will ask it for."""
    share_cores()
    config = load_config(arguments.config, arguments.overrides)
    if not config.needs_reference:
        raise ConfigError(
            f"regularizer.objective={config.regularizer.objective} runs no reference: there is "
            "nothing to store"
        )
    require_absent(arguments.out)
    # The states are computed by the trunk here, not read from a store.
    plain = replace(config.reference, cache=None, balance="none")
    backend = start_backend(config)
    try:
        context = build_risk_context(replace(config, reference=plain), backend, with_reference=True)
        size = build_store(context, arguments.out)
    finally:
        leave_group()
    if size is None:
        return Outcome()
    same = (arguments.config, *arguments.overrides)
    return Outcome(
        figures={**size._asdict(), "out": arguments.out},
        now=command(training_verb(config.engine.name), *same, f"reference.cache={arguments.out}"),
    )
