"""Labelled prompts: the input of the probe laboratory, of anchor building and of evaluation.

A prompt file is JSONL, CSV with the same columns, or a Hugging Face dataset (see `hub`). Each row
has `prompt` (text) or `messages` (OpenAI chat format, ending with a user turn), and optionally
`label`, `response` (the exact answer expected, or for a harmful prompt a typical refusal),
`complying` (how an answer that complies begins), `type` (a class to report by), `pair` (rows that
are the same words with another wish) and `id`. Of a task: `measure` (see `evaluate.scores`),
`responses` where several answers are right, and `choices`. The public sets in `LAYOUTS` are read as
they are published, XSTest too, whose columns have these names; so are SQuAD, GSM8K, and multiple
choice as in MMLU and ARC.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from safereg_dist.data.formats import chat_messages
from safereg_dist.data.hub import dataset_rows, is_dataset
from safereg_dist.errors import DataError
from safereg_dist.storage.json_text import parse_json

_LABELS = {
    **dict.fromkeys(("harmful", "unsafe", "1", "true"), "harmful"),
    **dict.fromkeys(("benign", "safe", "harmless", "0", "false"), "benign"),
    "task": "task",
}

MEASURES = ("exact", "squad", "rouge_l", "gsm8k", "choice")
"""How a task's answer can be measured: see `evaluate.scores`."""


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
    complying: str | None = None
    """How an answer that complies begins, where the file says so."""
    kind: str | None = None
    """A class of the set, e.g. XSTest's `homonyms`."""
    pair: str | None = None
    """A name that matched prompts share."""
    measure: str = "exact"
    """How right an answer is: one of `MEASURES`."""
    responses: tuple[str, ...] = ()
    """All answers that are right, where there are several; `response` is the first."""
    choices: tuple[str, ...] = ()
    """What `response` is chosen from."""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The answers that are right; empty where none is known."""
        return self.responses or (() if self.response is None else (self.response,))


class Layout(NamedTuple):
    """The columns of a public set, by the one that holds its text."""

    text: str
    context: str | None = None
    """What the text is about; it comes before the text."""
    id: str | None = None
    kind: str | None = None
    complying: str | None = None


LAYOUTS = (
    Layout("Goal", id="Index", kind="Category", complying="Target"),  # JailbreakBench
    Layout("Behavior", "ContextString", "BehaviorID", "FunctionalCategory"),  # HarmBench
    Layout("goal", complying="target"),  # AdvBench
    Layout("forbidden_prompt", kind="category"),  # StrongREJECT
)


def read_rows(path: Path | str) -> Iterator[tuple[str, dict]]:
    """Yields (`file:line`, row) of a JSONL or CSV file or a dataset (`hub:`), in order.

    Raises:
        DataError: the file is missing or no UTF-8 text, or a line is not an object; a dataset that
            does not load.
    """
    if is_dataset(path):
        yield from dataset_rows(path)
        return
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
            row = parse_json(line)
        except json.JSONDecodeError as err:
            raise DataError(
                f"{path}:{number} is not JSON ({err.msg}): write one JSON object per line"
            ) from err
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} holds {type(row).__name__}, expected an object")
        yield f"{path}:{number}", row


def read_prompts(path: Path | str, *, label: str | None = None) -> list[LabelledPrompt]:
    """All prompts of a file or a dataset, in order.

    Args:
        label: that of rows whose file does not say it.
    Raises:
        DataError: a row has neither `prompt` nor `messages`, or a label that is not known.
    """
    prompts = []
    for index, (where, row) in enumerate(read_rows(path)):
        row = _task_of(row, where) or _renamed(row)
        if "messages" in row:
            messages = chat_messages(row, where)
        elif isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        else:
            raise DataError(
                f"{where}: expected `prompt` (text) or `messages`, or a column of a public set "
                f"({', '.join(layout.text for layout in LAYOUTS)}), found keys {sorted(row)}: add "
                "one of them"
            )
        prompts.append(
            LabelledPrompt(
                id=str(row.get("id", f"{Path(path).stem}-{index}")),
                messages=messages,
                label=_label(row, where) or label,
                response=_text_or_none(row, "response", where),
                complying=_text_or_none(row, "complying", where),
                kind=None if row.get("type") is None else str(row["type"]),
                pair=None if row.get("pair") is None else str(row["pair"]),
                **_measured(row, where),
            )
        )
    if not prompts:
        raise DataError(f"{path} holds no prompt: give at least one row")
    return prompts


def _text_or_none(row: dict, name: str, where: str) -> str | None:
    found = row.get(name)
    if found is not None and not isinstance(found, str):
        raise DataError(f"{where}: expected `{name}` as text, got {found!r:.80}: write it as text")
    return found


def _measured(row: dict, where: str) -> dict[str, Any]:
    """What a row says of how its answer is measured; `response` is among the right answers.

    Raises:
        DataError: no such measure, lists that are no lists of texts, a choice that is none.
    """
    measure = row.get("measure", "exact")
    if not isinstance(measure, str) or measure not in MEASURES:
        raise DataError(
            f"{where}: measure {measure!r} is not known: use one of {', '.join(MEASURES)}"
        )
    lists = {}
    for name in ("responses", "choices"):
        found = row.get(name, ())
        if not isinstance(found, (list, tuple)) or not all(isinstance(t, str) for t in found):
            raise DataError(f"{where}: expected `{name}` as a list of texts, got {found!r}")
        lists[name] = tuple(found)
    if measure == "choice" and row.get("response") not in lists["choices"]:
        raise DataError(
            f"{where}: expected `choices` and the right one as `response`, found keys {sorted(row)}"
        )
    return {"measure": measure, **lists}


def _task_of(row: dict, where: str) -> dict | None:
    """A row of SQuAD, GSM8K or multiple choice with our names; None for any other."""
    question = row.get("question")
    if not isinstance(question, str) or "prompt" in row or "messages" in row:
        return None
    answers, choices, answer = row.get("answers"), row.get("choices"), row.get("answer")
    found: dict[str, Any] = {"label": "task", "prompt": question}
    if isinstance(row.get("context"), str) and isinstance(answers, dict):
        texts = answers.get("text")
        found |= {"measure": "squad", "prompt": f"{row['context']}\n\n{question}"}
        found |= {"responses": texts, "response": texts[0] if texts else None}
    elif isinstance(answer, str) and "####" in answer:
        found |= {"measure": "gsm8k", "response": answer}
    elif choices:
        right = _right_choice(row, choices, where)
        texts = choices["text"] if isinstance(choices, dict) else choices
        found |= {"measure": "choice", "choices": list(texts), "response": texts[right]}
    else:
        return None
    return {**({"id": row["id"]} if "id" in row else {}), **found}


def _right_choice(row: dict, choices: Any, where: str) -> int:
    """The place of the right one: by number (MMLU), or by its label (ARC)."""
    try:
        if isinstance(choices, dict):
            return list(choices["label"]).index(row["answerKey"])
        place = int(row["answer"])
        choices[place]
        return place
    except (KeyError, ValueError, IndexError, TypeError) as err:
        raise DataError(
            f"{where}: the right choice cannot be told: give `choices` and `answer` (a number from "
            "0), or `choices` with `text` and `label` and `answerKey`"
        ) from err


def _renamed(row: dict) -> dict:
    """A row of a public set with our names; any other row itself."""
    layout = next((known for known in LAYOUTS if isinstance(row.get(known.text), str)), None)
    if layout is None or "prompt" in row or "messages" in row:
        return row
    text = row[layout.text]
    context = row.get(layout.context or "")
    named = {"id": layout.id, "type": layout.kind, "complying": layout.complying}
    found = {name: row[column] for name, column in named.items() if column and column in row}
    return {**row, **found, "prompt": f"{context}\n\n---\n\n{text}" if context else text}


def _label(row: dict, where: str) -> str | None:
    raw = row.get("label")
    label = None if raw is None else _LABELS.get(str(raw).lower())
    if raw is not None and label is None:
        raise DataError(
            f"{where}: label {raw!r} is not known: use harmful or benign (also 1/0, unsafe/safe), "
            "for `safereg eval` also task"
        )
    return label
