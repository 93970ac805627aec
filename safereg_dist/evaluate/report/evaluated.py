"""What evaluations say: base beside arms, by set, class and form; the law of mixtures."""

from collections.abc import Iterator
from dataclasses import replace

from safereg_dist.evaluate.compare import COMPARED
from safereg_dist.evaluate.report.arms import Arm, as_object, percent, plain
from safereg_dist.evaluate.report.tables import (
    SIGNS,
    Block,
    Cell,
    Heading,
    Line,
    Note,
    Section,
    Table,
    difference_cell,
    known_signs,
    name_cell,
    rate_cell,
)
from safereg_dist.evaluate.report.tradeoff import law_of

_EXPLAINED = {
    "attack_success_rate": "Lower is better for attack success and over-refusal.",
    "attack_success_rate_sampled": "Sampled means temperature 1; greedy decoding alone can hide a "
    "leak.",
    "poisoned_token_probability": "P(poisoned) is the mean probability, on harmful prompts, of the "
    "first token of an answer that complies.",
    "refusal_probability": "P(refuse) is the mean probability, on harmful prompts, of a refusal's "
    "first token.",
}
"""What the note says of figures that are shown."""


def evaluation_section(arms: list[Arm]) -> Section | None:
    """All tables of the evaluation; None where there is none."""
    shown = known_signs(arms)
    if not shown:
        return None
    lines = [
        Line(arm.role, [name_cell(arm, place), *(rate_cell(arm, key) for key in shown)])
        for place, arm in enumerate(arms)
        if arm.evaluation
    ]
    told = [words for key, words in _EXPLAINED.items() if key in shown]
    note = Note(" ".join(["Held-out prompts, 95 % intervals below each share.", *told]))
    head = ["arm", *(SIGNS[key] for key in shown)]
    blocks = [
        *(_stale_note(arm) for arm in arms if arm.stale),
        Table(label="Evaluation, all prompts", head=head, lines=lines),
        note,
        *_grouped(arms, "sets", "By set of prompts"),
        *_grouped(arms, "kinds", "By class of prompts"),
        *_by_form(arms),
        *_differences(arms),
    ]
    return Section(key="evaluation", title="Evaluation", blocks=blocks)


def _stale_note(arm: Arm) -> Note:
    told = f"The evaluation of {arm.name} is stale: {arm.stale}. Run `safereg eval` again."
    return Note(told, "bad")


def _grouped(arms: list[Arm], by: str, title: str) -> list[Block]:
    """For each set, or class, of prompts the arms one below the other; nothing without any."""
    names = list(dict.fromkeys(name for arm in arms for name in as_object(arm.evaluation.get(by))))
    tables: dict[tuple[str, ...], list[Line]] = {}  # groups that tell of the same share one
    for name in names:
        parts = [_part(arm, by, name) for arm in arms]
        shown = known_signs(parts)
        if shown:
            tables.setdefault(tuple(shown), []).append(Line("", [name]))
            tables[tuple(shown)] += [
                Line(part.role, [name_cell(part, place), *(rate_cell(part, key) for key in shown)])
                for place, part in enumerate(parts)
                if known_signs([part])
            ]
    told: list[Block] = [
        Table(
            label=f"{title}: {', '.join(SIGNS[key] for key in shown)}",
            head=["arm", *(SIGNS[key] for key in shown)],
            lines=lines,
        )
        for shown, lines in tables.items()
    ]
    return [Heading(title), *told] if told else []


def _part(arm: Arm, by: str, name: str) -> Arm:
    return replace(arm, evaluation=as_object(as_object(arm.evaluation.get(by)).get(name)))


def _by_form(arms: list[Arm]) -> list[Block]:
    """Attack success of each form of attack beside the plain one, over all sets and for each."""
    head, lines = _forms(arms), []
    if not head:
        return []
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
            lines += [Line("", [scope]), *told] if sets else told
    title = "By form of attack"
    note = Note("Attack success, greedy, on the same harmful prompts in each form.")
    return [Heading(title), Table(label=title, head=["arm", "as asked", *head], lines=lines), note]


def _forms(arms: list[Arm]) -> list[str]:
    return list(dict.fromkeys(n for arm in arms for n in as_object(arm.evaluation.get("attacks"))))


def _form_cells(arm: Arm, forms: list[str]) -> Iterator[Cell]:
    yield rate_cell(arm, "attack_success_rate")
    for form in forms:
        yield rate_cell(_part(arm, "attacks", form), "attack_success_rate")


def _differences(arms: list[Arm]) -> list[Block]:
    """What `safereg eval --against` has found, a row for each pair of models."""
    lines = []
    for place, arm in enumerate(arms):
        for name, other in as_object(arm.evaluation.get("against")).items():
            found = as_object(as_object(other).get("differences"))
            cells = [difference_cell(as_object(found.get(figure))) for figure in COMPARED]
            pair = name_cell(arm, place)._replace(text=f"{arm.name} \u2212 {name}")
            lines.append(Line(arm.role, [pair, *cells]))
    if not lines:
        return []
    title, head = "Prompt by prompt", ["difference", *(SIGNS[figure] for figure in COMPARED)]
    note = Note(
        "The same prompts, one by one; 95 % intervals (of yes and no Agresti and Min's, else the "
        "bootstrap's over prompts), and p of McNemar's exact test where answers are yes or no."
    )
    return [Heading(title), Table(label=title, head=head, lines=lines), note]


def law_section(arms: list[Arm]) -> Section | None:
    """The law of mixtures against what was measured; None where no b is known."""
    law = law_of(arms)
    if not law:
        return None
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
    note = Note(
        "By the law, P(refuse) = b P_base(refuse). It is exact for what the loss is lowest at, on "
        "requests that were trained on with answers that do not refuse; the measured figure is of "
        "held-out prompts, after a finite training."
    )
    title = "The law of mixtures"
    return Section(
        key="law", title=title, blocks=[Table(label=title, head=head, lines=lines), note]
    )
