"""The cases: each is a function that runs commands and keeps what they wrote."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench import Bench, CaseError

Case = Callable[[Bench], None]
CASES: dict[str, Case] = {}
ACCUMULATE = "train.grad_accum_steps=3"


def case(function: Case) -> Case:
    """Adds a case under its name."""
    CASES[function.__name__] = function
    return function


# ---- the four arms of the demo, under the deepspeed launcher -----------------------------------


def _arm(bench: Bench, *overrides: str) -> None:
    world = bench.world
    bench.train(
        *(f"data.train={world / 'train.jsonl'}", f"data.anchor={world / 'anchor.jsonl'}"),
        *("risk.estimator=probe", f"risk.path={world / 'probe'}", "regularizer.schedule=step"),
        *("train.steps=30", "train.micro_batch_size=4", *overrides),
        ranks=2,
        deepspeed=True,
    )


@case
def arm_sft(bench: Bench) -> None:
    """No regularisation."""
    _arm(bench, "regularizer.objective=none", "data.anchor=null")


@case
def arm_static_low(bench: Bench) -> None:
    """The same small coefficient for every row."""
    _arm(bench, "regularizer.objective=static", "regularizer.ceiling=0.3", "data.anchor=null")


@case
def arm_static_high(bench: Bench) -> None:
    """The same large coefficient for every row."""
    _arm(bench, "regularizer.objective=static", "regularizer.ceiling=0.9", "data.anchor=null")


@case
def arm_adaptive_probe(bench: Bench) -> None:
    """Coefficients from the probe on the reference, anchor rows beside."""
    _arm(bench)


# ---- windows: accumulation, passes, balance ----------------------------------------------------


@case
def window_1_batch_ema(bench: Bench) -> None:
    """One rank; a coefficient for the batch, smoothed; validation."""
    bench.train(
        *("regularizer.granularity=batch", "regularizer.ema=0.6", "regularizer.schedule=linear"),
        *("regularizer.floor=0.1", "regularizer.ceiling=0.9", ACCUMULATE),
        *(f"data.validation={bench.world / 'validation.jsonl'}", "train.eval_every=3"),
    )


@case
def window_2_batch_ema(bench: Bench) -> None:
    """The same on two ranks, rows as they fall, anchors among them."""
    bench.train(
        *("regularizer.granularity=batch", "regularizer.ema=0.6", "regularizer.schedule=clamp"),
        *("regularizer.floor=0.1", "regularizer.ceiling=0.9", "reference.balance=none", ACCUMULATE),
        *(f"data.anchor={bench.world / 'anchor.jsonl'}", "data.anchor_fraction=0.2"),
        ranks=2,
    )


@case
def window_2_exchange(bench: Bench) -> None:
    """Rows of a probe lent to the other rank, one row a pass, next to no memory for states."""
    bench.train(
        *("risk.estimator=probe", f"risk.path={bench.world / 'probe'}"),
        *("reference.balance=exchange", "reference.rows_per_pass=1", "reference.keep_bytes=4096"),
        *("regularizer.schedule=linear", "regularizer.divergence=kl_reverse", ACCUMULATE),
        ranks=2,
    )


@case
def window_3_deal(bench: Bench) -> None:
    """Risky rows dealt evenly over three ranks, two of them a pass; validation."""
    bench.train(
        *("reference.balance=deal", "reference.rows_per_pass=2", ACCUMULATE),
        *("regularizer.schedule=sigmoid", f"data.validation={bench.world / 'validation.jsonl'}"),
        "train.eval_every=4",
        ranks=3,
    )


@case
def window_3_additive(bench: Bench) -> None:
    """Three ranks, no accumulation, logits compared by their squares, epochs instead of steps."""
    bench.train(
        *("regularizer.objective=additive", "regularizer.divergence=l2_logits"),
        *("regularizer.ceiling=1.5", "regularizer.schedule=threshold", "reference.balance=none"),
        *("train.steps=null", "train.epochs=0.4"),
        ranks=3,
    )


@case
def window_4_exchange(bench: Bench) -> None:
    """Rows lent among four ranks, with hidden states that do not all fit."""
    bench.train(
        *("reference.balance=exchange", "reference.keep_bytes=20000", "reference.rows_per_pass=2"),
        *("train.activation_checkpointing=true", ACCUMULATE),
        ranks=4,
    )


# ---- a stored reference ------------------------------------------------------------------------


_STORES = threading.Lock()


def _store(bench: Bench, *, is_whole: bool) -> Path:
    """A store of all rows that training asks for, by two ranks; or without half of them, by one.

    Built by the first case that asks for it.
    """
    place = bench.work.parent / f"store_{'whole' if is_whole else 'partial'}.built"
    with _STORES:
        if not (place / "store").is_dir():
            place.mkdir()
            builder = replace(bench, work=place)
            words = [builder.config(), f"data.anchor={bench.world / 'anchor.jsonl'}"]
            words += [] if is_whole else ["regularizer.threshold=0.8"]
            out = ["--out", place / "store"]
            builder.verb("reference", "build", *words, *out, ranks=2 if is_whole else 1)
    return place / "store"


def _train_from_store(bench: Bench, ranks: int, *overrides: str, is_whole: bool) -> None:
    bench.train(
        *(f"data.anchor={bench.world / 'anchor.jsonl'}", "data.anchor_fraction=0.1"),
        *(f"reference.cache={_store(bench, is_whole=is_whole)}", ACCUMULATE, *overrides),
        ranks=ranks,
    )


@case
def store_whole(bench: Bench) -> None:
    """The states themselves."""
    bench.keep_tensors("states", _store(bench, is_whole=True))


@case
def store_partial(bench: Bench) -> None:
    """Those of the riskiest rows."""
    bench.keep_tensors("states", _store(bench, is_whole=False))


@case
def stored_1(bench: Bench) -> None:
    """One rank, states of all rows."""
    _train_from_store(bench, 1, is_whole=True)


@case
def stored_2_partial(bench: Bench) -> None:
    """Two ranks; rows that the store lacks run online."""
    _train_from_store(bench, 2, "reference.rows_per_pass=2", is_whole=False)


@case
def stored_3_partial(bench: Bench) -> None:
    """The same on three ranks, with little memory for states, rows as they fall."""
    little = ("reference.balance=none", "reference.keep_bytes=8192")
    _train_from_store(bench, 3, *little, is_whole=False)


@case
def stored_4(bench: Bench) -> None:
    """Four ranks, states of all rows."""
    _train_from_store(bench, 4, is_whole=True)


# ---- where the risk comes from -----------------------------------------------------------------


@case
def policy_probe_realign(bench: Bench) -> None:
    """A probe on the policy, compared with the reference's side and mapped back."""
    bench.train(
        *("risk.estimator=probe", f"risk.path={bench.world / 'probe'}", "risk.source=policy"),
        *("risk.drift=realign", "risk.drift_every=2", "risk.drift_recall=1.0"),
        *("optimizer.lr=1e-2", "train.steps=10", "train.grad_accum_steps=2"),
        ranks=2,
    )


@case
def several_signals(bench: Bench) -> None:
    """The largest of a probe, a local judge and a column, each with its ceiling; overrides."""
    parts = [
        {"category": "probe", "estimator": "probe", "path": str(bench.world / "probe")},
        {
            "category": "judge",
            "estimator": "critic",
            "ceiling": 0.6,
            "critic": {"local": str(bench.world / "judge")},
        },
        {"category": "column", "estimator": "column", "ceiling": 0.8, "threshold": 0.7},
    ]
    bench.train(
        *("risk.estimator=max", f"risk.parts={json.dumps(parts)}"),
        *(f"risk.override={bench.world / 'override.jsonl'}", "train.epochs=1.0"),
        *("train.steps=null", "train.micro_batch_size=8", "train.grad_accum_steps=2"),
        ranks=2,
    )


# ---- engines, precision, going on --------------------------------------------------------------


@case
def resumed_2(bench: Bench) -> None:
    """Stopped by SIGUSR1, gone on by the same command: anchors, a moving average, a probe."""
    overrides = (
        *("risk.estimator=probe", f"risk.path={bench.world / 'probe'}", "train.steps=24"),
        *(f"data.anchor={bench.world / 'anchor.jsonl'}", "data.anchor_fraction=0.2"),
        *("regularizer.granularity=batch", "regularizer.ema=0.5", "regularizer.schedule=linear"),
        *("train.save_every=10", "train.grad_accum_steps=2"),
    )
    bench.interrupted_training(*overrides, ranks=2, after_steps=4)
    if (bench.work / "run" / "summary.json").exists():
        raise CaseError("the run was over before it was stopped: give it more steps")
    bench.train(*overrides, ranks=2)


@case
def bf16_2(bench: Bench) -> None:
    """bfloat16 with float32 master weights, the weights exported in several files."""
    bench.train("train.precision=bf16", ACCUMULATE, "train.export_shard_bytes=100000", ranks=2)


@case
def hpz_2(bench: Bench) -> None:
    """A second copy of the policy's weights, profiled."""
    bench.train("engine.hpz_partition_size=2", "profile=true", "train.steps=4", ranks=2)


@case
def single_fp32(bench: Bench) -> None:
    """Plain torch in one process, with validation and anchors."""
    bench.train(
        *("engine.name=single", ACCUMULATE, "train.eval_every=3"),
        f"data.validation={bench.world / 'validation.jsonl'}",
        *(f"data.anchor={bench.world / 'anchor.jsonl'}", "data.anchor_fraction=0.2"),
    )


@case
def single_bf16(bench: Bench) -> None:
    """The same in bfloat16, from a probe."""
    bench.train(
        *("engine.name=single", "train.precision=bf16", ACCUMULATE),
        *("risk.estimator=probe", f"risk.path={bench.world / 'probe'}"),
    )


# ---- the other verbs ---------------------------------------------------------------------------


@case
def verb_probe_fit(bench: Bench) -> None:
    """A probe: its tensors, threshold and tables."""
    bench.verb(
        *("probe", "fit", "--model", bench.world / "base", "--layers", "1,2"),
        *("--data", bench.world / "probe_small.jsonl", "--out", bench.work / "probe"),
        *("--background", 40, "--recall", 0.9),
    )
    bench.keep_tensors("probe", bench.work / "probe")
    bench.keep_json("facts", bench.work / "probe" / "probe.json")


@case
def verb_anchor_build(bench: Bench) -> None:
    """Greedy answers, by two ranks."""
    bench.verb(
        *("anchor", "build", "--model", bench.world / "base", "--max-new-tokens", 16),
        *("--prompts", bench.world / "anchor_prompts.jsonl", "--out", bench.work / "anchor.jsonl"),
        ranks=2,
    )
    rows = (bench.work / "anchor.jsonl").read_text(encoding="utf-8").splitlines()
    bench.keep_rows("anchor", [json.loads(row) for row in rows])


@case
def verb_audit(bench: Bench) -> None:
    """What a run would hold back."""
    risk = {
        "estimator": "probe",
        "path": str(bench.world / "probe"),
        "override": str(bench.world / "override.jsonl"),
        "max_held_back": 1.0,
    }
    engine = {"name": "single"}
    bench.verb("audit", bench.config(risk=risk, engine=engine), "--out", bench.work / "audit")
    for path in sorted((bench.work / "audit").glob("*.json")):
        bench.keep_json(path.stem, path)
