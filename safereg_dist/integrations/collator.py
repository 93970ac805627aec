"""A stack's collator, and beside its tensors the rows that are in them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from safereg_dist.data.stacked import IGNORED, RowColumns, batch_of
from safereg_dist.errors import DataError
from safereg_dist.parallel.comm import capture
from safereg_dist.types import MicroBatch

KEY = "safereg"
"""The key of a batch under which its `MicroBatch` travels; it moves to the device with the rest."""
COLUMNS = ("risk", "id", "is_anchor")
"""Columns of a data set that the step reads and no model or collator is shown."""


class RowCollator:
    """Calls the stack's own collator without our columns, then finds the rows in its batch.

    It runs where batches are collated, on the host and maybe in a worker process, so that the
    training loop waits for nothing. Rows that cannot be read become an error that the step raises
    on all ranks together.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], *, needs_positions: bool) -> None:
        """`needs_positions`: rows come packed, so a batch without position ids is refused."""
        self.collator = collator
        self._needs_positions = needs_positions

    def __call__(self, features: Sequence[Any]) -> Any:
        """The collator's batch with one key more, `KEY`; a packed line may be a list of rows."""
        inputs = self.collator([_without_ours(feature) for feature in features])
        found = capture(self._read, inputs, list(_flat(features)))
        inputs[KEY] = MicroBatch.failed(found.error) if found.error is not None else found.value
        if found.error is None:
            # Nothing predicts a row's first token: where rows are packed a stack's own loss might
            # have the row before it do so.
            width = inputs["labels"].shape[1]
            for line, first in (divmod(place, width) for place in found.value.row_begins):
                inputs["labels"][line, first] = IGNORED
        return inputs

    def _read(self, inputs: Any, features: Sequence[Any]) -> MicroBatch:
        if self._needs_positions and inputs.get("position_ids") is None:
            raise DataError(
                "rows are packed and the batch has no position_ids: a row would attend to the rows "
                "before it, and could not be told from them; use a padding-free collator "
                "(trl: packing_strategy=bfd), or do not pack"
            )
        mask, is_packed = inputs.get("attention_mask"), inputs.get("position_ids") is not None
        if mask is not None and mask.ndim != 2 and is_packed:
            # Which token sees which: that rows end where positions start again says as much.
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        has_lists = any(isinstance(f.get(name), list) for f in features for name in COLUMNS)
        if not (is_packed and has_lists):
            try:
                return batch_of(inputs, _columns(features, of_tokens=False))
            except DataError:
                if not is_packed:
                    raise
        # A feature may be a packed line of many rows.
        return batch_of(inputs, _columns(features, of_tokens=True))


def _flat(features: Iterable[Any]) -> Iterator[Any]:
    for feature in features:
        if isinstance(feature, list):
            yield from _flat(feature)
        else:
            yield feature


def _without_ours(feature: Any) -> Any:
    if isinstance(feature, list):
        return [_without_ours(row) for row in feature]
    return {name: value for name, value in feature.items() if name not in COLUMNS}


def _columns(features: Sequence[Any], *, of_tokens: bool) -> RowColumns:
    return RowColumns(*(_column(features, name, of_tokens=of_tokens) for name in COLUMNS))


def _column(features: Sequence[Any], name: str, *, of_tokens: bool) -> list[Any] | None:
    """The features' values, one for each; `of_tokens` as lists, one value for each token."""
    values = [feature.get(name) for feature in features]
    if all(value is None for value in values):
        return None
    if not of_tokens or any("input_ids" not in feature for feature in features):
        return values
    return [
        value if isinstance(value, list) else [value] * len(feature["input_ids"])
        for value, feature in zip(values, features, strict=True)
    ]
