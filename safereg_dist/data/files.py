"""Labelled prompts: the input of the probe laboratory, of anchor building and of evaluation.

A prompt file is JSONL (or CSV with the same columns). Each row has `prompt` (text) or `messages`
(OpenAI chat format, ending with a user turn), and optionally `label`, `response` (the exact answer
expected, or for a harmful prompt a typical refusal) and `id`.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from safereg_dist.data.formats import chat_messages
from safereg_dist.errors import DataError

_LABELS = {
    **dict.fromkeys(("harmful", "unsafe", "1", "true"), "harmful"),
    **dict.fromkeys(("benign", "safe", "harmless", "0", "false"), "benign"),
    "task": "task",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledPrompt:
    """One prompt with what is known of it."""

    id: str
    messages: list[dict[str, str]]
    """Chat turns up to and including the user turn to be answered."""
    label: str | None
    """`harmful`, `benign`, `task`, or None where the file does not say."""
    response: str | None
    """The exact answer expected, where there is one."""


def read_rows(path: Path | str) -> Iterator[tuple[str, dict]]:
    """Yields (`file:line`, row) of a JSONL or CSV file, in order.

    Raises:
        DataError: the file is missing or no UTF-8 text, or a line is not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"expected a data file, found none at {path}: check the path")
    try:
        # utf-8-sig: spreadsheets begin their files with a byte-order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from _csv_rows(path, file) if path.suffix == ".csv" else _json_rows(path, file)
    except UnicodeDecodeError as err:
        raise DataError(f"{path} is not UTF-8 text ({err}): save it as UTF-8") from err


def _csv_rows(path: Path, file: TextIO) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(file)
    while True:
        first = reader.line_num + 1  # a quoted field may hold line breaks
        try:
            row = next(reader, None)
        except csv.Error as err:
            raise DataError(f"{path}:{first} is not CSV ({err}): quote its fields") from err
        if row is None:
            return
        where = f"{path}:{max(first, 2)}"
        if None in row:
            raise DataError(f"{where}: more fields than the header has: quote fields with commas")
        yield where, {k: v for k, v in row.items() if v not in (None, "")}


def _json_rows(path: Path, file: TextIO) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as err:
            raise DataError(
                f"{path}:{number} is not JSON ({err.msg}): write one JSON object per line"
            ) from err
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} holds {type(row).__name__}, expected an object")
        yield f"{path}:{number}", row


def read_prompts(path: Path | str) -> list[LabelledPrompt]:
    """All prompts of a JSONL or CSV file, in order.

    Raises:
        DataError: a row has neither `prompt` nor `messages`, or a label that is not known.
    """
    prompts = []
    for index, (where, row) in enumerate(read_rows(path)):
        if "messages" in row:
            messages = chat_messages(row, where)
        elif isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        else:
            raise DataError(
                f"{where}: expected `prompt` (text) or `messages`, found keys {sorted(row)}: "
                "add one of them"
            )
        raw = row.get("label")
        label = None if raw is None else _LABELS.get(str(raw).lower())
        if raw is not None and label is None:
            raise DataError(
                f"{where}: label {raw!r} is not known: use harmful, benign or task "
                "(also 1/0, unsafe/safe)"
            )
        prompts.append(
            LabelledPrompt(
                id=str(row.get("id", f"{Path(path).stem}-{index}")),
                messages=messages,
                label=label,
                response=row.get("response"),
            )
        )
    if not prompts:
        raise DataError(f"{path} holds no prompt: give at least one row")
    return prompts
