"""One rank of `bench_overhead.py`, started by the deepspeed launcher.

    overhead_worker.py SETTINGS.json     the model, its folder, the cases and where each one goes

All arms live in one process group, each with its own engines. A case is one risky fraction: every
arm trains one optimizer step to warm up, one under `profiling.Recorder` (FLOPs, bytes, loss), one
under the allocator's events (memory), and then, with nothing that watches, one in each round; the
order of arms turns from round to round. The learning rate is 0: the optimizer works, and the
weights stay, so that losses of all steps can be compared. A step is `trainer.optimizer_step`, the
gather of its metrics included. Rank 0 writes a file for each case.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from always_on import build_always_on
from harness import commit, hardware, peak_extra_bytes
from overhead_cases import (
    MODELS,
    arm_config,
    place_rows,
    threshold_for,
)
from step_flops import NOT_COMPARED
from torch import Tensor

from safereg_dist import config
from safereg_dist.factory import Run, build_run, start_backend
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Backend
from safereg_dist.profiling import Recorder
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.trainer import optimizer_step
from safereg_dist.types import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One risky fraction."""

    name: str
    fraction: float
    num_rows: int
    """Rows of an optimizer step over all ranks."""
    num_risky: int
    micro_batch_size: int
    rounds: int
    """Timed steps of each arm; 0 = FLOPs, bytes and losses alone."""
    memory_steps: int
    """Steps whose memory is watched; the lowest peak counts, since it is chance when a collective
    that runs beside the step gives its buffers back."""
    arms: tuple[str, ...]

    def micro_batches(self, ranks: Ranks) -> list[list[int]]:
        """Numbers of this rank's rows, by micro-batch."""
        return place_rows(
            self.num_rows,
            rank=ranks.rank,
            world_size=ranks.world_size,
            micro_batch_size=self.micro_batch_size,
        )


class Arm:
    """One way to train: a run, and the rows of the case at hand."""

    def __init__(
        self, run: Run, *, scores: Sequence[float] | None = None, is_first_epoch: bool = False
    ) -> None:
        """`scores` are given where a probe says the risk.

        In the first epoch it is not known of any row when a step begins.
        """
        self._run = run
        self._scores = scores
        self._is_first_epoch = is_first_epoch
        self._rows: list[Row] = []
        self._is_cold = False

    def begin(self, case: Case) -> None:
        """Lays out the rows of a case, and makes the right ones risky; not measured."""
        run, dealt = self._run, case.micro_batches(self._run.ranks)
        self._rows = [
            replace(run.sources.train.row(i), risk=float(i < case.num_risky))
            for micro_batch in dealt
            for i in micro_batch
        ]
        train = config.replace(
            run.config.train,
            micro_batch_size=len(self._rows) // len(dealt),
            grad_accum_steps=len(dealt),
        )
        self._run = replace(run, config=config.replace(run.config, train=train))
        if self._scores is not None:
            threshold = threshold_for(self._scores, case.num_risky)
            run.regularizer.coefficient.threshold = threshold
            self._is_cold = True
            self()  # fills the cache of risks
        self._is_cold = self._is_first_epoch

    def __call__(self) -> dict[str, float]:
        """One optimizer step; its sums over all ranks."""
        if self._is_first_epoch:
            for entry in self._run.regularizer.risk.sources:
                entry.source.cache.clear()
        done = optimizer_step(
            self._run, self._rows, step=NOT_COMPARED, lr=0.0, in_first_epoch=self._is_cold
        )
        return done.totals.sums


class BuiltArm(NamedTuple):
    """An arm, and the bytes of tensors that its engines hold between steps on this rank."""

    arm: Arm
    resident_bytes: int


def build_arms(
    folder: Path, model: str, backend: Backend, names: Iterable[str]
) -> dict[str, BuiltArm]:
    """The arms by name, one after another, each having made one step."""
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))

    def build(name: str) -> Arm:
        source = SOURCES[name]
        cache = folder / "store" if name == "stored" else None
        settings = arm_config(folder, model, source, ranks=backend.ranks.world_size, cache=cache)
        if name == "always_on":
            return Arm(build_always_on(settings, backend))
        return Arm(
            build_run(settings, backend),
            scores=scores if source.startswith("probe") else None,
            is_first_epoch=name == "routed_first_epoch",
        )

    found = {}
    warm_up = _all_risky(model, backend.ranks)
    for name in names:
        before = live_tensor_bytes()
        arm = build(name)
        arm.begin(warm_up)
        arm()  # the optimizer makes its states in the first step
        found[name] = BuiltArm(arm, live_tensor_bytes() - before)
    return found


def _all_risky(model: str, ranks: Ranks) -> Case:
    step = MODELS[model]
    return Case(
        name="warm-up",
        fraction=1.0,
        num_rows=step.rows_per_step,
        num_risky=step.rows_per_step,
        micro_batch_size=step.rows_per_step // (step.grad_accum_steps * ranks.world_size),
        rounds=0,
        memory_steps=0,
        arms=(),
    )


SOURCES = {
    "sft": "none",
    "sft again": "none",
    "routed": "column",
    "routed:probe-policy": "probe-policy",
    "routed:probe-reference": "probe-reference",
    "routed_first_epoch": "probe-reference",
    "stored": "column",
    "always_on": "column",
}
"""Where the risk of each arm comes from. The second `sft` is the noise: the same thing again."""


def live_tensor_bytes() -> int:
    """Bytes of all tensors that exist in this process, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure_case(
    case: Case, arms: dict[str, BuiltArm], ranks: Ranks
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(arm, figures over all ranks) of one case."""
    chosen = {name: arms[name] for name in case.arms}
    counts = {}
    for name, built in chosen.items():
        built.arm.begin(case)
        if case.rounds:
            built.arm()
        counts[name] = _counts(built, case, ranks)
    times = _times(chosen, case.rounds, ranks)
    for name, found in counts.items():
        yield name, {**found, "seconds": times[name]}


def _counts(built: BuiltArm, case: Case, ranks: Ranks) -> dict[str, Any]:
    """FLOPs and bytes summed over ranks; safety bytes and memory of the rank that has most."""
    with Recorder() as recorder:
        sums = built.arm()
    peaks = [peak_extra_bytes(built.arm, ranks.device) for _ in range(case.memory_steps)]
    own = torch.tensor(
        [
            recorder.flops,
            recorder.total_bytes,
            recorder.safety_bytes,
            built.resident_bytes + min(peaks, default=0),
        ],
        dtype=torch.float64,
    )
    by_rank = ranks.gather(own)
    flops, total_bytes = by_rank[:, :2].sum(0).tolist()
    safety_bytes, peak_bytes = by_rank[:, 2:].max(0).values.tolist()
    return {
        "loss": sums["loss"],
        "reference_rows": int(sums["reference_rows"]),
        "flops": int(flops),
        "total_bytes": int(total_bytes),
        "safety_bytes_per_micro_batch": safety_bytes / len(case.micro_batches(ranks)),
        "peak_memory_bytes": int(peak_bytes) if peaks else None,
    }


def _times(arms: dict[str, BuiltArm], rounds: int, ranks: Ranks) -> dict[str, list[float]]:
    """Seconds of each arm's step in each round, of the slowest rank."""
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            times[name].append(_time_step(arms[name].arm, ranks))
    if rounds == 0:
        return times
    slowest = ranks.gather(torch.tensor([times[name] for name in names]).flatten()).amax(0)
    return dict(zip(names, slowest.view(len(names), rounds).tolist(), strict=True))


def _time_step(arm: Arm, ranks: Ranks) -> float:
    ranks.raise_together(None)  # all ranks begin together
    gc.disable()  # a collection in between would be billed to the step
    try:
        started = time.perf_counter()
        arm()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        return time.perf_counter() - started
    finally:
        gc.enable()


def main() -> None:
    """All cases, in the order given, which is the same on every rank."""
    settings = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))
    folder, model = Path(settings["folder"]), settings["model"]
    outs = [Path(case.pop("out")) for case in settings["cases"]]
    cases = [Case(**{**case, "arms": tuple(case["arms"])}) for case in settings["cases"]]
    names = [name for name in SOURCES if any(name in case.arms for case in cases)]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    backend = start_backend(arm_config(folder, model, "none", ranks=world_size))
    arms = build_arms(folder, model, backend, names)
    gc.freeze()  # what is built stays: looking through it would cost more than a step
    device = backend.ranks.device
    facts = {"commit": commit(), "hardware": hardware(device), "device": device.type}
    for case, out in zip(cases, outs, strict=True):
        found = dict(measure_case(case, arms, backend.ranks))
        if backend.ranks.is_main:
            write_atomically(out, json.dumps({**facts, "arms": found}, indent=1))
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
