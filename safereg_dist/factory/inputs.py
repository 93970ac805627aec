"""The inputs that a run reads before weights: model folder, rows, sources of risk."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from safereg_dist.coefficient import resolved_threshold, scheduled
from safereg_dist.config import Config
from safereg_dist.data import (
    Sampler,
    StreamedRows,
    TokenizedDataset,
    filler,
    joined,
    load_rows,
    load_tokenizer,
    steps_for,
)
from safereg_dist.data.canary import Canary, canary_rows
from safereg_dist.data.lanes import Lanes, StepShape
from safereg_dist.errors import ConfigError
from safereg_dist.factory.agreement import require_same_inputs
from safereg_dist.factory.model_folder import resolve_model
from safereg_dist.factory.risk import (
    configured_overrides,
    reads_column,
    require_risk_column,
    warn_of_unknown_rows,
)
from safereg_dist.factory.risk_specs import SourceSpec, check_templates, read_sources
from safereg_dist.parallel.comm import Ranks, capture
from safereg_dist.risk.override import Override
from safereg_dist.types import Row

DEFAULT_STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSources:
    """The data of a run on one rank."""

    stream: Sampler
    train: TokenizedDataset | None
    """None where rows are streamed."""
    anchor: TokenizedDataset | None
    validation: Sampler | None
    validation_rows: int
    canary: Canary | None
    """Prompts that are watched in training."""
    total_steps: int
    micro_batches: int
    """Of this rank in one optimizer step."""
    lanes: Lanes
    """How each step's rows go from the ranks that the run began with to those of now."""
    order_digest: str
    """Digest (hex) of the rows dealt as active; empty if active rows are not dealt evenly."""
    filler: Row
    """Replaces missing rows where a rank has none left."""
    overrides: dict[str, Override]
    """Reviewers' decisions by row id."""
    ranks: Ranks

    @property
    def rows_per_step(self) -> int:
        """Rows of this rank in one optimizer step."""
        return self.lanes.of_rank.rows

    def rows_of_step(self, step: int) -> list[Row]:
        """[rows_per_step] this rank's rows in an optimizer step.

        Raises:
            DataError: a streamed row that cannot be used, on all ranks.
        Collectives: one MAX all-reduce of 8 bytes if rows are streamed.
        """
        return [self.filler if row is None else row for row in self._read(step, step + 1)]

    def in_first_epoch(self, step: int) -> bool:
        """True until every rank has gone through all its rows; the same on every rank."""
        return self.stream.in_first_epoch(step * self.rows_per_step)

    def coming_rows(self, step: int) -> Iterator[Row]:
        """This rank's rows of `step` and of the next step, if there is one.

        Raises and collectives: as `rows_of_step`.
        """
        found = self._read(step, min(step + 2, self.total_steps))
        return (row for row in found if row is not None)

    def _read(self, begin: int, end: int) -> Iterable[Row | None]:
        """The rows of some steps, read one by one as they are used unless they are streamed."""
        size = self.rows_per_step
        rows = (self.stream.row(position) for position in range(begin * size, end * size))
        if self.train is not None:
            return rows
        # What is wrong in a streamed row shows here first, on its rank alone.
        read = capture(list, rows)
        self.ranks.raise_if_any_failed(read)
        return read.value

    @property
    def tokenised_files(self) -> dict[str, tuple[str, list[Path]]]:
        """Content hash and files of the tokenised rows, by the key that names the rows."""
        named = {"data.train": self.train, "data.anchor": self.anchor}
        return {
            name: (store.content_hash, [Path(f["filename"]) for f in store.table.cache_files])
            for name, store in named.items()
            if store is not None
        }

    @property
    def content_hashes(self) -> list[str]:
        """Content hashes of the training rows and, if there are any, the anchor rows."""
        return [store.content_hash for store in (self.train, self.anchor) if store is not None]


def read_inputs(
    config: Config, ranks: Ranks, *, began_with: int | None = None
) -> tuple[Path, PreTrainedTokenizerBase, RowSources, list[SourceSpec]]:
    """Reads the model's folder, its tokenizer, the rows and the sources of risk; no weights.

    Raises:
        GroupError: hosts have other files than rank 0's.
    Collectives: gathers of texts.
    """
    folder = resolve_model(config.model, ranks)
    with ranks.together():
        tokenizer = load_tokenizer(str(folder), config.data)
    sources = build_sources(config, tokenizer, ranks, began_with=began_with)
    specs = read_sources(config, ranks, tokenizer)
    with ranks.together():
        check_templates(specs, tokenizer)
    require_same_inputs(
        config, ranks, model=folder, tokenizer=tokenizer, rows=sources.tokenised_files
    )
    return folder, tokenizer, sources, specs


def build_sources(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
    *,
    began_with: int | None = None,
) -> RowSources:
    """Training, anchor and validation rows of this rank.

    Args:
        began_with: ranks of the run at its first step; None = those of now.
    Raises:
        ConfigError: the rows cannot be dealt to another number of ranks than the run began with.
        DataError: a file or row that cannot be used, or a missing risk column.
    Collectives: gathers of texts.
    """
    data, seed = config.data, config.train.seed
    lanes = _lanes(config, ranks, began_with)
    needs_column = config.needs_risk and reads_column(config.risk)

    def load(path: str) -> TokenizedDataset:
        with ranks.main_first():
            return load_rows(path, tokenizer, data, progress=ranks.is_main)

    sets = [] if data.streaming else [(each, load(each.path)) for each in data.train_sets]
    anchor = load(data.anchor) if data.anchor is not None else None
    held_out = load(data.validation) if data.validation is not None else None
    with ranks.together():
        overrides = configured_overrides(config)
        train = joined({each.path: rows for each, rows in sets}) if sets else None
        if train is not None and needs_column:
            require_risk_column(train, data.train_names)
        if train is not None and ranks.is_main:
            warn_of_unknown_rows(overrides, config, train)
        active = None if train is None else _known_active_rows(config, train, overrides)

    with ranks.together():
        rows = train
        if rows is None:
            rows = _streamed(config, tokenizer, lanes, needs_risk=needs_column)
        order = partial(Sampler, seed=seed, anchor_fraction=data.anchor_fraction)
        lane = partial(
            order,
            rows,
            anchor,
            world_size=lanes.count,
            epochs=config.train.epochs,
            active=active,
            parts=[(len(r), s.weight) for s, r in sets if s.weight is not None] or None,
        )
        validation = None
        if held_out is not None:
            own = partial(order, held_out, None, rank=ranks.rank, world_size=ranks.world_size)
            validation = own(epochs=1.0, name="data.validation")
        canary = None
        if config.eval is not None:
            canary = canary_rows(config.eval, tokenizer, max_length=data.max_length)
        return RowSources(
            # On other ranks than at first it has what training asks of one; what else is asked of a
            # `Sampler` is so before the first step.
            stream=cast(Sampler, lanes.stream(lambda rank: lane(rank=rank))),
            train=train,
            anchor=anchor,
            validation=validation,
            validation_rows=0 if held_out is None else len(held_out),
            canary=canary,
            total_steps=_total_steps(config, train, lanes),
            micro_batches=lanes.of_rank.micro_batches,
            lanes=lanes,
            order_digest="" if active is None else hashlib.sha256(active.tobytes()).hexdigest(),
            filler=filler(pad_id_of(tokenizer)),
            overrides=overrides,
            ranks=ranks,
        )


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the padding token."""
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)  # `load_tokenizer` sets it
    return pad_id


def _lanes(config: Config, ranks: Ranks, began_with: int | None) -> Lanes:
    """How rows go to the ranks of now, which all of them can."""
    of_lane = StepShape(config.train.grad_accum_steps, config.train.micro_batch_size)
    count = began_with or ranks.world_size
    lanes = Lanes(count=count, of_lane=of_lane, rank=ranks.rank, world_size=ranks.world_size)
    with ranks.together():
        if count != ranks.world_size and config.data.streaming:
            raise ConfigError(
                f"data.streaming reads each rank's rows as they come, and this run began with "
                f"{count} ranks, now there are {ranks.world_size}: go on with {count} ranks"
            )
        _ = lanes.of_rank  # raises
    return lanes


def _streamed(
    config: Config, tokenizer: PreTrainedTokenizerBase, lanes: Lanes, *, needs_risk: bool
) -> StreamedRows:
    rows = StreamedRows(
        config.data,
        tokenizer,
        rank=lanes.rank,
        world_size=lanes.world_size,
        seed=config.train.seed,
        keep=3 * lanes.of_lane.rows,  # a step and the next, once read ahead and once used
        needs_risk=needs_risk,
    )
    rows.row(0)  # a wrong path or form shows before any weights are loaded
    return rows


def _total_steps(config: Config, rows: TokenizedDataset | None, lanes: Lanes) -> int:
    train, data = config.train, config.data
    if train.epochs is None or rows is None:
        return train.steps or DEFAULT_STEPS
    return steps_for(
        rows,
        epochs=train.epochs,
        world_size=lanes.count,
        rows_per_step=lanes.of_lane.rows,
        anchor_fraction=data.anchor_fraction if data.anchor is not None else 0.0,
    )


def _known_active_rows(
    config: Config, rows: TokenizedDataset, overrides: Mapping[str, Override]
) -> np.ndarray | None:
    """bool [rows], True where b > 0; None if not known yet or if rows are not dealt evenly."""
    if not config.deals_rows:
        return None
    risk = np.asarray(rows.table.data.column("risk")).copy()
    for index, name in enumerate(rows.table["id"] if overrides else ()):
        if name in overrides:
            risk[index] = overrides[name].risk
    threshold = resolved_threshold(config.regularizer)
    values, places = np.unique(risk, return_inverse=True)
    active = [scheduled(value, config.regularizer, threshold) > 0 for value in values.tolist()]
    return np.array(active)[places]
