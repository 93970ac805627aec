"""What a model has said: kept as it is said, so that a run that is cut off goes on.

A JSONL file. Its first line says what the answers depend on; each other one holds a row's number
and some of what is known of it, and lines of the same row add up. At the end it is written once
more with one line for each row, its verdicts among them: the same file then serves to read, to
judge again without the model, and to compare two models prompt by prompt.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safereg_dist.errors import CheckpointError, DataError
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import parse_json


def answers_path(out: Path) -> Path:
    """Where the answers of an evaluation are kept: beside its result."""
    return out.with_name(f"{out.stem}.answers.jsonl")


class KeptAnswers:
    """The file of one evaluation; without a path, the same in memory alone.

    Args:
        made_of: what answers depend on; a file that was made of something else begins anew.
    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path: Path | None, made_of: Mapping[str, Any]) -> None:
        self._path = path
        self._made_of = json.loads(json.dumps(made_of))
        self._rows: dict[int, dict[str, Any]] = defaultdict(dict)
        if path is None:
            return
        header, rows = _read(path)
        if header == self._made_of:
            self._rows.update(rows)
        self._write()

    def known(self, name: str) -> dict[int, Any]:
        """Row -> what is known under a name, where it is."""
        return {row: found[name] for row, found in self._rows.items() if name in found}

    def add(self, row: int, **found: Any) -> None:
        """Keeps what is new of a row."""
        self._rows[row] |= found
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"row": row, **found}) + "\n")

    def finish(self, verdicts: Iterable[Mapping[str, Any]]) -> None:
        """Writes the whole file, with what was made of each row."""
        for row, verdict in enumerate(verdicts):
            self._rows[row] |= verdict
        if self._path is not None:
            self._write()

    def _write(self) -> None:
        assert self._path is not None
        rows = [{"row": row, **self._rows[row]} for row in sorted(self._rows)]
        lines = [json.dumps(line) + "\n" for line in ({"made_of": self._made_of}, *rows)]
        write_atomically(self._path, "".join(lines))


def kept_rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what they were made of, the rows in order) of a finished evaluation.

    Raises:
        DataError: there is no such file, or it is no evaluation's.
    """
    header, rows = _read(path)
    if header is None:
        raise DataError(
            f"expected the answers of an evaluation in {path}, found none: run `safereg eval` with "
            "--out first"
        )
    return header, [rows[row] for row in sorted(rows)]


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[int, dict[str, Any]]]:
    """Header and rows; without a last line that was cut off, or anything of a foreign file."""
    rows: dict[int, dict[str, Any]] = defaultdict(dict)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None, rows
    except (OSError, UnicodeDecodeError) as err:
        raise CheckpointError(
            f"cannot read {path}: {err}: remove it, or name another --out"
        ) from err
    header = None
    for number, line in enumerate(lines):
        try:
            found = parse_json(line)
        except json.JSONDecodeError:
            break
        if not isinstance(found, dict):
            break
        if number == 0:
            header = found.get("made_of")
            continue
        if not isinstance(row := found.pop("row", None), int):
            break
        rows[row] |= found
    return (header, rows) if isinstance(header, dict) else (None, rows)
