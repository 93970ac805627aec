"""Runs Trainers on two ranks under an engine; each rank writes what it found.

    trainer_worker.py WORK ENGINE FOLDER

FOLDER holds `reference`; rank R writes WORK.rankR.json there.
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `support`

WORK, ENGINE, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if "zero" in ENGINE:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import safereg_dist.parallel.deepspeed  # noqa: F401 - turns DeepSpeed's builds off
if ENGINE != "ddp":
    from support import accelerate_on_cpu  # noqa: F401

from safetensors.torch import save_file  # noqa: E402
from support.builders import tiny_model  # noqa: E402
from support.trainer_runs import (  # noqa: E402
    SMALL,
    Losses,
    engine_arguments,
    features,
    same_weights,
    settings,
    trainer,
    whole_weights,
)
from torch.utils.data import IterableDataset  # noqa: E402

from safereg_dist.errors import CheckpointError  # noqa: E402

RANK = int(os.environ["RANK"])


def run(name, *, resume=False, regularizer=None, args=None, stop=None, dropout=0.1, **how):
    """(logs, whole weights, trainer) of a run in FOLDER/name."""
    seen = Losses(stop=stop)
    made = trainer(
        FOLDER / name,
        model=tiny_model(attention_dropout=dropout, **SMALL),
        safereg=settings(FOLDER / "reference", regularizer=regularizer or {}),
        callbacks=[seen],
        args={"per_device_train_batch_size": 2, **engine_arguments(ENGINE), **(args or {})},
        **how,
    )
    made.train(resume_from_checkpoint=resume)
    return seen, whole_weights(made.model), made


def resume():
    """A run, the same stopped and resumed, and the first one's weights saved."""
    adaptive = {"granularity": "batch", "ema": 0.7, "schedule": "linear"}
    saves = {"save_strategy": "steps", "save_steps": 3}
    seen, trained, made = run("whole", regularizer=adaptive, args=saves)
    made.save_model(str(FOLDER / "saved"))
    if RANK == 0:
        save_file(trained, FOLDER / "trained.safetensors")
    first, _, _ = run("again", regularizer=adaptive, args=saves, stop=3)
    second, resumed, _ = run("again", regularizer=adaptive, args=saves, resume=True)
    return {
        "losses": [seen.losses, first.losses + second.losses],
        "same_weights": same_weights(trained, resumed),
    }


def begun():
    """Three of six steps."""
    run("ranks", args={"save_strategy": "steps", "save_steps": 3}, stop=3)
    return {}


def went_on():
    """The rest of them, on another number of ranks."""
    seen, _, _ = run("ranks", resume=True)
    return {"losses": seen.losses}


def damaged():
    """What every rank raises where a file that one rank alone reads was changed."""
    saves = {"save_strategy": "steps", "save_steps": 3}
    run("damaged", args=saves, stop=3)
    [path] = (FOLDER / "damaged").rglob("*zero_pp_rank_1*optim*")
    torch.distributed.barrier()
    if RANK == 0:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    torch.distributed.barrier()
    try:
        run("damaged", args=saves, resume=True)
    except CheckpointError as error:
        return {"error": str(error)}
    return {}


class Stream(IterableDataset):
    def __iter__(self):
        yield from features(50)


def windows():
    """Ranks with and without risky rows, a cut window, a stream, evaluation between steps."""
    rows = features(20)
    for index, row in enumerate(rows):  # sequential: rank 1 gets places 2, 3 of every four
        row["risk"] = 0.0 if index % 4 > 1 else 0.9
    sequential = {"train_sampling_strategy": "sequential"}
    epochs = {"max_steps": -1, "num_train_epochs": 1, **sequential}
    how = {"train_dataset": rows, "dropout": 0.0}
    seen, _, _ = run("windows", args=epochs, **how)
    evals = {"eval_strategy": "steps", "eval_steps": 2, **epochs}
    other, _, _ = run("evaluated", args=evals, eval_dataset=features(7, seed=8), **how)
    streamed, _, _ = run("stream", args={"max_steps": 3}, train_dataset=Stream())
    return {
        "losses": seen.losses,
        "evaluated": other.losses,
        "eval_loss": [log["eval_loss"] for log in other.logs if "eval_loss" in log],
        "streamed": streamed.losses,
    }


def errors():
    """What every rank raises where one rank's row cannot be read, and where ranks are apart."""
    rows = features(24)
    rows[2]["risk"] = 7.0  # rank 1's first row
    found = []
    try:
        run("bad", args={"train_sampling_strategy": "sequential"}, train_dataset=rows)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return {"errors": found}


def main():
    torch.set_num_threads(1)
    works = (resume, begun, went_on, windows, errors, damaged)
    found = {work.__name__: work for work in works}[WORK]()
    (FOLDER / f"{WORK}.rank{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
