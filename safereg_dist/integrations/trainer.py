"""transformers.Trainer with the step inside: `SafeRegTrainer`, and a mixin for any subclass.

    trainer = SafeRegTrainer(model=model, args=args, train_dataset=data, safereg="safety.yaml")

The Trainer keeps its loop, engines, data, evaluation, checkpoints and trackers. It opens a window
of micro-batches where it fetches them (`get_batch_samples`), each loss is computed in the head's
own call (`compute_loss`), and a callback closes the step.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from safereg_dist.errors import EXIT_REQUEUE
from safereg_dist.factory.prepare import config_of, prepare, read_settings
from safereg_dist.integrations.anchors import with_anchors
from safereg_dist.integrations.checks import check_trainer
from safereg_dist.integrations.collator import COLUMNS, KEY, RowCollator
from safereg_dist.integrations.recorder import Recorder, describe_trainer, settings_of
from safereg_dist.integrations.risk_column import check_risk_column
from safereg_dist.integrations.state import STATE
from safereg_dist.parallel.distributed import current_ranks
from safereg_dist.reference import NoReference
from safereg_dist.run.watching import how_it_goes_on
from safereg_dist.step import SafetyRegularizer, StepPlan

Settings = str | Path | Mapping[str, Any]

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # a mixin: the Trainer comes after it


class SafeRegMixin(_Trainer):
    """Goes before a Trainer class: `class Mine(SafeRegMixin, Trainer)`.

    Collectives of a step beside the Trainer's own: those of `SafetyRegularizer.open`, `loss_of` and
    `close`. The Trainer's own count of tokens is not made: `open` makes it.
    """

    loss_is_scaled_for_ga = True
    """The loss is divided by the tokens of the whole window, not by the number of batches."""
    safereg: SafetyRegularizer
    _recorder: Recorder
    _keeps_loss: bool
    """Where no row is active the Trainer's own loss stays."""
    _plan: StepPlan | None = None
    _next = 0
    _lr = _grad_norm = float("nan")

    def __init__(self, *args: Any, safereg: Settings | SafetyRegularizer, **kwargs: Any) -> None:
        """As the Trainer's; `safereg` are the settings (see `prepare`), or a regulariser.

        Raises:
            ConfigError: settings, or a Trainer with which the step cannot work; or more rows would
                be held back than `risk.max_held_back` allows.
            DataError: a `risk` column that cannot be used.
        """
        settings: Mapping[str, Any] = {}
        if not isinstance(safereg, SafetyRegularizer):
            with current_ranks().together():  # a typo is said before TRL loads the model
                settings = read_settings(safereg)
                config_of(settings, "-")
        super().__init__(*args, **kwargs)
        ranks = current_ranks()
        with ranks.together():
            check_trainer(self)
        has_loss = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = True  # else older Trainers divide by the batches again
        tokenizer = getattr(self, "processing_class", None)
        signing = None
        if not isinstance(safereg, SafetyRegularizer):
            with ranks.together():
                settings = settings_of(settings, self.args)
                config = config_of(settings, "-")
                signing = config.signing
                check_risk_column(self.train_dataset, config, announces=ranks.is_main)
            model: Any = self.model
            safereg = prepare(model, {**settings, "signing": None}, tokenizer=tokenizer)
        self.safereg = safereg
        folder = Path(str(self.args.output_dir))
        told = describe_trainer(self, settings)
        self._recorder = Recorder(safereg, folder, told, signing)
        self._mix_anchors(settings, tokenizer)
        self._keeps_loss = has_loss and self._loss_is_plain(settings)
        self.data_collator = RowCollator(self.data_collator, needs_positions=self._packs_rows())
        if isinstance(self.train_dataset, IterableDataset):
            # Rows travel as objects: each rank reads its own, none are sent from the first rank.
            self.accelerator.dataloader_config.dispatch_batches = False
        self.add_callback(_StepEnd(self))

    def _packs_rows(self) -> bool:
        return bool(getattr(self.args, "packing", False))

    def _loss_is_plain(self, settings: Mapping[str, Any]) -> bool:
        """Whether the Trainer's loss is the sum of CE over all ranks' N, and nothing else."""
        text_config = self.safereg.policy.model.config.get_text_config()
        has_anchors = (settings.get("data") or {}).get("anchor") is not None or "is_anchor" in (
            getattr(self.train_dataset, "column_names", None) or []
        )
        is_over_all_ranks = self.args.average_tokens_across_devices or self.args.world_size == 1
        return (
            is_over_all_ranks
            and not getattr(text_config, "output_router_logits", False)
            and not (has_anchors and isinstance(self.safereg.reference, NoReference))
        )

    def _mix_anchors(self, settings: Mapping[str, Any], tokenizer: Any) -> None:
        data = settings.get("data") or {}
        if data.get("anchor") is not None and self.train_dataset is not None:
            with current_ranks().main_first():
                self.train_dataset = self._with_anchors(data, tokenizer)

    def _with_anchors(self, data: Mapping[str, Any], tokenizer: Any) -> Any:
        return with_anchors(
            self.train_dataset,
            data,
            tokenizer,
            seed=self.args.seed,
            is_packed=self._packs_rows(),
        )

    # ---- one step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step, planned together, and the tokens N of all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._plan = self.safereg.open(
            [batch[KEY] for batch in batches], step=self.state.global_step
        )
        self._next = 0
        return batches, self._plan.num_tokens

    def _get_num_items_in_batch(self, *_: Any) -> None:
        """Nothing: the plan has counted the tokens."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This rank's share of L, times the ranks over which its engine averages gradients.

        Where no rank has an active row, the Trainer's own.
        """
        batch = inputs.pop(KEY, None)
        if not model.training or batch is None:
            return super().compute_loss(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
        assert self._plan is not None
        planned = self._plan.micro_batches[self._next]
        self._next += 1
        if self._keeps_loss and self.safereg.is_free(planned):
            found = super().compute_loss(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=self._plan.num_tokens.clamp_min(1),
            )
            loss = found[0] if isinstance(found, tuple) else found
            own = loss / self.safereg.ranks.world_size
            self.safereg.add_stack_loss(own, planned, batch, self._plan)
            return found
        given = {key: value for key, value in inputs.items() if key not in ("labels", "use_cache")}
        with self.safereg.loss_of(planned, batch, self._plan):
            outputs = model(**given, use_cache=False)
        # Taken from the outputs: an engine may have put a tensor of its own there.
        loss = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        loss = loss * self.safereg.ranks.world_size
        loss = loss + self._router_loss(outputs)
        return (loss, outputs) if return_outputs else loss

    def _router_loss(self, outputs: Any) -> Tensor | float:
        """The routers' own loss of a mixture of experts, a mean over the step's micro-batches."""
        router = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        if router is None:
            return 0.0
        assert self._plan is not None
        return self._router_coefficient() * router / len(self._plan.micro_batches)

    def _router_coefficient(self) -> float:
        return self.safereg.policy.model.config.get_text_config().router_aux_loss_coef

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, on its own columns."""
        inputs = {key: value for key, value in inputs.items() if key != KEY}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = found
        self._lr = float(self._get_learning_rate())  # the scheduler moves on before the step ends
        return found

    # ---- data, logs and checkpoints

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = list(self._signature_columns or [])
        self._signature_columns = [*known, *(c for c in COLUMNS if c not in known)]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's logs, with the safety metrics since the last ones under `safereg/`."""
        if "loss" in logs:
            logs.update(self._recorder.since_last_log())
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; resumes our state and logs with its own.

        After `safereg stop` the program ends with status 75, once the checkpoint is written.
        """
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(str(self.args.output_dir))
            if found is None:
                return super().train(True, *args, **kwargs)  # says that there is no checkpoint
        state, step = None, 0
        if isinstance(found, str | Path):
            state, step = Path(found, STATE), self._recorder.check(Path(found))
        self._recorder.start(state, step=step)
        with self._recorder:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._recorder.is_stop_requested and self.state.global_step < self.state.max_steps:
                self._recorder.pause()
                if self.args.process_index == 0:
                    folder = Path(str(self.args.output_dir))
                    print(
                        f"stopped on request, status {EXIT_REQUEUE}: {how_it_goes_on(folder)}",
                        flush=True,
                    )
                raise SystemExit(EXIT_REQUEUE)
            self._recorder.finish(self.state.global_step)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        # Before the Trainer's own files: a checkpoint that it counts as complete has ours.
        step = self.state.global_step
        self._recorder.save(Path(str(self.args.output_dir), f"checkpoint-{step}", STATE), step=step)
        super()._save_checkpoint(model, trial, *args, **kwargs)


class _StepEnd(TrainerCallback):
    """Closes each step where the Trainer has made its update, and seals its checkpoints."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        trainer.safereg.bind(trainer.model_wrapped)
        trainer._recorder.begin(state.max_steps, resumed_by="resume_from_checkpoint")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        if trainer._plan is None:
            return
        trainer._recorder.close(trainer._plan, lr=trainer._lr, grad_norm=trainer._grad_norm)
        trainer._plan = None
        if trainer._recorder.is_stop_requested:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        self._trainer._recorder.seal(checkpoint, step=state.global_step)


class SafeRegTrainer(SafeRegMixin, Trainer):
    """`transformers.Trainer` whose risky rows are pulled toward a frozen reference.

    It takes the Trainer's arguments, and `safereg`: a YAML file or a mapping with the sections
    `reference`, `risk`, `regularizer` and of `data` the anchors', or a `SafetyRegularizer`.
    """
