"""What the laboratory prints."""

from collections.abc import Sequence
from typing import Any

from safereg_dist.errors import printable
from safereg_dist.probe_lab.control import is_as_good, reaches
from safereg_dist.probe_lab.layer_fit import LayerReport
from safereg_dist.risk.probe import Probe
from safereg_dist.screen.table import aligned

FIGURES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "recall_at_fpr_1": "recall at 1 % false positives",
    "recall_at_fpr_5": "recall at 5 % false positives",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "recall": "recall at the threshold",
    "false_positive_rate": "false positives at the threshold",
}
"""Names of the figures of `scores.measure` that are printed."""


def print_sweep(reports: Sequence[LayerReport], chosen: LayerReport | None) -> None:
    """One line for each layer, with kind and pooling where there are several.

    `cv` is out-of-fold in the fit part, which the choice goes by; the others are of the hold-out.
    """
    families = {(r.kind, r.pooling) for r in reports}
    rows: list[Sequence[str]] = [
        ("layer", "cv AUROC", "cv log loss", "AUROC", "recall", "FPR", "bg FPR")
    ]
    for r in reports:
        held_out = (r.auroc, r.recall, r.false_positive_rate, r.background_false_positive_rate)
        shares = [f"{share:.3f}" for share in (r.choice_auroc, *held_out)]
        rows.append([str(r.layer), shares[0], f"{r.choice_log_loss:.4f}", *shares[1:]])
    notes = [f"  {r.kind} {r.pooling}" if len(families) > 1 else "" for r in reports]
    marks = [" <- chosen" if r is chosen else "" for r in reports]
    for line, note, mark in zip(aligned(rows, left=0), ["", *notes], ["", *marks], strict=True):
        print(f"{line}{note}{mark}", flush=True)


def print_chosen(probe: Probe) -> None:
    """The chosen probe's figures with their intervals, and what its threshold promises."""
    print(f"held-out {probe.position}s, {probe.kind} probe on layer {probe.layer}:")
    print_figures(probe.meta["metrics"])
    print_guarantee(probe)


def print_figures(metrics: dict[str, Any]) -> None:
    """A line for each figure with its 95 % interval."""
    rows = [("figure", "value", "95 % interval")]
    for name, words in FIGURES.items():
        low, high = metrics["intervals"][name]
        rows.append((words, _number(metrics[name]), f"{_number(low)} to {_number(high)}"))
    print("\n".join(f"  {line}" for line in aligned(rows)))


def print_guarantee(probe: Probe) -> None:
    """Level and sample size of the threshold's recall, and for what it holds."""
    promise = probe.meta["guarantee"]
    print(
        f"threshold {probe.threshold:.4f}: flags a new {promise['of']} with probability "
        f"at least {promise['level']}, by {promise['calibration_positives']} calibration rows "
        f"({promise['method']}); holds for {promise['holds_for']}",
        flush=True,
    )


def print_control(control: dict[str, Any], metrics: dict[str, Any]) -> None:
    """What a bag of words reaches on the same hold-out, and a warning where that is as much."""
    low, high = control["intervals"]["auroc"]
    print(
        f"control, a bag of words: AUROC {control['auroc']:.3f} [{low:.3f}, {high:.3f}], the probe "
        f"{metrics['auroc']:.3f}",
        flush=True,
    )
    if metrics.get("pairs_auroc") is not None:
        print(
            f"on matched pairs alone: the bag of words {control['pairs_auroc']:.3f}, the probe "
            f"{metrics['pairs_auroc']:.3f}",
            flush=True,
        )
    if is_as_good(control, metrics):
        mend = "add matched pairs (the same words, a harmful and a harmless wish) to --data"
        if reaches(control, metrics, "pairs_auroc"):
            words = ", ".join(repr(printable(word, 30)) for word in control["pairs_words"])
            mend = (
                f"your matched pairs too are told apart by their own words (most by {words}): "
                "write pairs that differ in fewer or rarer words"
            )
        print(
            "warning: your labels are separable by form: counted words tell the classes apart "
            "about as well as the model's states, so these figures do not show that the probe "
            f"reads the wish; {mend}",
            flush=True,
        )


def print_comparison(found: dict[str, float] | None) -> None:
    """How the model's behaviour and the data's labels agree, where there are labels."""
    if found is None:
        print("no labels to compare with, or too few: all figures are about the model's behaviour")
        return
    print(
        f"against the data's labels, held-out: AUROC {found['auroc_self_supervised']:.3f} without "
        f"labels, {found['auroc_supervised']:.3f} with; agreement of the two "
        f"{found['agreement']:.3f}; behaviour and label agree on "
        f"{found['behaviour_agrees_with_labels']:.3f}",
        flush=True,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
