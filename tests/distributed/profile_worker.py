"""One rank of the profile's tests: whole runs in one process group. Arguments: folder of the test.

Collectives are counted at torch.distributed's functions, which are wrapped before deepspeed is
imported (it keeps some of them): a second way to the numbers that the profile sees at the
dispatcher.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import distributed

SEEN: Counter[str] = Counter()


def size(value) -> int:
    """Bytes of a tensor or of a list of tensors."""
    tensors = [value] if torch.is_tensor(value) else value
    return sum(t.numel() * t.element_size() for t in tensors)


PAYLOAD = {  # kind, and which argument is the whole tensor
    "all_reduce": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "all_gather": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "all_to_all_single": ("all_to_all", 1),
}
NAMES = {"tensor": 0, "output_tensor": 0, "output": 0, "input_tensor": 1, "input": 1}


def count_collectives() -> None:
    """Adds the payload of every collective that torch is asked for from now on to SEEN."""
    depth = [0]  # some of these functions call another one: it is one collective
    for name, (kind, place) in PAYLOAD.items():
        original = getattr(distributed, name, None)
        if original is None:
            continue

        def counted(*args, _original=original, _kind=kind, _place=place, **kwargs):
            by_place = dict(enumerate(args)) | {
                NAMES[key]: value for key, value in kwargs.items() if key in NAMES
            }
            if not depth[0]:
                SEEN[_kind] += size(by_place[_place])
            depth[0] += 1
            try:
                return _original(*args, **kwargs)
            finally:
                depth[0] -= 1

        setattr(distributed, name, counted)


count_collectives()

from safereg_dist import trainer as train_module  # noqa: E402
from safereg_dist.config import load_config  # noqa: E402
from safereg_dist.factory import build_run, start_backend  # noqa: E402

# Every arm: its name, and what it changes.
ARMS = {
    "risky": [],
    "unprofiled": ["profile=false"],
    "quiet": ["regularizer.threshold=1.0"],
    "exchanged": ["reference.balance=exchange"],
    "policy_probe": [
        "risk={estimator: probe, source: policy, path: FOLDER/probe, cache: none, drift: warn}",
        "regularizer.threshold=1.0",
    ],
    "sft": ["regularizer.objective=none"],
}


def run_arm(folder: Path, name: str, backend) -> None:
    """Trains; writes what this rank's wrapped functions saw in each optimizer step."""
    changes = [change.replace("FOLDER", str(folder)) for change in ARMS[name]]
    config = load_config(folder / "base.yaml", [f"output_dir={folder / name}", *changes])
    run = build_run(config, backend)
    steps = []
    original = train_module.optimizer_step

    def watched(*args, **kwargs):
        before = Counter(SEEN)
        result = original(*args, **kwargs)
        steps.append(dict(SEEN - before))
        return result

    train_module.optimizer_step = watched
    try:
        assert train_module.train(run, None) == 0
    finally:
        train_module.optimizer_step = original
    (folder / f"{name}.rank{backend.ranks.rank}.json").write_text(json.dumps(steps))
    run.engine.engine.destroy()


def main() -> None:
    """All arms, in an order that is the same on every rank."""
    folder = Path(sys.argv[-1])
    backend = start_backend(load_config(folder / "base.yaml"))
    for name in ARMS:
        run_arm(folder, name, backend)
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
