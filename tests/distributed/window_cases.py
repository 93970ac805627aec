"""The cases that windows of rows are tested on; read by the ranks and by the judge."""

from dataclasses import dataclass

import numpy as np
from step_cases import Case, micro_batch_rows
from support.extent import FULL, cases

from safereg_dist.types import Row

ROWS_PER_MICRO_BATCH = 3


@dataclass(frozen=True)
class WindowCase(Case):
    """One way to bring the risky rows of a step before the reference."""

    balance: str = "none"
    pays: bool = True
    """What the cost model of an exchange is made to say."""
    rows_per_pass: int = 2
    keep_bytes: int = 16 << 20
    is_small: bool = False
    """Models of one layer, for many steps."""

    def overrides(self) -> list[str]:
        """The case as `key=value` overrides."""
        return [
            *super().overrides(),
            f"reference.balance={self.balance}",
            f"reference.keep_bytes={self.keep_bytes}",
            f"reference.rows_per_pass={self.rows_per_pass}",
            *(("model=small-policy", "reference.model=small-reference") if self.is_small else ()),
        ]


EQUAL = (
    WindowCase("routed-1"),
    WindowCase("routed-4", grad_accum_steps=4),
    WindowCase("kept-for-one-4", grad_accum_steps=4, keep_bytes=0),
    WindowCase("exchanged-1", balance="exchange"),
    WindowCase("exchanged-4", grad_accum_steps=4, balance="exchange"),
    WindowCase("exchanged-one-by-one-4", grad_accum_steps=4, balance="exchange", keep_bytes=0),
    # All rows in one pass: an exchange would not save one, which is worth more than it costs.
    WindowCase(
        "exchange-costs-4", grad_accum_steps=4, balance="exchange", pays=False, rows_per_pass=64
    ),
)


def equal_on(world_size: int) -> tuple[WindowCase, ...]:
    """All cases on two ranks; on the others, unless in the full mode, one each."""
    if FULL or world_size == 2:
        return EQUAL
    chosen = {1: "routed-4", 3: "exchanged-one-by-one-4", 4: "exchanged-4"}[world_size]
    return tuple(case for case in EQUAL if case.name == chosen)


DEAL = WindowCase("dealt-2", grad_accum_steps=2, balance="deal")
RANDOM_KINDS = cases([("none", 1), ("exchange", 3)], [("none", 3), ("exchange", 1)])
RANDOM = tuple(
    WindowCase(
        f"random-{balance}-{accum}",
        grad_accum_steps=accum,
        balance=balance,
        is_small=True,
        rows_per_pass=4,
    )
    for balance, accum in RANDOM_KINDS
)
RANDOM_STEPS = {1: 80, 3: 20} if FULL else {1: 16, 3: 12}
"""Optimizer steps by accumulation, 28 in all, or 200 of twice as many cases in the full mode."""
QUIET = (
    WindowCase("quiet-plain", objective="none", grad_accum_steps=3),
    WindowCase("quiet-none", grad_accum_steps=3),
    WindowCase("quiet-exchange", grad_accum_steps=3, balance="exchange"),
)
LOPSIDED = WindowCase("lopsided", grad_accum_steps=3, balance="exchange")


def rows_of_rank(case: Case, rank: int) -> list[Row]:
    """A rank's rows of one optimizer step."""
    return [
        row
        for m in range(case.grad_accum_steps)
        for row in micro_batch_rows(rank, m, anchors=case.anchors)
    ]


def quiet_rows(case: Case, rank: int) -> list[Row]:
    """Rows of which none is risky."""
    return [changed(row, risk=0.0, is_masked=False) for row in rows_of_rank(case, rank)]


def lopsided_rows(case: Case, rank: int) -> list[Row]:
    """All risky rows on rank 0: eight of its nine; all are answered."""
    return [
        changed(row, risk=float(rank == 0 and i != 4), is_masked=False)
        for i, row in enumerate(rows_of_rank(case, rank))
    ]


def random_rows_of_rank(case: Case, rank: int, step: int) -> list[Row]:
    """Rows of a random pattern: no rank risky, some, or all; whole ranks and rows masked."""
    common = np.random.default_rng([case.grad_accum_steps, step])
    share = common.choice([0.0, 0.1, 0.5, 1.0])
    own = np.random.default_rng([case.grad_accum_steps, step, rank])
    share = 0.0 if own.random() < 0.3 else share  # a rank without a risky row among others
    masked = 1.0 if own.random() < 0.1 else 0.2
    rows = []
    for m in range(case.grad_accum_steps):
        rows += micro_batch_rows(rank, m + step % 5, anchors=False)
    return [
        changed(row, risk=float(own.random() < share), is_masked=own.random() < masked)
        for row in rows
    ]


def changed(row: Row, *, risk: float, is_masked: bool) -> Row:
    """The row with this risk, and all or none of what follows its prompt to learn."""
    prompt = 2
    mask = [int(t >= prompt and not is_masked) for t in range(len(row.input_ids))]
    return Row(
        id=row.id,
        input_ids=row.input_ids,
        loss_mask=mask,
        prompt_ends=[] if is_masked else [prompt],
        risk=risk,
        prompt_key=row.prompt_key,
    )
