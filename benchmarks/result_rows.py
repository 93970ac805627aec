"""The rows of `gpu_check.sh`: each is written and printed the moment it is known."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import COLUMNS, cell, write_csv


class Rows:
    """A CSV file to which each row is added, and printed, the moment it is known."""

    def __init__(self, path: Path, **common: Any) -> None:
        """`common` are the columns that all rows of this process share."""
        self._path = path
        self._common = common
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_csv([], path)

    def add(self, **columns: Any) -> None:
        """One row; a column that it lacks stays empty, one that is not known is an error."""
        row = {key: cell(value) for key, value in {**self._common, **columns}.items()}
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n").writerow(row)
        print(text_of({**self._common, **columns}), flush=True)


def text_of(row: Mapping[str, Any]) -> str:
    """A row as people read it; where nothing was measured, the status."""
    share = "" if row.get("active_fraction") is None else f"{row['active_fraction']:.0%}"
    chunk = f"chunk {row['chunk_tokens']}" if row.get("chunk_tokens") else ""
    words = [row["what"], share, row.get("head", ""), chunk]
    text = f"{' '.join(filter(None, words)):34s} {row['implementation']:27s}"
    if row.get("median_ms") is None:
        counted = "" if row.get("count") is None else f" {row['count']}"
        return f"{text} {row.get('status', '')}{counted}"
    text += f" {row['median_ms']:9.3f} ms"
    for column, form in _SHOWN.items():
        if row.get(column) is not None:
            text += f"  {form.format(row[column])}"
    if row.get("peak_extra_bytes") is not None:
        text += f"  {row['peak_extra_bytes'] / 2**20:.1f} MiB"
    return text if row.get("status", "ok") == "ok" else f"{text}  {row['status']}"


_SHOWN = {
    "percent_of_copy_bandwidth": "{:5.1f} % of copy",
    "percent_of_matmul_rate": "{:5.1f} % of matmul",
    "ratio_to_ours": "x{:.3f} ours",
    "ratio_to_products": "x{:.3f} products",
    "ratio_to_sft": "x{:.3f} SFT",
    "gap": "off {:.1e}",
}
"""What `text_of` shows of a measured row, and how."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
