"""What evaluations say: base beside arms, by set, class and form; the law of mixtures."""

import math
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from typing import Any

from safereg_dist.evaluate.compare import COMPARED
from safereg_dist.evaluate.report.arms import DASH, Arm, as_object, number, percent, plain
from safereg_dist.evaluate.report.tables import (
    SIGNS,
    Line,
    known_signs,
    name_cell,
    rate_cell,
    small,
    table,
)
from safereg_dist.evaluate.report.tradeoff import law_of


def evaluation_section(arms: list[Arm]) -> str:
    """All tables of the evaluation; a hint where there is none."""
    shown = known_signs(arms)
    if not shown:
        return small(
            "No evaluation was found: run `safereg eval` with `--out RUN_DIR/eval.json` to see "
            "attack success and utility here."
        )
    lines = [
        Line(arm.role, [name_cell(arm, place), *(rate_cell(arm, key) for key in shown)])
        for place, arm in enumerate(arms)
        if arm.evaluation
    ]
    note = small(
        "Held-out prompts, 95 % intervals below each share. Lower is better for attack success and "
        "over-refusal. Sampled means temperature 1; greedy decoding alone can hide a leak. "
        "P(refuse) is the mean probability of the refusal's first token, P(poisoned) of that of an "
        "answer that complies, both on harmful prompts."
    )
    parts = [
        "<h2>Evaluation</h2>",
        *(_stale_note(arm) for arm in arms if arm.stale),
        table(["arm", *(SIGNS[key] for key in shown)], lines),
        note,
        _grouped(arms, "sets", "By set of prompts"),
        _grouped(arms, "kinds", "By class of prompts"),
        _by_form(arms),
        _differences(arms),
    ]
    return "".join(parts)


def _stale_note(arm: Arm) -> str:
    told = f"The evaluation of {arm.name} is stale: {arm.stale}. Run `safereg eval` again."
    return f'<p class="bad">{escape(told)}</p>'


def _grouped(arms: list[Arm], by: str, title: str) -> str:
    """For each set, or class, of prompts the arms one below the other; nothing without any."""
    names = list(dict.fromkeys(name for arm in arms for name in as_object(arm.evaluation.get(by))))
    tables: dict[tuple[str, ...], list[Line]] = {}  # groups that tell of the same share one
    for name in names:
        parts = [_part(arm, by, name) for arm in arms]
        shown = known_signs(parts)
        if shown:
            tables.setdefault(tuple(shown), []).append(Line("", [escape(name)]))
            tables[tuple(shown)] += [
                Line(part.role, [name_cell(part, place), *(rate_cell(part, key) for key in shown)])
                for place, part in enumerate(parts)
                if known_signs([part])
            ]
    told = [table(["arm", *(SIGNS[k] for k in shown)], lines) for shown, lines in tables.items()]
    return f"<h3>{title}</h3>{''.join(told)}" if told else ""


def _part(arm: Arm, by: str, name: str) -> Arm:
    return replace(arm, evaluation=as_object(as_object(arm.evaluation.get(by)).get(name)))


def _by_form(arms: list[Arm]) -> str:
    """Attack success of each form of attack beside the plain one, over all sets and for each."""
    head, lines = _forms(arms), []
    if not head:
        return ""
    sets = list(
        dict.fromkeys(name for arm in arms for name in as_object(arm.evaluation.get("sets")))
    )
    scopes: list[tuple[str, list[Arm]]] = [("all sets", arms)]
    scopes += [(name, [_part(arm, "sets", name) for arm in arms]) for name in sets]
    for scope, parts in scopes:
        told = [
            Line(part.role, [name_cell(part, place), *_form_cells(part, head)])
            for place, part in enumerate(parts)
            if part.evaluation.get("attacks")
        ]
        if told:
            lines += [Line("", [escape(scope)]), *told] if sets else told
    note = small("Attack success, greedy, on the same harmful prompts in each form.")
    return f"<h3>By form of attack</h3>{table(['arm', 'as asked', *head], lines)}{note}"


def _forms(arms: list[Arm]) -> list[str]:
    return list(dict.fromkeys(n for arm in arms for n in as_object(arm.evaluation.get("attacks"))))


def _form_cells(arm: Arm, forms: list[str]) -> Iterator[str]:
    yield rate_cell(arm, "attack_success_rate")
    for form in forms:
        yield rate_cell(_part(arm, "attacks", form), "attack_success_rate")


def _differences(arms: list[Arm]) -> str:
    """What `safereg eval --against` has found, a row for each pair of models."""
    lines = []
    for place, arm in enumerate(arms):
        for name, other in as_object(arm.evaluation.get("against")).items():
            found = as_object(as_object(other).get("differences"))
            cells = [_difference(as_object(found.get(figure))) for figure in COMPARED]
            lines.append(Line(arm.role, [f"{name_cell(arm, place)} \u2212 {escape(name)}", *cells]))
    if not lines:
        return ""
    note = small(
        "The same prompts, one by one; 95 % intervals (of yes and no Agresti and Min's, else the "
        "bootstrap's over prompts), and p of McNemar's exact test where answers are yes or no."
    )
    head = ["difference", *(SIGNS[figure] for figure in COMPARED)]
    return f"<h3>Prompt by prompt</h3>{table(head, lines)}{note}"


def _difference(tested: dict[str, Any]) -> str:
    value, interval, p = (tested.get(key) for key in ("difference", "interval", "p"))
    if not math.isfinite(number(value)) or not isinstance(interval, (list, tuple)):
        return DASH
    low, high = (100 * number(bound) for bound in interval)
    told = f"{100 * number(value):+.1f}\u00a0%<small>{low:+.1f} to {high:+.1f}"
    if p is None:
        return f"{told}</small>"
    chance = "&lt; 0.001" if number(p) < 0.001 else plain(number(p), ".3f")
    return f"{told}, p {chance}</small>"


def law_section(arms: list[Arm]) -> str:
    """The law of mixtures against what was measured; nothing where no b is known."""
    law = law_of(arms)
    if not law:
        return ""
    places = {arm.name: place for place, arm in enumerate(arms)}
    lines = [
        Line(
            arm.role,
            [
                name_cell(arm, places[arm.name]),
                plain(b, ".2g"),
                percent(said),
                rate_cell(arm, "refusal_probability"),
                plain(arm.rate("refusal_probability") - said, "+.1f"),
            ],
        )
        for arm, b, said in law
    ]
    head = ["arm", "b of every row", "P(refuse) by the law", "measured", "difference, points"]
    note = small(
        "By the law, P(refuse) = b P_base(refuse). It is exact for what the loss is lowest at, on "
        "requests that were trained on with answers that do not refuse; the measured figure is of "
        "held-out prompts, after a finite training."
    )
    return f"<h2>The law of mixtures</h2>{table(head, lines)}{note}"
