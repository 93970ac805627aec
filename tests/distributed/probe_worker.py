"""One rank of the probe tests under ZeRO-3. Arguments: folder of the test."""

import json
import os
import sys
from pathlib import Path

from step_worker import left_gathered

from safereg_dist.config import load_config
from safereg_dist.data import collate, collate_window
from safereg_dist.factory import build_run, start_backend
from safereg_dist.trainer import _global_tokens


def probed_training(folder, backend, source: str, steps: int) -> dict:
    """Trains some steps with the probe; the risk of every row, and what was left gathered."""
    config = load_config(folder / "base.yaml", [f"risk.source={source}"])
    run = build_run(config, backend)
    risk: dict[str, float] = {}
    left = []
    for step in range(steps):
        batch = collate_window(
            run.sources.stream,
            start=step * run.sources.rows_per_step,
            count=config.train.micro_batch_size,
            pad_id=run.pad_id,
        )
        num_tokens = _global_tokens(run, batch.num_response_tokens)
        output = run.engine(batch, num_tokens)
        for row, value in zip(batch.rows, output.risk.values, strict=True):
            risk.setdefault(row.id, value)
        run.engine.backward(output.loss, is_last=True)
        run.engine.update(0.0)  # weights stay: the policy's states stay those of the reference
        left.append(left_gathered(run))
    signal = run.step.risk.parts[0].estimator
    found = {"risk": risk, "left": left, "cached": len(getattr(signal, "cache", {}))}
    run.engine.engine.destroy()
    return found


def one_rank_not_finite(folder, backend) -> dict:
    """A loss that is nan on rank 1 alone: no rank steps, and the next step is as if nothing was."""
    config = load_config(folder / "base.yaml", ["regularizer.objective=none"])
    run = build_run(config, backend)
    batch = collate([run.sources.stream.row(0)], pad_id=run.pad_id)
    applied, before = [], backend.fingerprint(run.model)
    for step in range(2):
        output = run.engine(batch, _global_tokens(run, batch.num_response_tokens))
        spoilt = step == 0 and backend.ranks.rank == 1
        run.engine.backward(output.loss * (float("nan") if spoilt else 1.0), is_last=True)
        applied.append(run.engine.update(1e-2).applied)
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
