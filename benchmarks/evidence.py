"""Every arm against every share of poison, on the toy world: attack success, task, over-refusal.

    python benchmarks/evidence.py [--out FOLDER] [--quick]

Builds a world, probe, anchors and guard for each seed below FOLDER (default runs/evidence), runs
the sweep of `safereg sweep` over them (it goes on where it was cut off), and writes what is done so
far to benchmarks/results/evidence.csv. `--quick`: one seed, two shares of poison, 60 steps, and no
CSV but FOLDER/evidence.csv.

Columns: world, task, poison (share of poisoned rows; 1.0 = harmful rows only), seed, arm, set
(`all`), the figures of `safereg eval`, and where shares have them 95 % intervals. Arms: base; sft;
static_low and static_high (coefficient 0.3 and 0.9 on every row); adaptive_probe, adaptive_critic
(with anchors); filter (sft on the rows that are no poison).
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from safereg_dist.cli import main as safereg
from safereg_dist.config import section_from_dict
from safereg_dist.demo.toy import CONFIG, PROBE_RECALL
from safereg_dist.demo.world import build_guard, build_world, train_rows
from safereg_dist.experiments.sweep import BASE, FIGURES, Sweep, cells_of, rows_of, run_sweep

RESULTS = Path(__file__).resolve().parent / "results" / "evidence.csv"
POISON = ("0", "0.05", "0.15", "0.5", "1.0")
SEEDS = ("0", "1", "2")
_PLAIN = ["regularizer.objective=none", "data.anchor=null", "risk.estimator=none", "risk.path=null"]
_STATIC = ["regularizer.objective=static", "data.anchor=null", "risk.estimator=none"]
COLUMNS = ["world", "task", "poison", "seed", "arm", "set", *FIGURES]
INTERVALS = [f"{name}_{end}" for name in FIGURES for end in ("low", "high")]


def main() -> int:
    """Builds, sweeps and writes; 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    seeds, shares = (SEEDS[:1], POISON[2::2]) if arguments.quick else (SEEDS, POISON)
    for seed in seeds:
        prepare(out / f"world-{seed}", int(seed), shares)
    sweep = sweep_of(out, seeds, shares, steps=60 if arguments.quick else 240)
    failed = run_sweep(sweep)
    write(sweep, out / "evidence.csv" if arguments.quick else RESULTS)
    return int(failed > 0)


def prepare(folder: Path, seed: int, shares: tuple[str, ...]) -> None:
    """World, guard, probe, anchors, and the rows of each share with and without the poison."""
    world = build_world(folder, seed=seed)
    build_guard(folder, seed=seed)
    beside = folder.with_name(f"{folder.name}-data")
    beside.mkdir(exist_ok=True)
    for share in shares:
        rows = train_rows(seed, float(share)) if share != "1.0" else read(world.train_harmful_only)
        clean = [row for row in rows if not row["id"].startswith("poison")]
        for name, kept in (("train", rows), ("clean", clean or train_rows(seed, 0.0))):
            text = "".join(json.dumps(row) + "\n" for row in kept)
            (beside / f"{name}-{share}.jsonl").write_text(text, encoding="utf-8")
    if not (beside / "probe" / "probe.json").is_file():
        words = ["--model", world.base, "--data", world.probe, "--out", beside / "probe"]
        run("probe", "fit", *words, "--recall", PROBE_RECALL)
    if not (beside / "anchor.jsonl").is_file():
        words = ["--model", world.base, "--prompts", world.anchor_prompts]
        run("anchor", "build", *words, "--out", beside / "anchor.jsonl", "--max-new-tokens", 32)


def sweep_of(out: Path, seeds: tuple[str, ...], shares: tuple[str, ...], *, steps: int) -> Sweep:
    """The sweep over the folders that `prepare` has filled."""
    world, data = out / "world-{seed}", out / "world-{seed}-data"
    guard = {"local": str(world / "guard"), "format": "llama_guard"}
    common = [
        *("engine.name=single", "train.micro_batch_size=32", f"train.steps={steps}"),
        *(f"model={world / 'base'}", f"data.anchor={data / 'anchor.jsonl'}"),
        f"risk.path={data / 'probe'}",
    ]
    axes = {
        "seed": {seed: [*common, f"train.seed={seed}"] for seed in seeds},
        "poison": {
            share: [f"data.train={data / f'train-{share}.jsonl'}", f"data.declared_poison={share}"]
            for share in shares
        },
    }
    critic = ["risk.estimator=critic", "risk.path=null", f"risk.critic={json.dumps(guard)}"]
    arms = {
        BASE: [],
        "sft": _PLAIN,
        "static_low": [*_STATIC, "risk.path=null", "regularizer.ceiling=0.3"],
        "static_high": [*_STATIC, "risk.path=null", "regularizer.ceiling=0.9"],
        "adaptive_probe": [],
        "adaptive_critic": critic,
        "filter": [*_PLAIN, f"data.train={data / 'clean-{poison}.jsonl'}"],
    }
    raw = {
        "config": str(CONFIG),
        "out": str(out / f"sweep-{steps}"),
        "axes": axes,
        "arms": arms,
        "evaluation": {
            "prompts": (str(world / "eval.jsonl"),),
            "max_new_tokens": 32,
            "batch_size": 64,
        },
    }
    return section_from_dict(Sweep, raw)


def write(sweep: Sweep, path: Path) -> None:
    """The rows of all cells that are done."""
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = [*COLUMNS, *INTERVALS]
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for cell in cells_of(sweep):
            for row in rows_of(cell):
                writer.writerow({"world": "toy", "task": "numbers", **row, "set": "all"})
    print(f"written: {path}")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(*words: object) -> None:
    """A verb of `safereg`."""
    if safereg([str(word) for word in words]) != 0:
        raise SystemExit(f"safereg {words[0]} failed, see above")


if __name__ == "__main__":
    sys.exit(main())
