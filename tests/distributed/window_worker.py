"""One rank of the window tests: the loop of `train` on rows given here. Argument: the folder."""

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
    FailingSignal,
    left_gathered,
    safe_get_full_grad,
)
from window_cases import (
    DEAL,
    EQUAL,
    LOPSIDED,
    QUIET,
    RANDOM,
    RANDOM_STEPS,
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
from safereg_dist.risk.combine import Part, RiskStage
from safereg_dist.run.log import RunLog
from safereg_dist.trainer import Progress, _optimizer_step

WATCHDOG_S = 60


class Given:
    """A stream of rows made by the test, in place of a file's."""

    def __init__(self, rows) -> None:
        self._rows = rows

    def row(self, position):
        """The row at a position."""
        return self._rows[position]

    def in_first_epoch(self, position) -> bool:
        """False: no estimator here keeps what it knows."""
        return False


class Recording:
    """Stands before the policy's engine: notes outputs and gradients, and may leave out updates."""

    def __init__(self, run, *, updates: bool) -> None:
        self._engine, self._model, self._updates = run.engine, run.model, updates
        self.tokens: dict[str, list[list[float]]] = {}
        self.rows_run = 0
        self.grads: dict[str, np.ndarray] = {}

    def __call__(self, batch, num_tokens, ahead=None):
        """The engine's output of one micro-batch."""
        output = self._engine(batch, num_tokens, ahead)
        self.rows_run += output.reference_rows
        parts = [output.ce.split(batch.tokens_of_row), output.divergence.split(batch.tokens_of_row)]
        for row, ce, divergence in zip(batch.rows, *parts, strict=True):
            if row.id:
                self.tokens[row.id] = [ce.tolist(), divergence.tolist()]
        return output

    def backward(self, loss, *, is_last) -> None:
        """The engine's."""
        self._engine.backward(loss, is_last=is_last)

    def update(self, lr) -> Update:
        """The engine's, or none, so that the weights stay."""
        if self._updates:
            return self._engine.update(lr)
        named = self._model.named_parameters()
        self.grads = {n: safe_get_full_grad(p).float().numpy().copy() for n, p in named}
        return Update(applied=True, grad_norm=0.0)


class Loop:
    """A run, the loop's own state, and what was seen of it."""

    def __init__(self, folder, case, backend, rows=None, *, updates=False, overrides=()) -> None:
        out = folder / f"{case.name}-{backend.ranks.world_size}"
        config = load_config(
            folder / "base.yaml", [*case.overrides(), *overrides, f"output_dir={out}"]
        )
        run = build_run(config, backend)
        if rows is not None:
            run = replace(run, sources=replace(run.sources, stream=Given(rows)))
        if case.balance == "exchange":
            # Slow processors on a fast network, where an exchange pays, or the other way round.
            flops_per_s, link_bytes_per_s = (1.0, 1e30) if case.pays else (1e30, 1.0)
            run.step.reference.rates = Rates(
                flops_per_s=flops_per_s, link_bytes_per_s=link_bytes_per_s
            )
        self.engine = run.engine
        self.seen = Recording(run, updates=updates)
        self.run = replace(run, engine=self.seen)
        self.progress = Progress()
        out.mkdir(exist_ok=True)
        self.out, self.rank = out, backend.ranks.rank
        self.log = RunLog(out, backend.ranks, metrics_bytes=0, ledger_bytes=0, first_step=0)
        self.begin = len(COLLECTIVES)

    def step(self) -> None:
        """One optimizer step, by the function of `train`; a rank that hangs ends the test."""
        faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
        try:
            _optimizer_step(self.run, self.progress, self.log, [False])
        finally:
            faulthandler.cancel_dump_traceback_later()

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
        self.write("rows_run", self.seen.rows_run)
        self.write("tokens", self.seen.tokens)
        with self.log:
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
    if isinstance(loop.run.step.reference, Reference):
        trunk = loop.run.step.reference.engine.module
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
    loop.run.step.risk = RiskStage([Part("", FailingSignal(rank), 0.5)])
    caught = ""
    try:
        loop.step()
    except (RuntimeError, SafeRegError) as error:
        caught = f"{type(error).__name__}: {error}"
    loop.write("caught", caught)
    loop.write("collectives", loop.collectives())
    loop.write("rows_run", loop.seen.rows_run)
    with loop.log:
        loop.engine.engine.destroy()


def main() -> None:
    """All parts, in an order that is the same on every rank."""
    folder = Path(sys.argv[-1])
    backend = start_backend(load_config(folder / "base.yaml"))
    for case in EQUAL:
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
