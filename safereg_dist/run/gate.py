"""The gate before training: the risk of rows; refuses if too many are held back, or hide.

Risks from the frozen reference are computed for the rows that the run begins with, and cached: the
cost of the first epoch is paid earlier, not twice.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from safereg_dist.data import Sampler
from safereg_dist.errors import ConfigError
from safereg_dist.factory import Run
from safereg_dist.parallel.comm import Ranks, capture
from safereg_dist.risk.stage import RiskStage
from safereg_dist.run.shape import Shape, lower_share, refuse_what_hides, upper_share
from safereg_dist.screen.progress import progress_bar
from safereg_dist.types import Row


class RowRisk(NamedTuple):
    """The risk of one training row, and where it came from."""

    id: str
    risk: float | None
    """nan where it failed."""
    by_category: dict[str, float | None]
    source: str
    note: str | None
    prompt_tokens: int
    num_tokens: int


def row_risks(
    stream: Sampler,
    risk: RiskStage,
    *,
    count: int,
    micro_batch_size: int,
    filler: Row,
    ranks: Ranks,
) -> Iterator[RowRisk]:
    """Yields the risk of each of the first `count` training rows of this rank.

    Collectives: those of the risk stage and one 8-byte MAX all-reduce, for each of
    ceil(count / micro_batch_size) batches; every rank passes the same `count` and reads every item.
    """
    rows = stream.first_rows(count)
    with progress_bar(total=count, desc="risk of rows", unit=" rows", shown=ranks.is_main) as bar:
        for begin in range(0, count, micro_batch_size):
            chosen = [next(rows) for _ in range(min(micro_batch_size, count - begin))]
            batch = [filler if row is None else row for row in chosen]
            result = capture(risk, batch, in_first_epoch=True)
            ranks.raise_if_any_failed(result)
            found = result.value
            for index, row in enumerate(batch):
                if row.id:
                    yield RowRisk(
                        row.id,
                        found.values[index],
                        {name: values[index] for name, values in found.by_category.items()},
                        found.sources[index],
                        found.notes.get(index),
                        row.prompt_ends[-1] if row.prompt_ends else 0,
                        len(row.input_ids),
                    )
            bar.update(len(chosen))
    risk.take_sums()  # the metrics of step 0 are its own


def is_held_back(risk: float | None, threshold: float) -> bool:
    """True at or above the threshold, and where the risk failed."""
    return risk is not None and not risk < threshold


def refuse_too_many_held_back(run: Run) -> float | None:
    """The share of rows that would be held back; None where nothing was counted.

    Raises if more rows would be held back, or hide (`shape`), than the configuration allows.
    Counts the rows that the run will see (all rows if risk is a column), or the first
    `risk.gate_rows` if a judge or a probe on the policy gives the risk or rows are streamed. If
    these are not all rows of the data, the exact one-sided 95 % lower bound of the share is
    compared with the limit, and the upper one is what is returned.

    Raises:
        ConfigError: too many rows at or above the threshold, or too many that hide below it.
    Collectives: those of `row_risks`, one SUM of 88 bytes, gathers of texts.
    """
    config, ranks, sources, risk = run.config, run.ranks, run.sources, run.regularizer.risk
    limit = config.risk.max_held_back + config.data.declared_poison
    if not config.needs_risk or limit >= 1:
        return None
    positions = sources.total_steps * sources.rows_per_step
    count = sources.stream.rows_within(positions)
    if sources.train is not None and config.risk.estimator == "column":
        count = sources.stream.most_rows  # costs nothing
    elif sources.train is None or risk.looks_ahead or config.risk.source == "policy":
        count = min(count, -(-config.risk.gate_rows // ranks.world_size))
        with ranks.together():  # a streamed row may be one that cannot be used
            ahead = [row for row in sources.stream.first_rows(count) if row is not None]
        run.regularizer.risk.prefetch(ahead)
    screened = row_risks(
        sources.stream,
        risk,
        count=count,
        micro_batch_size=config.train.micro_batch_size,
        filler=sources.filler,
        ranks=ranks,
    )
    threshold = run.regularizer.coefficient.threshold
    seen = ((is_held_back(r.risk, threshold), r.risk, r.by_category) for r in screened)
    own = Shape.of(seen, threshold, risk.positions)
    total = ranks.sum_(torch.tensor(own.counts, device=ranks.device)).tolist()
    shape = Shape.of_counts(total, risk.benign_share(threshold))
    with ranks.together():
        is_sample = sources.train is None or len(sources.train) > shape.rows
        how = {"is_sample": is_sample, "look": "with `safereg audit CONFIG.yaml`"}
        check_share(shape.held, shape.rows, limit=limit, **how)
        refuse_what_hides(shape, config, threshold, **how)
    return upper_share(shape.held, shape.rows, is_sample=is_sample) if shape.rows else None


def check_share(held: int, rows: int, *, limit: float, is_sample: bool, look: str) -> None:
    """Raises ConfigError where a larger share than `limit` is held back; `look` says how to look.

    Of a sample the exact one-sided 95 % lower bound of the share is compared.
    """
    if lower_share(held, rows, is_sample=is_sample) > limit:
        kind = "rows looked at" if is_sample else "rows"
        raise ConfigError(
            f"{held} of {rows} {kind} ({held / rows:.1%}) would be held back, more than "
            f"risk.max_held_back + data.declared_poison = {limit:.1%}: look at them, {look}; then "
            "mend the data or the probe, allow rows one by one (risk.override), say what share is "
            "known to be risky (data.declared_poison), or accept this share "
            f"(risk.max_held_back={math.ceil(100 * held / rows) / 100:g})"
        )
