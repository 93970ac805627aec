"""What all figures share: colours, the style, how results are read and figures written."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from safereg_dist.plan.figures import STYLE

__all__ = ["COLOURS", "OURS", "PRODUCTS", "STYLE", "Row", "read_csv", "save"]

Row = dict[str, str]

OURS, PRODUCTS = "ours", "bare products"
COLOURS = {
    PRODUCTS: "#E6E6E6",
    OURS: "#E69F00",
    "torch eager": "#4D4D4D",
    "torch compile": "#999999",
    "torch linear_cross_entropy": "#C4C4C4",
    "Liger KLDIVLoss / JSD": "#0072B2",
    "Liger chunked JSDLoss": "#0072B2",
    "Liger FLCE + FLJSD": "#56B4E9",
    "Liger FLCE + FLKLDiv": "#9AD0F0",
    "cut-cross-entropy": "#009E73",
    "quack": "#CC79A7",
}
"""Ours is orange, torch is grey, Liger is blue; told apart by the colour-blind, and in print."""


def read_csv(path: Path) -> list[Row]:
    """The rows of one results file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes PNG and SVG."""
    figure.savefig(folder / f"{name}.png", dpi=160)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    print(f"written: {folder / name}.png and .svg")
