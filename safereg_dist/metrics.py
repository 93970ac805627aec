"""Stage 7: the metrics of a step, summed over ranks in one collective."""

import resource
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from safereg_dist.errors import DataError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.regions import METRICS, region
from safereg_dist.types import LedgerRow, MicroBatch, MicroBatchResult, known_risk

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
    "risky_rows",
)
_LARGEST = ("kl_coef_max", "risk_max", "peak_memory_bytes")


class StepTotals(NamedTuple):
    """Totals of one optimizer step over all ranks, and this rank's rows of the ledger."""

    sums: dict[str, float]
    """Sums over rows, tokens and ranks; maxima for quantities such as peak memory."""
    risk_metrics: dict[str, float | int]
    """Metrics that the sources of risk report for the step."""
    flags: dict[str, bool]
    """Each is true if it is true on any rank."""
    ledger_rows: list[LedgerRow]
    """One row per sequence of this rank."""

    def metrics_row(
        self, *, step: int, lr: float, grad_norm: float, step_time_s: float
    ) -> dict[str, float | int]:
        """The row of `metrics.jsonl`: each sum divided by its number of rows or tokens."""
        sums = self.sums
        return {
            "step": step,
            "loss": sums["loss"],
            "task_loss": _ratio(sums["ce_sum"], sums["task_tokens"]),
            "divergence": _ratio(sums["divergence_sum"], sums["active_tokens"]),
            "kl_coef_mean": _ratio(sums["kl_coef_sum"], sums["rows"]),
            "kl_coef_max": sums["kl_coef_max"],
            "risk_mean": _ratio(sums["risk_sum"], sums["risk_rows"]),
            "risk_max": sums["risk_max"],
            "risky_fraction": _ratio(sums["risky_rows"], sums["risk_rows"]),
            "rows": int(sums["rows"]),
            "active_rows": int(sums["active_rows"]),
            "reference_rows": int(sums["reference_rows"]),
            "response_tokens": int(sums["response_tokens"]),
            "active_tokens": int(sums["active_tokens"]),
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_s": sums["all_tokens"] / step_time_s,
            "step_time_s": step_time_s,
            "peak_memory_bytes": int(sums["peak_memory_bytes"]),
            **self.risk_metrics,
        }


class StepMetrics:
    """Collects the micro-batches of one optimizer step on one rank."""

    def __init__(self, *, threshold: float = 0.5) -> None:
        """`threshold` is the risk from which a row counts as risky."""
        self._threshold = threshold
        self._host: dict[str, float] = dict.fromkeys((*_SUMMED, *_LARGEST), 0.0)
        self._device_sums: list[Tensor] = []
        self._results: list[tuple[MicroBatch, MicroBatchResult]] = []

    @property
    def results(self) -> list[tuple[MicroBatch, MicroBatchResult]]:
        """The micro-batches added so far, each with its result."""
        return self._results

    def add(self, batch: MicroBatch, result: MicroBatchResult) -> None:
        """Adds one micro-batch; nothing is fetched from the device yet."""
        terms = result.loss
        sums = torch.stack([terms.loss.detach(), terms.ce.sum(), terms.divergence.sum()])
        self._device_sums.append(sums.double())
        self._results.append((batch, result))
        for row, risk, coef in zip(batch.rows, result.risk.values, result.kl_coef, strict=True):
            if row.id:  # not a filler
                tokens = row.num_response_tokens
                self._add_row(row.is_anchor, tokens, len(row.input_ids), risk, coef)
        self._host["reference_rows"] += result.reference_rows
        self._host["reference_misses"] += result.reference_misses

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
            risk = known_risk(risk)
            host["risk_sum"] += risk
            host["risk_rows"] += 1
            host["risky_rows"] += risk >= self._threshold
            host["risk_max"] = max(host["risk_max"], risk)

    @region(METRICS)
    def reduce(
        self, ranks: Ranks, *, step: int, flags: Mapping[str, bool], risk_sums: Mapping[str, float]
    ) -> StepTotals:
        """The step's totals over all ranks: sums, and maxima for the names in `_LARGEST`.

        The same all-gather carries requests and failures of a rank (`flags`) and the counts of the
        sources of risk (`risk_sums`). Both have the same names on every rank.
        Collectives: one all-gather of 18 float64 per rank, and one of each of those. Two host
        synchronisations.
        """
        if not self._device_sums:
            raise DataError(
                "expected a forward for each micro-batch of the step, got none: run them inside "
                "`loss_of` before `close`"
            )
        self._host["peak_memory_bytes"] = _peak_memory_bytes(ranks.device)
        own = torch.tensor(
            [
                *(self._host[name] for name in (*_SUMMED, *_LARGEST)),
                *map(float, flags.values()),
                *risk_sums.values(),
            ],
            dtype=torch.float64,
            device=ranks.device,
        )
        own[:3] = torch.stack(self._device_sums).sum(0)
        table = ranks.gather(own).cpu()
        largest = (*_LARGEST, *flags)
        sums = table.sum(0).tolist()
        most = table.max(0).values.tolist()
        end = len(_SUMMED) + len(largest)
        total = {
            **dict(zip(_SUMMED, sums, strict=False)),
            **dict(zip(largest, most[len(_SUMMED) :], strict=False)),
            **dict(zip(risk_sums, sums[end:], strict=True)),
        }
        return StepTotals(
            total,
            {},
            {name: bool(total.pop(name)) for name in flags},
            self._ledger_rows(step=step, rank=ranks.rank),
        )

    def _ledger_rows(self, *, step: int, rank: int) -> list[LedgerRow]:
        """One ledger row per sequence. One host synchronisation."""
        means = [_mean_divergence(batch, result) for batch, result in self._results]
        fetched = iter(torch.cat(means).tolist() if means else [])
        rows = []
        for micro_batch, (batch, result) in enumerate(self._results):
            for index, (row, divergence) in enumerate(zip(batch.rows, fetched, strict=False)):
                if not row.id:
                    continue
                coef = result.kl_coef[index]
                rows.append(
                    LedgerRow(
                        step=step,
                        micro_batch=micro_batch,
                        rank=rank,
                        row=index,
                        id=result.risk.ids.get(index, row.id),
                        risk=result.risk.values[index],
                        estimator="anchor" if row.is_anchor else result.risk.sources[index],
                        kl_coef=coef,
                        divergence=divergence if coef > 0 else None,
                        note=result.risk.notes.get(index),
                    )
                )
        return rows


def _mean_divergence(batch: MicroBatch, result: MicroBatchResult) -> Tensor:
    """[B] mean divergence of each row over its response tokens."""
    divergence = result.loss.divergence
    zeros = divergence.new_zeros(len(batch.rows))
    total = zeros.index_add(0, batch.row_of_token, divergence)
    count = zeros.index_add(0, batch.row_of_token, torch.ones_like(divergence))
    return total / count.clamp_min(1)


def _peak_memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _ratio(numerator: float, count: float) -> float:
    return numerator / count if count else 0.0
