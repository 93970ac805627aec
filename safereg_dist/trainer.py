"""The training loop: optimizer steps, log, checkpoints, export."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from safereg_dist.config import Config, config_to_yaml, load_config
from safereg_dist.data import collate, collate_window
from safereg_dist.errors import CheckpointError, ConfigError, NonFiniteLoss
from safereg_dist.factory import RowSources, Run
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Update
from safereg_dist.parallel.optimizer import learning_rate
from safereg_dist.profiling import NoProfiler, Profiler
from safereg_dist.run import checkpoint as checkpoints
from safereg_dist.run.checkpoint import RunState, config_hash, differences
from safereg_dist.run.export import export_model
from safereg_dist.run.gate import refuse_too_many_held_back
from safereg_dist.run.ledger import merge_ledgers
from safereg_dist.run.log import RunLog
from safereg_dist.run.metrics import StepMetrics, metrics_row
from safereg_dist.types import Row, to_device

MAX_NON_FINITE_IN_A_ROW = 3
EXIT_REQUEUE = 75
"""Exit status after a checkpoint on SIGUSR1 or SIGTERM: run the same command again to go on."""


@dataclass(slots=True)
class Progress:
    """What the loop counts; the part of a checkpoint that is not in the engine."""

    step: int = 0
    non_finite_steps: int = 0
    non_finite_in_a_row: int = 0
    seconds: float = 0.0


def is_complete(config: Config, ranks: Ranks) -> bool:
    """True where `output_dir` holds this very run, ended; False where it can begin or go on.

    Writes nothing.

    Raises:
        CheckpointError: the folder belongs to another run, or is not a run folder.
    Collectives: one gather of texts.
    """
    folder = Path(config.output_dir)
    with ranks.together():
        known = folder / "config.yaml"
        if known.is_file():
            before = _read_config(known)
            if config_hash(before) != config_hash(config):
                raise CheckpointError(
                    f"{folder} holds a run with another configuration (see {known}): "
                    f"{'; '.join(differences(before, config))}: choose another output_dir, or "
                    "remove the folder"
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"output_dir {folder} exists and holds no config.yaml of a run: choose another"
            )
        return _is_marked_complete(folder / "summary.json")


def _is_marked_complete(summary: Path) -> bool:
    if not summary.is_file():
        return False
    try:
        return json.loads(summary.read_text("utf-8"))["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(
            f"{summary} cannot be read ({err}): remove it to go on from the last checkpoint"
        ) from err


def _read_config(path: Path) -> Config:
    try:
        return load_config(path)
    except ConfigError as err:
        raise CheckpointError(
            f"{path} is not the configuration of a run ({err}): choose another output_dir"
        ) from err


def _claim_folder(folder: Path, config: Config) -> None:
    """Makes the run folder and writes the resolved `config.yaml`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace_text(folder / "config.yaml", config_to_yaml(config))
    except OSError as err:
        raise CheckpointError(f"output_dir {folder} cannot be written: {err.strerror}") from err


def train(run: Run) -> int:
    """Trains to the last step; 0, or `EXIT_REQUEUE` after a checkpoint asked for by a signal.

    Resumes from the newest checkpoint of the run folder. Writes metrics, ledger, checkpoints, the
    exported model and `summary.json`.

    Raises:
        ConfigError: more rows would be held back than `risk.max_held_back` allows.
        NonFiniteLoss: three steps in a row had a gradient that was not finite.
        CheckpointError: a checkpoint does not fit this run, or the disk is full.
    """
    folder = Path(run.config.output_dir)
    if not checkpoints.complete_checkpoints(folder / "checkpoint"):
        refuse_too_many_held_back(run)  # before the folder is claimed: it stays free to try again
    with run.ranks.together():
        if run.ranks.is_main:
            _claim_folder(folder, run.config)
    progress, metrics_bytes, ledger_bytes = _resume(run, folder)
    profiler = _profiler(run, progress)
    log = RunLog(
        folder,
        run.ranks,
        metrics_bytes=metrics_bytes,
        ledger_bytes=ledger_bytes,
        first_step=progress.step,
    )
    last_row: dict[str, float | int] = {}
    with log, _signals() as stop_requested, _bar(run, progress) as bar:
        while progress.step < run.sources.total_steps:
            with profiler.step(progress.step):
                last_row, stop = _optimizer_step(run, progress, log, stop_requested)
            _show(bar, last_row)
            if stop or _is_save_due(run, progress):
                _save(run, progress, folder, log)
            if stop and progress.step < run.sources.total_steps:
                return EXIT_REQUEUE
        log.finish(run.ranks)  # every ledger is closed when any rank goes on
    profiler.finish()
    _finish(run, progress, folder, last_row)
    return 0


def _optimizer_step(
    run: Run, progress: Progress, log: RunLog, stop_requested: list[bool]
) -> tuple[dict[str, float | int], bool]:
    """One optimizer step over its micro-batches: the row of metrics, and whether to stop."""
    started = time.perf_counter()
    config, sources, step = run.config, run.sources, progress.step
    window = collate_window(
        sources.stream,
        start=step * sources.rows_per_step,
        count=sources.rows_per_step,
        pad_id=run.pad_id,
    )
    risk = run.step.risk
    risk.begin_step(step)
    if risk.looks_ahead:
        risk.prefetch(_coming_rows(sources, step))
    num_tokens = _global_tokens(run, window.num_response_tokens)
    metrics, count = StepMetrics(), config.train.grad_accum_steps
    micro_batches = run.step.micro_batches(window.to(run.ranks.device), count)
    for index, (batch, ahead) in enumerate(micro_batches):
        output = run.engine(batch, num_tokens, ahead)
        run.engine.backward(output.loss, is_last=index == count - 1)
        metrics.add(batch, output)
    lr = learning_rate(step, sources.total_steps, config.optimizer)
    update = run.engine.update(lr)
    total = metrics.reduce(
        run.ranks,
        stop_requested=stop_requested[0],
        log_failed=log.error is not None,
        risk_sums=risk.take_sums(),
    )
    if total["log_failed"]:
        run.ranks.raise_together(log.error)
    progress.step += 1
    validation = _validation_loss(run, progress)
    seconds = time.perf_counter() - started
    progress.seconds += seconds
    row = metrics_row(total, step=step, lr=lr, grad_norm=update.grad_norm, step_time_s=seconds)
    row.update({**risk.end_step(total), **validation})
    if config.reference.cache is not None:
        row["reference_misses"] = int(total["reference_misses"])
    log.write(row, metrics.ledger_rows(step=step, rank=run.ranks.rank))
    _count_non_finite(progress, update)
    return row, bool(total["stop_requested"])


def _coming_rows(sources: RowSources, step: int) -> list[Row]:
    """This rank's rows of the step that begins and of the next one, if there is one."""
    end = min(step + 2, sources.total_steps) * sources.rows_per_step
    found = (sources.stream.row(position) for position in range(step * sources.rows_per_step, end))
    return [row for row in found if row is not None]


def _global_tokens(run: Run, count: int) -> Tensor:
    """N: response tokens of all ranks and micro-batches, a float32 scalar on the device."""
    own = to_device(torch.tensor(count, dtype=torch.int64), run.ranks.device)
    return run.ranks.sum_(own).float()


def _count_non_finite(progress: Progress, update: Update) -> None:
    if update.applied:
        progress.non_finite_in_a_row = 0
        return
    progress.non_finite_steps += 1
    progress.non_finite_in_a_row += 1
    if progress.non_finite_in_a_row >= MAX_NON_FINITE_IN_A_ROW:
        raise NonFiniteLoss(
            f"{MAX_NON_FINITE_IN_A_ROW} optimizer steps in a row, up to step {progress.step - 1}, "
            "had a loss or gradient that was not finite and were skipped: lower optimizer.lr, "
            "check the data, or train with precision=fp32"
        )


@torch.no_grad()
def _validation_loss(run: Run, progress: Progress) -> dict[str, float]:
    """Mean cross-entropy over all validation rows, where due. Collectives: engine's, one SUM."""
    every, stream = run.config.train.eval_every, run.sources.validation
    is_last = progress.step == run.sources.total_steps
    if stream is None or not every or (progress.step % every and not is_last):
        return {}
    size, world_size = run.config.train.micro_batch_size, run.ranks.world_size
    most_rows = -(-run.sources.validation_rows // world_size)
    total = torch.zeros(2, dtype=torch.float64, device=run.ranks.device)
    one = torch.ones((), device=run.ranks.device)
    run.step.eval()
    for start in range(0, most_rows, size):
        rows = [stream.row(position) for position in range(start, start + size)]
        batch = collate(rows, pad_id=run.pad_id).to(run.ranks.device)
        ce = run.engine(batch, one).ce
        total += torch.stack([ce.sum().double(), one.double() * ce.shape[0]])
    run.step.train()
    ce_sum, count = run.ranks.sum_(total).tolist()
    return {"validation_loss": ce_sum / count if count else 0.0}


def _resume(run: Run, folder: Path) -> tuple[Progress, int, int]:
    """Progress, and the positions of metrics and this rank's ledger; all 0 for a new run."""
    below = folder / "checkpoint"
    if run.ranks.is_main:
        checkpoints.remove_partial(below)
    found = checkpoints.complete_checkpoints(below)
    if not found:
        return Progress(), 0, 0
    state = checkpoints.load_checkpoint(
        found[-1],
        config=run.config,
        engine=run.engine,
        step=run.step,
        ranks=run.ranks,
        order=run.sources.order,
    )
    if run.ranks.is_main:
        print(f"resuming from {found[-1]} at step {state.step}", flush=True)
    progress = Progress(
        step=state.step,
        non_finite_steps=state.non_finite_steps,
        non_finite_in_a_row=state.non_finite_in_a_row,
        seconds=state.seconds,
    )
    return progress, state.metrics_bytes, state.ledger_bytes[run.ranks.rank]


def _profiler(run: Run, progress: Progress) -> Profiler | NoProfiler:
    if not run.config.profile:
        return NoProfiler()
    return Profiler(
        Path(run.config.output_dir),
        run.ranks,
        micro_batches=run.config.train.grad_accum_steps,
        first_step=progress.step,
    )


def _is_save_due(run: Run, progress: Progress) -> bool:
    every = run.config.train.save_every
    return every > 0 and progress.step % every == 0 and progress.step < run.sources.total_steps


def _save(run: Run, progress: Progress, folder: Path, log: RunLog) -> None:
    with run.ranks.together():
        own = torch.tensor(log.positions(), dtype=torch.int64, device=run.ranks.device)
    positions = run.ranks.gather(own).tolist()
    state = RunState(
        step=progress.step,
        world_size=run.ranks.world_size,
        config_hash=config_hash(run.config),
        order=run.sources.order,
        coefficient=run.step.coefficient.state_dict(),
        non_finite_steps=progress.non_finite_steps,
        non_finite_in_a_row=progress.non_finite_in_a_row,
        metrics_bytes=positions[0][1],
        ledger_bytes=[position[0] for position in positions],
        seconds=progress.seconds,
    )
    checkpoints.save_checkpoint(
        folder / "checkpoint",
        state,
        engine=run.engine,
        step=run.step,
        ranks=run.ranks,
        keep=run.config.train.keep_checkpoints,
    )


def _finish(run: Run, progress: Progress, folder: Path, last_row: dict[str, float | int]) -> None:
    """Exports the model, merges the ledger, writes `summary.json` last: it marks the end."""
    export_model(
        run.model,
        run.tokenizer,
        folder / "model",
        backend=run.backend,
        shard_bytes=run.config.train.export_shard_bytes,
    )
    with run.ranks.together():
        if run.ranks.is_main:
            head = merge_ledgers(folder, run.ranks.world_size)
            summary = {
                **describe_run(run),
                "status": "complete",
                "steps": progress.step,
                "seconds": progress.seconds,
                "non_finite_steps": progress.non_finite_steps,
                "final_metrics": last_row,
                "ledger": {"head": head.head, "rows": head.rows},
            }
            _replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def describe_run(run: Run) -> dict[str, Any]:
    """What a run is made of: counts of rows, fingerprints, versions, ranks."""
    sources = run.sources
    stores = {"train": sources.train, "anchor": sources.anchor}
    return {
        "world_size": run.ranks.world_size,
        "engine": run.config.engine.name,
        "total_steps": sources.total_steps,
        "rows_per_step": sources.rows_per_step * run.ranks.world_size,
        "threshold": run.step.coefficient.threshold,
        "fingerprints": run.fingerprints,
        "rows": {
            name: {"kept": len(s), "overlong": s.overlong, "dropped": s.dropped}
            for name, s in stores.items()
            if s is not None
        },
        "versions": {
            name: version(name)
            for name in ("safereg_dist", "torch", "transformers", "deepspeed", "datasets")
        },
    }


def _bar(run: Run, progress: Progress) -> tqdm:
    return tqdm(
        total=run.sources.total_steps,
        initial=progress.step,
        desc="train",
        unit=" steps",
        disable=not run.ranks.is_main,
        dynamic_ncols=True,
    )


def _show(bar: tqdm, row: dict[str, float | int]) -> None:
    bar.update()
    bar.set_postfix(
        loss=f"{row['loss']:.4f}", kl_coef=f"{row['kl_coef_mean']:.2f}", risky=row["active_rows"]
    )


@contextmanager
def _signals() -> Iterator[list[bool]]:
    """A block in which SIGUSR1 and SIGTERM ask for a checkpoint and a stop after this step."""
    requested = [False]

    def request(*_: object) -> None:
        requested[0] = True

    before = {s: signal.signal(s, request) for s in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
