"""Tables and cells of the page, as HTML."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from safereg_dist.evaluate.report.arms import Arm, percent

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


class Line(NamedTuple):
    """A row of a table; cells are HTML. With one cell it heads the rows below it."""

    kind: str
    cells: Sequence[str]


def table(head: Sequence[str], lines: Sequence[Line]) -> str:
    """A table in a box of its own that scrolls; heads are text."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(_line(line, len(head)) for line in lines)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="table"><table><thead><tr>'
        f"{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _line(line: Line, width: int) -> str:
    if len(line.cells) == 1 < width:
        blank = f'<th class="rest" colspan="{width - 1}"></th>'
        return f'<tr class="group"><th scope="rowgroup">{line.cells[0]}</th>{blank}</tr>'
    cells = "".join(f"<td>{cell}</td>" for cell in line.cells)
    return f'<tr class="{escape(line.kind)}">{cells}</tr>'


def small(text: str) -> str:
    """A note below a table."""
    return f'<p class="small">{escape(text)}</p>'


def name_cell(arm: Arm, place: int) -> str:
    """An arm's name after a dot in its colour; `place` is its number among all arms."""
    stale = ' <span class="bad">(stale)</span>' if arm.stale else ""
    dot = f'<span class="dot" style="background:var(--arm{place})"></span>'
    first, *rest = _broken(arm.name)
    return f'<span class="start">{dot}{escape(first)}</span>{"".join(rest)}{stale}'


def breakable(name: str) -> str:
    """A name that may go on in a second line after each `_`, as HTML."""
    first, *rest = _broken(name)
    return escape(first) + "".join(rest)


def _broken(name: str) -> list[str]:
    first, *rest = name.split("_")
    return [first, *("_<wbr>" + escape(part) for part in rest)]


def rate_cell(arm: Arm, key: str) -> str:
    """A share with its 95 % interval below it."""
    bounds = arm.bounds(key)
    if bounds is None:
        return percent(arm.rate(key))
    low, high = (percent(bound).removesuffix("\u00a0%") for bound in bounds)
    return f"{percent(arm.rate(key))}<small>{low}\u2013{high}</small>"


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
