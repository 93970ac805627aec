"""Reviewed rows: the reviewer's decision sets their risk."""

from pathlib import Path
from typing import NamedTuple

from safereg_dist.data.files import read_rows
from safereg_dist.errors import DataError

_RISK = {"allow": 0.0, "hold": 1.0}


class Override(NamedTuple):
    """A reviewer's decision about one row."""

    risk: float
    """0 where the row is allowed to train freely, 1 where it is held back."""
    reason: str


def read_overrides(path: Path | str) -> dict[str, Override]:
    """Decisions by row id, from JSONL rows with `id`, `action` (allow or hold) and `reason`.

    Raises:
        DataError: a row lacks a field, has another action, or an id occurs twice.
    """
    overrides: dict[str, Override] = {}
    for where, row in read_rows(path):
        name, action, reason = (row.get(key) for key in ("id", "action", "reason"))
        risk = _RISK.get(action) if isinstance(action, str) else None
        if name in (None, "") or risk is None or not isinstance(reason, str) or not reason:
            raise DataError(
                f"{where}: an override needs `id`, `action` (allow or hold) and a `reason`, got "
                f"{ {key: row.get(key) for key in ('id', 'action', 'reason')} }: correct the row"
            )
        if str(name) in overrides:
            raise DataError(f"{where}: id {name!r} is overridden twice: keep one decision")
        overrides[str(name)] = Override(risk, f"{action}: {reason}")
    return overrides
