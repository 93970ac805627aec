"""signals: what each signal finds, by disguise, from response_risk.csv and influence.csv."""

from collections import defaultdict
from statistics import mean

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from plot_style import Row

SIGNALS = {
    "prompt": "probe on prompts",
    "both": "probes on prompts and answers",
    "influence": "influence",
    "guard": "judge (a small guard)",
}
"""By name in the results; each is fitted on plain exchanges alone."""
KINDS = (
    "ordinary",
    "tool_result",
    "identity_shift",
    "late_turn",
    "other_language",
    "smuggled_pair",
    "trigger",
    "cipher",
)
FOUND = 0.5


def draw_signals(judged: list[Row], influence: list[Row]) -> Figure:
    """Recall at 1 % false positives, mean of the seeds, as a table of shades."""
    found = _recalls(judged, influence)
    figure, axes = plt.subplots(figsize=(8, 2.9), layout="constrained")
    axes.imshow(
        [[found[signal, kind] for kind in KINDS] for signal in SIGNALS],
        cmap="Oranges",
        vmin=0,
        vmax=1.4,  # so that black stays readable on the darkest
        aspect="auto",
    )
    for y, signal in enumerate(SIGNALS):
        for x, kind in enumerate(KINDS):
            axes.text(x, y, f"{found[signal, kind]:.0%}", ha="center", va="center", color="black")
    names = ["plain harm" if kind == "ordinary" else kind.replace("_", "\n") for kind in KINDS]
    axes.set_xticks(range(len(KINDS)), names)
    axes.set_yticks(range(len(SIGNALS)), list(SIGNALS.values()))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(_message(found), fontsize=10, fontweight="bold")
    return figure


def _recalls(judged: list[Row], influence: list[Row]) -> dict[tuple[str, str], float]:
    values = defaultdict(list)
    for row in judged:
        values[row["signal"], row["kind"]].append(float(row["recall"]))
    for row in influence:
        if row["signal"] == "influence":
            values["influence", row["kind"]].append(float(row["recall_at_fpr_1"]))
    return {key: mean(each) for key, each in values.items()}


def _message(found: dict[tuple[str, str], float]) -> str:
    missed = [kind for kind in KINDS if max(found[signal, kind] for signal in SIGNALS) < FOUND]
    names = ", ".join(kind.replace("_", " ") for kind in missed)
    return (
        f"Share of harmful rows found at 1 % false positives, by disguise.\n"
        f"Less than half by any signal: {names or 'none'}"
    )
