"""What trainings say: the rows held back, the divergence spent, overhead, probes, the ledger."""

import math
from html import escape

import numpy as np

from safereg_dist import __version__
from safereg_dist.evaluate.report.arms import Arm, as_object, number, percent, plain
from safereg_dist.evaluate.report.steps import budget_of
from safereg_dist.evaluate.report.tables import Line, breakable, name_cell, small, table


def training_section(arms: list[Arm]) -> str:
    """A row for each arm that was trained."""
    lines = []
    for place, arm in enumerate(arms):
        steps, peak = arm.column("step"), arm.column("peak_memory_bytes")
        if len(steps) == 0:
            continue
        gib = float(np.nanmax(peak)) / 2**30 if np.isfinite(peak).any() else math.nan
        cells = [
            name_cell(arm, place),
            plain(float(steps[-1]), ",.0f"),
            plain(arm.total("rows"), ",.0f"),
            percent(arm.share("active_rows", "rows")),
            plain(arm.ending("task_loss")),
            plain(arm.ending("divergence")),
            plain(gib, ".2f"),
        ]
        lines.append(Line(arm.role, cells))
    if not lines:
        return ""
    head = ["arm", "last step", "rows", "pulled rows", "task loss at the end"]
    head += ["divergence at the end", "peak memory (GiB)"]
    return f"<h2>Training</h2>{table(head, lines)}"


def overhead_section(arms: list[Arm]) -> str:
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
        return ""
    than = f"times a step of {plain_arm.name}" if plain_arm else "times a step without a reference"
    head = ["arm", "reference rows", "step time (s), median", than, "seconds of all steps"]
    head += ["seconds of the run", "tokens/s, median"]
    return f"<h2>Overhead</h2>{table(head, lines)}"


def divergence_section(arms: list[Arm]) -> str:
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
        return ""
    head = ["arm", "active tokens", "nats in all", "nats per token", "at the end", "budget"]
    note = small(
        "Divergence of active tokens (b above 0) over all steps; at the end: the last tenth of the "
        "steps that have any. A budget is what `regularizer.schedule: budget` aims at."
    )
    return f"<h2>KL budget</h2>{table(head, lines)}{note}"


def held_back_section(arm: Arm) -> str:
    """The rows of one arm that were held back most often; nothing where no risk was known."""
    ledger = arm.ledger
    if ledger is None or not ledger.most_held:
        return ""
    lines = [
        Line(
            "",
            [
                escape(row.name if len(row.name) <= 60 else row.name[:57] + "..."),
                f"{row.times} of {row.seen}",
                plain(row.mean_risk, ".3f"),
                plain(row.highest_risk, ".3f"),
                plain(row.mean_coefficient, ".3f"),
                plain(row.mean_divergence, ".3f"),
            ],
        )
        for row in ledger.most_held
    ]
    sources = ", ".join(f"{key} ({count})" for key, count in ledger.sources.items())
    head = ["id", "times held back", "mean risk", "highest risk", "mean b", "mean divergence"]
    note = small(
        f"Ledger: {ledger.rows} rows on {ledger.sequences} sequences, {ledger.held} with b above "
        f"0; risk from {sources}. Anchors are left out; b and divergence are over the times held "
        "back."
    )
    return f"<h2>Most held back by {escape(arm.name)}</h2>{table(head, lines)}{note}"


def probe_section(arms: list[Arm]) -> str:
    """The hold-out's figures of each probe that gave an arm its risk."""
    probes: dict[str, tuple[dict, list[str]]] = {}
    for arm in arms:
        for folder, facts in arm.probes.items():
            probes.setdefault(folder, (facts, []))[1].append(arm.name)
    lines = []
    for folder, (facts, names) in probes.items():
        found = as_object(as_object(facts.get("meta")).get("metrics"))
        part = Arm(name="", role="reference", evaluation=found)
        cells = [", ".join(breakable(name) for name in names), escape(str(facts.get("position")))]
        cells += [escape(str(facts.get("layer"))), plain(number(facts.get("threshold")))]
        cells += [_figure(part, key) for key in _PROBE]
        lines.append(Line("", [*cells, escape(folder)]))
    if not lines:
        return ""
    head = ["arm", "position", "layer", "threshold", *_PROBE.values(), "folder"]
    note = small(
        "Of rows that the probe was not fitted on, 95 % intervals over groups of alike rows. "
        "Recall and false positives are those at the probe's own threshold."
    )
    return f"<h2>Probe</h2>{table(head, lines)}{note}"


_PROBE = {
    "auroc": "AUROC",
    "recall_at_fpr_1": "recall at 1 % false positives",
    "recall": "recall",
    "false_positive_rate": "false positives",
    "calibration_error": "calibration error",
}


def _figure(part: Arm, key: str) -> str:
    """A figure between 0 and 1 with its interval, as probes are told of."""
    told, bounds = plain(part.rate(key) / 100, ".3f"), part.bounds(key)
    if bounds is None:
        return told
    return f"{told}<small>{bounds[0] / 100:.3f}\u2013{bounds[1] / 100:.3f}</small>"


def ledger_section(arms: list[Arm]) -> str:
    """Whether each ledger's chain of hashes holds."""
    lines = []
    for place, arm in enumerate(arms):
        if arm.ledger is not None:
            kind = "bad" if arm.ledger.holds is False else ""
            told = f'<span class="{kind}">{escape(arm.ledger.check)}</span>'
            lines.append(Line(arm.role, [name_cell(arm, place), told]))
    if not lines:
        return ""
    note = small("As `safereg ledger verify` finds it, when this page was written.")
    return f'<h2>Ledger</h2><div class="text">{table(["arm", "its chain"], lines)}</div>{note}'


def provenance_section(arms: list[Arm]) -> str:
    """Models, prompts and versions; versions once where all arms have the same."""
    lines = []
    for arm in arms:
        known, files = arm.evaluation, arm.evaluation.get("prompts")
        texts = [
            f"{file.get('file')} (sha256 {str(file.get('sha256'))[:12]})"
            for file in (files if isinstance(files, list) else [])
            if isinstance(file, dict)
        ]
        if texts:
            what = f"{arm.name}: model {known.get('model')}, judge {known.get('judge')}, "
            lines.append(what + ", ".join(texts))
    by_versions: dict[str, list[str]] = {}
    for arm in arms:
        if found := as_object(arm.summary.get("versions")):
            told = ", ".join(f"{name} {version}" for name, version in found.items())
            by_versions.setdefault(told, []).append(arm.name)
    lines += [f"{', '.join(names)}: trained with {told}" for told, names in by_versions.items()]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    made = small(f"This page: safereg_dist {__version__}.")
    return f'<h2>Provenance and versions</h2><ul class="small">{items}</ul>{made}'
