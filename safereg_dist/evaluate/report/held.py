"""What a ledger says: which sequences were held back and why, and whether its chain holds."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from safereg_dist.data.files import read_rows
from safereg_dist.errors import DataError, LedgerError
from safereg_dist.evaluate.report.arms import (
    Check,
    HeldRow,
    LedgerFacts,
    Tally,
    as_object,
    number,
)
from safereg_dist.run.ledger import MERGED_NAME, LedgerHead, verify_ledger
from safereg_dist.storage.json_text import json_objects
from safereg_dist.storage.signing import SUFFIX, Key

_TOP_ROWS = 10
_ANCHOR, _OVERRIDE, _FAILED, _JUDGED = "anchor", "override", "judge failed", "judge: "
_Row = dict[str, Any]


def read_ledger(
    folder: Path, config: _Row, summary: _Row, key: Key | None = None
) -> LedgerFacts | None:
    """The facts of a run's ledger, of a run that goes on too; None where it has none.

    Lines that are no rows are passed over: `check` tells of them.
    """
    merged = folder / MERGED_NAME
    files = [merged] if merged.is_file() else sorted(folder.glob("ledger.rank*.jsonl"))
    rows = [row for file in files for row in json_objects(file) if "id" in row]
    check = _checked(folder, summary, key)
    if not rows and check.state != "altered":
        return None
    by_id: dict[str, list[_Row]] = {}
    for row in rows:
        if row.get("estimator") != _ANCHOR:
            by_id.setdefault(str(row["id"]), []).append(row)
    is_held = _held_by(summary)
    held = {name: [row for row in own if is_held(row)] for name, own in by_id.items()}
    reasons = Counter(_reason(own[0]) for own in held.values() if own)
    return LedgerFacts(
        rows=len(rows),
        sequences=len(by_id),
        held=sum(map(bool, held.values())),
        has_risk=any(row.get("risk") is not None for own in by_id.values() for row in own),
        by={
            "source": _tallied(by_id, held, _source_of(config, by_id)),
            "estimator": _tallied(by_id, held, lambda row: str(row.get("estimator"))),
            "category": _tallied(by_id, held, _category),
            "review": _tallied(by_id, held, _review),
        },
        failed=sum(any(_has_failed(row) for row in own) for own in by_id.values()),
        reasons=reasons.most_common(),
        most_held=_most_held(by_id),
        check=check,
    )


def _held_by(summary: _Row) -> Callable[[_Row], bool]:
    """Whether a row was held back: by the run's threshold, else by its coefficient."""
    threshold = number(summary.get("threshold"))
    if math.isnan(threshold):
        return lambda row: number(row.get("kl_coef")) > 0 and row.get("risk") is not None
    return lambda row: _has_failed(row) or number(row.get("risk")) >= threshold


def _has_failed(row: _Row) -> bool:
    """A risk that could not be computed is written as the text `nan`."""
    return row.get("risk") == "nan" or _note(row).startswith(_FAILED)


def _note(row: _Row) -> str:
    note = row.get("note")
    return note if isinstance(note, str) else ""


def _category(row: _Row) -> str:
    """Of harm, as the source that decided calls it; empty where it names none."""
    if row.get("estimator") == _OVERRIDE:
        return ""
    _, _, part = str(row.get("estimator")).partition(":")
    judged = _note(row).removeprefix(_JUDGED) if _note(row).startswith(_JUDGED) else ""
    return part or judged


def _review(row: _Row) -> str:
    """`allow` or `hold` where a reviewer has decided; their words stay in the ledger."""
    decision = _note(row).partition(":")[0]
    return decision if row.get("estimator") == _OVERRIDE else ""


def _reason(row: _Row) -> str:
    if _review(row):
        return "reviewer"
    source, _, part = str(row.get("estimator")).partition(":")
    if _has_failed(row):
        return f"{source}: judgement failed"
    category = part or _category(row)
    return f"{source}: {category}" if category else source


def _tallied(
    by_id: dict[str, list[_Row]], held: dict[str, list[_Row]], group_of: Callable[[_Row], str]
) -> list[Tally]:
    """By group of the row that held a sequence back, else of its last; those of none left out."""
    groups: dict[str, list[tuple[bool, float]]] = {}
    for name, own in by_id.items():
        group = group_of((held[name] or own[-1:])[0])
        if group:
            risk = _mean(np.array([number(row.get("risk")) for row in own]))
            groups.setdefault(group, []).append((bool(held[name]), risk))
    found = [
        Tally(group, len(own), sum(is_held for is_held, _ in own), _mean(np.array(own)[:, 1]))
        for group, own in groups.items()
    ]
    return sorted(found, key=lambda tally: (-tally.held, -tally.sequences, tally.name))


# ---- the data set that a row came from


def _source_of(config: _Row, wanted: Iterable[str]) -> Callable[[_Row], str]:
    """The data set of a ledger's row.

    With one it is that; of several the files' own ids tell, where they can still be read (ids
    alone are kept), else the name that rows without an id were given.
    """
    train = as_object(config.get("data")).get("train")
    listed = train if isinstance(train, list) else [train]
    paths = [part.get("path") if isinstance(part, dict) else part for part in listed]
    names = [path for path in paths if isinstance(path, str)]
    if len(names) == 1:
        return lambda row: _short(names[0])
    known: dict[str, str] = {}
    for path in names:
        known |= _ids_in(path, set(wanted))
    stems = {Path(path).stem: _short(path) for path in names}
    return lambda row: (
        known.get(str(row["id"])) or stems.get(str(row["id"]).rpartition("-")[0]) or "not known"
    )


def _short(path: str) -> str:
    return Path(path).name or path


def _ids_in(path: str, wanted: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    if not Path(path).is_file():
        return found
    try:
        for place, (_, row) in enumerate(read_rows(path)):
            given = row.get("id")
            name = f"{Path(path).stem}-{place}" if given in (None, "") else str(given)
            if name in wanted:
                found[name] = _short(path)
    except (DataError, OSError):
        return {}  # the file is another now
    return found


# ---- rows that were held back most often


def _most_held(by_id: dict[str, list[_Row]]) -> list[HeldRow]:
    keys = ("risk", "kl_coef", "divergence")
    found = [
        _held(name, [[number(row.get(key)) for key in keys] for row in own])
        for name, own in by_id.items()
    ]
    found = [row for row in found if row.times and row.highest_risk > 0]
    found.sort(key=lambda row: (-row.times, -row.mean_risk, row.name))
    return found[:_TOP_ROWS]


def _held(name: str, entries: list[list[float]]) -> HeldRow:
    """[(risk, b, divergence)] of one sequence."""
    risks, coefficients, divergences = np.array(entries, dtype=np.float64).T
    held = coefficients > 0
    return HeldRow(
        name=name,
        times=int(held.sum()),
        seen=len(entries),
        mean_risk=_mean(risks),
        highest_risk=float(np.nanmax(np.append(risks, -np.inf))),
        mean_coefficient=_mean(coefficients[held]),
        mean_divergence=_mean(divergences[held]),
    )


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


# ---- the chain


def _checked(folder: Path, summary: _Row, key: Key | None) -> Check:
    """What `safereg ledger verify` says of the folder."""
    if "ledger" not in summary:
        return Check("unchecked", "not checked: the run has no summary yet, which keeps its head")
    try:
        head = verify_ledger(folder, key)
    except LedgerError as err:
        return Check("altered", f"does NOT hold: {err}")
    return Check("verified", f"holds: {_told(head)}; {_vouched(folder, key)}", key is not None)


def _told(head: LedgerHead) -> str:
    return f"{head.rows} rows, head {head.head[:16]}"


def _vouched(folder: Path, key: Key | None) -> str:
    if key is not None:
        return f"signed: {key.name}"
    if (folder / f"summary.json{SUFFIX}").is_file():
        return "signed, but no key was given to check it: `safereg report --key`"
    return "not keyed: whoever can write both of its files can make it anew"
