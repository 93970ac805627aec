"""Records a finished demo as one tidy CSV, and draws its figure from that alone.

    python benchmarks/record_demo.py RUN_DIR [NAME]
    python benchmarks/record_demo.py --figures          of all that are recorded, anew

NAME is the folder below results/: `demo` by default, `real` for the real model. A row is one arm,
of all prompts (`set` empty) or of one set, and carries what it was measured with (processor, cores,
versions, commit).
"""

import csv
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import commit, processor
from plot_style import Row, read_csv

from safereg_dist.evaluate.rates import table_rows
from safereg_dist.evaluate.report.arms import Arm
from safereg_dist.evaluate.report.frame import draw
from safereg_dist.evaluate.report.reading import read_arms
from safereg_dist.evaluate.report.tradeoff import SUCCESS, draw_safety

RESULTS = Path(__file__).resolve().parent / "results"
DRAWN = (SUCCESS, f"{SUCCESS}_sampled", "task_exact_match")


def main() -> None:
    """Writes `results/NAME/demo.csv`, unless it is there, and `results/NAME/safety.png`."""
    if sys.argv[1] == "--figures":
        names = [path.parent.name for path in RESULTS.glob("*/demo.csv")]
    else:
        names = [sys.argv[2] if len(sys.argv) > 2 else "demo"]
        record(Path(sys.argv[1]), names[0])
    for name in names:
        drawing = draw(draw_safety, recorded_arms(name))
        assert drawing is not None
        (RESULTS / name / "safety.png").write_bytes(drawing.png)


def recorded_arms(name: str) -> list[Arm]:
    """The arms of `results/NAME/demo.csv`, as a report reads them."""
    rows = read_csv(RESULTS / name / "demo.csv")
    arms = {row["arm"]: _evaluation(row) for row in rows if not row.get("set")}
    summary = {"base": arms.pop("base"), "arms": arms}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return read_arms([Path(folder)], may_be_empty=set())


def _evaluation(row: Row) -> dict[str, Any]:
    bounds = {key: [row.get(f"{key}_{end}", "") for end in ("low", "high")] for key in DRAWN}
    known = {key: [float(bound) for bound in pair] for key, pair in bounds.items() if all(pair)}
    return {**{key: float(row[key]) for key in DRAWN}, "intervals": known}


def record(run: Path, name: str) -> None:
    """Writes `results/NAME/demo.csv`."""
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


if __name__ == "__main__":
    main()
