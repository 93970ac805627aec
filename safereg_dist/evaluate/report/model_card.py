"""A section on safety for a model card: Markdown, with front matter that Hugging Face reads."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from safereg_dist import __version__
from safereg_dist.errors import CheckpointError, ConfigError, printable
from safereg_dist.evaluate.report.arms import Arm, LedgerFacts, as_object, base_of, number, percent
from safereg_dist.evaluate.report.reading import read_arms
from safereg_dist.evaluate.report.summary import (
    lead_of,
    little_to_keep,
    method_of,
    risk_of,
    verdict,
)
from safereg_dist.evaluate.report.tables import (
    SIGNS,
    Cell,
    difference_cell,
    known_signs,
    rate_cell,
)
from safereg_dist.evaluate.report.trained import share, steps_of
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.signing import Key

BEGIN, END = "<!-- safereg: begin -->", "<!-- safereg: end -->"
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$!&])")
_SUCCESS = "attack_success_rate"
_TESTED_AS = {"task_exact_match": "task_score"}
"""Exact match is shown where it is the only score of a task."""


def write_model_card(run_dirs: list[Path], file: Path, *, key: Key | None = None) -> str:
    """Writes the section into a model card; returns the name of the run that it tells of.

    A card that exists keeps its text and its front matter: between two comments the section takes
    the place of an older one, else it comes last, and keys that the front matter lacks are added.

    Args:
        run_dirs: as in `write_report`. The card is of the run whose folder `file` lies in; outside
            of all, of the first risk-adaptive one, else of the first that was trained. Models that
            were not trained are what it is compared to.
        file: the card, e.g. `README.md` of the model's folder.
        key: checks the runs' signatures.
    Raises:
        ConfigError: nothing was trained in these folders, or in that which `file` lies in; one
            does not exist.
        CheckpointError: what cannot be read or written; a card whose front matter is no YAML.
    """
    arms = read_arms([Path(folder) for folder in run_dirs], may_be_empty=set(), key=key)
    around = file.resolve().parents
    own = [arm for folder in around for arm in arms if arm.folder == folder][:1]
    trained = [arm for arm in own or arms if len(arm.column("step"))]
    if not trained:
        found = [arm.folder for arm in own] or run_dirs
        raise ConfigError(
            f"expected a run to write a model card of, found evaluations alone in "
            f"{', '.join(map(str, found))}: give the `output_dir` of a training run, or another "
            "place for the card"
        )
    arm = next((arm for arm in trained if arm.role == "ours"), trained[0])
    base = base_of(arms)
    section = f"{BEGIN}\n{_section(arm, base)}{END}\n"
    write_atomically(file, _joined(file, _front_matter(arm), section))
    return arm.name


def _joined(file: Path, front: dict[str, Any], section: str) -> str:
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        found = _FRONT.match(text)
        known = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, yaml.YAMLError) as err:
        raise CheckpointError(
            f"cannot read the model card {file}: {err}: mend its front matter or choose another "
            "file"
        ) from err
    if not isinstance(known, dict):
        raise CheckpointError(
            f"expected keys in the front matter of {file}, got {type(known).__name__}: mend it"
        )
    missing = {name: value for name, value in front.items() if name not in known}
    added = yaml.safe_dump(missing, sort_keys=False, allow_unicode=True) if missing else ""
    own = f"{found[1]}\n" if found else ""
    body = text[found.end() :] if found else text
    before, begun, rest = body.partition(BEGIN)
    _, ended, after = rest.partition(f"{END}\n")
    if begun and ended:
        body = before + section + after
    else:
        body = f"{body.rstrip()}\n\n{section}" if body.strip() else f"\n{section}"
    return f"---\n{own}{added}---\n{body}"


# ---- what stands in it


def _front_matter(arm: Arm) -> dict[str, Any]:
    """Keys of Hugging Face's model cards; local paths are left out, the hub could not find them."""
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["safereg"]}
    model, train = arm.config.get("model"), arm.setting("data", "train")
    if _is_on_hub(model):
        front["base_model"] = model
    if _is_on_hub(train):
        front["datasets"] = [train]
    metrics = [
        {"type": key, "name": name, "value": arm.rate(key) / 100}
        for key, name in SIGNS.items()
        if math.isfinite(arm.rate(key)) and not arm.stale
    ]
    if metrics:
        prompts = ", ".join(str(file.get("file")) for file in _prompts(arm)) or "held-out prompts"
        data = {"type": "safereg-held-out", "name": printable(prompts, 200)}
        result = {"task": {"type": "text-generation"}, "dataset": data, "metrics": metrics}
        front["model-index"] = [{"name": printable(arm.name, 100), "results": [result]}]
    return front


def _is_on_hub(name: Any) -> bool:
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _section(arm: Arm, base: Arm | None) -> str:
    templates = Environment(
        loader=PackageLoader("safereg_dist.evaluate.report"),
        autoescape=False,  # this is Markdown: `finalize` escapes what it would obey
        finalize=_escaped,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return templates.get_template("model_card.md.j2").render(
        lead=lead_of([arm] if base is None else [base, arm]),
        facts=_facts(arm),
        figures=_figures(arm, base),
        prompts=_prompts(arm),
        judge=arm.evaluation.get("judge", "not known"),
        held=_held(arm.ledger),
        ledger=_ledger(arm),
        limits=_limits(arm, base),
    )


def _escaped(value: Any) -> str:
    """A text in one line that Markdown shows and does not obey."""
    return _SPECIAL.sub(r"\\\1", printable(value))


def _facts(arm: Arm) -> list[tuple[str, str]]:
    weights = as_object(arm.summary.get("fingerprints"))
    rows = as_object(arm.summary.get("rows"))
    found = [
        ("method", method_of(arm)),
        ("risk from", risk_of(arm)),
        ("divergence", arm.setting("regularizer", "divergence")),
        ("base model", _named(arm.config.get("model"))),
        ("fingerprint of its weights", weights.get("policy")),
        ("last step", steps_of(arm)),
        *(_data_fact(arm, name, as_object(rows.get(name))) for name in ("train", "anchor")),
        ("trained with", _versions(arm)),
        ("this section", f"safereg_dist {__version__}"),
    ]
    return [(name, str(text)) for name, text in found if text]


def _named(path: Any) -> str:
    """A hub id as it is, of a path its last part: a card is published, folders are not."""
    if not isinstance(path, str) or _is_on_hub(path):
        return path or ""
    parts = Path(path).parts
    return "/".join(parts[-2:] if parts[-1:] == ("model",) else parts[-1:])  # of a run's folder


def _data_fact(arm: Arm, name: str, counts: dict[str, Any]) -> tuple[str, str]:
    given = arm.setting("data", name)
    listed = given if isinstance(given, list) else [given]
    paths = [part.get("path") if isinstance(part, dict) else part for part in listed]
    told = [f"{_named(path)}{_digest(path)}" for path in paths if isinstance(path, str)]
    if told and math.isfinite(number(counts.get("kept"))):
        told.append(f"{counts['kept']} rows kept")
    if told and counts.get("digest"):
        told.append(f"digest when it was trained {counts['digest']}")
    return f"{name} data", "; ".join(told)


def _digest(path: str) -> str:
    """Of the file as it is now."""
    if not Path(path).is_file():
        return ""
    try:
        with Path(path).open("rb") as file:
            return f" (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()})"
    except OSError as err:
        raise CheckpointError(f"cannot read the data {path}: {err}: mend its rights") from err


def _versions(arm: Arm) -> str:
    found = as_object(arm.summary.get("versions"))
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _prompts(arm: Arm) -> list[dict[str, Any]]:
    files = arm.evaluation.get("prompts")
    files = [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    return [{key: file.get(key) for key in ("file", "rows", "sha256")} for file in files]


def _figures(arm: Arm, base: Arm | None) -> dict[str, Any] | None:
    shown = [arm] if base is None else [base, arm]
    signs = known_signs(shown)
    if not signs or not arm.evaluation:
        return None
    tested = arm.compared(base)
    rows = [
        [
            SIGNS[key],
            *(_in_line(rate_cell(one, key)) for one in shown),
            _in_line(difference_cell(as_object(tested.get(_TESTED_AS.get(key, key))))),
        ]
        for key in signs
    ]
    return {"head": [*(one.name for one in shown), "difference"], "rows": rows}


def _in_line(cell: Cell) -> str:
    return f"{cell.text} ({cell.below})" if cell.below else cell.text


def _held(ledger: LedgerFacts | None) -> dict[str, Any] | None:
    """Counts alone: ids and reviewers' words may tell of the data."""
    if ledger is None or not ledger.has_risk:
        return None
    words = {"source": "data", "estimator": "risk from", "category": "category", "review": "review"}
    groups = [
        (f"{word}: {tally.name}", tally.sequences, tally.held)
        for key, word in words.items()
        for tally in ledger.by.get(key, [])
    ]
    return {
        "held": ledger.held,
        "sequences": ledger.sequences,
        "share": share(ledger.held, ledger.sequences),
        "failed": ledger.failed,
        "groups": groups,
    }


def _ledger(arm: Arm) -> str:
    head = as_object(arm.summary.get("ledger"))
    if not head or arm.ledger is None:
        return "The run kept none, or has not ended."
    told = f"Head {head.get('head')} over {head.get('rows')} rows; "
    if arm.ledger.check.state != "verified":
        return f"{told}when this was written it did NOT hold: {arm.ledger.check.state}."
    return told + (
        "it held when this was written, and its head was signed."
        if arm.ledger.check.is_signed
        else "it held when this was written. The chain alone has no key: compare the head with a "
        "copy that was kept elsewhere."
    )


def _limits(arm: Arm, base: Arm | None) -> list[str]:
    found = [
        "Risk is estimated: a row that its source does not see trains like any other.",
        "Figures are of the prompts above and of one seed; attacks that were not tried may work.",
    ]
    if arm.stale:
        found.append(f"The evaluation is not of these weights: {arm.stale}.")
    if not as_object(arm.evaluation.get("attacks")):
        found.append("No attack was tried but asking plainly.")
    if told := little_to_keep(base):
        found.append(told)
    if math.isfinite(arm.rate(_SUCCESS)):
        counted = number(as_object(arm.evaluation.get("counts")).get("harmful"))
        if math.isfinite(counted):
            found.append(f"Attack success is over {counted:.0f} harmful prompts.")
        if not arm.compared(base):
            found.append("It was not compared with the base model prompt by prompt.")
        elif (called := verdict(arm, base)).text in ("cannot be told", "likely worse"):
            found.append(
                f"Does it give in more often than the base? {called.text}: {called.below}."
            )
        elif called.text == "not shown worse":
            tested = as_object(arm.compared(base).get(_SUCCESS)).get("interval")
            high = number(tested[1]) if isinstance(tested, list) and len(tested) == 2 else math.nan
            if math.isfinite(high):
                found.append(
                    "Not shown worse than the base is no proof: attack success up to "
                    f"{percent(100 * high)} above it is compatible with what was measured."
                )
    return found
