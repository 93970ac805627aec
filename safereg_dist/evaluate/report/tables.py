"""What sections of the page are made of: tables, notes and figures, as values for the templates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from safereg_dist.evaluate.report.arms import DASH, Arm, number, percent, plain

SIGNS = {
    "attack_success_rate": "attack success, greedy",
    "attack_success_rate_sampled": "attack success, sampled",
    "poisoned_token_probability": "P(poisoned)",
    "refusal_probability": "P(refuse)",
    "refusal_rate": "refused",
    "over_refusal_rate": "over-refusal",
    "benign_exact_match": "benign exact",
    "task_exact_match": "task exact",
    "task_score": "task score",
    "squad_f1": "SQuAD F1",
    "rouge_l": "ROUGE-L",
    "gsm8k_accuracy": "GSM8K",
    "choice_accuracy": "multiple choice",
}
"""Figures of an evaluation, and what they are called."""
_SHORT = 20  # rows: about half a page


class Cell(NamedTuple):
    """A cell of a table; a text alone is one too."""

    text: str
    below: str = ""
    """A second, smaller line: an interval."""
    kind: str = ""
    """`good`, `bad` or nothing."""
    arm: int | None = None
    """Of an arm's name: its number among all arms, which has a colour."""
    mark: str = ""
    """A warning after the text."""


class Line(NamedTuple):
    """A row of a table. With one cell it heads the rows below it."""

    kind: str
    cells: Sequence[Cell | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table in a box of its own, which scrolls where it is too wide."""

    form: ClassVar[str] = "table"
    label: str
    """What a screen reader calls it; each is another."""
    head: Sequence[str]
    lines: Sequence[Line]
    is_prose: bool = False
    """True where cells are sentences, which wrap."""

    @property
    def is_short(self) -> bool:
        """True where it is printed on one page; a longer one breaks between its rows."""
        return len(self.lines) <= _SHORT


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph: a small one unless it warns."""

    form: ClassVar[str] = "note"
    text: str
    kind: str = "small"


@dataclass(frozen=True, slots=True)
class Heading:
    """Of the blocks below it, within a section."""

    form: ClassVar[str] = "heading"
    text: str


Block = Table | Note | Heading


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page with a title."""

    key: str
    """Its anchor."""
    title: str
    blocks: Sequence[Block]


def name_cell(arm: Arm, place: int) -> Cell:
    """An arm's name; `place` is its number among all arms."""
    return Cell(arm.name, arm=place, mark="(stale)" if arm.stale else "")


def rate_cell(arm: Arm, key: str) -> Cell:
    """A share with its 95 % interval below it."""
    bounds = arm.bounds(key)
    return Cell(percent(arm.rate(key)), "" if bounds is None else between(*bounds))


def between(low: float, high: float) -> str:
    """An interval of shares in per cent."""
    return "\u2013".join(percent(end).removesuffix("\u00a0%") for end in (low, high))


def difference_cell(tested: dict[str, Any]) -> Cell:
    """What a paired test has found: the difference, its 95 % interval and p."""
    value, interval, p = (tested.get(key) for key in ("difference", "interval", "p"))
    if not math.isfinite(number(value)) or not isinstance(interval, (list, tuple)):
        return Cell(DASH)
    low, high = (100 * number(bound) for bound in [*interval, None, None][:2])
    told = f"{low:+.1f} to {high:+.1f}"
    if p is not None:
        told += f", p {chance(number(p))}"
    return Cell(f"{100 * number(value):+.1f}\u00a0%", told)


def chance(p: float) -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else plain(p, ".3f")


def known_signs(arms: Sequence[Arm]) -> list[str]:
    """The figures that some arm has; of two that say the same, one."""
    found = [key for key in SIGNS if any(math.isfinite(arm.rate(key)) for arm in arms)]
    if "task_score" in found and "task_exact_match" in found:
        pairs = [(arm.rate("task_exact_match"), arm.rate("task_score")) for arm in arms]
        if all(one == other or math.isnan(one + other) for one, other in pairs):
            found.remove("task_score")  # there is no other measure
    if "refusal_rate" in found and "attack_success_rate" in found:
        found.remove("refusal_rate")  # what is left of attack success
    return found
