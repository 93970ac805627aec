"""Anchor rows mixed into a data set of any kind: they carry only the divergence."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from safereg_dist.config import DataConfig
from safereg_dist.data import load_rows
from safereg_dist.errors import ConfigError
from safereg_dist.types import Row


def with_anchors(
    dataset: Any,
    data: Mapping[str, Any],
    tokenizer: Any,
    *,
    seed: int,
    is_packed: bool = False,
) -> Any:
    """`dataset` with the rows of `data.anchor` in `data.anchor_fraction` of all places.

    A data set with a length gives one with a length, an iterable one an iterable one. Anchor rows
    are drawn from a seed; each is `input_ids`, `labels`, `attention_mask` and `is_anchor`. Where
    `dataset` holds packed lines each is a line of its own.

    Raises:
        ConfigError: no tokenizer to read the anchor rows with.
        DataError: anchor rows that cannot be used.
    """
    if tokenizer is None:
        raise ConfigError("data.anchor needs the Trainer's processing_class (a tokenizer): give it")
    config = DataConfig(**{"train": "-", **data})
    assert config.anchor is not None
    stored = load_rows(config.anchor, tokenizer, config, progress=False)
    anchors = [_feature(stored.row(index, is_anchor=True)) for index in range(len(stored))]
    if is_packed:
        for anchor in anchors:
            anchor["seq_lengths"] = [len(anchor["input_ids"])]  # as trl's packing gives them
    wrap = (
        _Iterable
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
        else _Mapped
    )
    return wrap(dataset, anchors, config.anchor_fraction, seed)


def _feature(row: Row) -> dict[str, Any]:
    labels = [t if own else -100 for t, own in zip(row.input_ids, row.loss_mask, strict=True)]
    return {
        "input_ids": row.input_ids,
        "attention_mask": [1] * len(row.input_ids),
        "labels": labels,
        "id": row.id,
        "is_anchor": True,
    }


class _Mapped(Dataset):
    """A data set with a length, the anchors spread evenly over it."""

    def __init__(self, dataset: Any, anchors: list, fraction: float, seed: int) -> None:
        self._dataset, self._anchors = dataset, anchors
        count = round(len(dataset) * fraction / (1 - fraction))
        draws = np.random.default_rng(seed)
        self._drawn = [int(i) for i in draws.integers(len(anchors), size=count)]

    def __len__(self) -> int:
        return len(self._dataset) + len(self._drawn)

    def __getitem__(self, index: int) -> Any:
        before, after = (len(self._drawn) * i // len(self) for i in (index, index + 1))
        if before == after:
            return self._dataset[index - before]
        return dict(self._anchors[self._drawn[before]])


class _Iterable(IterableDataset):
    """A stream in which every so many places are an anchor's, the same for every reader."""

    def __init__(self, dataset: Any, anchors: list, fraction: float, seed: int) -> None:
        self._dataset, self._anchors = dataset, anchors
        self._fraction, self._seed = fraction, seed

    def __iter__(self) -> Iterator[Any]:
        draws, due = np.random.default_rng(self._seed), 0.0
        for row in self._dataset:
            due += self._fraction / (1 - self._fraction)
            while due >= 1:
                due -= 1
                yield dict(self._anchors[int(draws.integers(len(self._anchors)))])
            yield row

    def set_epoch(self, epoch: int) -> None:
        """Hands the epoch to a data set that shuffles by it."""
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
