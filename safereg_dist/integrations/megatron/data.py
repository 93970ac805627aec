"""Megatron's GPT data sets with the risk of their documents, which `safereg score` has written.

    safereg score --data PREFIX --tokenizer T --endpoint ...     PREFIX.risk.npy, PREFIX.risk.json
    train_set = with_risk(train_set)                             items have `risk`

A sample of such a set is cut from documents that follow one another in a shuffled order. Which ones
they are is in the set's own indices: `shuffle_index` gives a sample its place, `sample_index` where
that begins, as (place in `document_index`, tokens left out there), `document_index` the documents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from safereg_dist.data.indexed import read_risks
from safereg_dist.errors import DataError

_QUERY = "_query_document_sample_shuffle_indices"


def with_risk(dataset: Any, stems: Mapping[str, str | Path] | None = None) -> Any:
    """The data set, whose items have a `risk` [S] float64 too; None of None.

    Items are those of the set. A row is a line, or what lies between two places where its
    `position_ids` start again at 0; each of its tokens has the largest risk of the documents in the
    row, so that a line without such places is as risky as its riskiest document. What fills a line
    up has risk 0.

    Args:
        dataset: a `GPTDataset`, or a `BlendedDataset` of such.
        stems: prefix of a data set -> where `safereg score --out` put its risks, if not beside it.
    Raises:
        DataError: another kind of data set; no risks, or those of other data (see `read_risks`).
    """
    return None if dataset is None else WithRisk(dataset, stems or {})


class WithRisk(Dataset):
    """What `with_risk` returns; other attributes are those of the data set."""

    def __init__(self, dataset: Any, stems: Mapping[str, str | Path]) -> None:
        """Raises DataError as `with_risk`."""
        self._dataset = dataset
        self._risks = [_risks_of(part, stems) for part in _parts(dataset)]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        item = self._dataset[index]  # first: a set may read its indices only now
        part, sample = 0, index or 0  # None is a line that fills a batch up
        if hasattr(self._dataset, "datasets"):
            part = int(self._dataset.dataset_index[sample])
            sample = int(self._dataset.dataset_sample_index[sample])
        risks, positions = self._risks[part], item["position_ids"].numpy()
        of_tokens = _risk_of_tokens(_parts(self._dataset)[part], sample, risks, len(positions))
        return {**item, "risk": torch.from_numpy(_largest_of_row(of_tokens, positions))}


def _parts(dataset: Any) -> list[Any]:
    """The data sets of a blend, or the one."""
    return getattr(dataset, "datasets", [dataset])


def _risks_of(dataset: Any, stems: Mapping[str, str | Path]) -> np.ndarray:
    """[N] the risks of the sequences of one data set."""
    query = getattr(getattr(type(dataset), _QUERY, None), "__qualname__", "")
    prefix = getattr(dataset.dataset, "path_prefix", None) if hasattr(dataset, "dataset") else None
    if query != f"GPTDataset.{_QUERY}" or prefix is None:
        raise DataError(
            f"expected a GPTDataset over an IndexedDataset, or a BlendedDataset of such, got "
            f"{type(dataset).__name__}, whose samples are made of documents in a way of its own: "
            "give its items a `risk`, or set risk.estimator=lookup"
        )
    return read_risks(prefix, stems.get(prefix))


def _risk_of_tokens(dataset: Any, sample: int, risks: np.ndarray, length: int) -> np.ndarray:
    """[length] the risk of each token's document, 0 behind the last one."""
    place = dataset.shuffle_index[sample]
    (first, skipped), (last, _) = dataset.sample_index[place], dataset.sample_index[place + 1]
    documents = dataset.document_index[first : last + 1]
    lengths = dataset.dataset.sequence_lengths[documents].astype(np.int64)
    lengths[0] -= skipped
    known = np.repeat(risks[documents], lengths.clip(max=length))[:length]
    return np.pad(known, (0, length - len(known)))


def _largest_of_row(of_tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The values, each replaced by the largest of its row."""
    starts = np.flatnonzero(positions == 0)
    starts = np.unique(np.append(0, starts))
    return np.repeat(np.maximum.reduceat(of_tokens, starts), np.diff([*starts, len(of_tokens)]))
