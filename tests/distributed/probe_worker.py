"""One rank of the probe tests under ZeRO-3. Arguments: folder of the test."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from step_worker import left_gathered
from support.engines import PassThrough

from safereg_dist.config import load_config
from safereg_dist.factory import build_run, start_backend
from safereg_dist.trainer import optimizer_step


def probed_training(folder, backend, source: str, steps: int) -> dict:
    """Trains some steps with the probe; the risk of every row, and what was left gathered."""
    config = load_config(folder / "base.yaml", [f"risk.source={source}"])
    run = build_run(config, backend)
    risk: dict[str, float] = {}
    left = []
    for step in range(steps):
        # lr 0, so weights stay: the policy's states stay those of the reference.
        done = optimizer_step(
            run,
            run.sources.rows_of_step(step),
            step=step,
            lr=0.0,
            in_first_epoch=run.sources.in_first_epoch(step),
        )
        for batch, result in done.plan.metrics.results:
            for row, value in zip(batch.rows, result.risk.values, strict=True):
                risk.setdefault(row.id, value)
        left.append(left_gathered(run))
    source = run.regularizer.risk.sources[0].source
    found = {"risk": risk, "left": left, "cached": len(getattr(source, "cache", {}))}
    run.engine.engine.destroy()
    return found


class Spoiling(PassThrough):
    """Multiplies every loss."""

    def __init__(self, engine, factor: float) -> None:
        super().__init__(engine)
        self._factor = factor

    def backward(self, loss, *, is_last) -> None:
        """The engine's, of another loss."""
        super().backward(loss * self._factor, is_last=is_last)


def one_rank_not_finite(folder, backend) -> dict:
    """A loss that is nan on rank 1 alone: no rank steps, and the next step is as if nothing was."""
    config = load_config(folder / "base.yaml", ["regularizer.objective=none"])
    run = build_run(config, backend)
    applied, before = [], backend.fingerprint(run.model)
    for step in range(2):
        spoilt = step == 0 and backend.ranks.rank == 1
        spoiling = replace(run, engine=Spoiling(run.engine, float("nan") if spoilt else 1.0))
        done = optimizer_step(spoiling, [run.sources.stream.row(0)], step=step, lr=1e-2)
        applied.append(done.update.applied)
        applied.append(backend.fingerprint(run.model) == before)
    run.engine.engine.destroy()
    return {"applied_and_unchanged": applied}


def main() -> None:
    """All parts, in the same order on every rank."""
    folder = Path(sys.argv[-1])
    backend = start_backend(load_config(folder / "base.yaml"))
    found = {
        "reference": probed_training(folder, backend, "reference", 14),
        "policy": probed_training(folder, backend, "policy", 4),
        "not_finite": one_rank_not_finite(folder, backend),
    }
    (folder / f"found.rank{backend.ranks.rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
