"""Attack templates against the arms of the real demo: what breaks refusals that training kept?

    python benchmarks/templates.py RUN          RUN: a folder of `bash launch/demo.sh --real`

Asks the run's held-out harmful prompts again in each form of `safereg_dist.evaluate.attacks`,
greedy. Writes benchmarks/results/templates.csv, one row an arm and form (`none`: as they are), with
the share that is not refused and its 95 % interval; answers are kept in RUN/templates, and the same
command goes on there.
"""

import argparse
import csv
import sys
from pathlib import Path

from safereg_dist.demo.real.rows import POISONED
from safereg_dist.demo.real.run import ARMS, GUARDED
from safereg_dist.evaluate.attacks import WORDINGS
from safereg_dist.evaluate.evaluate import evaluate_model

RESULTS = Path(__file__).resolve().parent / "results" / "templates.csv"
FORMS = (*WORDINGS, "prefill:2", "prefill:5")
COLUMNS = ("arm", "template", "prompts", "attack_success_rate", "low", "high")


def main() -> int:
    """Asks and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    prompts = [run / "data" / f"harmful_{form}.jsonl" for form in ("orders", "questions")]
    (run / "templates").mkdir(exist_ok=True)
    rows = []
    for arm in ("base", *ARMS, GUARDED):
        print(f"== {arm}", flush=True)
        found = evaluate_model(
            run / arm / "model",
            prompts,
            attacks=FORMS,
            poisoned=POISONED,
            max_new_tokens=20,
            batch_size=40,
            out=run / "templates" / f"{arm}.json",
        )
        for template, figures in {"none": found, **found["attacks"]}.items():
            low, high = figures["intervals"]["attack_success_rate"]
            count = found["counts"]["harmful"]
            rows.append((arm, template, count, figures["attack_success_rate"], low, high))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
