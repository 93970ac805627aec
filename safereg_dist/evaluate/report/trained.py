"""What trainings say: the rows held back, the divergence spent, overhead, probes, the ledger."""

import math

import numpy as np

from safereg_dist import __version__
from safereg_dist.evaluate.report.arms import Arm, HeldRow, as_object, number, percent, plain
from safereg_dist.evaluate.report.steps import budget_of
from safereg_dist.evaluate.report.tables import (
    Block,
    Cell,
    Heading,
    Line,
    Note,
    Section,
    Table,
    name_cell,
)


def steps_of(arm: Arm) -> str:
    """`12 of 12`: the last step, of those that were asked for where they are known."""
    last = plain(float(arm.column("step")[-1]), ",.0f")
    asked = number(arm.summary.get("total_steps"))
    asked = number(arm.setting("train", "steps")) if math.isnan(asked) else asked
    return last if math.isnan(asked) else f"{last} of {plain(asked, ',.0f')}"


def share(part: float, whole: float) -> str:
    """In per cent."""
    return percent(100 * part / whole if whole > 0 else math.nan)


def training_section(arms: list[Arm]) -> Section | None:
    """A row for each arm that was trained."""
    lines = []
    for place, arm in enumerate(arms):
        if len(arm.column("step")) == 0:
            continue
        cells = [
            name_cell(arm, place),
            steps_of(arm),
            plain(arm.total("rows"), ",.0f"),
            percent(arm.share("active_rows", "rows")),
            plain(arm.ending("task_loss")),
            plain(arm.ending("divergence")),
            plain(arm.largest("peak_memory_bytes") / 2**30, ".2f"),
        ]
        lines.append(Line(arm.role, cells))
    if not lines:
        return None
    head = ["arm", "last step", "rows", "pulled rows", "task loss at the end"]
    head += ["divergence at the end", "peak memory (GiB)"]
    note = Note(
        "Rows over all steps. Pulled toward the reference: those with a coefficient b above 0, "
        "anchors too. At the end: mean of the last tenth of the steps, nats per token."
    )
    return _section("training", "Training", head, lines, note)


def overhead_section(arms: list[Arm]) -> Section | None:
    """Seconds, and the reference's share; against the first arm without a reference."""
    plain_arm = next((a for a in arms if a.total("reference_rows") == 0), None)
    lines = []
    for place, arm in enumerate(arms):
        seconds = arm.median("step_time_s")
        if math.isnan(seconds):
            continue
        of = math.nan if plain_arm is None else plain_arm.median("step_time_s")
        cells = [
            name_cell(arm, place),
            percent(arm.share("reference_rows", "rows")),
            plain(seconds),
            plain(seconds / of if of > 0 else math.nan, ".2f"),
            plain(arm.total("step_time_s")),
            plain(number(arm.summary.get("seconds"))),
            plain(arm.median("tokens_per_s"), ",.0f"),
        ]
        lines.append(Line(arm.role, cells))
    if not lines:
        return None
    than = f"times a step of {plain_arm.name}" if plain_arm else "times a step without a reference"
    head = ["arm", "reference rows", "step time (s), median", than, "seconds of all steps"]
    head += ["seconds of the run", "tokens/s, median"]
    return _section("overhead", "Overhead", head, lines)


def divergence_section(arms: list[Arm]) -> Section | None:
    """How far active tokens are from the reference, beside the budget where there is one."""
    lines = []
    for place, arm in enumerate(arms):
        spent, tokens = arm.column("divergence"), arm.column("active_tokens")
        known = np.isfinite(spent) & (tokens > 0)
        if not known.any():
            continue
        total, count = float((spent * tokens)[known].sum()), float(tokens[known].sum())
        cells = [name_cell(arm, place), plain(count, ",.0f"), plain(total), plain(total / count)]
        cells += [plain(arm.ending("divergence")), plain(budget_of(arm))]
        lines.append(Line(arm.role, cells))
    if not lines:
        return None
    head = ["arm", "active tokens", "nats in all", "nats per token", "at the end", "budget"]
    note = Note(
        "Divergence of active tokens (b above 0) over all steps; at the end: the last tenth of the "
        "steps that have any. A budget is what `regularizer.schedule: budget` aims at."
    )
    return _section("divergence", "KL budget", head, lines, note)


_GROUPS = {
    "source": "By data source",
    "estimator": "By what gave the risk",
    "category": "By category of harm",
    "review": "By a reviewer's decision",
}


def held_back_section(arm: Arm, place: int) -> Section | None:
    """What one arm held back, by group, and the rows it held most; None where no risk was known."""
    ledger = arm.ledger
    if ledger is None or not ledger.has_risk:
        return None
    lines = []
    for key, title in _GROUPS.items():
        if tallies := ledger.by.get(key):
            lines.append(Line("", [title]))
            for name, count, held, risk in tallies:
                counts = [plain(count, ",.0f"), plain(held, ",.0f"), share(held, count)]
                lines.append(Line("", [name, *counts, plain(risk, ".3f")]))
    head = ["group", "sequences", "held back", "share", "mean risk"]
    groups = Table(label=f"Held back by {arm.name}, by group", head=head, lines=lines)
    note = Note(
        f"Ledger: {ledger.rows} rows on {ledger.sequences} sequences without anchors, of which "
        f"{ledger.held} reached the run's threshold, or failed, at least once. A sequence counts "
        "once, in the group of the source that held it back."
    )
    blocks = [groups, note, *_most_held(arm.name, ledger.most_held)]
    return Section(key=f"held-{place}", title=f"Held back by {arm.name}", blocks=blocks)


def _most_held(name: str, rows: list[HeldRow]) -> list[Block]:
    if not rows:
        return []
    lines = [
        Line(
            "",
            [
                row.name if len(row.name) <= 60 else row.name[:57] + "...",
                f"{row.times} of {row.seen}",
                plain(row.mean_risk, ".3f"),
                plain(row.highest_risk, ".3f"),
                plain(row.mean_coefficient, ".3f"),
                plain(row.mean_divergence, ".3f"),
            ],
        )
        for row in rows
    ]
    head = ["id", "times held back", "mean risk", "highest risk", "mean b", "mean divergence"]
    title = f"Most held back by {name}"
    note = Note(
        "Times with a coefficient b above 0, over which mean b and divergence are. Without anchors."
    )
    return [Heading(title), Table(label=title, head=head, lines=lines), note]


def probe_section(arms: list[Arm]) -> Section | None:
    """The hold-out's figures of each probe that gave an arm its risk."""
    probes: dict[str, tuple[dict, list[str]]] = {}
    for arm in arms:
        for folder, facts in arm.probes.items():
            probes.setdefault(folder, (facts, []))[1].append(arm.name)
    lines = []
    for folder, (facts, names) in probes.items():
        found = as_object(as_object(facts.get("meta")).get("metrics"))
        part = Arm(name="", role="reference", evaluation=found)
        cells = [", ".join(names), str(facts.get("position"))]
        cells += [str(facts.get("layer")), plain(number(facts.get("threshold")))]
        cells += [_figure(part, key) for key in _PROBE]
        lines.append(Line("", [*cells, folder]))
    if not lines:
        return None
    head = ["arm", "position", "layer", "threshold", *_PROBE.values(), "folder"]
    note = Note(
        "Of rows that the probe was not fitted on, 95 % intervals over groups of alike rows. "
        "Recall and false positives are those at the probe's own threshold."
    )
    return _section("probe", "Probe", head, lines, note)


_PROBE = {
    "auroc": "AUROC",
    "recall_at_fpr_1": "recall at 1 % false positives",
    "recall": "recall",
    "false_positive_rate": "false positives",
    "calibration_error": "calibration error",
}


def _figure(part: Arm, key: str) -> Cell:
    """A figure between 0 and 1 with its interval, as probes are told of."""
    told, bounds = plain(part.rate(key) / 100, ".3f"), part.bounds(key)
    if bounds is None:
        return Cell(told)
    return Cell(told, f"{bounds[0] / 100:.3f}\u2013{bounds[1] / 100:.3f}")


def ledger_section(arms: list[Arm]) -> Section | None:
    """Whether each ledger's chain of hashes holds."""
    lines = []
    for place, arm in enumerate(arms):
        if arm.ledger is not None:
            kind = "bad" if arm.ledger.check.state == "altered" else ""
            told = Cell(arm.ledger.check.told, kind=kind)
            lines.append(Line(arm.role, [name_cell(arm, place), told]))
    if not lines:
        return None
    table = Table(label="Ledger", head=["arm", "its chain"], lines=lines, is_prose=True)
    note = Note("As `safereg ledger verify` finds it, when this page was written.")
    return Section(key="ledger", title="Ledger", blocks=[table, note])


def provenance_section(arms: list[Arm]) -> Section:
    """Models, prompts and versions; versions once where all arms have the same."""
    blocks: list[Block] = []
    for arm in arms:
        known, files = arm.evaluation, arm.evaluation.get("prompts")
        texts = [
            f"{file.get('file')} (sha256 {str(file.get('sha256'))[:12]})"
            for file in (files if isinstance(files, list) else [])
            if isinstance(file, dict)
        ]
        if texts:
            what = f"{arm.name}: model {known.get('model')}, judge {known.get('judge')}, "
            blocks.append(Note(what + ", ".join(texts)))
    by_versions: dict[str, list[str]] = {}
    for arm in arms:
        if found := as_object(arm.summary.get("versions")):
            told = ", ".join(f"{name} {version}" for name, version in found.items())
            by_versions.setdefault(told, []).append(arm.name)
    blocks += [Note(f"{', '.join(names)}: trained with {v}") for v, names in by_versions.items()]
    made = Note(f"This page: safereg_dist {__version__}.")
    return Section(key="provenance", title="Provenance and versions", blocks=[*blocks, made])


def _section(key: str, title: str, head: list[str], lines: list[Line], *notes: Note) -> Section:
    table = Table(label=title, head=head, lines=lines)
    return Section(key=key, title=title, blocks=[table, *notes])
