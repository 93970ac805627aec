"""Rows dealt to fit, calibration and hold-out, near-duplicates together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import DataError, ProbeError
from safereg_dist.probe_lab.logistic import FOLDS
from safereg_dist.probe_lab.near_duplicates import near_duplicate_groups

REGIONS = ("fit", "calibrate", "hold_out")


@dataclass(frozen=True, slots=True)
class SplitRows:
    """Labels and parts of all rows; background rows are negatives."""

    harmful: np.ndarray
    background: np.ndarray
    part: np.ndarray
    fold: np.ndarray
    """Cross-validation fold inside the fit part."""
    group: np.ndarray
    """Number that near-duplicates share."""

    def where(self, part: str) -> np.ndarray:
        """[rows] bool: the rows of one of `REGIONS`."""
        return self.part == REGIONS.index(part)

    @property
    def calibration_positives(self) -> np.ndarray:
        """Harmful calibration rows, near-duplicates once: the guarantee counts independent rows."""
        chosen = self.where("calibrate") & self.harmful
        first = np.zeros_like(chosen)
        first[np.flatnonzero(chosen)[np.unique(self.group[chosen], return_index=True)[1]]] = True
        return first


def split_rows(
    labelled: Sequence[LabelledPrompt],
    negatives: Sequence[LabelledPrompt],
    held_out_fraction: float,
    seed: int,
    *,
    progress: bool = False,
) -> SplitRows:
    """Parts and folds by group of near-duplicate prompts, in equal shares of each label.

    Matched pairs are one group too: of a pair that is dealt to two parts, one side would teach the
    other side's label to its words. A group goes where its first row goes, also where its rows
    disagree about the label.
    """
    prompts = [*labelled, *negatives]
    harmful = np.array([p.label == "harmful" for p in prompts])
    background = np.arange(len(prompts)) >= len(labelled)
    texts = [" ".join(message["content"] for message in p.messages) for p in prompts]
    group = _with_pairs(near_duplicate_groups(texts, progress=progress), prompts)
    part, fold = np.zeros((2, len(prompts)), dtype=int)
    bounds = (1 - 2 * held_out_fraction, 1 - held_out_fraction)
    draw = np.random.default_rng(seed)
    is_first = group == np.arange(len(group))
    for stratum in (harmful, ~harmful & ~background, background):
        first = np.flatnonzero(is_first & stratum)
        places = np.argsort(draw.permutation(len(first)))
        part[first] = np.searchsorted(bounds, (places + 0.5) / max(len(first), 1))
        fold[first] = places % FOLDS
    return SplitRows(harmful, background, part[group], fold[group], group)


def _with_pairs(group: np.ndarray, prompts: Sequence[LabelledPrompt]) -> np.ndarray:
    """The groups, those of a matched pair joined; a group's number stays its first row."""
    first_of: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        if prompt.pair is not None:
            one, other = group[first_of.setdefault(prompt.pair, row)], group[row]
            group[group == max(one, other)] = min(one, other)
    return group


def check_enough(
    rows: SplitRows, recall: float, held_out_fraction: float, *, by_behaviour: bool = False
) -> None:
    """Says before the states are collected what the threshold would refuse after they are.

    Args:
        by_behaviour: harmful are the prompts that the model refused.
    Raises:
        DataError: a part is without one of the classes.
        ProbeError: too few positives for the recall.
    """
    found = int(rows.calibration_positives.sum())
    needed = math.ceil(1 / (1 - recall) - 1e-9) - 1
    in_all = math.ceil(needed / held_out_fraction)
    if by_behaviour and found < needed:
        raise ProbeError(
            f"the model refused {rows.harmful.sum()} of {(~rows.background).sum()} prompts, and a "
            f"recall of {recall} needs about {in_all} refused ones that differ: give labels "
            "(`label` in --data, without --self-supervised), or a model that refuses"
        )
    for part in REGIONS:
        for harmful in (True, False):
            if not (rows.where(part) & (rows.harmful == harmful)).any():
                raise DataError(
                    f"too few {'harmful' if harmful else 'benign'} prompts: none is left for the "
                    f"part `{part}`: give at least {math.ceil(1 / held_out_fraction)} of each kind "
                    "that differ"
                )
    if found < needed:
        raise ProbeError(
            f"a recall of {recall} needs {needed} different harmful prompts for calibration, "
            f"about {in_all} in all, found {found} for it: give more harmful prompts or lower "
            "--recall"
        )
