"""Rows of a Hugging Face dataset, named as a file would be: `hub:OWNER/NAME[:CONFIG][@SPLIT]`.

A folder takes the place of OWNER/NAME where the data lies on this machine. A split may be a slice
(`@test[:200]`). No code of the dataset runs: `datasets` from 4.0 on reads data files only.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safereg_dist.errors import DataError, reason_of

_PREFIX = "hub:"
_FORM = re.compile(r"(?P<name>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<split>[^@]+))?")


def is_dataset(path: Path | str) -> bool:
    """Whether a path names a Hugging Face dataset."""
    return str(path).startswith(_PREFIX)


def dataset_rows(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`name[number]`, row) in order; a class label is its name, what is null is left out.

    Raises:
        DataError: the name has another form, nothing loads under it, or it has several splits and
            names none.
    """
    given = str(path)
    found = _FORM.fullmatch(given.removeprefix(_PREFIX))
    if found is None:
        raise DataError(f"expected hub:OWNER/NAME[:CONFIG][@SPLIT], got {given!r}: write it so")
    table = _loaded(given, found["name"], found["config"], found["split"])
    # Only `label`: of others the number is meant (MMLU's `answer` counts its choices).
    names = getattr(table.features.get("label"), "names", None)
    for number, row in enumerate(table):
        if names and row["label"] is not None:
            row["label"] = names[row["label"]]
        yield f"{given}[{number}]", {k: v for k, v in row.items() if v is not None}


def _loaded(given: str, name: str, config: str | None, split: str | None) -> Any:
    import datasets  # a second, which files do not need

    try:
        table = datasets.load_dataset(name, config, split=split)
    except Exception as err:  # the hub's client and the readers of a dozen formats raise their own
        raise DataError(
            f"cannot load the dataset {given} ({type(err).__name__}: {reason_of(err)}): "
            "check name, configuration and split; without a network give a folder with its files, "
            "hub:FOLDER[@SPLIT], or download them as JSONL"
        ) from err
    if not isinstance(table, datasets.DatasetDict):
        return table
    if len(table) > 1:
        splits = list(map(str, table))
        raise DataError(
            f"the dataset {given} has the splits {', '.join(splits)}: name one, as in "
            f"{given}@{splits[0]}"
        )
    return next(iter(table.values()))
