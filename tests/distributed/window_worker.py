"""One rank of the window tests: optimizer steps on rows given here. Argument: the folder."""

import faulthandler
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from step_worker import (  # before deepspeed is imported: it counts collectives
    BYTES,
    COLLECTIVES,
    FailingSource,
    NoUpdate,
    left_gathered,
)
from window_cases import (
    DEAL,
    LOPSIDED,
    QUIET,
    RANDOM,
    RANDOM_STEPS,
    equal_on,
    lopsided_rows,
    quiet_rows,
    random_rows_of_rank,
    rows_of_rank,
)

from safereg_dist.config import load_config
from safereg_dist.errors import SafeRegError
from safereg_dist.factory import build_run, start_backend
from safereg_dist.parallel.engine import Update
from safereg_dist.parallel.hardware import Rates
from safereg_dist.reference import Reference
from safereg_dist.risk.stage import RiskStage, WeightedSource
from safereg_dist.trainer import optimizer_step

WATCHDOG_S = 60
LR = 1e-5


class Recording(NoUpdate):
    """Stands before the policy's engine: keeps gradients, and may leave out updates."""

    def __init__(self, run, *, updates: bool) -> None:
        super().__init__(run)
        self._updates = updates

    def update(self, lr) -> Update:
        """The engine's, or none, so that the weights stay."""
        return self._engine.update(lr) if self._updates else super().update(lr)


class Loop:
    """A loop around `optimizer_step`, and what was seen of it."""

    def __init__(self, folder, case, backend, rows=None, *, updates=False, overrides=()) -> None:
        out = folder / f"{case.name}-{backend.ranks.world_size}"
        config = load_config(
            folder / "base.yaml", [*case.overrides(), *overrides, f"output_dir={out}"]
        )
        run = build_run(config, backend)
        if case.balance == "exchange":
            # Slow processors on a fast network, where an exchange pays, or the other way round.
            flops_per_s, link_bytes_per_s = (1.0, 1e30) if case.pays else (1e30, 1.0)
            run.regularizer.reference.exchange.rates = Rates(
                flops_per_s=flops_per_s, link_bytes_per_s=link_bytes_per_s
            )
        self.engine = run.engine
        self.seen = Recording(run, updates=updates)
        self.run = replace(run, engine=self.seen)
        self._rows = rows
        self._step = 0
        self.rows_run = 0
        self.tokens: dict[str, list[list[float]]] = {}
        out.mkdir(exist_ok=True)
        self.out, self.rank = out, backend.ranks.rank
        self.begin = len(COLLECTIVES)

    def rows(self):
        """This rank's rows of the coming step: those given here, in place of a file's."""
        if self._rows is None:
            return self.run.sources.rows_of_step(self._step)
        count = self.run.sources.rows_per_step
        return self._rows[self._step * count : (self._step + 1) * count]

    def step(self) -> None:
        """One optimizer step; a rank that hangs ends the test."""
        faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
        try:
            plan, totals, _ = optimizer_step(
                self.run, self.rows(), step=self._step, lr=LR, in_first_epoch=False
            )
        finally:
            faulthandler.cancel_dump_traceback_later()
        for batch, result in plan.metrics.results:
            self._note(batch, result)
        row = totals.metrics_row(step=self._step, lr=LR, grad_norm=0.0, step_time_s=1.0)
        if self.rank == 0:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        self._step += 1

    def _note(self, batch, result) -> None:
        self.rows_run += result.reference_rows
        terms = [t.split(batch.tokens_of_row) for t in (result.loss.ce, result.loss.divergence)]
        for row, ce, divergence in zip(batch.rows, *terms, strict=True):
            if row.id:
                self.tokens[row.id] = [ce.tolist(), divergence.tolist()]

    def collectives(self) -> list[str]:
        """Those of this loop so far."""
        return COLLECTIVES[self.begin :]

    def write(self, name, value) -> None:
        """A fact of this rank, for the judge."""
        (self.out / f"{name}.rank{self.rank}.json").write_text(json.dumps(value))

    def end(self) -> None:
        """Writes what every case has to show, and frees the engine."""
        self.write("collectives", self.collectives())
        self.write("left", left_gathered(self.run))
        self.write("rows_run", self.rows_run)
        self.write("tokens", self.tokens)
        self.engine.engine.destroy()


def equal(folder, case, backend) -> None:
    """One step whose gradients are kept."""
    loop = Loop(folder, case, backend, rows_of_rank(case, backend.ranks.rank))
    loop.step()
    if loop.rank == 0:
        np.savez(loop.out / "grads.npz", **loop.seen.grads)
    loop.end()


def dealt(folder, backend) -> None:
    """Two epochs of a file's rows, dealt; the policy stays as it is."""
    loop = Loop(folder, DEAL, backend, overrides=["train.epochs=2"])
    sources = loop.run.sources
    ids: list[str | None] = []
    for position in range(sources.total_steps * sources.rows_per_step):
        row = sources.stream.row(position)
        ids.append(None if row is None else row.id)
    for _ in range(sources.total_steps):
        loop.step()
    loop.write("ids", ids)
    loop.end()


def lopsided(folder, backend) -> None:
    """One step in which rank 0 has all the risky rows."""
    loop = Loop(folder, LOPSIDED, backend, lopsided_rows(LOPSIDED, backend.ranks.rank))
    loop.step()
    loop.end()


def quiet(folder, case, backend) -> None:
    """Steps without risk: how often the reference's trunk runs, and what is sent."""
    loop = Loop(folder, case, backend, quiet_rows(case, backend.ranks.rank) * 2, updates=True)
    forwards = []
    reference = loop.run.regularizer.reference
    if isinstance(reference, Reference):
        trunk = reference.model.engine.module
        trunk.register_forward_pre_hook(lambda *_: forwards.append(1))
    loop.step()
    loop.begin = begin = len(COLLECTIVES)  # the second step: prefetching has settled
    loop.step()
    loop.write("sent", list(zip(COLLECTIVES[begin:], BYTES[begin:], strict=True)))
    loop.write("forwards", len(forwards))
    loop.end()


def random_patterns(folder, case, backend) -> None:
    """Many steps of random risk; then an estimator that fails on one rank only."""
    rank, steps = backend.ranks.rank, RANDOM_STEPS[case.grad_accum_steps]
    rows = [row for step in range(steps + 1) for row in random_rows_of_rank(case, rank, step)]
    loop = Loop(folder, case, backend, rows, updates=True)
    for _ in range(steps):
        loop.step()
    loop.write("left", left_gathered(loop.run))
    loop.run.regularizer.risk = RiskStage([WeightedSource("", FailingSource(rank), 0.5)])
    caught = ""
    try:
        loop.step()
    except (RuntimeError, SafeRegError) as error:
        caught = f"{type(error).__name__}: {error}"
    loop.write("caught", caught)
    loop.write("collectives", loop.collectives())
    loop.write("rows_run", loop.rows_run)
    loop.engine.engine.destroy()


def main() -> None:
    """All parts, in an order that is the same on every rank."""
    folder = Path(sys.argv[-1])
    backend = start_backend(load_config(folder / "base.yaml"))
    for case in equal_on(backend.ranks.world_size):
        equal(folder, case, backend)
    if backend.ranks.world_size == 3:
        dealt(folder, backend)
    if backend.ranks.world_size == 4:
        lopsided(folder, backend)
        for case in QUIET:
            quiet(folder, case, backend)
        for case in RANDOM:
            random_patterns(folder, case, backend)
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
