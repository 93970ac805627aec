"""What saving costs a run: at once, asynchronously from a disk, and from memory.

    python benchmarks/save_cost.py [--rounds 3] [--out benchmarks/results/save_cost.csv]

A random model of SmolLM2-135M's shape (134.5 million parameters) trains under ZeRO-3 in float32 on
two ranks of this machine, torchrun, with a checkpoint every fourth step; the arms take turns.
`blocked_s` is the time in which no rank trained, `saved_s` that until a checkpoint was whole, both
of one checkpoint; `step_s` is the median of the steps right after a checkpoint, during which an
asynchronous one is copied, `other_step_s` of the others. `wall_s` is all steps and all waiting.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.builders import random_rows, save_model, tiny_model, write_jsonl, write_run  # noqa: E402
from support.launching import FINETUNE, Launcher  # noqa: E402

STEPS, EVERY = 12, 4
SMOLLM2_135M = {
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    **{"max_position_embeddings": 1024, "initializer_range": 0.02},
}
"""As published with the model, beside its vocabulary of 49152."""
LONGEST = 30  # words of a prompt, and of a response
ASYNC = "train.async_save=true"
ARMS: dict[str, list[str]] = {
    "at once": [],
    "async, disk": [ASYNC],
    "async, memory": [ASYNC, "train.save_staging=/dev/shm"],
}
COLUMNS = (
    *("arm", "round", "checkpoint_bytes", "saved", "blocked_s", "saved_s", "step_s"),
    *("other_step_s", "wall_s", "date", "hardware", "commit", "torch"),
)


def make_run(folder: Path) -> Path:
    """The configuration of all arms."""
    config = write_run(
        folder,
        rows=60,
        train={
            **{"steps": STEPS, "save_every": EVERY, "keep_checkpoints": 1},
            **{"precision": "fp32", "micro_batch_size": 2},
        },
    )
    save_model(folder / "model", tiny_model(vocab=49152, **SMOLLM2_135M))
    write_jsonl(folder / "train.jsonl", random_rows(60, longest=LONGEST))
    return config


def measured(out: Path) -> dict[str, Any]:
    """What a run that has ended says of its saves and steps."""
    saves = json.loads((out / "summary.json").read_text("utf-8"))["checkpoints"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = {row["step"]: row["step_time_s"] for row in rows[1:]}  # the first one allocates
    after = [seconds for step, seconds in steps.items() if step % EVERY == 0]
    others = [seconds for step, seconds in steps.items() if step % EVERY]
    count = saves["saved"]
    whole = [f for f in (out / "checkpoint").rglob("*") if f.is_file()]
    seconds = {
        "blocked_s": saves["blocked_seconds"] / max(count, 1),
        "saved_s": saves["seconds"] / max(count, 1),
        "step_s": statistics.median(after),
        "other_step_s": statistics.median(others),
        "wall_s": sum(steps.values()) + saves["blocked_seconds"],
    }
    size = sum(f.stat().st_size for f in whole)
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    return {"checkpoint_bytes": size, "saved": count, **rounded}


def main() -> None:
    """Runs all arms; each row is written when it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/save_cost.csv")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    known = provenance(torch.device("cpu"))
    common = {name: known[name] for name in COLUMNS if name in known}
    with tempfile.TemporaryDirectory() as name, options.out.open("w", newline="") as file:
        folder = Path(name)
        config, launch = make_run(folder), Launcher(folder)
        rows = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        rows.writeheader()
        for number in range(options.rounds):
            for arm, words in ARMS.items():
                out = folder / f"run{number}-{arm}".replace(", ", "-").replace(" ", "-")
                done = launch(FINETUNE, config, f"output_dir={out}", *words, launcher="torchrun")
                assert done.status == 0, done.output
                found = measured(out)
                shutil.rmtree(out)
                rows.writerow({"arm": arm, "round": number, **found, **common})
                file.flush()
                print(arm, found, flush=True)


if __name__ == "__main__":
    main()
