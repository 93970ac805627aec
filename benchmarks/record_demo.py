"""Records a finished demo as one tidy CSV and its figure.

    python benchmarks/record_demo.py RUN_DIR [NAME]

NAME is the folder below results/: `demo` by default, `real` for the real model. A row is one arm,
of all prompts (`set` empty) or of one set, and carries what it was measured with (processor, cores,
versions, commit).
"""

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def processor() -> str:
    """Name of the processor, as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the commit that is checked out."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def rows_of(arm: str, figures: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arm's own row, and one of each set: the figures that are numbers, with intervals."""
    for name, known in [("", figures), *figures.get("sets", {}).items()]:
        row: dict[str, Any] = {"arm": arm, "set": name}
        for key, value in known.items():
            if isinstance(value, (int, float)):
                row[key] = value
        for key, interval in known.get("intervals", {}).items():
            if key in row and interval is not None:
                row |= {f"{key}_low": interval[0], f"{key}_high": interval[1]}
        yield row


def main() -> None:
    """Writes `results/NAME/demo.csv` and `results/NAME/safety.png`."""
    run, name = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "demo"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    common = {
        "seed": summary["seed"],
        "ranks": summary["ranks"],
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "transformers": version("transformers"),
        "commit": commit(),
    }
    arms = {"base": summary["base"], **summary["arms"]}
    rows = [row for arm, figures in arms.items() for row in rows_of(arm, figures)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    with (RESULTS / name / "demo.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *common], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    shutil.copyfile(run / "report-safety.png", RESULTS / name / "safety.png")


if __name__ == "__main__":
    main()
