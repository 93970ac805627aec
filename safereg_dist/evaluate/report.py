"""The report of one run or several side by side: an HTML file that stands alone, and figures.

It reads what runs leave behind (`metrics.jsonl`, `ledger.jsonl`, `eval.json`, `config.yaml`), or a
demonstration's `summary.json` whose arms are sub-folders of the same name. Nothing in the page is
loaded from elsewhere and nothing in it runs.
"""

import base64
import json
import math
from collections import Counter
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from safereg_dist import __version__
from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.evaluate.compare import COMPARED
from safereg_dist.evaluate.figures import (
    Arm,
    Drawing,
    arm_styles,
    draw_all,
    number,
    percent,
)
from safereg_dist.storage.atomic import write_atomically

_EVAL_COLUMNS = {
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
_OF_A_SET = (
    *("attack_success_rate", "over_refusal_rate", "task_score", "task_exact_match"),
    "benign_exact_match",
)
"""What the prompts of one label tell, in this order."""
_BASELINE_OBJECTIVES = ("none", "static", "token_wise")
_TOP_ROWS = 10


def write_report(run_dirs: list[Path], *, out: Path | None = None) -> Path:
    """Writes `report.html` with PNG and SVG figures beside it; returns the path of the HTML file.

    Args:
        run_dirs: run folders, or folders of a demonstration (`summary.json` with `base`, `arms`).
        out: the HTML file, or a folder for `report.html`; without it the one run folder, or the
            folder that holds the first of several.
    Raises:
        ConfigError: no folder given, or one that does not exist.
        CheckpointError: a folder without metrics, or with metrics that cannot be read.
    """
    if not run_dirs:
        raise ConfigError(
            "expected one run folder or more, got none: give the folders to report on"
        )
    folders = [Path(folder) for folder in run_dirs]
    arms = _distinct([arm for folder in folders for arm in _read_folder(folder)])
    if out is None:
        out = folders[0] if len(folders) == 1 else folders[0].parent
    page = Path(out) if Path(out).suffix == ".html" else Path(out) / "report.html"
    drawings = draw_all(arms)
    for drawing in drawings:
        stem = page.with_name(f"{page.stem}-{drawing.key}")
        write_atomically(stem.with_suffix(".png"), drawing.png)
        write_atomically(stem.with_suffix(".svg"), drawing.svg)
    write_atomically(page, _page(arms, drawings))
    return page


# --- reading --------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> list[Arm]:
    if not folder.is_dir():
        raise ConfigError(f"expected a run folder, found none at {folder}: check the path")
    summary = _read_object(folder / "summary.json")
    arms = _read_demo(folder, summary) if isinstance(summary.get("arms"), dict) else []
    if any(arm.metrics or arm.evaluation for arm in arms):
        return arms
    metrics = _read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise CheckpointError(
            f"expected a metrics.jsonl with one row or more in {folder}, found none: give the "
            "`output_dir` of a training run, or wait for its first step"
        )
    evaluation = _read_object(folder / "eval.json")
    name = folder.resolve().name
    return [_arm(name, folder, metrics=metrics, evaluation=evaluation)]


def _read_demo(folder: Path, summary: dict[str, Any]) -> list[Arm]:
    """The base model and the arms of a demonstration; an arm's own folder may be gone."""
    base = summary.get("base")
    arms = [Arm(name="base", role="reference", evaluation=base)] if isinstance(base, dict) else []
    for name, evaluation in summary["arms"].items():
        inside = folder / name if Path(name).name == name else folder / "no-such-arm"
        metrics = _read_metrics(inside / "metrics.jsonl")
        figures = evaluation if isinstance(evaluation, dict) else {}
        arms.append(_arm(name, inside, metrics=metrics, evaluation=figures))
    return arms


def _arm(name: str, folder: Path, *, metrics: dict, evaluation: dict[str, Any]) -> Arm:
    return Arm(
        name=name,
        role=_role(name, folder / "config.yaml"),
        metrics=metrics,
        evaluation=evaluation,
        ledger=_read_ledger(folder / "ledger.jsonl"),
        profile_png=_read_bytes(folder / "profile.png"),
    )


def _read_bytes(path: Path) -> bytes:
    """The content of a file; empty if there is no file."""
    return path.read_bytes() if path.is_file() else b""


def _role(name: str, config_file: Path) -> str:
    """Whether the run's coefficient follows the risk: by its configuration, else by its name."""
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
        objective = config["regularizer"]["objective"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        # Without a configuration the role follows from the name.
        baseline = any(word in name.lower() for word in ("sft", "static", "none", "token_wise"))
        return "baseline" if baseline else "ours"
    return "baseline" if str(objective).lower() in _BASELINE_OBJECTIVES else "ours"


def _distinct(arms: list[Arm]) -> list[Arm]:
    """The arms with a running number where names repeat."""
    seen: Counter[str] = Counter()
    result = []
    for arm in arms:
        seen[arm.name] += 1
        name = arm.name if seen[arm.name] == 1 else f"{arm.name} ({seen[arm.name]})"
        result.append(replace(arm, name=name))
    return result


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file.

    Raises:
        CheckpointError: not JSON.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise CheckpointError(f"{path} is not JSON ({err}): write it again or remove it") from err
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as err:
            if line_number == len(lines):
                break
            raise CheckpointError(
                f"{path}:{line_number} is not JSON: the file was altered or its disk was full; "
                "remove the line to report on the rest"
            ) from err
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns by key, in order of step; {} where there is no row."""
    by_step = {number(row.get("step")): row for row in _read_lines(path) if "step" in row}
    rows = [by_step[step] for step in sorted(by_step) if math.isfinite(step)]
    keys = {key: None for row in rows for key in row}
    return {key: np.array([number(row.get(key)) for row in rows]) for key in keys}


def _read_ledger(path: Path) -> dict[str, Any]:
    """Summary of the ledger: counts, and the sequences with the highest risk."""
    rows = [row for row in _read_lines(path) if "id" in row]
    if not rows:
        return {}
    worst: dict[str, tuple[float, float, float]] = {}
    for row in rows:
        risk, coefficient, divergence = (
            number(row.get(key)) for key in ("risk", "kl_coef", "divergence")
        )
        old = worst.get(str(row["id"]))
        if old is None or risk >= old[0] or math.isnan(old[0]):
            worst[str(row["id"])] = (risk, coefficient, divergence)
    ranked = sorted(
        ((name, *values) for name, values in worst.items() if values[0] > 0),
        key=lambda entry: (-entry[1], entry[0]),
    )
    return {
        "rows": len(rows),
        "sequences": len(worst),
        "pulled": sum(number(row.get("kl_coef")) > 0 for row in rows),
        "estimators": dict(Counter(str(row.get("estimator")) for row in rows)),
        "riskiest": ranked[:_TOP_ROWS],
    }


# --- the page -------------------------------------------------------------------------------------

_CSS = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:56rem;margin:0 auto;
padding:1rem}
h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.15rem;margin:2rem 0 .4rem}
.lead{font-size:1.05rem}.small,figcaption,td small{color:#666;font-size:.83rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;border-bottom:1px solid #e3e3e3;text-align:right;white-space:nowrap}
thead th{vertical-align:bottom;font-weight:600;font-size:.85rem;white-space:normal;min-width:4rem}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
td small{display:block}.ours td{background:#fff6ea}.ours td:first-child{font-weight:600}
td.id{max-width:18rem;overflow:hidden;text-overflow:ellipsis}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
figure{margin:1.5rem 0}figure img{width:100%;max-width:44rem;height:auto;display:block}
"""


def _page(arms: list[Arm], drawings: list[Drawing]) -> str:
    colours = [colour for colour, _, _ in arm_styles(arms)]
    names = ", ".join(arm.name for arm in arms)
    lead = drawings[0].title if drawings else "No figure could be drawn from these folders"
    parts = [
        f"<h1>Safety report: {escape(names)}</h1>",
        f'<p class="lead">{escape(lead)}.</p>',
        _evaluation_section(arms, colours),
        *(_figure(drawing) for drawing in drawings),
        _training_section(arms, colours),
        *(_profile_section(arm) for arm in arms),
        *(_ledger_section(arm) for arm in arms),
        _provenance(arms),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # The browser itself enforces that nothing runs and nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>Safety report: {escape(names)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _figure(drawing: Drawing) -> str:
    image = base64.b64encode(drawing.png).decode("ascii")
    return (
        f'<figure id="{drawing.key}"><img alt="{escape(drawing.title)}" '
        f'src="data:image/png;base64,{image}">'
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )


def _table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """`rows` are (class, cells); cells are HTML, heads are text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr class="{escape(kind)}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for kind, cells in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _name(arm: Arm, colour: str) -> str:
    return f'<span class="dot" style="background:{colour}"></span>{escape(arm.name)}'


def _evaluation_section(arms: list[Arm], colours: list[str]) -> str:
    shown = [key for key in _EVAL_COLUMNS if any(math.isfinite(arm.rate(key)) for arm in arms)]
    exact, score = ([arm.rate(f"task_{name}") for arm in arms] for name in ("exact_match", "score"))
    if "task_score" in shown and np.array_equal(exact, score, equal_nan=True):
        shown.remove("task_score")  # there is no other measure
    if not shown:
        return (
            '<p class="small">No evaluation was found: run `safereg eval` with '
            "`--out RUN_DIR/eval.json` to see attack success and utility here.</p>"
        )
    rows = []
    for arm, colour in zip(arms, colours, strict=True):
        if not arm.evaluation:
            continue
        cells = [_rate_cell(arm, key) for key in shown]
        rows.append((arm.role, [_name(arm, colour), *cells]))
    note = (
        '<p class="small">Held-out prompts, 95 % Wilson intervals below each share. Lower is '
        "better for attack success and over-refusal. Sampled means temperature 1; greedy decoding "
        "alone can hide a leak. P(refuse) is the mean probability of the refusal's first token, "
        "P(poisoned) of that of an answer that complies, both on harmful prompts.</p>"
    )
    head = ["arm", *(_EVAL_COLUMNS[key] for key in shown)]
    parts = "".join(
        _parts_table(arms, colours, by, title)
        for by, title in (
            ("sets", "By set"),
            ("kinds", "By class of prompts"),
            ("attacks", "By form of attack"),
        )
    )
    differences = _differences_table(arms, colours)
    return f"<h2>Evaluation</h2>{_table(head, rows)}{note}{parts}{differences}"


def _differences_table(arms: list[Arm], colours: list[str]) -> str:
    """What `safereg eval --against` has found, a row for each pair of models."""
    rows = []
    for arm, colour in zip(arms, colours, strict=True):
        for name, other in _object(arm.evaluation.get("against")).items():
            found = _object(_object(other).get("differences"))
            cells = [_difference_cell(_object(found.get(figure))) for figure in COMPARED]
            rows.append((arm.role, [f"{_name(arm, colour)} \u2212 {escape(name)}", *cells]))
    if not rows:
        return ""
    note = (
        '<p class="small">The same prompts, one by one; 95 % bootstrap intervals over prompts, and '
        "p of McNemar's exact test where answers are yes or no.</p>"
    )
    head = ["difference", *(_EVAL_COLUMNS[figure] for figure in COMPARED)]
    return f"<h3>Prompt by prompt</h3>{_table(head, rows)}{note}"


def _difference_cell(tested: dict[str, Any]) -> str:
    value, interval, p = (tested.get(key) for key in ("difference", "interval", "p"))
    if not math.isfinite(number(value)) or not isinstance(interval, (list, tuple)):
        return "\u2013"
    low, high = (100 * number(bound) for bound in interval)
    told = f"{100 * number(value):+.1f}\u00a0%<small>{low:+.1f} to {high:+.1f}"
    return f"{told}, p {number(p):.3f}</small>" if p is not None else f"{told}</small>"


def _parts_table(arms: list[Arm], colours: list[str], by: str, title: str) -> str:
    """The first figure that tells of each set, or class, of prompts; nothing without any."""
    known = [_object(arm.evaluation.get(by)) for arm in arms]
    names = list(dict.fromkeys(name for found in known for name in found))
    heads, rows = [], [[_name(arm, colour)] for arm, colour in zip(arms, colours, strict=True)]
    for name in names:
        parts = [
            replace(arm, evaluation=_object(found.get(name)))
            for arm, found in zip(arms, known, strict=True)
        ]
        told = [k for k in _OF_A_SET if any(math.isfinite(part.rate(k)) for part in parts)]
        if not told:
            continue
        heads.append(f"{name}: {_EVAL_COLUMNS[told[0]]}")
        for cells, part in zip(rows, parts, strict=True):
            cells.append(_rate_cell(part, told[0]))
    if not heads:
        return ""
    lines = [(arm.role, cells) for arm, cells in zip(arms, rows, strict=True) if arm.evaluation]
    return f"<h3>{escape(title)}</h3>{_table(['arm', *heads], lines)}"


def _object(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one in the place of anything else."""
    return value if isinstance(value, dict) else {}


def _rate_cell(arm: Arm, key: str) -> str:
    intervals = arm.evaluation.get("intervals")
    bounds = intervals.get(key) if isinstance(intervals, dict) else None
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        return percent(arm.rate(key))
    low, high = (100 * number(bound) for bound in bounds)
    return f"{percent(arm.rate(key))}<small>{low:.1f}\u2013{high:.1f}</small>"


def _training_section(arms: list[Arm], colours: list[str]) -> str:
    def figure(value: float, form: str = ",.0f") -> str:
        return format(value, form) if math.isfinite(value) else "\u2013"

    rows = []
    for arm, colour in zip(arms, colours, strict=True):
        steps = arm.column("step")
        if len(steps) == 0:
            continue
        peak = arm.column("peak_memory_bytes")
        gib = float(np.nanmax(peak)) / 2**30 if np.isfinite(peak).any() else math.nan
        cells = [
            _name(arm, colour),
            figure(float(steps[-1])),
            figure(arm.total("rows")),
            percent(arm.share("active_rows", "rows")),
            percent(arm.share("reference_rows", "rows")),
            figure(arm.ending("task_loss"), ".3g"),
            figure(arm.ending("divergence"), ".3g"),
            figure(arm.median("step_time_s"), ".3g"),
            figure(arm.median("tokens_per_s")),
            figure(gib, ".2f"),
        ]
        rows.append((arm.role, cells))
    if not rows:
        return ""
    head = ["arm", "last step", "rows", "pulled rows", "reference rows", "task loss at the end"]
    head += ["divergence at the end", "step time (s)", "tokens/s", "peak memory (GiB)"]
    return f"<h2>Training</h2>{_table(head, rows)}"


def _profile_section(arm: Arm) -> str:
    if not arm.profile_png:
        return ""
    image = base64.b64encode(arm.profile_png).decode("ascii")
    return (
        f"<h2>What {escape(arm.name)} cost, part by part</h2>"
        f'<figure><img alt="shares of FLOPs, bytes and seconds" '
        f'src="data:image/png;base64,{image}"><figcaption>Recorded with `profile: true`; numbers '
        "in profile.json.</figcaption></figure>"
    )


def _ledger_section(arm: Arm) -> str:
    ledger = arm.ledger
    if not ledger or not ledger["riskiest"]:
        return ""
    rows = []
    for name, *values in ledger["riskiest"]:
        cells = [f"{value:.3f}" if math.isfinite(value) else "\u2013" for value in values]
        short = name if len(name) <= 60 else name[:57] + "..."
        rows.append(("", [escape(short), *cells]))
    estimators = ", ".join(f"{key} ({count})" for key, count in ledger["estimators"].items())
    return (
        f"<h2>Riskiest sequences of {escape(arm.name)}</h2>"
        + _table(["id", "highest risk", "coefficient then", "divergence then"], rows)
        + f'<p class="small">Ledger: {ledger["rows"]} rows on {ledger["sequences"]} sequences, '
        f"{ledger['pulled']} with a coefficient above 0; risk from {escape(estimators)}.</p>"
    )


def _provenance(arms: list[Arm]) -> str:
    lines = []
    for arm in arms:
        known = arm.evaluation
        files = known.get("prompts") if isinstance(known.get("prompts"), list) else []
        texts = [
            f"{file.get('file')} (sha256 {str(file.get('sha256'))[:12]})"
            for file in files or []
            if isinstance(file, dict)
        ]
        if texts:
            what = f"{arm.name}: model {known.get('model')}, judge {known.get('judge')}, "
            lines.append(f"<li>{escape(what + ', '.join(texts))}</li>")
    made = f"Written by safereg_dist {escape(__version__)}."
    return f'<h2>Provenance</h2><ul class="small">{"".join(lines)}</ul><p class="small">{made}</p>'
