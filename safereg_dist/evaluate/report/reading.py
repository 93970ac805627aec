"""What runs leave behind, read into arms: metrics, evaluation, configuration, ledger, probes."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from safereg_dist.config.yaml_text import read_yaml
from safereg_dist.errors import CheckpointError, ConfigError, LedgerError
from safereg_dist.evaluate.report.arms import Arm, HeldRow, LedgerFacts, as_object, number
from safereg_dist.evaluate.stale import stale_because
from safereg_dist.run.ledger import MERGED_NAME, verify_ledger
from safereg_dist.storage.json_text import parse_json

_BASELINE_OBJECTIVES = ("none", "static", "token_wise")
_TOP_ROWS = 10


def read_arms(folders: list[Path], *, may_be_empty: set[Path]) -> list[Arm]:
    """The arms of run folders, or of folders of a demonstration, under distinct names.

    A folder with an evaluation and no training is a reference: the model before it.

    Raises:
        ConfigError: a folder that does not exist.
        CheckpointError: one that holds nothing and is not in `may_be_empty`, or what cannot be
            read.
    """
    arms = []
    for folder in folders:
        found = _read_folder(folder)
        if not found and folder not in may_be_empty:
            raise CheckpointError(
                f"expected a metrics.jsonl with one row or more, or an eval.json, in {folder}, "
                "found none: give the `output_dir` of a training run, or wait for its first step"
            )
        arms += found
    return _distinct(arms)


def _read_folder(folder: Path) -> list[Arm]:
    if not folder.is_dir():
        raise ConfigError(f"expected a run folder, found none at {folder}: check the path")
    summary = read_object(folder / "summary.json")
    arms = _read_demo(folder, summary) if isinstance(summary.get("arms"), dict) else []
    if any(arm.metrics or arm.evaluation for arm in arms):
        return arms
    metrics = _read_metrics(folder / "metrics.jsonl")
    file = folder / "eval.json"
    evaluation = read_object(file)
    if not metrics and not evaluation:
        return []
    return [_arm(folder.resolve().name, folder, metrics, evaluation, file)]


def _read_demo(folder: Path, summary: dict[str, Any]) -> list[Arm]:
    """The base model and the arms of a demonstration; an arm's own folder may be gone."""
    base = summary.get("base")
    arms = [Arm(name="base", role="reference", evaluation=base)] if isinstance(base, dict) else []
    for name, evaluation in summary["arms"].items():
        inside = folder / name if Path(name).name == name else folder / "no-such-arm"
        metrics, file = _read_metrics(inside / "metrics.jsonl"), folder / "summary.json"
        arm = _arm(name, inside, metrics, as_object(evaluation), file)
        arms.append(replace(arm, role=_role(name, arm.config)))
    return arms


def _arm(
    name: str,
    folder: Path,
    metrics: dict[str, np.ndarray],
    evaluation: dict[str, Any],
    evaluation_file: Path,
) -> Arm:
    config = _read_config(folder / "config.yaml")
    return Arm(
        name=name,
        role=_role(name, config) if metrics else "reference",
        metrics=metrics,
        evaluation=evaluation,
        stale=stale_because(evaluation, evaluation_file, folder),
        config=config,
        summary=read_object(folder / "summary.json"),
        ledger=_read_ledger(folder),
        probes=_read_probes(folder, config),
        profile_png=_read_bytes(folder / "profile.png"),
    )


def _read_bytes(path: Path) -> bytes:
    """The content of a file; empty if there is no file."""
    return path.read_bytes() if path.is_file() else b""


def _read_config(path: Path) -> dict[str, Any]:
    """The run's configuration as it was written; {} where there is none."""
    try:
        return as_object(read_yaml(path))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _role(name: str, config: dict[str, Any]) -> str:
    """Whether the run's coefficient follows the risk: by its configuration, else by its name."""
    objective = as_object(config.get("regularizer")).get("objective")
    if objective is None:
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


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file.

    Raises:
        CheckpointError: not JSON.
    """
    if not path.is_file():
        return {}
    try:
        return as_object(parse_json(path.read_bytes()))
    except ValueError as err:
        raise CheckpointError(f"{path} is not JSON ({err}): write it again or remove it") from err


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
            row = parse_json(line)
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
    """Columns by key, in order of step; {} where there is no row.

    The mean divergence of no token is written as 0 and is none: NaN.
    """
    by_step = {number(row.get("step")): row for row in _read_lines(path) if "step" in row}
    rows = [by_step[step] for step in sorted(by_step) if math.isfinite(step)]
    keys = {key: None for row in rows for key in row}
    columns = {key: np.array([number(row.get(key)) for row in rows]) for key in keys}
    counts = columns.get("active_tokens", columns.get("active_rows"))
    if counts is not None and "divergence" in columns:
        columns["divergence"] = np.where(counts == 0, np.nan, columns["divergence"])
    return columns


def _read_probes(folder: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The facts of the probes that the configuration names, where their folders can be reached."""
    risk = as_object(config.get("risk"))
    parts = risk.get("parts")
    named = [risk, *(as_object(part) for part in (parts if isinstance(parts, list) else []))]
    found = {}
    for path in (part.get("path") for part in named):
        roots = [Path(path), folder / path] if isinstance(path, str) else []
        inside = [root / part for root in roots for part in (".", "prompt", "response")]
        for probe in inside:
            if facts := read_object(probe / "probe.json"):
                found[str(probe)] = facts
    return found


# ---- the ledger


def _read_ledger(folder: Path) -> LedgerFacts | None:
    rows = [row for row in _read_lines(folder / MERGED_NAME) if "id" in row]
    if not rows:
        return None
    by_id: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if row.get("estimator") != "anchor":
            values = (number(row.get(key)) for key in ("risk", "kl_coef", "divergence"))
            by_id.setdefault(str(row["id"]), []).append(tuple(values))  # type: ignore[arg-type]
    held = [_held(name, entries) for name, entries in by_id.items()]
    held = [row for row in held if row.times and row.highest_risk > 0]
    held.sort(key=lambda row: (-row.times, -row.mean_risk, row.name))
    check, holds = _checked(folder)
    return LedgerFacts(
        rows=len(rows),
        sequences=len({str(row["id"]) for row in rows}),
        held=sum(number(row.get("kl_coef")) > 0 for row in rows),
        sources=dict(Counter(str(row.get("estimator")) for row in rows)),
        most_held=held[:_TOP_ROWS],
        check=check,
        holds=holds,
    )


def _held(name: str, entries: list[tuple[float, float, float]]) -> HeldRow:
    """[(risk, b, divergence)] of one sequence."""
    risks, coefficients, divergences = np.array(entries, dtype=np.float64).T
    held = coefficients > 0
    return HeldRow(
        name=name,
        times=int(held.sum()),
        seen=len(entries),
        mean_risk=_mean(risks),
        highest_risk=float(np.nanmax(np.append(risks, -np.inf))),
        mean_coefficient=_mean(coefficients[held]),
        mean_divergence=_mean(divergences[held]),
    )


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def _checked(folder: Path) -> tuple[str, bool | None]:
    """(what `safereg ledger verify` says of the folder, whether the chain holds)."""
    if "ledger" not in read_object(folder / "summary.json"):
        return "not checked: the run has no summary yet, which keeps the last hash", None
    try:
        head = verify_ledger(folder)
    except LedgerError as err:
        return f"does NOT hold: {err}", False
    return f"holds: {head.rows} rows, head {head.head[:16]}", True
