"""trl.SFTTrainer with the step inside.

    trainer = SafeRegSFTTrainer(model=model, args=args, train_dataset=data, safereg="safety.yaml")

TRL's packing keeps no column but tokens and labels, so risk is spread over a row's tokens first.
TRL's own metrics (entropy, accuracy, tokens) come from the same pass through the head as the loss.
"""

from typing import Any

import torch
from torch import Tensor, nn

from safereg_dist.errors import ConfigError
from safereg_dist.integrations.collator import COLUMNS
from safereg_dist.integrations.trainer import SafeRegMixin
from safereg_dist.models.extras import needed
from safereg_dist.types import to_device

with needed():
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import SFTTrainer


class SafeRegSFTTrainer(SafeRegMixin, SFTTrainer):
    """`trl.SFTTrainer` whose risky rows are pulled toward a frozen reference.

    It takes the SFTTrainer's arguments, and `safereg` as `SafeRegTrainer` does. The columns
    `risk`, `id` and `is_anchor` survive TRL's preparation, packing included.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sums: list[Tensor] = []
        self._router_losses: list[Tensor] = []
        super().__init__(*args, **kwargs)
        self.safereg.objective.reports_tokens = True

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """TRL's own; rows are packed here, with what we know of them beside each token."""
        prepared = super()._prepare_dataset(dataset, processing_class, args, False, *rest, **named)
        if not packing:
            return prepared
        if args.packing_strategy == "wrapped":
            raise ConfigError(
                "packing_strategy=wrapped cuts rows anywhere, and a piece has no risk of its own: "
                "set packing_strategy=bfd"
            )
        if args.max_length is None:
            raise ConfigError("packing needs max_length, the length of a packed line: set it")
        known = [name for name in COLUMNS if name in (prepared.column_names or [])]
        spread = prepared.map(_per_token, fn_kwargs={"names": known})
        columns = spread.select_columns(["input_ids", "labels", *known])
        pack: Any = pack_dataset
        return pack(columns, args.max_length, args.packing_strategy)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mixin's loss; in training the sums of TRL's metrics wait on the device for `log`."""
        is_step = model.training and self._plan is not None
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if is_step:
            assert self._plan is not None
            batch, found = self._plan.metrics.results[-1]
            terms = found.loss
            if terms.entropy is None or terms.accuracy is None:
                return result  # the loss is TRL's, and so are its metrics
            rows = zip(batch.rows, batch.tokens_of_row, strict=True)
            task = sum(count for row, count in rows if not row.is_anchor)
            counts = [batch.num_response_tokens, task, sum(len(r.input_ids) for r in batch.rows)]
            sums = torch.stack([terms.entropy.sum(), terms.accuracy.sum()])
            own = to_device(torch.tensor(counts, dtype=torch.float64), sums.device)
            self._sums.append(torch.cat([sums.double(), own]))
        return result

    def _router_loss(self, outputs: Any) -> Tensor | float:
        if not getattr(self, "aux_loss_enabled", False):
            return 0.0
        loss = super()._router_loss(outputs)
        if isinstance(loss, Tensor):
            self._router_losses.append(outputs["aux_loss"].detach())
        return loss

    def _router_coefficient(self) -> float:
        return self.router_aux_loss_coef

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The mixin's, with TRL's metrics of the micro-batches since the last log."""
        if "loss" in logs and self._sums:
            ranks = self.safereg.ranks
            table = ranks.sum_(torch.stack(self._sums)).tolist()
            self._sums.clear()
            metrics = self._metrics["train"]
            for entropy, correct, count, task, tokens in table:  # of each micro-batch, as TRL does
                self._total_train_tokens += int(tokens)
                metrics["entropy"].append(entropy / count if count else 0.0)
                metrics["mean_token_accuracy"].append(correct / task if task else 0.0)
            metrics["num_tokens"] = [self._total_train_tokens]
            if self._router_losses:
                own = torch.stack(self._router_losses).mean()
                metrics["aux_loss"].append(float(ranks.sum_(own)) / ranks.world_size)
                self._router_losses.clear()
        super().log(logs, *args, **kwargs)


def _per_token(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The row's values as lists, one for each token; of the id only the first, which is read."""
    length = len(row["input_ids"])
    found = {n: row[n] if isinstance(row[n], list) else [row[n]] * length for n in names}
    if "id" in found:  # a text for each token would outweigh the tokens
        found["id"][1:] = [None] * (length - 1)
    return found
