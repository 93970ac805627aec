"""What a run reads before any weights: its model's folder, its rows, its signals of risk."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from safereg_dist.coefficient import DEFAULT_THRESHOLD, scheduled
from safereg_dist.config import Config
from safereg_dist.data import Sampler, TokenizedDataset, load_rows, load_tokenizer, steps_for
from safereg_dist.errors import ConfigError
from safereg_dist.factory.risk import (
    SourceSpec,
    check_overrides,
    check_templates,
    read_sources,
    reads_column,
    require_risk_column,
)
from safereg_dist.parallel.comm import Ranks
from safereg_dist.risk.override import read_overrides

DEFAULT_STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSources:
    """The data of a run on one rank."""

    stream: Sampler
    train: TokenizedDataset
    anchor: TokenizedDataset | None
    validation: Sampler | None
    validation_rows: int
    total_steps: int
    rows_per_step: int
    """Rows of this rank in one optimizer step."""
    order: str
    """Digest (hex) of which rows are dealt as active ones; empty where they are not dealt."""

    @property
    def content_hashes(self) -> list[str]:
        """Of the training rows and, where there are any, the anchor rows."""
        return [store.content_hash for store in (self.train, self.anchor) if store is not None]


def read_inputs(
    config: Config, ranks: Ranks
) -> tuple[Path, PreTrainedTokenizerBase, RowSources, list[SourceSpec]]:
    """The model's folder, its tokenizer, the rows and the signals: all that is read before weights.

    Collectives: gathers of texts.
    """
    folder = resolve_model(config.model, ranks)
    with ranks.together():
        tokenizer = load_tokenizer(str(folder), config.data)
    sources = build_sources(config, tokenizer, ranks)
    signals = read_sources(config, ranks)
    with ranks.together():
        check_templates(signals, tokenizer)
    return folder, tokenizer, sources, signals


def resolve_model(model: str, ranks: Ranks) -> Path:
    """Local folder of a path or hub id; the first rank of each node downloads.

    Raises:
        ConfigError: neither a folder nor a hub id that can be fetched.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with ranks.main_first():
        try:
            patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            return Path(snapshot_download(model, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
            raise ConfigError(
                f"model {model!r} is neither a local folder nor a hub id that can be fetched "
                f"({' '.join(str(err).split())[:200]}): check the path"
            ) from err


def build_sources(config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> RowSources:
    """Training, anchor and validation rows of this rank.

    Raises:
        DataError: a file or row that cannot be used, or a missing risk column.
    Collectives: gathers of texts.
    """
    data, train = config.data, config.train

    def load(path: str) -> TokenizedDataset:
        with ranks.main_first():
            return load_rows(path, tokenizer, data, progress=ranks.is_main)

    train_rows = load(data.train)
    anchor_rows = load(data.anchor) if data.anchor is not None else None
    validation = load(data.validation) if data.validation is not None else None
    with ranks.together():
        if config.needs_risk and reads_column(config.risk):
            require_risk_column(train_rows, data.train)
        if config.needs_risk and config.risk.override is not None:
            check_overrides(config.risk.override, train_rows, data.train, is_main=ranks.is_main)

        active = _known_active_rows(config, train_rows)

    rows_per_step = train.micro_batch_size * train.grad_accum_steps

    def stream(
        rows: TokenizedDataset,
        anchor: TokenizedDataset | None,
        epochs: float | None,
        name: str,
        active: np.ndarray | None = None,
    ) -> Sampler:
        return Sampler(
            rows,
            anchor,
            anchor_fraction=data.anchor_fraction,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=train.seed,
            epochs=epochs,
            name=name,
            active=active,
        )

    with ranks.together():
        return RowSources(
            stream=stream(train_rows, anchor_rows, train.epochs, "data.train", active),
            train=train_rows,
            anchor=anchor_rows,
            validation=None
            if validation is None
            else stream(validation, None, 1.0, "data.validation"),
            validation_rows=0 if validation is None else len(validation),
            total_steps=_total_steps(config, train_rows, rows_per_step, ranks.world_size),
            rows_per_step=rows_per_step,
            order="" if active is None else hashlib.sha256(active.tobytes()).hexdigest(),
        )


def _total_steps(
    config: Config, rows: TokenizedDataset, rows_per_step: int, world_size: int
) -> int:
    train, data = config.train, config.data
    if train.epochs is None:
        return train.steps or DEFAULT_STEPS
    return steps_for(
        rows,
        epochs=train.epochs,
        world_size=world_size,
        rows_per_step=rows_per_step,
        anchor_fraction=data.anchor_fraction if data.anchor is not None else 0.0,
    )


def _known_active_rows(config: Config, rows: TokenizedDataset) -> np.ndarray | None:
    """bool [rows], rows with b > 0, where that is known now and they are to be dealt evenly."""
    is_column = config.needs_risk and config.risk.estimator == "column"
    if not is_column or config.reference.balance not in ("auto", "deal"):
        return None
    if config.regularizer.granularity == "batch":
        return None  # a row's coefficient depends on the rows beside it
    risk = np.asarray(rows.table.data.column("risk")).copy()
    if config.risk.override is not None:
        decisions = read_overrides(config.risk.override)
        for index, name in enumerate(rows.table["id"]):
            if name in decisions:
                risk[index] = decisions[name].risk
    threshold = config.regularizer.threshold
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    values, places = np.unique(risk, return_inverse=True)
    active = [scheduled(value, config.regularizer, threshold) > 0 for value in values.tolist()]
    return np.array(active)[places]
