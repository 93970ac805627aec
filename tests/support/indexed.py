"""Indexed data sets as Megatron's own builder writes them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


def write_indexed(prefix: Path, sequences: Sequence[Sequence[int]], dtype: type = np.int32) -> Path:
    """Writes `prefix`.bin and .idx, a document for each sequence; the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequence in sequences:
        builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix
