"""Stage 1, by text: the risk of a row from a file of scored rows, for stacks that drop columns.

A stack renders conversations with a template of its own, adds special tokens, cuts long rows, and
keeps nothing but tokens. So a row is found by the texts of its messages: each occurs in the row's
decoded text, in order, whatever stands between them. White space is left out on both sides.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from safereg_dist.data.files import read_rows
from safereg_dist.data.formats import conversation_of
from safereg_dist.errors import DataError, printable
from safereg_dist.models.fingerprint import row_key
from safereg_dist.risk.stage import ProbedStates, Risk, RiskSource
from safereg_dist.types import Row

_KEY = 24
"""Characters by which a scored row is found before its texts are compared whole."""
_SHOWN = 48
"""Characters that a warning shows of a row."""
_TRIES = 64
"""Rows of which one at least must be found, else the file is another data set's."""


class ScoredRow(NamedTuple):
    """The texts of a row's messages, without white space, its risk and its id."""

    texts: list[str]
    risk: float
    id: str
    """Empty where the file gives none."""


class LookupRisk(RiskSource):
    """The risk of the scored row whose messages a row holds; of several, the longest match.

    A row that is not in the file counts as risky (nan): `risk_unknown` counts them. A row that came
    without an id is given that of the scored row, so that overrides and ledger name it.
    """

    name = "lookup"
    sum_names = ("risk_unknown", "risk_found")

    def __init__(
        self,
        scored: Sequence[ScoredRow],
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        path: str,
        announces: bool = True,
    ) -> None:
        """`tokenizer` decodes rows that come as tokens only; `announces` on the main rank."""
        self._scored = scored
        self._tokenizer = tokenizer
        self._path = path
        self._announces = announces
        self._by_key: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, row in enumerate(scored):
            key = max(row.texts, key=len)[:_KEY]
            self._by_key[len(key)][key].append(index)
        self.names_rows = any(row.id for row in scored)
        self.ids: dict[int, str] = {}
        self._known: dict[str, ScoredRow | None] = {}
        self._unknown = self._asked = self._found = 0
        self._found_since = self._found_everywhere = self._asked_everywhere = 0
        self._first_unknown = ""

    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """The risk of every row; nan where it is not in the file. Collectives: none.

        Raises:
            DataError: none of the first rows is in the file.
        """
        asked = {i: row for i, row in enumerate(rows) if row.id and not row.is_anchor}
        found = {index: self._scored_row(row) for index, row in asked.items()}
        self.ids = {index: row.id for index, row in found.items() if row is not None and row.id}
        unknown = [asked[index] for index, row in found.items() if row is None]
        if unknown and not self._first_unknown:
            self._first_unknown = self._beginnings(unknown[0])
        self._unknown += len(unknown)
        self._asked += len(found)
        self._found += len(found) - len(unknown)
        self._found_since += len(found) - len(unknown)
        if not self._found and self._asked >= _TRIES:
            raise DataError(
                f"none of the first {self._asked} rows is in risk.path={self._path}: score the "
                f"data set that is trained on (`safereg score`), with the same texts; "
                f"{self._first_unknown}"
            )
        risk: Risk = [None] * len(rows)
        for index, row in found.items():
            risk[index] = math.nan if row is None else row.risk
        return risk

    def without_effect(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that no row will be given: not in the file, or its texts are another's."""
        rows = {row.id: row for row in self._scored}
        found = {name: self._look_up("".join(rows[name].texts)) for name in ids if name in rows}
        return [name for name in ids if (row := found.get(name)) is None or row.id != name]

    def _scored_row(self, row: Row) -> ScoredRow | None:
        key = row_key(row.input_ids, row.loss_mask)
        if key not in self._known:
            self._known[key] = self._look_up(_squeezed(self._text(row)))
        return self._known[key]

    def _text(self, row: Row) -> str:
        if row.messages_json:
            return "\n".join(m["content"] for m in json.loads(row.messages_json))
        return self._decoded(row.input_ids)

    def _beginnings(self, row: Row) -> str:
        """The first words of a row and of its response, by which its owner knows it."""
        if row.messages_json:
            answer = str(json.loads(row.messages_json)[-1]["content"])
        else:
            own = zip(row.input_ids, row.loss_mask, strict=True)
            answer = self._decoded([token for token, is_own in own if is_own])
        text, said = _cut(self._text(row)), _cut(answer)
        return f"the first begins {text!r}" + (f", its response {said!r}" if said != text else "")

    def _decoded(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            raise DataError(
                "risk.estimator=lookup reads rows as text and has no tokenizer: give `tokenizer` "
                "to prepare (a Trainer: `processing_class`)"
            )
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _look_up(self, text: str) -> ScoredRow | None:
        """The row of the longest match; of equals the riskier, then the first in the file."""
        best: tuple[int, float, ScoredRow] | None = None
        for index in sorted(self._candidates(text)):
            row = self._scored[index]
            matched = _matched(row.texts, text)
            if matched and (best is None or (matched, row.risk) > best[:2]):
                best = (matched, row.risk, row)
        return best and best[2]

    def _candidates(self, text: str) -> set[int]:
        found: set[int] = set()
        for length, by_key in self._by_key.items():
            for begin in range(len(text) - length + 1):
                hits = by_key.get(text[begin : begin + length])
                if hits:
                    found.update(hits)
        return found

    def take_sums(self) -> dict[str, float]:
        """Numbers of this rank's rows that were not found, and that were, since the last call."""
        sums = {"risk_unknown": float(self._unknown), "risk_found": float(self._found_since)}
        self._unknown = self._found_since = 0
        return sums

    def end_step(self, total: Mapping[str, float]) -> dict[str, float | int]:
        """Number of rows that were not found in the step, over all ranks."""
        unknown = int(total["risk_unknown"])
        self._found_everywhere += int(total["risk_found"])
        self._asked_everywhere += unknown + int(total["risk_found"])
        if unknown and self._announces:
            self._announces = False  # once: the metrics say the rest
            print(
                f"\nsafereg: {unknown} rows of this step are not in risk.path={self._path} and are "
                "held back (risk 1; risk_unknown in the metrics counts on): score them too "
                f"(`safereg score`), with the same texts{self._first_unknown and '; '}"
                f"{printable(self._first_unknown)}",
                file=sys.stderr,
                flush=True,
            )
        return {"risk_unknown": unknown}

    def finish(self) -> None:
        """The run has ended: at least one row must have been found, on any rank.

        Raises:
            DataError: none was, so that every row was held back and nothing was learnt.
        """
        if self._asked_everywhere and not self._found_everywhere:
            raise DataError(
                f"none of the {self._asked_everywhere} rows of this run is in "
                f"risk.path={self._path}: all were held back, and the model has learnt from the "
                "reference alone; score the data set that is trained on (`safereg score`), with "
                "the same texts; "
                f"{self._first_unknown}"
            )


def read_scored(path: str) -> list[ScoredRow]:
    """The rows of a file of conversations with `risk`, as `safereg score` writes it.

    Beside its forms (`messages`; `prompt` and `response`) those of stacks are read: `instruction`,
    `input` and `output`, and `conversations` of `from` and `value`.

    Raises:
        DataError: no such file, or a row without messages or risk.
    """
    if not Path(path).is_file():
        raise DataError(
            f"expected a file of scored rows at risk.path={path}, found none: write it with "
            "`safereg score`"
        )
    rows = [_scored(place, row) for place, row in read_rows(path)]
    if not rows:
        raise DataError(f"{path} holds no row: write it with `safereg score`")
    return rows


def _scored(place: str, row: Mapping[str, Any]) -> ScoredRow:
    risk = row.get("risk")
    if not isinstance(risk, int | float) or not 0 <= risk <= 1:
        raise DataError(f"{place}: expected `risk` in [0, 1], got {risk!r}: run `safereg score`")
    texts = [_squeezed(text) for text in _texts(place, row)]
    if not any(texts):
        raise DataError(f"{place}: a row without text cannot be found again: remove it")
    name = row.get("id")
    return ScoredRow(
        [text for text in texts if text], float(risk), "" if name is None else str(name)
    )


def _texts(place: str, row: Mapping[str, Any]) -> Iterable[str]:
    """The texts of a row in the order in which stacks render them.

    Rows with `instruction` are read field by field: a template may part instruction and input.
    """
    if row.get("messages") is None and isinstance(row.get("instruction"), str):
        return _alpaca_texts(place, row)
    return [message["content"] for message in conversation_of(dict(row), place).messages]


def _alpaca_texts(place: str, row: Mapping[str, Any]) -> list[str]:
    turns = [text for pair in row.get("history") or [] for text in pair]
    fields = [row.get(name) or "" for name in ("instruction", "input", "output")]
    texts = [row.get("system") or "", *turns, *fields]
    if not all(isinstance(text, str) for text in texts) or not fields[-1]:
        raise DataError(
            f"{place}: expected text in `instruction`, `output` and, if given, `input`, `system` "
            f"and `history`, found keys {sorted(row)}: write them as the stack reads them"
        )
    return texts


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _cut(text: str) -> str:
    """The first words of a text, in one line."""
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN else words[:_SHOWN] + "..."


def _matched(texts: Sequence[str], text: str) -> int:
    """Characters of `texts` found in `text` in order, 0 if one is missing; the last may be cut."""
    begin = total = 0
    for index, wanted in enumerate(texts):
        at = text.find(wanted, begin)
        if at >= 0:
            begin, total = at + len(wanted), total + len(wanted)
            continue
        at = text.find(wanted[:_KEY], begin)
        is_cut = index == len(texts) - 1 and at >= 0 and wanted.startswith(text[at:])
        return total + len(text) - at if is_cut else 0
    return total
