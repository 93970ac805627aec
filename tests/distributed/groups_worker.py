"""One rank of the group tests: whole runs, one after another. Arguments: folder, names of cases."""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

GATHERS: Counter[int] = Counter()


def count_gathers() -> None:
    """Counts all-gathers by the size of their group from now on."""
    for name in ("all_gather_into_tensor", "all_gather_single"):
        original = getattr(torch.distributed, name, None)
        if original is None:
            continue

        def counted(*args, _original=original, **kwargs):
            GATHERS[torch.distributed.get_world_size(kwargs.get("group"))] += 1
            return _original(*args, **kwargs)

        setattr(torch.distributed, name, counted)


count_gathers()  # deepspeed takes the names when it is imported

import numpy as np  # noqa: E402
from deepspeed.utils import groups, safe_get_full_grad  # noqa: E402
from torch.distributed.distributed_c10d import _world  # noqa: E402

from safereg_dist.commands.reference import build_store  # noqa: E402
from safereg_dist.config import load_config  # noqa: E402
from safereg_dist.factory import build_risk_context, build_run, start_backend  # noqa: E402
from safereg_dist.run.resume import find_checkpoint  # noqa: E402
from safereg_dist.trainer import train  # noqa: E402

CASES = {
    "plain": ["regularizer.objective=none"],
    "routed": [],
    "offloaded": ["reference.offload=cpu", "engine.offload_params=cpu"],
    "offloaded-optimizer": ["reference.offload=cpu", "engine.offload_optimizer=cpu"],
    "stored": ["reference.cache=store"],
    "hpz-plain": ["engine.hpz_partition_size=2", "regularizer.objective=none"],
    "hpz": ["engine.hpz_partition_size=2"],
    "hpz-resumed": ["engine.hpz_partition_size=2", "train.save_every=2"],
}


class CrashError(Exception):
    """The crash of a run that is to be resumed."""


@dataclass
class Recorder:
    """Stands before the policy's update: notes the gradients of every step, then steps."""

    run: object
    steps: list
    crash_after: int | None = None

    def __call__(self, lr):
        """What the engine's update returns."""
        if self.crash_after == len(self.steps):
            raise CrashError
        named = self.run.model.named_parameters()
        self.steps.append({n: safe_get_full_grad(p).float().numpy().copy() for n, p in named})
        return type(self.run.engine).update(self.run.engine, lr)


def run_case(folder: Path, name: str, backend) -> None:
    """Trains a case to its end (in two parts where it is resumed) and writes what was seen."""
    config = load_config(
        folder / "base.yaml",
        [*CASES[name], f"output_dir={folder / name}-{backend.ranks.world_size}"],
    )
    steps: list[dict[str, np.ndarray]] = []
    if name == "stored":
        build_store(
            build_risk_context(load_config(folder / "base.yaml"), backend, with_reference=True),
            Path("store"),
        )
    if name == "hpz-resumed":
        crash(config, backend)
    run = start(config, backend, steps)
    GATHERS.clear()
    train(run, find_checkpoint(run.config, run.ranks))
    facts = describe(run) | {"gathers": dict(GATHERS), "steps": len(steps)}
    run.engine.engine.destroy()
    where = folder / f"{name}-{backend.ranks.world_size}"
    if backend.ranks.is_main:
        for index, grads in enumerate(steps):
            np.savez(where / f"grads-{index}.npz", **grads)
    (where / f"facts.rank{backend.ranks.rank}.json").write_text(json.dumps(facts))


def crash(config, backend) -> None:
    """Runs into an error on all ranks one step after a checkpoint."""
    run = start(config, backend, [], crash_after=3)
    try:
        train(run, None)
    except CrashError:
        run.engine.engine.destroy()
        return
    raise AssertionError("the run did not stop")


def start(config, backend, steps, *, crash_after=None):
    """A run whose gradients are recorded."""
    # deepspeed refuses a second model with hpZ in one process; a user's process has but one.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    run = build_run(config, backend)
    object.__setattr__(run.engine, "update", Recorder(run, steps, crash_after))
    return run


def describe(run) -> dict:
    """Groups, shards and settings of both engines."""
    policy = run.engine.engine
    facts = {"communicators": len(_world.pg_map), "policy": settings(policy)}
    facts["policy"]["persistent"] = sorted(
        n for n, p in run.model.named_parameters() if p.ds_persist
    )
    if not run.config.needs_reference:
        return facts
    own = [*run.model.parameters(), *run.regularizer.reference.model.head.parameters]
    facts["shared"] = {"parameter_groups": len({id(p.ds_process_group) for p in own}) == 1}
    if run.config.reference.cache is not None:
        facts["has_trunk"] = run.regularizer.reference.model.is_loaded
        return facts
    reference = run.regularizer.reference.model.engine.engine
    model = reference.module.model
    both = [*run.model.parameters(), *model.parameters()]
    facts["reference"] = settings(reference)
    facts["reference"]["persistent"] = sorted(
        n for n, p in model.named_parameters() if p.ds_persist
    )
    facts["shared"] = {
        "data_parallel_group": policy.data_parallel_group is reference.data_parallel_group,
        "seq_data_parallel_group": policy.seq_data_parallel_group
        is reference.seq_data_parallel_group,
        "parameter_groups": len({id(p.ds_process_group) for p in both}) == 1,
    }
    facts["reference"]["secondary"] = sum(
        p.ds_secondary_tensor is not None for p in model.parameters()
    )
    return facts


def settings(engine) -> dict:
    """What DeepSpeed itself says that an engine was built with."""
    offload = engine.zero_offload_param()
    return {
        "threshold": engine.zero_param_persistence_threshold(),
        "prefetch": engine.zero_prefetch_bucket_size(),
        "hpz": engine.zero_hpz_partition_size(),
        "offload": None if offload is None else str(offload.device),
        "optimizer": type(engine.optimizer).__name__,
        "waits_to_time": engine.tput_timer.start_time > 0,
    }


def main() -> None:
    """The cases asked for, in the same order on every rank."""
    folder = Path(sys.argv[-2])
    backend = start_backend(load_config(folder / "base.yaml"))
    for name in sys.argv[-1].split(","):
        run_case(folder, name, backend)
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
