"""Ledger, metrics and the regulariser's state of a run that another stack drives."""

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from safereg_dist.config import SigningConfig
from safereg_dist.errors import ConfigError
from safereg_dist.factory.prepare import config_of
from safereg_dist.integrations.state import check_checkpoint, load_state, save_state
from safereg_dist.models.versions import UNKNOWN, versions_of
from safereg_dist.run.folder import sole_writer
from safereg_dist.run.ledger import merge_ledgers
from safereg_dist.run.log import RunLog
from safereg_dist.run.metrics import METRICS_NAME
from safereg_dist.run.save import seal
from safereg_dist.run.stop import forget_stop, stop_file
from safereg_dist.run.tracking import TRACKING_NAME
from safereg_dist.run.watching import OF_A_LOOP
from safereg_dist.screen.progress import say
from safereg_dist.step import SafetyRegularizer, StepPlan
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.signing import signing_key, write_signed

_LARGEST = ("kl_coef_max", "risk_max")
_COUNTS = ("rows", "active_rows", "reference_rows", "response_tokens", "active_tokens")
_COUNTS_OF_RISK = ("risk_unknown", "risk_failed", "risky_rows/")
"""How the names of counts begin that sources of risk report."""


_STACK = ("safereg_dist", "torch", "transformers", "accelerate", "datasets", "trl", "peft")


def settings_of(settings: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """The settings, filled in with what a Trainer's arguments already say."""
    known = {
        "micro_batch_size": args.per_device_train_batch_size,
        "grad_accum_steps": args.gradient_accumulation_steps,
        "precision": "bf16" if args.bf16 else "fp32",
    }
    return {**settings, "train": {**known, **(settings.get("train") or {})}}


def describe_trainer(trainer: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.yaml` says of a Trainer's run, in the form of a run of our own.

    Of `data` and `train` what is known, nothing of the optimizer and the engine, which are the
    Trainer's; the regulariser's own sections are added by `Recorder`.
    """
    name = trainer.model.name_or_path
    told: dict[str, Any] = {"model": name, "data": {}, "train": {}}
    if settings:
        config = config_of(settings, name or "-")
        told["data"] = config.data.model_dump(exclude_unset=True)
        told["train"] = config.train.model_dump(exclude_unset=True)
    if told["data"].get("train", "-") == "-":
        told["data"]["train"] = _name_of(trainer.train_dataset)
    for adapter in getattr(trainer.model, "peft_config", {}).values():
        if not adapter.inference_mode:
            told["lora"] = {"rank": adapter.r, "alpha": adapter.lora_alpha}
    return {**told, "output_dir": str(trainer.args.output_dir)}


def _name_of(dataset: Any) -> str:
    """A hub data set's own; `datasets` does not keep the names of files that it has read."""
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None)
    return name if name and name != getattr(info, "builder_name", None) else "train_dataset"


class Recorder:
    """Writes `metrics.jsonl` and the ledger into a folder, and averages metrics between logs."""

    def __init__(
        self,
        regularizer: SafetyRegularizer,
        folder: Path,
        config: Mapping[str, Any],
        signing: SigningConfig | None = None,
    ) -> None:
        """`config`: what `config.yaml` says beside the regulariser's settings and the steps."""
        self._regularizer = regularizer
        self._ranks = regularizer.ranks
        self._folder = folder
        self._config = dict(config)
        for name, values in regularizer.settings.items():
            given = config.get(name) or {}
            if name != "data" and isinstance(given, Mapping):  # else the loop's own words stand
                self._config[name] = {**values, **given}
        self._signing = signing
        self._log: RunLog | None = None
        self._held = ExitStack()
        """The lock of the folder, from `start` to `finish`."""
        self._since: dict[str, list[float]] = defaultdict(list)
        self._last = time.perf_counter()
        self._total_steps: int | None = None
        """None where the stack does not say."""
        self._first_step = 0
        """That of the checkpoint that the run goes on from."""
        self.is_stop_requested = False
        """Whether the stop file was seen at the last step; the same on all ranks."""

    def check(self, checkpoint: Path) -> int:
        """The step of a Trainer's checkpoint. Raises and collectives: `check_checkpoint`."""
        return check_checkpoint(checkpoint, signing=self._signing, ranks=self._ranks)

    def start(self, state: Path | None, *, step: int = 0) -> None:
        """Opens the logs; from the `state` of a checkpoint after `step` steps it goes on there.

        Raises:
            CheckpointError: the state is not what was written or belongs to other settings, or
                another run writes to the folder, on all ranks.
            ConfigError: the key is missing, on all ranks.
        Collectives: those of `sole_writer` and `load_state`, gathers of texts.
        """
        with ExitStack() as held:
            held.enter_context(sole_writer(self._folder, self._ranks))
            self._open(state, step)
            self._held = held.pop_all()

    def _open(self, state: Path | None, step: int) -> None:
        ranks, self._first_step = self._ranks, step
        metrics_bytes, ledger_bytes, before = 0, [], None
        if state is not None:
            metrics_bytes, ledger_bytes, before = load_state(
                state,
                step,
                regularizer=self._regularizer,
                logs=self._folder,
                signing=self._signing,
            )
        metrics = self._folder / METRICS_NAME
        if ranks.is_main and state is None and metrics.is_file() and metrics.stat().st_size:
            say(f"{self._folder}: the run begins anew, and with it the metrics and ledger there")
        with ranks.together():
            if ranks.is_main:
                signing_key(self._signing)  # one that is missing is refused now
                self._folder.mkdir(parents=True, exist_ok=True)
                forget_stop(self._folder)  # it was meant for the run before
                self._write_config({})
        self._log = RunLog(
            self._folder,
            ranks,
            metrics_bytes=metrics_bytes,
            ledger_bytes=ledger_bytes,
        )
        if before not in (None, ranks.world_size):
            self._log.write_change(step, before, ranks.world_size)

    def begin(self, total_steps: int, *, resumed_by: str = OF_A_LOOP) -> None:
        """Notes how long the run is to be, before its first step. Collectives: gather of texts.

        Args:
            resumed_by: what goes on with the run from its folders `checkpoint-STEP`; as it is,
                from what `save` wrote.
        Raises:
            ConfigError: the checkpoint has more steps already; a Trainer would take one more.
        """
        self._total_steps = total_steps
        with self._ranks.together():
            if self._first_step > total_steps:
                raise ConfigError(
                    f"the checkpoint has {self._first_step} steps and the run asks for "
                    f"{total_steps}: nothing is left to train; ask for more (max_steps, epochs), "
                    "or begin anew in another folder"
                )
            if self._ranks.is_main:
                self._write_config({"steps": total_steps})
                known = {"total_steps": total_steps, "resumed_by": resumed_by}
                write_atomically(self._folder / TRACKING_NAME, json.dumps(known) + "\n")
        self._last = time.perf_counter()

    def _write_config(self, train: Mapping[str, Any]) -> None:
        config = {**self._config, "train": {**(self._config.get("train") or {}), **train}}
        text = yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False)
        write_atomically(self._folder / "config.yaml", text)

    def close(self, plan: StepPlan, *, lr: float, grad_norm: Any) -> None:
        """Closes the step, and writes its row of metrics and its rows of the ledger.

        Collectives: those of `SafetyRegularizer.close`.
        """
        log = self._log
        has_failed = log is not None and log.error is not None
        asked = self._ranks.is_main and stop_file(self._folder).exists()
        flags = {"stop_requested": asked, "log_failed": has_failed}
        totals = self._regularizer.close(plan, flags=flags)
        self.is_stop_requested = totals.flags["stop_requested"]
        if totals.flags["log_failed"]:
            assert log is not None
            self._ranks.raise_together(log.error)
        now = time.perf_counter()
        row = totals.metrics_row(
            step=plan.step, lr=lr, grad_norm=float(grad_norm), step_time_s=now - self._last
        )
        self._last = now
        for name, value in row.items():
            self._since[name].append(value)
        if log is not None:
            log.write(row, totals.ledger_rows)

    def since_last_log(self) -> dict[str, float]:
        """Means, maxima and counts of the steps since the last call, under `safereg/`."""
        found: dict[str, float] = {}
        for name, values in self._since.items():
            if name in _COUNTS or name.startswith(_COUNTS_OF_RISK):
                found[name] = sum(values)
            elif name in _LARGEST:
                found[name] = max(values)
            elif name not in _OF_THE_LOOP:
                found[name] = sum(values) / len(values)
        self._since.clear()
        return {f"safereg/{name}": float(value) for name, value in found.items()}

    def save(self, state: Path, *, step: int) -> None:
        """Writes the regulariser's state and the logs' ends. Raises and collectives: `save_state`.

        `step` steps are done. `state` is a folder of its own (CHECKPOINT/safereg), replaced as a
        whole; one that holds anything else is refused.
        """
        assert self._log is not None
        save_state(state, step, regularizer=self._regularizer, log=self._log, signing=self._signing)

    def seal(self, checkpoint: Path, *, step: int) -> None:
        """Writes the manifest over a stack's whole checkpoint. Raises and collectives: `seal`."""
        seal(checkpoint, step, logs={}, signing=self._signing, ranks=self._ranks)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        """Closes the logs of a run that has failed; `finish` has closed those of others."""
        if self._log is not None:
            with self._log:
                self._log = None
        self._held.__exit__(*error)

    def pause(self) -> None:
        """Ends the logs of a run that goes on later. Collectives: one gather of texts."""
        assert self._log is not None
        self._log.finish(self._ranks)
        self._log = None
        if self._ranks.is_main:
            forget_stop(self._folder)
        self._held.close()

    def finish(self, steps: int) -> None:
        """Ends the logs: the ledgers of all ranks become one, whose last hash the summary keeps.

        With fewer than all `steps` done (early stopping, a callback) the run is not complete.

        Raises:
            DataError: see `RiskSource.finish`.
        Collectives: gathers of texts.
        """
        assert self._log is not None
        self._regularizer.risk.finish()
        self._log.finish(self._ranks)
        self._log = None
        with self._ranks.together():
            if self._ranks.is_main:
                head = merge_ledgers(self._folder, self._ranks.world_size)
                found = versions_of(*_STACK)
                is_complete = steps >= (self._total_steps or 0)
                summary = {
                    "status": "complete" if is_complete else "ended early",
                    "steps": steps,
                    "total_steps": self._total_steps,
                    "world_size": self._ranks.world_size,
                    "threshold": self._regularizer.coefficient.threshold,
                    "ledger": {"head": head.head, "rows": head.rows},
                    "rank_changes": [change._asdict() for change in head.rank_changes],
                    "versions": {name: v for name, v in found.items() if v != UNKNOWN},
                }
                text = json.dumps(summary, indent=2) + "\n"
                key = signing_key(self._signing)
                write_signed(self._folder / "summary.json", text.encode(), key)
                forget_stop(self._folder)  # it came too late
        self._held.close()


_OF_THE_LOOP = frozenset(
    ("step", "loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "peak_memory_bytes")
)
"""Metrics of `metrics.jsonl` that a stack reports itself."""
