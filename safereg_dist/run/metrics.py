"""What a step did, summed over ranks in one collective, and where it is written."""

import json
import math
import resource
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from safereg_dist.parallel.comm import Ranks
from safereg_dist.regions import METRICS, region
from safereg_dist.run.ledger import LedgerRow
from safereg_dist.types import MicroBatch, StepOutput

_SUMMED = (
    "loss",
    "ce_sum",
    "divergence_sum",
    "task_tokens",
    "active_tokens",
    "response_tokens",
    "all_tokens",
    "rows",
    "active_rows",
    "reference_rows",
    "reference_misses",
    "kl_coef_sum",
    "risk_sum",
    "risk_rows",
)
_LARGEST = ("kl_coef_max", "risk_max", "peak_memory_bytes", "stop_requested", "log_failed")


class StepMetrics:
    """Collects the micro-batches of one optimizer step on one rank."""

    def __init__(self) -> None:
        self._host: dict[str, float] = dict.fromkeys((*_SUMMED, *_LARGEST), 0.0)
        self._device_sums: list[Tensor] = []
        self._outputs: list[tuple[MicroBatch, StepOutput]] = []

    def add(self, batch: MicroBatch, output: StepOutput) -> None:
        """Adds one micro-batch; nothing is fetched from the device yet."""
        sums = torch.stack([output.loss.detach(), output.ce.sum(), output.divergence.sum()])
        self._device_sums.append(sums.double())
        self._outputs.append((batch, output))
        for row, risk, coef in zip(batch.rows, output.risk.values, output.kl_coef, strict=True):
            if row.id:  # not a filler
                self._add_row(row.is_anchor, sum(row.loss_mask), len(row.input_ids), risk, coef)
        self._host["reference_rows"] += output.reference_rows
        self._host["reference_misses"] += output.reference_misses

    def _add_row(
        self, is_anchor: bool, response_tokens: int, length: int, risk: float | None, coef: float
    ) -> None:
        host = self._host
        host["rows"] += 1
        host["all_tokens"] += length
        host["response_tokens"] += response_tokens
        host["task_tokens"] += 0 if is_anchor else response_tokens
        host["active_tokens"] += response_tokens if coef > 0 else 0
        host["active_rows"] += coef > 0
        host["kl_coef_sum"] += coef
        host["kl_coef_max"] = max(host["kl_coef_max"], coef)
        if risk is not None:
            risk = 1.0 if math.isnan(risk) else risk
            host["risk_sum"] += risk
            host["risk_rows"] += 1
            host["risk_max"] = max(host["risk_max"], risk)

    @region(METRICS)
    def reduce(
        self,
        ranks: Ranks,
        *,
        stop_requested: bool,
        log_failed: bool = False,
        risk_sums: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """The step's values over all ranks; sums, and the largest of what cannot be summed.

        Requests and failures of one rank travel with them, so that they cost no collective; so do
        the risk stage's counts of this rank, `risk_sums`.
        Collectives: one all-gather of 19 float64 per rank, and one of each of `risk_sums`. One host
        synchronisation.
        """
        sums_of_risk = risk_sums or {}
        self._host["peak_memory_bytes"] = _peak_memory_bytes(ranks.device)
        self._host["stop_requested"] = float(stop_requested)
        self._host["log_failed"] = float(log_failed)
        own = torch.tensor(
            [*(self._host[n] for n in (*_SUMMED, *_LARGEST)), *sums_of_risk.values()],
            dtype=torch.float64,
            device=ranks.device,
        )
        own[:3] = torch.stack(self._device_sums).sum(0)
        table = ranks.gather(own).cpu()
        sums = table[:, : len(_SUMMED)].sum(0).tolist()
        total: dict[str, float] = dict(zip(_SUMMED, sums, strict=True))
        end = len(_SUMMED) + len(_LARGEST)
        largest = table[:, len(_SUMMED) : end].max(0).values.tolist()
        total.update(zip(_LARGEST, largest, strict=True))
        total.update(zip(sums_of_risk, table[:, end:].sum(0).tolist(), strict=True))
        return total

    def ledger_rows(self, *, step: int, rank: int) -> list[LedgerRow]:
        """One ledger row per sequence. One host synchronisation."""
        means = [_mean_divergence(batch, output) for batch, output in self._outputs]
        fetched = torch.stack(means).cpu().tolist() if means else []
        rows = []
        for micro_batch, (batch, output) in enumerate(self._outputs):
            for index, row in enumerate(batch.rows):
                if not row.id:
                    continue
                coef = output.kl_coef[index]
                rows.append(
                    LedgerRow(
                        step=step,
                        micro_batch=micro_batch,
                        rank=rank,
                        row=index,
                        id=row.id,
                        risk=output.risk.values[index],
                        estimator="anchor" if row.is_anchor else output.risk.sources[index],
                        kl_coef=coef,
                        divergence=fetched[micro_batch][index] if coef > 0 else None,
                        note=output.risk.notes.get(index),
                    )
                )
        return rows


def _mean_divergence(batch: MicroBatch, output: StepOutput) -> Tensor:
    """[B] mean divergence of each row over its response tokens."""
    zeros = output.divergence.new_zeros(len(batch.rows))
    total = zeros.index_add(0, batch.row_of_token, output.divergence)
    count = zeros.index_add(0, batch.row_of_token, torch.ones_like(output.divergence))
    return total / count.clamp_min(1)


def _peak_memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def metrics_row(
    total: Mapping[str, float], *, step: int, lr: float, grad_norm: float, step_time_s: float
) -> dict[str, float | int]:
    """The row of `metrics.jsonl`: sums turned into means over what they count."""
    return {
        "step": step,
        "loss": total["loss"],
        "task_loss": _ratio(total["ce_sum"], total["task_tokens"]),
        "divergence": _ratio(total["divergence_sum"], total["active_tokens"]),
        "kl_coef_mean": _ratio(total["kl_coef_sum"], total["rows"]),
        "kl_coef_max": total["kl_coef_max"],
        "risk_mean": _ratio(total["risk_sum"], total["risk_rows"]),
        "risk_max": total["risk_max"],
        "rows": int(total["rows"]),
        "active_rows": int(total["active_rows"]),
        "reference_rows": int(total["reference_rows"]),
        "response_tokens": int(total["response_tokens"]),
        "active_tokens": int(total["active_tokens"]),
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens_per_s": total["all_tokens"] / step_time_s,
        "step_time_s": step_time_s,
        "peak_memory_bytes": int(total["peak_memory_bytes"]),
    }


def _ratio(numerator: float, count: float) -> float:
    return numerator / count if count else 0.0


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and TensorBoard events; on the main rank only."""

    def __init__(self, folder: Path, *, position: int, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = (folder / "metrics.jsonl").open("a+", encoding="utf-8")
        self._file.truncate(position)
        self._file.seek(0, 2)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, row: Mapping[str, float | int]) -> None:
        """One line of JSON (values that are not finite become null), flushed at once."""
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, int(row["step"]))

    def position(self) -> int:
        """Bytes written so far, for the checkpoint."""
        return self._file.tell()

    def close(self) -> None:
        """Closes both writers."""
        try:
            self._file.close()
        finally:
            self._board.close()
