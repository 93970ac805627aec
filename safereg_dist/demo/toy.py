"""The demo on the embedded world: base, probe, anchors, arms under the launcher, report."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safereg_dist.demo.claims import check_claims
from safereg_dist.demo.estimators import (
    ESTIMATOR_ARMS,
    FORMAT,
    estimator_overrides,
    served_guard,
)
from safereg_dist.demo.stages import command, finish, forget_stale, launch, say
from safereg_dist.demo.world import WorldPaths, build_guard, build_world

CONFIG = Path(__file__).with_name("demo.yaml")

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


def run_demo(out: Path, *, ranks: int, seed: int, estimators: bool = False) -> dict[str, Any]:
    """All stages below `out`; the content of `summary.json`.

    Raises:
        DemoError: a stage failed, or what was measured is not what the demo claims.
        CriticUnavailable: the guard's server did not start.
    """
    started = time.perf_counter()
    say("1/5 the embedded world: grammar, data, an aligned base model trained from scratch")
    world = build_world(out / "world", seed=seed)
    run = Run(out=out, world=world, ranks=ranks, seed=seed)
    seconds = _begin_stages(run, round(time.perf_counter() - started, 1))

    say("2/5 the probe, and anchor rows answered by the base")
    _prepare(run)

    say("3/5 the base before fine-tuning")
    base = {**_evaluate(world.base, world.eval, out / "base" / "eval.json"), "seconds": seconds}
    arms = {name: _run_arm(run, name, overrides) for name, overrides in ARMS.items()}
    if estimators:
        arms |= _run_estimator_arms(run)

    say("5/5 the report")
    summary = {
        "base": base,
        "arms": arms,
        "seed": seed,
        "ranks": ranks,
        "seconds": round(time.perf_counter() - started, 1),
    }
    finish(summary, check_claims(summary, out), out, _COLUMNS)
    return summary


def _begin_stages(run: Run, seconds: float) -> float:
    """Forgets stages made from another world; the seconds that this world took to build."""
    made_of = [
        run.world.manifest.read_bytes(),
        CONFIG.read_bytes(),
        f"{run.ranks} {PROBE_RECALL}".encode(),
    ]
    stages = [run.probe, run.out / "base", run.anchor, *(run.out / arm for arm in ARMS)]
    return forget_stale(run.out / "stages.json", made_of, stages, seconds)


def _prepare(run: Run) -> None:
    """The probe and the anchor rows."""
    world = run.world
    if not (run.probe / "probe.json").is_file():
        command(
            *("probe", "fit", "--model", world.base, "--data", world.probe, "--out", run.probe),
            *("--recall", PROBE_RECALL),
        )
    if not run.anchor.is_file():
        command(
            *("anchor", "build", "--model", world.base, "--prompts", world.anchor_prompts),
            *("--out", run.anchor, "--max-new-tokens", 32),
        )


def _run_arm(run: Run, name: str, overrides: list[str]) -> dict[str, Any]:
    say(f"4/5 arm {name}: {run.ranks} ranks, ZeRO-3")
    folder = run.out / name
    seconds_file = folder / "seconds.json"
    if not (folder / "summary.json").is_file():
        began = time.perf_counter()
        launch(
            run.ranks,
            CONFIG,
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
    say("4/5 the guard, trained from scratch and served")
    guard = build_guard(run.world.root, seed=run.seed)
    cache = run.out / "critic.sqlite"
    made_of = [(run.out / "stages.json").read_bytes(), (guard / "guard.json").read_bytes()]
    stages = [run.scored, cache, *(run.out / arm for arm in ESTIMATOR_ARMS)]
    forget_stale(run.out / "estimators.json", made_of, stages, 0.0)
    with served_guard(guard) as served:
        if not run.scored.is_file():
            command(
                *("score", "--endpoint", served.endpoint, "--model", served.model),
                *("--format", FORMAT, "--data", run.world.train, "--out", run.scored),
                *("--cache", cache),
            )
        arms = estimator_overrides(served, scored=run.scored, probe=run.probe)
        return {name: _run_arm(run, name, arms[name]) for name in ESTIMATOR_ARMS}


def _evaluate(model: Path, prompts: Path, out: Path) -> dict[str, Any]:
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        command(
            *("eval", "--model", model, "--prompts", prompts, "--judge", "keyword"),
            *("--out", out, "--max-new-tokens", 32, "--batch-size", 64),
        )
    evaluation = json.loads(out.read_text(encoding="utf-8"))
    return {name: evaluation[name] for name in (*_COLUMNS, "intervals")}
