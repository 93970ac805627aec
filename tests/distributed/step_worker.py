"""One rank of the step tests: all cases in one group. Arguments: folder of the test, engine."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

COLLECTIVES: list[str] = []
BYTES: list[int] = []
"""Bytes that this rank gives to each of COLLECTIVES."""
ENGINE = "engine.name=deepspeed"
"""The engine of the runs, as an override."""


def record_collectives() -> None:
    """Notes name and size of every collective that torch is asked for from now on.

    What ranks exchange differs between them, so of all-to-alls the name alone.
    """
    for name in (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
        "broadcast",
        "all_gather_object",
        "all_to_all_single",
    ):
        original = getattr(torch.distributed, name, None)
        if original is None:
            continue

        def recorded(*args, _original=original, _name=name, **kwargs):
            first = args[0] if args else next(iter(kwargs.values()))
            given = [first] if torch.is_tensor(first) else first
            tensors = [each for each in given if torch.is_tensor(each)]
            size = "" if _name == "all_to_all_single" else sum(t.numel() for t in tensors)
            COLLECTIVES.append(f"{_name}:{size}")
            given = args[1] if len(args) > 1 and torch.is_tensor(args[1]) else first
            BYTES.append(given.nbytes if torch.is_tensor(given) else 0)
            return _original(*args, **kwargs)

        setattr(torch.distributed, name, recorded)


record_collectives()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `support`

import numpy as np  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402
from step_cases import (  # noqa: E402
    RANDOM_STEPS,
    SCHEDULE_LINEAR,
    cases_on,
    micro_batch_rows,
)
from support.engines import PassThrough  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from safereg_dist.config import load_config  # noqa: E402
from safereg_dist.factory import build_run, start_backend  # noqa: E402
from safereg_dist.parallel import fsdp2  # noqa: E402
from safereg_dist.parallel.engine import Update  # noqa: E402
from safereg_dist.reference import NoReference  # noqa: E402
from safereg_dist.risk.stage import (  # noqa: E402
    RiskSource,
    RiskStage,
    WeightedSource,
)
from safereg_dist.trainer import optimizer_step  # noqa: E402


def run_case(folder, case, backend) -> None:
    """One optimizer step without the update; rank 0 writes loss, parts and gradients."""
    config = load_config(folder / "base.yaml", [*case.overrides(), SCHEDULE_LINEAR, ENGINE])
    fsdp2.WHOLE_GRADIENT_BYTES = 0 if case.reduces_each else 8 << 30
    run = build_run(config, backend)
    rank = backend.ranks.rank
    rows = [
        row
        for m in range(case.grad_accum_steps)
        for row in micro_batch_rows(rank, m, anchors=case.anchors)
    ]
    held = replace(run, engine=NoUpdate(run))
    before = len(COLLECTIVES)
    sums = optimizer_step(held, rows, step=0, lr=0.0).totals.sums
    per_step = COLLECTIVES[before:]
    left = left_gathered(run)
    if rank == 0:
        np.savez(folder / f"{case.name}.npz", **held.engine.grads)
        text = json.dumps({"total": sums, "left_gathered": left})
        (folder / f"{case.name}.json").write_text(text)
    (folder / f"{case.name}.rank{rank}.collectives").write_text("\n".join(per_step))
    destroy(run)


def destroy(run) -> None:
    """Ends the policy's engine where it has an end."""
    if ENGINE == "engine.name=deepspeed":
        run.engine.engine.destroy()


def full_grad(parameter) -> np.ndarray:
    """The gradient of a whole parameter, float32 (collective)."""
    grad = parameter.grad
    whole = grad.full_tensor() if isinstance(grad, DTensor) else safe_get_full_grad(parameter)
    return whole.float().numpy().copy()


class NoUpdate(PassThrough):
    """Keeps the gradients of a step, and leaves the weights."""

    def __init__(self, run) -> None:
        super().__init__(run.engine)
        self._model = run.model
        self.grads: dict[str, np.ndarray] = {}

    def update(self, lr) -> Update:
        """None."""
        named = self._model.named_parameters()
        self.grads = {name: full_grad(parameter) for name, parameter in named}
        return Update(applied=True, grad_norm=0.0)


class Watched(PassThrough):
    """Notes how many collectives came before the backward."""

    backward_began = 0

    def backward(self, loss, *, is_last) -> None:
        """The engine's."""
        self.backward_began = len(COLLECTIVES)
        super().backward(loss, is_last=is_last)


def left_gathered(run) -> list[str]:
    """Reference parameters that are whole though nobody asked them to stay so."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    reference = run.regularizer.reference
    if isinstance(reference, NoReference):
        return []
    model = reference.model.engine.module.model
    if ENGINE == "engine.name=fsdp2":
        return [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    return [
        name
        for name, p in model.named_parameters()
        if p.ds_status != ZeroParamStatus.NOT_AVAILABLE and not p.ds_persist
    ]


def random_patterns(folder, backend, steps: int) -> None:
    """Random risk on every rank: no hang, and the same order of collectives everywhere."""
    config = load_config(folder / "base.yaml", ["reference.rows_per_pass=1", ENGINE])
    run = build_run(config, backend)
    rank = backend.ranks.rank
    watched = replace(run, engine=Watched(run.engine))
    draw = np.random.default_rng(rank)
    begin = len(COLLECTIVES)
    skipped = 0
    for step in range(steps):
        rows = micro_batch_rows(rank, step % 4, anchors=False)
        quiet = step % 5 == 0  # on all ranks: nobody runs the reference then
        changed = [replace_risk(row, 0.0 if quiet or draw.random() < 0.6 else 1.0) for row in rows]
        at = len(COLLECTIVES)
        sums = optimizer_step(watched, changed, step=step, lr=1e-3).totals.sums
        skipped += quiet and sums["reference_rows"] == 0
        if quiet and step > 10:
            before_backward = COLLECTIVES[at : watched.engine.backward_began]
            (folder / f"quiet.rank{rank}").write_text("\n".join(before_backward))
    (folder / f"random.rank{rank}").write_text("\n".join(COLLECTIVES[begin:]))
    if rank == 0:
        (folder / "random.json").write_text(
            json.dumps({"skipped": int(skipped), "left_gathered": left_gathered(run)})
        )
    destroy(run)


def replace_risk(row, risk):
    """The row with another risk; an anchor row has none."""
    return row if row.is_anchor else replace(row, risk=risk)


class FailingSource(RiskSource):
    """Fails on one rank only."""

    name = "failing"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, rows, probed=None, *, in_first_epoch):
        """Raises on rank 1."""
        if self.rank == 1:
            raise RuntimeError("the risk of rank 1 broke")
        return [0.0] * len(rows)


def failing_rank(folder, backend) -> None:
    """An error in one rank's risk is raised by all ranks, with and without a batch mean."""
    from safereg_dist.errors import RemoteRankError

    for granularity in ("sequence", "batch"):
        override = f"regularizer.granularity={granularity}"
        config = load_config(folder / "base.yaml", [override, ENGINE])
        run = build_run(config, backend)
        rank = backend.ranks.rank
        run.regularizer.risk = RiskStage([WeightedSource("", FailingSource(rank), 0.5)])
        caught = ""
        try:
            optimizer_step(run, micro_batch_rows(rank, 0), step=0, lr=0.0)
        except (RuntimeError, RemoteRankError) as error:
            caught = f"{type(error).__name__}: {error}"
        (folder / f"failing-{granularity}.rank{rank}").write_text(caught)
        destroy(run)


def main() -> None:
    """All parts, in an order that is the same on every rank."""
    global ENGINE
    folder, engine = Path(sys.argv[-2]), sys.argv[-1]
    ENGINE = f"engine.name={engine}"
    backend = start_backend(load_config(folder / "base.yaml", [ENGINE]))
    for case in cases_on(backend.ranks.world_size, engine):
        run_case(folder, case, backend)
    if backend.ranks.world_size == 2:
        failing_rank(folder, backend)
    if backend.ranks.world_size == 3:
        random_patterns(folder, backend, RANDOM_STEPS)
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main()
