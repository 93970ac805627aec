"""Stage 2: from a row's risk to its coefficient b."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from safereg_dist.config import RegularizerConfig, replace
from safereg_dist.parallel.comm import Ranks, Result
from safereg_dist.regions import COEFFICIENT, region
from safereg_dist.types import Row, RowRisks, known_risk

_LEAST = 0.01
"""Share of the span that a budget's coefficient never falls below."""
DEFAULT_THRESHOLD = 0.5
"""The threshold if neither the configuration nor a probe gives one."""


def resolved_threshold(config: RegularizerConfig, calibrated: float | None = None) -> float:
    """The threshold: the configured one, else the probe's calibrated one, else 0.5."""
    if config.threshold is not None:
        return config.threshold
    return DEFAULT_THRESHOLD if calibrated is None else calibrated


def scheduled(risk: float, config: RegularizerConfig, threshold: float) -> float:
    """Coefficient b of a risk r in [0, 1], with floor f, ceiling c and threshold t.

    step       c if r >= t else f
    threshold  f if r < t else f + (c - f) (r - t) / (1 - t)
    linear     f + (c - f) r
    clamp      clip((4 r - 1) / 3, f, c): the official code's clip((s - 2) / 3), s = 1 + 4 r
    sigmoid    f + (c - f) / (1 + exp(-slope (r - t)))
    budget     as step, at its start; see `BudgetController`
    """
    low, span = config.floor, config.ceiling - config.floor
    match config.schedule:
        case "step" | "budget":
            return config.ceiling if risk >= threshold else low
        case "threshold":
            if risk < threshold:
                return low
            return low + span * ((risk - threshold) / (1 - threshold) if threshold < 1 else 1.0)
        case "linear":
            return low + span * risk
        case "clamp":
            return min(max((4 * risk - 1) / 3, low), config.ceiling)
        case "sigmoid":
            # tanh does not overflow, however steep: 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2
            return low + span * (1 + math.tanh(config.slope * (risk - threshold) / 2)) / 2
    raise AssertionError(config.schedule)


class BudgetController:
    """The coefficient of risky rows that keeps the divergence D_t of a step's tokens at a budget.

    A PID controller of the Lagrange multiplier of D <= budget (Stooke et al., 2007.03964), whose
    error is relative:

        e_t = (D_t - budget) / budget
        I_t = clip(I_{t-1} + k_i e_t, 0, c - f)
        b   = f + clip(k_p e_t + I_t + k_d max(0, e_t - e_{t-1}), (c - f) / 100, c - f)

    for floor f and ceiling c; b begins at c, and I_0 = c - f. Never 0: a row without a coefficient
    needs no reference, and then nobody would see D rise. Every rank sees the same D, so all have
    the same b; no collectives.
    """

    def __init__(self, config: RegularizerConfig) -> None:
        assert config.budget is not None
        self._budget = config.budget
        self._gains = config.budget_gains
        self._floor, self._span = config.floor, config.ceiling - config.floor
        self._integral, self._error = self._span, 0.0
        self.coefficient = config.ceiling

    def observe(self, divergence: float) -> None:
        """Takes the divergence of a step's active tokens, nats a token; nan changes nothing."""
        if not math.isfinite(divergence):
            return
        proportional, integral, derivative = self._gains
        error = (divergence - self._budget) / self._budget
        self._integral = min(max(self._integral + integral * error, 0.0), self._span)
        rise = max(0.0, error - self._error)
        wanted = proportional * error + self._integral + derivative * rise
        self._error = error
        self.coefficient = self._floor + min(max(wanted, _LEAST * self._span), self._span)

    def state_dict(self) -> dict[str, float]:
        """Its state, for the checkpoint."""
        return {
            "integral": self._integral,
            "error": self._error,
            "coefficient": self.coefficient,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores it."""
        self._integral, self._error = state["integral"], state["error"]
        self.coefficient = state["coefficient"]


class Coefficient:
    """Computes the coefficients of rows; holds the moving average of granularity `batch`."""

    def __init__(
        self,
        config: RegularizerConfig,
        *,
        threshold: float | None,
        ranks: Ranks,
        ceilings: Mapping[str, float] | None = None,
    ) -> None:
        """`ceilings` maps a category to its largest coefficient, where one is configured."""
        self.threshold = resolved_threshold(config, threshold)
        self.config = config
        """The section of the configuration that it follows."""
        self._ranks = ranks
        self._by_category = {
            category: replace(config, ceiling=ceiling)
            for category, ceiling in (ceilings or {}).items()
        }
        self._ema: float | None = None
        self._controller = None if config.budget is None else BudgetController(config)

    @region(COEFFICIENT)
    def __call__(
        self, rows: Sequence[Row], risk: Result[RowRisks], *, sizes: Sequence[int] | None = None
    ) -> list[float]:
        """[B] coefficient b of every row: 1 on anchor rows, 0 on rows without response tokens.

        With granularity `batch` the rows are those of consecutive micro-batches of `sizes` rows
        (None: of one). Where categories have ceilings of their own, b = max_c schedule_c(r_c). A
        row whose risk could not be computed (nan) counts as risky: r = 1. An error in place of
        risk is raised; with granularity `batch` on all ranks together.
        Collectives: none; with granularity `batch` one SUM all-reduce of 16 bytes each.
        """
        if risk.error is not None and self.config.granularity == "batch":
            self._sum_over_ranks(float("nan"), 1)
            self._ranks.raise_together(risk.error)
        known, found = risk.value, []
        if len(known.values) != len(rows):
            raise ValueError(
                f"expected a risk for each of {len(rows)} rows, got {len(known.values)}: a source "
                "of risk gives one value a row, None where there is none"
            )
        for size in sizes or [len(rows)]:
            places = list(range(len(found), len(found) + size))
            found += self._of_micro_batch([rows[i] for i in places], known.of_rows(places))
        return found

    def _of_micro_batch(self, rows: Sequence[Row], risk: RowRisks) -> list[float]:
        config = self.config
        if config.objective == "none":
            return [0.0] * len(rows)
        if config.objective == "static":
            common: float | None = config.ceiling
        elif config.objective == "token_wise":
            common = 1.0  # every row needs the reference
        elif config.granularity == "batch":
            common = scheduled(self._batch_risk(rows, risk.values), config, self.threshold)
        else:
            common = None
        return [self._row_coefficient(index, row, risk, common) for index, row in enumerate(rows)]

    def _row_coefficient(self, index: int, row: Row, risk: RowRisks, common: float | None) -> float:
        if row.is_anchor:
            return 1.0
        if not any(row.loss_mask):
            return 0.0
        if common is not None:
            return common
        if self._controller is not None:
            is_risky = known_risk(risk.values[index]) >= self.threshold
            return self._controller.coefficient if is_risky else self.config.floor
        if not self._by_category:
            return scheduled(known_risk(risk.values[index]), self.config, self.threshold)
        return max(
            scheduled(
                known_risk(values[index]),
                self._by_category.get(category, self.config),
                self.threshold,
            )
            for category, values in risk.by_category.items()
        )

    def _batch_risk(self, rows: Sequence[Row], risk: list[float | None]) -> float:
        """Mean risk of the micro-batch over all ranks, smoothed: s' = ema s' + (1 - ema) s."""
        own = [
            known_risk(value)
            for row, value in zip(rows, risk, strict=True)
            if not row.is_anchor and any(row.loss_mask)
        ]
        risk_sum, count = self._sum_over_ranks(math.fsum(own), len(own))
        if math.isnan(risk_sum):  # tells the other ranks that this one failed
            self._ranks.raise_together(None)
        if count == 0:  # no rank has a row with a risk: the average stays unchanged
            return self._ema or 0.0
        mean = risk_sum / count
        before = mean if self._ema is None else self._ema
        self._ema = self.config.ema * before + (1 - self.config.ema) * mean
        return self._ema

    def _sum_over_ranks(self, risk_sum: float, count: int) -> tuple[float, float]:
        own = torch.tensor([risk_sum, count], dtype=torch.float64, device=self._ranks.device)
        total = self._ranks.sum_(own).tolist()
        return total[0], total[1]

    def observe(self, divergence: float) -> dict[str, float]:
        """Takes the divergence of a step's active tokens; metrics, where a budget is kept.

        The same value on every rank. Collectives: none.
        """
        if self._controller is None:
            return {}
        used = self._controller.coefficient
        self._controller.observe(divergence)
        return {"budget_coef": used}

    def state_dict(self) -> dict[str, Any]:
        """The moving average and the controller's state, for the checkpoint."""
        kept = {} if self._controller is None else {"budget": self._controller.state_dict()}
        return {"ema": self._ema, **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        self._ema = state["ema"]
        if self._controller is not None:
            self._controller.load_state_dict(state["budget"])
