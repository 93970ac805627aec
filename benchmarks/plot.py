"""Draws the figures of results/kernels and results/probe from their CSV files, from nothing else.

    python benchmarks/plot.py [FOLDER ...]

Figures of kernels and training steps (cuda.csv, or cpu.csv where there is none) are in
`plot_kernels`, those of probes in `plot_probe`. logits_error.png/.svg: error of the gradient
against how far the two models are apart. Each title is worked out from the rows that are drawn.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from plot_kernels import figures_of as kernel_figures
from plot_probe import figures_of as probe_figures
from plot_style import COLOURS, OURS, STYLE, Row, read_csv, save

RESULTS = [Path(__file__).resolve().parent / "results" / name for name in ("kernels", "probe")]
VARIANTS = {
    ("float32", "False"): ("float32 (default)", COLOURS[OURS], "-", "o"),
    ("float32", "True"): ("float32, difference", "#999999", ":", "s"),
    ("bfloat16", "True"): ("bfloat16, difference", "#56B4E9", "--", "^"),
    ("bfloat16", "False"): ("bfloat16", "#0072B2", "-.", "D"),
}
"""By logits_dtype and is_difference: label, colour, dashes, marker."""


def draw_logits_error(rows: list[Row]) -> Figure:
    """Error of the gradient in the hidden states against the spread of the logits' difference."""
    rows = [row for row in rows if row["direction"] == "forward"]
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for key, (label, colour, dashes, marker) in VARIANTS.items():
        chosen = [row for row in rows if (row["logits_dtype"], row["is_difference"]) == key]
        x = [float(row["logit_difference_std"]) for row in chosen]
        median = [float(row["grad_error_median"]) for row in chosen]
        upper = [float(row["grad_error_p90"]) for row in chosen]
        axes.plot(x, median, color=colour, linestyle=dashes, marker=marker, label=label)
        axes.plot(x, upper, color=colour, linestyle=dashes, linewidth=0.6, marker=marker, ms=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("std of the difference of policy and reference logits (logit units, median)")
    axes.set_ylabel("relative error of the gradient\n(per token; thick: median, thin: 90th pct.)")
    axes.grid()
    axes.legend(title="dtype of the logits", frameon=False)
    axes.set_title(_error_message(rows), fontsize=10, fontweight="bold")
    return figure


def _error_message(rows: list[Row]) -> str:
    """What is lost where the two models are closest."""
    nearest = min(float(row["logit_difference_std"]) for row in rows)
    error = {
        (row["logits_dtype"], row["is_difference"]): float(row["grad_error_median"])
        for row in rows
        if float(row["logit_difference_std"]) == nearest
    }
    return (
        f"Logits {nearest:.2g} apart: bfloat16 errs by {error['bfloat16', 'False']:.0%} in the "
        f"gradient,\nits difference by {error['bfloat16', 'True']:.1%}, "
        f"float32 by {error['float32', 'False']:.1%}"
    )


def figures_of(folder: Path) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what the folder holds results for."""
    kernels = [path for name in ("cuda", "cpu") if (path := folder / f"{name}.csv").is_file()]
    if kernels:
        yield from kernel_figures(read_csv(kernels[0]), kernels[0].stem.upper())
    if (errors := folder / "logits_error.csv").is_file():
        yield "logits_error", draw_logits_error(read_csv(errors))
    yield from probe_figures(folder)


def main() -> int:
    """Draws what the folders have results for; the exit status."""
    drawn = 0
    folders = [Path(name) for name in sys.argv[1:]] or RESULTS
    with plt.rc_context(STYLE):
        for folder in folders:
            for name, figure in figures_of(folder):
                save(figure, folder, name)
                drawn += 1
    if not drawn:
        print(f"{', '.join(map(str, folders))}: no results: run a bench_*.py first")
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
