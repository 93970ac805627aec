"""The `risk` column of a Trainer's data set, checked as a whole before the reference is loaded.

Only a `datasets.Dataset` can be read at once; of other data sets and of streams a bad value is
found when its row is drawn, and nobody knows the share that is held back.
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from safereg_dist.coefficient import DEFAULT_THRESHOLD, resolved_threshold
from safereg_dist.config import Config
from safereg_dist.errors import DataError
from safereg_dist.factory.risk import configured_overrides, reads_column
from safereg_dist.integrations.collator import COLUMNS
from safereg_dist.run.gate import check_share, is_held_back
from safereg_dist.run.shape import Shape, refuse_what_hides

_LINES = 4096
"""Lines of a data set that are in memory at once."""


def check_risk_column(dataset: Any, config: Config, *, announces: bool) -> None:
    """Refuses a column with a value that is no risk, or by which too many rows are held or hide.

    Rows are those of `dataset`; a packed line holds several. Reviewers' decisions count, anchors do
    not. `announces`: limits that cannot be checked here are said, where the settings give them.

    Raises:
        DataError: a row without a risk in [0, 1], or a table without the column.
        ConfigError: more rows at or above the threshold than risk.max_held_back allows, or in a
            heap below it than risk.max_hidden does (`run.shape`).
    """
    limit = config.risk.max_held_back + config.data.declared_poison
    is_whole = _is_readable(dataset) and config.needs_risk and reads_column(config.risk)
    if not (is_whole and config.risk.estimator == "column") and announces:
        _warn_of_limit(config, limit)
    if not is_whole:
        _refuse_missing(dataset, config)
        return
    threshold = resolved_threshold(config.regularizer, DEFAULT_THRESHOLD)
    overrides = configured_overrides(config)
    rows = 0
    bad: list[_Row] = []

    def decided() -> Iterator[tuple[bool, float | None, dict[str, float | None]]]:
        nonlocal rows
        for row in _rows(dataset):
            rows += 1
            if not 0 <= row.risk <= 1:
                bad.append(row)
                continue
            decision = overrides.get(str(row.id))
            risk = row.risk if decision is None else decision.risk
            yield is_held_back(risk, threshold), risk, {}

    shape = Shape.of(decided(), threshold, {})
    if bad:
        raise DataError(
            f"train_dataset: risk.estimator=column needs `risk` in [0, 1] in every row, {len(bad)} "
            f"of {rows} rows have none or another value, the first is row {bad[0].line}, counted "
            f"from 0 (id {bad[0].id!r}), with {bad[0].given!r}: mend the column (`safereg score` "
            "writes one)"
        )
    if config.risk.estimator == "column" and limit < 1:
        look = f"those whose `risk` is {threshold:g} or more"
        check_share(shape.held, rows, limit=limit, is_sample=False, look=look)
        refuse_what_hides(shape, config, threshold, is_sample=False, look=look)


def _is_readable(dataset: Any) -> bool:
    """True if the rows' `risk` is a column of a table, and no transform gives another."""
    if not isinstance(dataset, Dataset) or "risk" not in dataset.column_names:
        return False
    return dataset.format["type"] != "custom"


def _refuse_missing(dataset: Any, config: Config) -> None:
    """Raises DataError where a table that gives its rows as they are has no column `risk`."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    if (
        config.needs_risk
        and config.risk.estimator == "column"
        and "risk" not in dataset.column_names
    ):
        raise DataError(
            "risk.estimator=column needs a column `risk` in train_dataset, which has "
            f"{', '.join(dataset.column_names)}: add it (`safereg score` writes one), rename "
            "yours, or choose another estimator"
        )


def _warn_of_limit(config: Config, limit: float) -> None:
    given = [n for n in ("max_held_back", "max_hidden") if n in config.risk.model_fields_set]
    if given and limit < 1:
        named = " and ".join(f"risk.{name}={getattr(config.risk, name)}" for name in given)
        print(
            f"safereg: {named} cannot be checked here, the run starts whatever rows are held back "
            "or hide: under a Trainer that needs risk.estimator=column and a datasets.Dataset with "
            "`risk`; or run `safereg audit`",
            file=sys.stderr,
            flush=True,
        )


class _Row(NamedTuple):
    line: int
    given: Any
    risk: float
    """nan where it is no number."""
    id: Any


def _rows(dataset: Dataset) -> Iterator[_Row]:
    names = [*COLUMNS, "seq_lengths", "position_ids"]
    known = [name for name in names if name in dataset.column_names]
    table: Any = dataset.select_columns(known).with_format("arrow")
    for begin in range(0, len(dataset), _LINES):
        part = table[begin : begin + _LINES]
        columns = {name: _whole(part.column(name)) for name in part.column_names}
        lines, firsts = _firsts(columns)
        values = [_of_rows(columns.get(name), lines, firsts) for name in COLUMNS]
        for line, risk, name, is_anchor in zip(lines.tolist(), *values, strict=True):
            if not is_anchor:
                yield _Row(begin + line, risk, _number(risk), name)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks)


def _firsts(columns: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
    """Of every row its line, and the place of its first token in the line."""
    count = len(columns["risk"])
    if "seq_lengths" in columns:  # trl's packing
        lengths = columns["seq_lengths"].to_pylist()
        firsts = [np.cumsum([0, *own[:-1]]) for own in lengths]
    elif "position_ids" in columns:
        firsts = [
            np.flatnonzero(np.asarray(own) == 0) for own in columns["position_ids"].to_pylist()
        ]
    else:
        return np.arange(count), np.zeros(count, np.int64)
    return np.repeat(np.arange(count), [len(own) for own in firsts]), np.concatenate(firsts)


def _of_rows(column: Any, lines: np.ndarray, firsts: np.ndarray) -> list[Any]:
    """The value of every row: its line's, or its first token's; None where there is none."""
    if column is None:
        return [None] * len(lines)
    if not pa.types.is_nested(column.type):
        return column.take(pa.array(lines)).to_pylist()
    lengths = np.asarray(column.value_lengths().fill_null(0))
    begins = np.cumsum(lengths) - lengths
    is_there = firsts < lengths[lines]
    places = pa.array(begins[lines] + firsts, mask=~is_there)
    return column.flatten().take(places).to_pylist()


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
