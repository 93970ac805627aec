"""Claimed: in no figure of the benchmarks, drawn from its committed table, does a text lie on
another text, on a line or on a marker, or beyond the page.

Geometry is read from what matplotlib has drawn. Figures whose texts are all legends and titles are
left out; those of the recorded demonstrations are in test_report_figures.
"""

from collections.abc import Iterator

import bench_plan
import evidence_tables
import plot
import plot_overhead
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from plot_style import STYLE, read_csv
from support.figures import touches

RESULTS = plot.RESULTS[0].parent


def kernels_and_probes() -> Iterator[tuple[str, Figure]]:
    for folder in plot.RESULTS:
        yield from plot.figures_of(folder)


def others() -> Iterator[tuple[str, Figure]]:
    overhead = read_csv(RESULTS / "overhead.csv")
    yield "overhead", plot_overhead.draw_overhead(overhead)
    yield "bytes", plot_overhead.draw_bytes(overhead)
    yield "evidence", evidence_tables.draw(evidence_tables.of_all_prompts())


def plans() -> Iterator[tuple[str, Figure]]:
    rows = read_csv(RESULTS / "plan" / "plan.csv")
    yield "window", bench_plan.draw_window([{**row, "gpus": int(row["gpus"])} for row in rows])
    for name in bench_plan.MODELS:
        shape = bench_plan.read_shape(name)
        plan = bench_plan.make_plan(shape, bench_plan.BASE, bench_plan.GPU)
        yield name, bench_plan.draw(plan, name=name)
        if name == "Llama-2-7B":
            layouts = bench_plan.layout_plan(shape)
            yield "layouts", bench_plan.draw_layouts(layouts, bench_plan.LAYOUT, name=name)


@pytest.mark.parametrize("figures", [kernels_and_probes, others, plans])
def test_nothing_lies_on_anything(figures) -> None:
    with plt.rc_context(STYLE):
        found = {name: touches(figure) for name, figure in figures()}
        plt.close("all")
    assert {name: texts for name, texts in found.items() if texts} == {}
    assert found
