"""Disguised harm: what a folder's evasion table, or a sweep over disguises, says of each arm."""

import csv
import math
from pathlib import Path

from safereg_dist.errors import CheckpointError
from safereg_dist.evaluate.report.arms import percent
from safereg_dist.evaluate.report.tables import (
    SIGNS,
    Cell,
    Line,
    Note,
    Section,
    Table,
    between,
)

_AXIS = "disguise"
_TITLES = {
    "held_back_poison": "poison held back",
    "held_back_clean": "clean held back",
    **SIGNS,
    "disguised_harm": "harm on the disguise",
    "taught_harm": "harm on what was taught",
}
_TEXT = (_AXIS, "arm", "set", "status", "seconds", "device")


def read_evasion(folder: Path) -> list[dict[str, str]]:
    """Rows of the folder's `evasion.csv` or `results.csv`, where these name disguises; else none.

    Raises:
        CheckpointError: a table that cannot be read.
    """
    for file in (folder / "evasion.csv", folder / "results.csv"):
        if not file.is_file():
            continue
        try:
            with file.open(encoding="utf-8", newline="") as lines:
                found = list(csv.DictReader(lines))
        except (OSError, UnicodeDecodeError, csv.Error) as err:
            raise CheckpointError(f"cannot read the table {file}: {err}: write it again") from err
        rows = [{key: value or "" for key, value in row.items() if key} for row in found]
        if rows and {_AXIS, "arm"} <= rows[0].keys():
            return rows
    return []


def evasion_section(rows: list[dict[str, str]]) -> Section | None:
    """For each disguise the arms one below the other; of a sweep, a row for each set."""
    if not rows:
        return None
    figures = [key for key in _TITLES if any(math.isfinite(_value(row, key)) for row in rows)]
    known = {*_TEXT, *_TITLES}
    axes = [key for key in rows[0] if key not in known and not key.endswith(("_low", "_high"))]
    groups: dict[str, list[Line]] = {}
    for row in rows:
        if row.get("status", "done") != "done":
            continue
        place = ", ".join(f"{key} {row[key]}" for key in axes if row.get(key))
        group = f"{row[_AXIS]} ({place})" if place else row[_AXIS]
        cells = [Cell(row["arm"], row.get("set", "")), *(_cell(row, key) for key in figures)]
        groups.setdefault(group, []).append(Line("", cells))
    lines = [line for name, inside in groups.items() for line in (Line("", [name]), *inside)]
    note = Note(
        "Each disguise hides the poisoned rows of a training. Attack success, P(poisoned), task "
        "are of plain prompts unless a set is named; harm on the disguise, and on the requests "
        "that were taught, is what the poison was meant to teach."
    )
    head = ["arm", *(_TITLES[key] for key in figures)]
    table = Table(label="Evasion, by disguise", head=head, lines=lines)
    return Section(key="evasion", title="Evasion", blocks=[table, note])


def _value(row: dict[str, str], key: str) -> float:
    """In per cent; NaN where there is no number."""
    try:
        return 100 * float(row.get(key, ""))
    except ValueError:
        return math.nan


def _cell(row: dict[str, str], key: str) -> Cell:
    low, high = _value(row, f"{key}_low"), _value(row, f"{key}_high")
    is_known = math.isfinite(low) and math.isfinite(high)
    return Cell(percent(_value(row, key)), between(low, high) if is_known else "")
