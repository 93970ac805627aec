"""Is an evaluation one of the weights that a run has now, or was the run trained again since?"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SLACK = 1.0  # seconds: one command writes both, and a clock of a file system may be coarse


def training_digest(run_dir: Path) -> str | None:
    """SHA-256 (hex) of a run's `summary.json`, which tells one training from another.

    None where the folder has none: no run has ended in it.
    """
    try:
        return hashlib.sha256((run_dir / "summary.json").read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def stale_because(evaluation: Mapping[str, Any], file: Path, run_dir: Path) -> str:
    """Why an evaluation, read from `file`, does not tell of what `run_dir` holds; "" if it may.

    Evaluations that name no training (`training`) are held against it by the times of the files.
    """
    if not evaluation or not (run_dir / "metrics.jsonl").is_file():
        return ""  # nothing was trained here
    now, then = training_digest(run_dir), evaluation.get("training")
    if then:
        return "" if then == now else "the run was trained again after this evaluation"
    summary = run_dir / "summary.json"
    if now is None or summary == file or file.stat().st_mtime + _SLACK >= summary.stat().st_mtime:
        return ""
    return "the file of this evaluation is older than the training's summary"
