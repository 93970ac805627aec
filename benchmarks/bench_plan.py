"""Plans of real models on 8 to 4096 GPUs: nothing is measured here, all of it is worked out.

    python benchmarks/bench_plan.py

Writes results/plan/plan.csv, one row a model, GPU count, risky fraction and arm, and the figures.
`curve` says what a row is for: `fraction` (64 GPUs, all fractions), `scaling` (10 % risky, all GPU
counts) and `window` (1 % risky, 512 rows a step on 2 to 4096 GPUs; from 1024 on one row a GPU).
Writes results/plan/layouts.csv and a figure for Megatron layouts of the dense models, the smallest
that fit, at 5 % risky: `batches` (32 micro-batches a replica) and `rows` (as many rows a step as on
512 GPUs).
The planner itself is measured by tests/distributed/test_plan_measured.py.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from plot_style import STYLE, save
from tqdm import tqdm

from safereg_dist.parallel.hardware import GIB, find_gpu
from safereg_dist.plan.figures import ARM_STYLES, FRACTIONS, GPU_COUNTS, draw
from safereg_dist.plan.megatron.figures import draw_layouts, layout_curve
from safereg_dist.plan.megatron.plan import LayoutPlan, make_layout_plan
from safereg_dist.plan.megatron.proposal import propose
from safereg_dist.plan.pipeline import bubble_room
from safereg_dist.plan.plan import make_plan
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape, read_shape

RESULTS = Path(__file__).resolve().parent / "results" / "plan"
GPU = find_gpu("H100-SXM")
ROWS_PER_STEP = 512
MODELS = ("Llama-2-7B", "Falcon-40B", "Mixtral-8x7B", "Llama-3.1-70B", "Llama-3.1-405B")
LABELLED_AT = {"always_on": 2, "routed": 6, "stored": 6}
"""Where along its line an arm's name stands in the figure of the window."""
LABEL_STYLE: dict[str, Any] = {"xytext": (-8, 5), "textcoords": "offset points", "ha": "right"}
BASE = Settings(
    world_size=64, seq_length=2048, micro_batch=1, grad_accum=8, activation_checkpointing=True
)

LAYOUT = {
    **{"engine": "megatron", "seq_length": 4096, "micro_batch": 1, "grad_accum": 32},
    "risky_fraction": 0.05,
}


def cases(curve: str) -> Iterator[Settings]:
    """The settings of one curve."""
    if curve == "fraction":
        yield from (replace(BASE, risky_fraction=fraction) for fraction in FRACTIONS)
    elif curve == "scaling":
        yield from (replace(BASE, world_size=count) for count in GPU_COUNTS)
    else:
        for count in (2, 4, *GPU_COUNTS):
            accum = max(1, ROWS_PER_STEP // count)
            yield replace(BASE, world_size=count, grad_accum=accum, risky_fraction=0.01)


def rows_of(name: str, shape: ModelShape, curve: str) -> Iterator[dict[str, Any]]:
    """Rows of the CSV, one an arm."""
    for settings in cases(curve):
        plan = make_plan(shape, settings, GPU)
        for arm, costs in plan.arms.items():
            yield {
                "curve": curve,
                "model": name,
                "parameters": shape.parameters,
                "gpu": GPU.name,
                "gpus": settings.world_size,
                "rows_per_step": settings.world_size * settings.window_rows,
                "seq_length": settings.seq_length,
                "risky_fraction": settings.risky_fraction,
                "arm": arm,
                "flops": f"{costs.total_flops:.6g}",
                "bytes_per_gpu": f"{costs.total_bytes:.6g}",
                "seconds": f"{costs.seconds:.6g}",
                "gpu_gib": f"{costs.memory.gpu / GIB:.2f}",
                "fits": costs.memory.gpu <= plan.usable_bytes,
                **{f"{k}_overhead": f"{v:.6f}" for k, v in plan.overhead(arm).items()},
            }


def layout_plan(shape: ModelShape) -> LayoutPlan:
    """The smallest Megatron layout that fits on 512 GPUs."""
    settings, reasons = propose(shape, {**LAYOUT, "world_size": 512}, GPU)
    return make_layout_plan(shape, settings, GPU, proposed=reasons)


def rows_of_layouts(name: str, shape: ModelShape) -> Iterator[dict[str, Any]]:
    """Rows of the layouts' CSV, one an arm."""
    base = layout_plan(shape)
    for curve in ("batches", "rows"):
        for plan in layout_curve(base, LAYOUT, keeps_rows=curve == "rows"):
            s, pipeline = plan.settings, plan.pipeline
            for arm, costs in plan.arms.items():
                yield {
                    "curve": curve,
                    "model": name,
                    "gpus": s.world_size,
                    "tensor": s.tensor_parallel,
                    "pipeline": s.pipeline_parallel,
                    "context": s.context_parallel,
                    "data": s.data_parallel,
                    "micro_batches": s.grad_accum,
                    "slots": pipeline.slots,
                    "idle_slots": pipeline.idle_slots,
                    "bubble_room": bubble_room(pipeline),
                    "arm": arm,
                    "reference_slots": f"{costs.reference_slots:.4f}",
                    "flops": f"{costs.total_flops:.6g}",
                    "bytes_per_gpu": f"{costs.total_bytes:.6g}",
                    "seconds": f"{costs.seconds:.6g}",
                    "gpu_gib": f"{costs.fullest[1] / GIB:.2f}",
                    "fits": costs.fullest[1] <= plan.usable_bytes,
                    **{f"{k}_overhead": f"{v:.6f}" for k, v in plan.overhead(arm).items()},
                }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file, all of it or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def draw_window(rows: list[dict[str, Any]]) -> Figure:
    """Bytes over plain fine-tuning at 1 % risk, against GPUs, by model and arm."""
    rows = [row for row in rows if row["curve"] == "window"]
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    first = next(iter(MODELS))
    for arm in ("always_on", "routed", "stored"):
        label, colour = ARM_STYLES[arm]
        for model in MODELS:
            line = [row for row in rows if row["model"] == model and row["arm"] == arm]
            x, y = [r["gpus"] for r in line], [float(r["bytes_overhead"]) for r in line]
            axes.plot(x, y, color=colour, linewidth=1.6 if model == first else 0.6)
            if model == first:
                at = LABELLED_AT[arm]
                axes.annotate(label, (x[at], y[at]), **LABEL_STYLE, color=colour)
    axes.axhline(0.05, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, 8, 32, 128, 512, 4096], ["2", "8", "32", "128", "512", "4096"])
    axes.set_xlim(2, 12000)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"GPUs, {ROWS_PER_STEP} rows a step (from 1024 on one row a GPU), 1 % risky")
    axes.set_ylabel(f"bytes over plain fine-tuning\n(thick: {first}, thin: the other models)")
    axes.grid(axis="y")
    axes.set_title(_window_message(rows), fontsize=10, fontweight="bold")
    return figure


def _window_message(rows: list[dict[str, Any]]) -> str:
    """Up to how many GPUs the routed reference stays below 5 % for every model."""
    over = [r["gpus"] for r in rows if r["arm"] == "routed" and float(r["bytes_overhead"]) > 0.05]
    below = [r["gpus"] for r in rows if r["gpus"] < min(over, default=10**9)]
    stored = max(float(r["bytes_overhead"]) for r in rows if r["arm"] == "stored")
    return (
        f"One pass a step keeps the reference below 5 % of the bytes up to {max(below)} GPUs;\n"
        f"stored states cost at most {stored:.1%}, on any number"
    )


def main() -> int:
    """Writes the table and the figures."""
    argparse.ArgumentParser(description=str(__doc__).splitlines()[0]).parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    shapes = {name: read_shape(name) for name in MODELS}
    rows = [
        row
        for name, shape in tqdm(shapes.items(), desc="plan", unit=" models")
        for curve in ("fraction", "scaling", "window")
        for row in rows_of(name, shape, curve)
    ]
    write(RESULTS / "plan.csv", rows)
    dense = {name: s for name, s in shapes.items() if s.parameters == s.active_parameters}
    del dense["Falcon-40B"]  # its attention and MLP run side by side, which is not Megatron's layer
    layouts = [row for name, shape in dense.items() for row in rows_of_layouts(name, shape)]
    write(RESULTS / "layouts.csv", layouts)
    with plt.rc_context(STYLE):
        for name, shape in shapes.items():
            save(draw(make_plan(shape, BASE, GPU), name=name), RESULTS, name.lower())
        for name, shape in dense.items():
            figure = draw_layouts(layout_plan(shape), LAYOUT, name=name)
            save(figure, RESULTS, f"{name.lower()}-megatron")
        save(draw_window(rows), RESULTS, "bytes_512_rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
