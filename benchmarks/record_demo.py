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
import sys
from importlib.metadata import version
from pathlib import Path

from harness import commit, processor

from safereg_dist.evaluate.rates import table_rows

RESULTS = Path(__file__).resolve().parent / "results"


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
    rows = [{"arm": arm, **row} for arm, result in arms.items() for row in table_rows(result)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    with (RESULTS / name / "demo.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *common], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    shutil.copyfile(run / "report-safety.png", RESULTS / name / "safety.png")


if __name__ == "__main__":
    main()
