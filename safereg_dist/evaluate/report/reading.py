"""What runs leave behind, read into arms: metrics, evaluation, configuration, ledger, probes."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from safereg_dist.config.yaml_text import read_yaml
from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.evaluate.report.arms import Arm, as_object, number
from safereg_dist.evaluate.report.held import read_ledger
from safereg_dist.evaluate.report.lines import read_lines, read_object
from safereg_dist.evaluate.stale import stale_because
from safereg_dist.run.alerts import ALERTS_NAME
from safereg_dist.storage.json_text import json_objects
from safereg_dist.storage.signing import Key

_BASELINE_OBJECTIVES = ("none", "static", "token_wise")


def read_arms(folders: list[Path], *, may_be_empty: set[Path], key: Key | None = None) -> list[Arm]:
    """The arms of run folders, or of folders of a demonstration, under distinct names.

    A folder with an evaluation and no training is a reference: the model before it. `key` checks
    the signatures of the runs.

    Raises:
        ConfigError: a folder that does not exist.
        CheckpointError: one that holds nothing and is not in `may_be_empty`, or what cannot be
            read.
    """
    arms = []
    for folder in folders:
        found = _read_folder(folder, key)
        if not found and folder not in may_be_empty:
            raise CheckpointError(
                f"expected a metrics.jsonl with one row or more, or an eval.json, in {folder}, "
                "found none: give the `output_dir` of a training run, or wait for its first step"
            )
        arms += found
    return _distinct(arms)


def _read_folder(folder: Path, key: Key | None) -> list[Arm]:
    if not folder.is_dir():
        raise ConfigError(f"expected a run folder, found none at {folder}: check the path")
    summary = read_object(folder / "summary.json")
    arms = _read_demo(folder, summary, key) if isinstance(summary.get("arms"), dict) else []
    if any(arm.metrics or arm.evaluation for arm in arms):
        return arms
    metrics = _read_metrics(folder / "metrics.jsonl")
    file = folder / "eval.json"
    evaluation = read_object(file)
    if not metrics and not evaluation:
        return []
    return [_arm(folder.resolve().name, folder, metrics, evaluation, file, key)]


def _read_demo(folder: Path, summary: dict[str, Any], key: Key | None) -> list[Arm]:
    """The base model and the arms of a demonstration; an arm's own folder may be gone."""
    base = summary.get("base")
    arms = [Arm(name="base", role="reference", evaluation=base)] if isinstance(base, dict) else []
    for name, evaluation in summary["arms"].items():
        inside = folder / name if Path(name).name == name else folder / "no-such-arm"
        metrics, file = _read_metrics(inside / "metrics.jsonl"), folder / "summary.json"
        arm = _arm(name, inside, metrics, as_object(evaluation), file, key)
        arms.append(replace(arm, role=_role(name, arm.config)))
    return arms


def _arm(
    name: str,
    folder: Path,
    metrics: dict[str, np.ndarray],
    evaluation: dict[str, Any],
    evaluation_file: Path,
    key: Key | None,
) -> Arm:
    config = _read_config(folder / "config.yaml")
    summary = read_object(folder / "summary.json")
    return Arm(
        name=name,
        role=_role(name, config) if metrics else "reference",
        metrics=metrics,
        evaluation=evaluation,
        stale=stale_because(evaluation, evaluation_file, folder),
        config=config,
        summary=summary,
        ledger=read_ledger(folder, config, summary, key),
        profile=read_object(folder / "profile.json"),
        alerts=_alerts(folder, summary),
        probes=_read_probes(folder, config),
        profile_png=_read_bytes(folder / "profile.png"),
        folder=folder.resolve(),
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


def _read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns by key, in order of step; {} where there is no row. Files count steps from 0.

    The mean divergence of no token is written as 0 and is none: NaN.
    """
    by_step = {number(row.get("step")): row for row in read_lines(path) if "step" in row}
    rows = [by_step[step] for step in sorted(by_step) if math.isfinite(step)]
    keys = {key: None for row in rows for key in row}
    columns = {key: np.array([number(row.get(key)) for row in rows]) for key in keys}
    if columns:
        columns["step"] += 1
    counts = columns.get("active_tokens", columns.get("active_rows"))
    if counts is not None and "divergence" in columns:
        columns["divergence"] = np.where(counts == 0, np.nan, columns["divergence"])
    return columns


def _alerts(folder: Path, summary: dict[str, Any]) -> dict[str, int]:
    """How often each alert was raised: as the summary counts them, else as `alerts.jsonl` has."""
    counted = as_object(summary.get("tracking")).get("alerts")
    if isinstance(counted, dict):
        return {str(k): int(number(n)) for k, n in counted.items() if 0 < number(n) < math.inf}
    rows = json_objects(folder / ALERTS_NAME)
    return dict(Counter(str(row["alert"]) for row in rows if "alert" in row))


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
