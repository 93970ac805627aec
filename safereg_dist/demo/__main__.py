"""The demo: base model -> probe -> anchors -> four arms under the deepspeed launcher -> report.

Each stage is a command that a user would type for a real model; it is printed before it runs.
Stages that are done already are not done again. With `--estimators` three arms more, whose risk
comes from a guard model: scored ahead of time, asked while training, and together with the probe.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safereg_dist.cli import main as safereg
from safereg_dist.demo.claims import check_claims
from safereg_dist.demo.estimators import (
    ESTIMATOR_ARMS,
    FORMAT,
    ROOT,
    estimator_overrides,
    served_guard,
)
from safereg_dist.demo.world import WorldPaths, build_guard, build_world
from safereg_dist.errors import SafeRegError
from safereg_dist.storage.atomic import write_atomically

FINETUNE = ROOT / "launch" / "finetune.py"
CONFIG = ROOT / "launch" / "configs" / "demo.yaml"

PROBE_RECALL = 0.98  # every row that is missed teaches its attack; 72 calibration rows support it
_NO_ANCHOR = ["data.anchor=null"]
ARMS: dict[str, list[str]] = {
    "sft": ["regularizer.objective=none", *_NO_ANCHOR],
    "static_low": ["regularizer.objective=static", "regularizer.ceiling=0.3", *_NO_ANCHOR],
    "static_high": ["regularizer.objective=static", "regularizer.ceiling=0.9", *_NO_ANCHOR],
    "adaptive_probe": [],
}
_COLUMNS = {
    "attack_success_rate": "attack, greedy",
    "attack_success_rate_sampled": "attack, sampled",
    "refusal_probability": "P(refuse)",
    "benign_exact_match": "benign exact",
    "over_refusal_rate": "over-refusal",
    "task_exact_match": "task exact",
}


class DemoError(SafeRegError):
    """A stage ended with an error of its own, printed above, or a claim does not hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every stage needs to know."""

    out: Path
    world: WorldPaths
    ranks: int
    seed: int

    @property
    def probe(self) -> Path:
        """Folder of the probe."""
        return self.out / "probe"

    @property
    def anchor(self) -> Path:
        """File of anchor rows."""
        return self.out / "anchor.jsonl"

    @property
    def scored(self) -> Path:
        """The training rows with the guard's risk."""
        return self.out / "scored.jsonl"


def main() -> int:
    """Runs the demo; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m safereg_dist.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--estimators", action="store_true", help="three arms more, with a guard")
    arguments = parser.parse_args()
    try:
        run_demo(
            arguments.out,
            ranks=arguments.ranks,
            seed=arguments.seed,
            estimators=arguments.estimators,
        )
    except SafeRegError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def run_demo(out: Path, *, ranks: int, seed: int, estimators: bool = False) -> dict[str, Any]:
    """All stages below `out`; the content of `summary.json`.

    Raises:
        DemoError: a stage failed, or what was measured is not what the demo claims.
        CriticUnavailable: the guard's server did not start.
    """
    started = time.perf_counter()
    _say("1/5 the embedded world: grammar, data, an aligned base model trained from scratch")
    world = build_world(out / "world", seed=seed)
    run = Run(out=out, world=world, ranks=ranks, seed=seed)
    seconds = _begin_stages(run, round(time.perf_counter() - started, 1))

    _say("2/5 the probe, and anchor rows answered by the base")
    _prepare(run)

    _say("3/5 the base before fine-tuning")
    base = {**_evaluate(world.base, world.eval, out / "base" / "eval.json"), "seconds": seconds}
    arms = {name: _run_arm(run, name, overrides) for name, overrides in ARMS.items()}
    if estimators:
        arms |= _run_estimator_arms(run)

    _say("5/5 the report")
    summary = {
        "base": base,
        "arms": arms,
        "seed": seed,
        "ranks": ranks,
        "seconds": round(time.perf_counter() - started, 1),
    }
    claims = check_claims(summary, out)
    summary["claims"] = [claim._asdict() for claim in claims]
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    _command("report", out)
    _print_table(summary)
    failed = [claim.text for claim in claims if not claim.holds]
    if failed:
        raise DemoError(f"measured otherwise than claimed: {'; '.join(failed)}")
    return summary


def _begin_stages(run: Run, seconds: float) -> float:
    """Forgets stages made from another world; the seconds that this world took to build."""
    made_of = [
        run.world.manifest.read_bytes(),
        CONFIG.read_bytes(),
        f"{run.ranks} {PROBE_RECALL}".encode(),
    ]
    stages = [run.probe, run.out / "base", run.anchor, *(run.out / arm for arm in ARMS)]
    return _forget_stale(run.out / "stages.json", made_of, stages, seconds)


def _forget_stale(
    stamp: Path, made_of: Iterable[bytes], stages: Iterable[Path], seconds: float
) -> float:
    """Removes `stages` unless `stamp` says that they were made of the same; its seconds."""
    digest = hashlib.sha256(b"".join(made_of)).hexdigest()
    known = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    if known.get("made_of") != digest:
        for stage in stages:
            shutil.rmtree(stage) if stage.is_dir() else stage.unlink(missing_ok=True)
        known = {"made_of": digest, "seconds": seconds}
        write_atomically(stamp, json.dumps(known) + "\n")
    return known["seconds"]


def _prepare(run: Run) -> None:
    """The probe and the anchor rows."""
    world = run.world
    if not (run.probe / "probe.json").is_file():
        _command(
            *("probe", "fit", "--model", world.base, "--data", world.probe, "--out", run.probe),
            *("--recall", PROBE_RECALL),
        )
    if not run.anchor.is_file():
        _command(
            *("anchor", "build", "--model", world.base, "--prompts", world.anchor_prompts),
            *("--out", run.anchor, "--max-new-tokens", 32),
        )


def _run_arm(run: Run, name: str, overrides: list[str]) -> dict[str, Any]:
    _say(f"4/5 arm {name}: {run.ranks} ranks, ZeRO-3")
    folder = run.out / name
    seconds_file = folder / "seconds.json"
    if not (folder / "summary.json").is_file():
        began = time.perf_counter()
        _launch(
            run.ranks,
            f"model={run.world.base}",
            f"data.train={run.world.train}",
            f"data.anchor={run.anchor}",
            f"risk.path={run.probe}",
            f"train.seed={run.seed}",
            f"output_dir={folder}",
            *overrides,
        )
        seconds_file.write_text(json.dumps(round(time.perf_counter() - began, 1)))
    evaluation = _evaluate(folder / "model", run.world.eval, folder / "eval.json")
    return {**evaluation, "seconds": json.loads(seconds_file.read_text())}


def _run_estimator_arms(run: Run) -> dict[str, dict[str, Any]]:
    """The arms whose risk a guard gives, each with the figures of `_run_arm`."""
    _say("4/5 the guard, trained from scratch and served")
    guard = build_guard(run.world.root, seed=run.seed)
    cache = run.out / "critic.sqlite"
    made_of = [(run.out / "stages.json").read_bytes(), (guard / "guard.json").read_bytes()]
    stages = [run.scored, cache, *(run.out / arm for arm in ESTIMATOR_ARMS)]
    _forget_stale(run.out / "estimators.json", made_of, stages, 0.0)
    with served_guard(guard) as served:
        if not run.scored.is_file():
            _command(
                *("score", "--endpoint", served.endpoint, "--model", served.model),
                *("--format", FORMAT, "--data", run.world.train, "--out", run.scored),
                *("--cache", cache),
            )
        arms = estimator_overrides(served, scored=run.scored, probe=run.probe)
        return {name: _run_arm(run, name, arms[name]) for name in ESTIMATOR_ARMS}


def _evaluate(model: Path, prompts: Path, out: Path) -> dict[str, Any]:
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        _command(
            *("eval", "--model", model, "--prompts", prompts, "--judge", "keyword"),
            *("--out", out, "--max-new-tokens", 32, "--batch-size", 64),
        )
    evaluation = json.loads(out.read_text(encoding="utf-8"))
    return {name: evaluation[name] for name in (*_COLUMNS, "intervals")}


def _command(*arguments: object) -> None:
    """One verb of the `safereg` command, in this process (its imports are paid once)."""
    words = [str(argument) for argument in arguments]
    print(f"$ safereg {shlex.join(words)}", flush=True)
    if safereg(words) != 0:
        raise DemoError(f"`safereg {words[0]}` failed, see above")


def _launch(ranks: int, *overrides: str) -> None:
    """One training run under the deepspeed launcher."""
    words = [
        *("deepspeed", "--num_gpus", str(ranks), "--master_port", str(_free_port())),
        *(str(FINETUNE), str(CONFIG), *overrides),
    ]
    print(f"$ {shlex.join(words)}", flush=True)
    environment = {**os.environ, "DS_LOG_LEVEL": "error"}
    words[:1] = [sys.executable, "-m", "deepspeed.launcher.runner"]
    status = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, check=False)
    if status.returncode != 0:
        raise DemoError(f"training ended with status {status.returncode}, see above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _print_table(summary: dict[str, Any]) -> None:
    rows = {"base": summary["base"], **summary["arms"]}
    print("\n" + "arm".ljust(16) + "".join(title.rjust(17) for title in _COLUMNS.values()))
    for name, values in rows.items():
        cells = ("-" if values[key] is None else f"{values[key]:.3f}" for key in _COLUMNS)
        print(name.ljust(16) + "".join(cell.rjust(17) for cell in cells))
    print()
    for claim in summary["claims"]:
        print(f"{'ok  ' if claim['holds'] else 'FAIL'}  {claim['text']}: {claim['measured']}")
    print(f"\n{summary['seconds']} s in all", flush=True)


if __name__ == "__main__":
    sys.exit(main())
