"""What a stored reference costs: its disk, building it, and when it has paid."""

from dataclasses import dataclass, replace

from safereg_dist.plan.flops import flops
from safereg_dist.plan.plan import Plan, arm_costs, trunk_seconds
from safereg_dist.plan.traffic import traffic
from safereg_dist.reference.store_writer import ROW_BYTES, WINDOW_PASSES

_EVERYTHING = 1 << 62  # bytes: a build keeps the states of a pass, never of other micro-batches


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrice:
    """Of the store of a data set, built on the plan's GPUs."""

    data_rows: int
    """Training and anchor rows of the data set."""
    stored_rows: float
    """Those that are risky, whose states are stored."""
    num_bytes: float
    """Of the store on disk."""
    flops: float
    """Of the reference's passes while it is built."""
    seconds: float
    """Of these passes; loading the model, reading and writing not counted."""
    probe_seconds: float
    """Of a reference-side probe on all rows before it; its results are kept (`risk.cache`), so that
    training does not repeat it."""
    saved_seconds: float
    """Of a step that trains with it, against the reference on risky rows."""
    epochs: float
    """After so many the time of the passes is saved; infinite where it never is."""


def stored_price(plan: Plan, data_rows: int) -> StoredPrice:
    """The price of `safereg reference build` for a data set of so many rows, and what it saves.

    A window of the build is planned as a step in which nothing but risk and reference runs: rows
    fall on ranks by chance, and ranks pass together until the fullest is done.
    """
    shape, settings = plan.shape, plan.settings
    per_pass = settings.rows_per_pass or settings.micro_batch
    share = -(-data_rows // settings.data_parallel)
    window = replace(
        settings,
        arm="routed",
        balance="none",
        micro_batch=per_pass,
        grad_accum=min(WINDOW_PASSES, -(-share // per_pass)),
        keep_bytes=_EVERYTHING,
    )
    windows = data_rows / (window.data_parallel * window.window_rows)
    work = flops(shape, window)
    seconds = trunk_seconds(work, traffic(shape, window), window, plan.gpu)
    building = windows * seconds["reference trunk"]
    online, stored = (
        arm_costs(shape, replace(settings, arm=arm, probe_depth=0.0), plan.gpu).seconds
        for arm in ("routed", "stored")
    )
    steps = data_rows / (settings.data_parallel * settings.window_rows)
    saved = (online - stored) * steps  # an epoch
    stored_rows = data_rows * settings.risky_fraction
    states = settings.response_tokens * shape.hidden_size * settings.itemsize
    return StoredPrice(
        data_rows=data_rows,
        stored_rows=stored_rows,
        num_bytes=stored_rows * (states + ROW_BYTES),
        flops=windows * work["reference trunk"],
        seconds=building,
        probe_seconds=windows * seconds["probe, first epoch"],
        saved_seconds=online - stored,
        epochs=building / saved if saved > 0 else float("inf"),
    )
