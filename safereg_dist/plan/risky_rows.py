"""How many risky rows the fullest rank has, and so how often all ranks run the reference.

Each of a rank's n rows is risky with probability f, independently: K ~ Binomial(n, f). The fullest
of W ranks has M = max K, with P(M <= m) = P(K <= m)^W, and all ranks make ceil(M / rows_per_pass)
passes of the reference in each group of micro-batches whose states are kept together.
"""

from dataclasses import dataclass

import numpy as np

from safereg_dist.plan.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Expectations over one optimizer step."""

    mean_rows: float
    """Risky rows of a rank."""
    most_rows: float
    """Of the fullest rank."""
    passes: float
    """Passes of the reference that every rank makes."""
    head_gathers: float
    """Micro-batches in which the reference's head is gathered."""
    any_risky: float
    """Probability that the reference runs at all."""


def expected_rows(settings: Settings, *, group_batches: int | None = None) -> Expected:
    """The expectations; `group_batches` micro-batches' states are kept together (None = all)."""
    law = most_rows_law(settings)
    most = np.arange(len(law))
    group = settings.micro_batch * min(group_batches or settings.grad_accum, settings.grad_accum)
    per_pass = settings.rows_per_pass or settings.micro_batch
    passes = np.zeros(len(law))
    for first in range(0, settings.window_rows, group):
        passes += np.ceil(np.clip(most - first, 0, group) / per_pass)
    return Expected(
        mean_rows=settings.window_rows * settings.risky_fraction,
        most_rows=float(law @ most),
        passes=float(law @ passes),
        head_gathers=float(law @ np.ceil(most / settings.micro_batch)),
        any_risky=float(1 - law[0]),
    )


def most_rows_law(settings: Settings) -> np.ndarray:
    """[n + 1] float64 probabilities that the fullest rank has 0..n risky rows in its window.

    By chance as in the module's equation; dealt: see `_dealt_law`.
    """
    n, fraction = settings.window_rows, settings.risky_fraction
    if settings.balance == "deal":
        return _dealt_law(n, settings.data_parallel, fraction)
    return fullest_law(n, fraction, settings.data_parallel)


def active_share(settings: Settings) -> float:
    """Probability that a micro-batch of B rows holds a risky one: 1 - (1 - f)^B."""
    return 1 - (1 - settings.risky_fraction) ** settings.micro_batch


def fullest_law(n: int, fraction: float, ranks: int) -> np.ndarray:
    """[n + 1] float64 probabilities of max K over ranks, each with K ~ Binomial(n, fraction)."""
    upto = np.cumsum(binomial(n, fraction)).clip(0.0, 1.0)
    upto[-1] = 1.0
    return np.diff(upto**ranks, prepend=0.0)


def _dealt_law(n: int, world_size: int, fraction: float) -> np.ndarray:
    """Of rows dealt one by one over ranks and steps.

    A step has W n f risky rows, rounded down or up so that their mean is kept; dealt evenly, the
    fullest rank has a W-th of them, rounded up.
    """
    total = world_size * n * fraction
    low = int(total)
    law = np.zeros(n + 1)
    for count, weight in ((low, 1 - (total - low)), (low + 1, total - low)):
        if weight > 0:
            law[min(-(-count // world_size), n)] += weight
    return law


def binomial(n: int, fraction: float) -> np.ndarray:
    """[n + 1] float64 probabilities of 0..n; in logarithms, so that a large n does not overflow."""
    if fraction in (0.0, 1.0):
        law = np.zeros(n + 1)
        law[int(n * fraction)] = 1.0
        return law
    k = np.arange(n + 1, dtype=np.float64)
    steps = np.log((n - k[:-1]) / (k[:-1] + 1)) + np.log(fraction / (1 - fraction))
    logs = np.concatenate([[0.0], np.cumsum(steps)]) + n * np.log1p(-fraction)
    return np.exp(logs)
