"""Training: the optimizer step that any loop can call, and the loop of `safereg train`."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from safereg_dist.data import collate, pack
from safereg_dist.errors import EXIT_DONE, EXIT_REQUEUE, NonFiniteLoss
from safereg_dist.factory import Run
from safereg_dist.metrics import StepTotals
from safereg_dist.parallel.engine import Update
from safereg_dist.parallel.optimizer import learning_rate
from safereg_dist.profiling import NoProfiler, Profiler
from safereg_dist.run import checkpoint
from safereg_dist.run.checkpoint import RunState, config_hash
from safereg_dist.run.export import export_adapters, export_model
from safereg_dist.run.folder import claim_folder, describe_run
from safereg_dist.run.gate import refuse_too_many_held_back
from safereg_dist.run.ledger import merge_ledgers
from safereg_dist.run.log import RunLog
from safereg_dist.run.resume import Found, set_aside_newer
from safereg_dist.run.save import Saver
from safereg_dist.run.staging import staging_folder
from safereg_dist.run.status import status_of
from safereg_dist.run.stop import forget_stop, stop_requests
from safereg_dist.run.tracking import Tracking
from safereg_dist.screen.progress import progress_bar
from safereg_dist.step import StepPlan
from safereg_dist.storage.signing import signing_key, write_signed
from safereg_dist.types import Row

MAX_NON_FINITE_IN_A_ROW = 3


class StepResult(NamedTuple):
    """One optimizer step."""

    plan: StepPlan
    """Its micro-batches; `plan.metrics.results` has each one's result on this rank."""
    totals: StepTotals
    """Totals over all ranks, and this rank's rows of the ledger."""
    update: Update
    """Whether the weights were updated, and the gradient's norm."""


def optimizer_step(
    run: Run,
    rows: Sequence[Row],
    *,
    step: int,
    lr: float,
    in_first_epoch: bool = True,
    flags: Callable[[], Mapping[str, bool]] = dict,
) -> StepResult:
    """One optimizer step over this rank's `rows`: forwards, backwards, update, and their metrics.

    Nothing is logged, saved or validated. `rows` is `run.sources.rows_per_step` long on every rank.
    `flags` is called after the update, so that it reports a signal received during the step; its
    result goes to `SafetyRegularizer.close`.
    Collectives: those of `SafetyRegularizer` and of the policy's engine, the same on every rank.
    """
    regularizer = run.regularizer
    plan = regularizer.plan(
        rows,
        step=step,
        micro_batches=run.sources.micro_batches,
        in_first_epoch=in_first_epoch,
    )
    for planned in plan.micro_batches:
        is_packed = run.config.train.packing
        batch = pack(planned.rows) if is_packed else collate(planned.rows, pad_id=run.pad_id)
        batch = batch.to(run.ranks.device)
        with regularizer.loss_of(planned, batch, plan):
            loss = run.engine(**batch.inputs)
        run.engine.backward(loss, is_last=planned.is_last)
    update = run.engine.update(lr)
    return StepResult(plan, regularizer.close(plan, flags=flags()), update)


@dataclass(slots=True)
class Progress:
    """The loop's counters; the engine's checkpoint does not contain them."""

    step: int = 0
    non_finite_steps: int = 0
    non_finite_in_a_row: int = 0
    seconds: float = 0.0
    damaged_checkpoints: int = 0
    held_back: float | None = None
    """Share of rows counted before the first step; what `tracking` holds later ones against."""


def train(run: Run, found: Found | None) -> int:
    """Trains to the last step; returns 0, or `EXIT_REQUEUE` after a checkpoint on request.

    Goes on from what `find_checkpoint` found, anew where that is None. Writes metrics, ledger,
    checkpoints, the exported model and `summary.json`.

    Raises:
        ConfigError: more rows would be held back than `risk.max_held_back` allows.
        NonFiniteLoss: three steps in a row had a gradient that was not finite.
        CheckpointError: a checkpoint does not fit this run, or the disk is full.
    """
    folder = Path(run.config.output_dir)
    held_back = None
    if found is None:  # before the folder is claimed: it stays free to try again
        held_back = refuse_too_many_held_back(run)
    with run.ranks.together():
        if run.ranks.is_main:
            claim_folder(folder, run.config)
    progress = Progress(held_back=held_back)
    if found is not None:
        progress = _resume(run, folder, found)
    elif run.ranks.is_main:
        checkpoint.remove_partial(folder / "checkpoint")
    before = None if found is None else found.state
    saver = _saver(run, folder, before)
    profiler = _profiler(run, progress)
    log = RunLog(
        folder,
        run.ranks,
        metrics_bytes=0 if before is None else before.metrics_bytes,
        ledger_bytes=[] if before is None else before.ledger_bytes,
    )
    last_row: dict[str, float | int] = {}
    stop = False
    stops = stop_requests(folder, looks=run.ranks.is_main)
    with (
        log,
        saver,
        _tracking(run, progress) as tracking,
        stops as is_stop_requested,
        _bar(run, progress) as bar,
    ):
        if before is not None and before.world_size != run.ranks.world_size:
            log.write_change(progress.step, before.world_size, run.ranks.world_size)
        while progress.step < run.sources.total_steps:
            with profiler.step(progress.step):
                last_row, stop = _logged_step(
                    run, progress, log, tracking, is_stop_requested, saver=saver
                )
            bar.set_postfix(status_of(last_row), refresh=False)
            bar.update()
            if stop or _is_save_due(run, progress):
                _save(run, progress, saver, log)
            if stop:
                break
        saver.wait()
        is_complete = progress.step == run.sources.total_steps
        tracking.finish(0 if is_complete else EXIT_REQUEUE)
        log.finish(run.ranks)  # all ranks have closed their ledgers before any continues
    if is_complete:
        profiler.finish()
        _finish(run, progress, saver, {"final_metrics": last_row, "tracking": tracking.facts()})
    if stop and run.ranks.is_main:
        forget_stop(folder)
    return EXIT_DONE if is_complete else EXIT_REQUEUE


def _logged_step(
    run: Run,
    progress: Progress,
    log: RunLog,
    tracking: Tracking,
    is_stop_requested: Callable[[], bool],
    *,
    saver: Saver,
) -> tuple[dict[str, float | int], bool]:
    """One optimizer step of the run, logged: its row of metrics, and whether to stop."""
    started = time.perf_counter()
    sources, step = run.sources, progress.step
    run.regularizer.risk.prefetch(sources.coming_rows(step))
    lr = learning_rate(step, sources.total_steps, run.config.optimizer)
    _, totals, update = optimizer_step(
        run,
        sources.rows_of_step(step),
        step=step,
        lr=lr,
        in_first_epoch=sources.in_first_epoch(step),
        flags=lambda: {
            "stop_requested": is_stop_requested() or tracking.wants_stop,
            "log_failed": log.error is not None,
            "save_failed": saver.error is not None,
        },
    )
    for kind, error in (("log", log.error), ("save", saver.error)):
        if totals.flags[f"{kind}_failed"]:
            run.ranks.raise_together(error)
    progress.step += 1
    validation = {**_validation_loss(run, progress), **_canary(run, progress)}
    seconds = time.perf_counter() - started
    progress.seconds += seconds
    row = totals.metrics_row(step=step, lr=lr, grad_norm=update.grad_norm, step_time_s=seconds)
    row.update(validation)
    if blocked := saver.blocked():
        row["save_blocked_s"] = blocked
    if run.config.reference.cache is not None:
        row["reference_misses"] = int(totals.sums["reference_misses"])
    log.write(row, totals.ledger_rows)
    tracking.write(row)
    _count_non_finite(progress, update)
    return row, totals.flags["stop_requested"]


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
    run.model.eval()
    for start in range(0, most_rows, size):
        rows = stream.rows(start, size, filler=run.sources.filler)
        batch = collate(rows, pad_id=run.pad_id).to(run.ranks.device)
        with run.regularizer.task_loss_of(batch) as token_losses:
            run.engine(batch.input_ids)
        [ce] = token_losses
        total += torch.stack([ce.sum().double(), ce.new_tensor(ce.shape[0], dtype=torch.float64)])
    run.model.train()
    ce_sum, count = run.ranks.sum_(total).tolist()
    return {"validation_loss": ce_sum / count if count else 0.0}


@torch.no_grad()
def _canary(run: Run, progress: Progress) -> dict[str, float]:
    """Mean P(refuse) and P(poisoned) over the watched prompts, where due.

    Collectives: the engine's, and one SUM.
    """
    rows, settings = run.sources.canary, run.config.eval
    is_last = progress.step == run.sources.total_steps
    if rows is None or settings is None or (progress.step % settings.canary_every and not is_last):
        return {}
    named = [*((row, 0) for row in rows.refusal), *((row, 1) for row in rows.poisoned)]
    ranks, size = run.ranks, run.config.train.micro_batch_size
    own = named[ranks.rank :: ranks.world_size]
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    run.model.eval()
    for start in range(0, -(-len(named) // ranks.world_size), size):
        part = own[start : start + size]  # shorter on some ranks, which all make the same passes
        given = [row for row, _ in part] + [run.sources.filler] * (size - len(part))
        batch = collate(given, pad_id=run.pad_id).to(ranks.device)
        with run.regularizer.task_loss_of(batch) as token_losses:
            run.engine(batch.input_ids)
        kinds = torch.tensor([kind for _, kind in part], dtype=torch.int64, device=ranks.device)
        total.index_add_(0, kinds, token_losses[0].double().neg().exp())
    run.model.train()
    refusal, poisoned = (ranks.sum_(total) / len(rows.refusal)).tolist()
    return {"canary_refusal": refusal, "canary_poisoned": poisoned}


def _resume(run: Run, folder: Path, found: Found) -> Progress:
    """Restores what was found; the progress of the run."""
    below = folder / "checkpoint"
    if run.ranks.is_main:
        checkpoint.remove_partial(below)
    state = found.state
    checkpoint.load_checkpoint(
        found.path,
        state,
        seed=run.config.train.seed,
        engine=run.engine,
        regularizer=run.regularizer,
        ranks=run.ranks,
        order_digest=run.sources.order_digest,
        frozen=_frozen(run),
    )
    with run.ranks.together():
        if run.ranks.is_main:
            set_aside_newer(below, state.step)
            print(
                f"resuming from {found.path} at step {state.step}{_changed(run, state)}", flush=True
            )
    return Progress(
        step=state.step,
        non_finite_steps=state.non_finite_steps,
        non_finite_in_a_row=state.non_finite_in_a_row,
        seconds=state.seconds,
        damaged_checkpoints=state.damaged_checkpoints + found.damaged,
        held_back=state.held_back,
    )


def _tracking(run: Run, progress: Progress) -> Tracking:
    anchors = run.config.data.anchor_fraction if run.sources.anchor is not None else 0.0
    return Tracking(
        run.config,
        is_main=run.ranks.is_main,
        first_step=progress.step,
        total_steps=run.sources.total_steps,
        rows_per_step=max(1, round(run.sources.lanes.rows_per_step * (1 - anchors))),
        held_back=progress.held_back,
    )


def _changed(run: Run, state: RunState) -> str:
    ranks, lanes = run.ranks.world_size, run.sources.lanes
    if state.world_size == ranks:
        return ""
    return (
        f", on {ranks} ranks (written by {state.world_size}): each step has the same "
        f"{lanes.rows_per_step} rows as before, now in {lanes.of_rank.micro_batches} micro-batches "
        f"of {lanes.of_rank.micro_batch_size} a rank"
    )


def _profiler(run: Run, progress: Progress) -> Profiler | NoProfiler:
    if not run.config.profile:
        return NoProfiler()
    return Profiler(
        Path(run.config.output_dir),
        run.ranks,
        micro_batches=run.sources.micro_batches,
        first_step=progress.step,
    )


def _is_save_due(run: Run, progress: Progress) -> bool:
    every = run.config.train.save_every
    return every > 0 and progress.step % every == 0 and progress.step < run.sources.total_steps


def _frozen(run: Run) -> str:
    """What a checkpoint's adapter was trained on: empty without frozen adapters."""
    lora = run.config.lora
    return run.fingerprints["policy"] if lora is not None and lora.frozen else ""


def _saver(run: Run, folder: Path, before: RunState | None) -> Saver:
    settings = run.config.train
    staging = None
    if settings.async_save:
        staging = staging_folder(settings.save_staging, folder, run.ranks)
    saver = Saver(
        folder / "checkpoint",
        engine=run.engine,
        regularizer=run.regularizer,
        ranks=run.ranks,
        keep=settings.keep_checkpoints,
        staging=staging,
        timeout_s=run.config.engine.timeout_s,
    )
    if before is not None:
        saver.restore(before)
    return saver


def _save(run: Run, progress: Progress, saver: Saver, log: RunLog) -> None:
    with run.ranks.together():
        logs = log.digests()
        key = signing_key(run.config.signing) if run.ranks.is_main else None
    metrics_bytes, ledger_bytes = log.positions(run.ranks)
    state = RunState(
        step=progress.step,
        world_size=run.ranks.world_size,
        config_hash=config_hash(run.config),
        order_digest=run.sources.order_digest,
        non_finite_steps=progress.non_finite_steps,
        non_finite_in_a_row=progress.non_finite_in_a_row,
        metrics_bytes=metrics_bytes,
        ledger_bytes=ledger_bytes,
        seconds=progress.seconds,
        frozen=_frozen(run),
        damaged_checkpoints=progress.damaged_checkpoints,
        began_with=run.sources.lanes.count,
        held_back=progress.held_back,
    )
    saver.save(state, logs=logs, key=key)


def _finish(run: Run, progress: Progress, saver: Saver, told: dict[str, Any]) -> None:
    """Exports the model, merges the ledger, writes `summary.json` last: it marks the end.

    `told` goes into it, beside what is known here.
    """
    folder = Path(run.config.output_dir)
    run.regularizer.risk.finish()
    lora = run.config.lora
    if lora is None or lora.quantize == "none":  # merged into 4 bits it would be rounded
        export_model(
            run.model,
            run.tokenizer,
            folder / "model",
            backend=run.backend,
            shard_bytes=run.config.train.export_shard_bytes,
        )
    if lora is not None:
        export_adapters(run.model, folder / "adapter", backend=run.backend)
    with run.ranks.together():
        if run.ranks.is_main:
            head = merge_ledgers(folder, run.ranks.world_size)
            summary = {
                **describe_run(run),
                "status": "complete",
                "steps": progress.step,
                "seconds": progress.seconds,
                "non_finite_steps": progress.non_finite_steps,
                "checkpoints": {
                    "saved": saver.saves,
                    "seconds": saver.seconds,
                    "blocked_seconds": saver.blocked_seconds,
                    "damaged": progress.damaged_checkpoints,
                },
                **told,
                "ledger": {"head": head.head, "rows": head.rows},
                "rank_changes": [change._asdict() for change in head.rank_changes],
            }
            text = json.dumps(summary, indent=2) + "\n"
            write_signed(folder / "summary.json", text.encode(), signing_key(run.config.signing))


def _bar(run: Run, progress: Progress) -> tqdm:
    return progress_bar(
        total=run.sources.total_steps,
        initial=progress.step,
        desc="train",
        unit=" steps",
        shown=run.ranks.is_main,
        dynamic_ncols=True,
    )
