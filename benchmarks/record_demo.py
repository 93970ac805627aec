"""Records a finished demo as one tidy CSV and its figure: python benchmarks/record_demo.py RUN_DIR.

Each row is one arm and carries what it was measured with (processor, cores, versions, commit).
"""

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "demo"


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


def main() -> None:
    """Writes `results/demo/demo.csv` and `results/demo/safety.png`."""
    run = Path(sys.argv[1])
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
    arms = {
        name: {key: value for key, value in values.items() if key != "intervals"}
        for name, values in {"base": summary["base"], **summary["arms"]}.items()
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "demo.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["arm", *next(iter(arms.values())), *common])
        writer.writeheader()
        for name, values in arms.items():
            writer.writerow({"arm": name, **values, **common})
    shutil.copyfile(run / "report-safety.png", RESULTS / "safety.png")


if __name__ == "__main__":
    main()
