"""The control of a probe: what a bag of words makes of the same rows.

Harmful orders beside benign questions can be told apart by their form alone. A probe that is no
better than counted words may have learnt that, and no harm.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.probe_lab.layer_fit import figures_with_intervals
from safereg_dist.probe_lab.scores import auroc
from safereg_dist.probe_lab.split import SplitRows

AS_GOOD = 0.02
"""AUROC by which a probe has to beat the bag of words."""


def bag_of_words(
    examples: Sequence[LabelledPrompt], rows: SplitRows, *, position: str, seed: int
) -> dict[str, Any]:
    """Figures of a logistic regression on TF-IDF of words and pairs of words, with intervals.

    It is fitted on the fit part and measured on the hold-out, both without background rows, as the
    figures of a probe are. `examples` are the rows' texts, background rows apart. `pairs_auroc` is
    that of `auroc_of_pairs`, and `pairs_words` has up to three words that tell the sides of the
    matched pairs apart best: they are texts of the data, to be shown and not to be kept.
    """
    texts = np.array([_text(example, position) for example in examples])
    real = np.arange(len(texts))
    fit, held = (real[rows.where(part)[: len(texts)]] for part in ("fit", "hold_out"))
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\S+")
    model = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    model.fit(texts[fit], rows.harmful[fit])
    probability = model.predict_proba(texts)[:, 1]
    found = figures_with_intervals(
        probability[held], rows.harmful[held], rows.group[held], threshold=0.5, seed=seed
    )
    found["pairs_auroc"] = auroc_of_pairs(examples, rows, probability)
    told = [] if found["pairs_auroc"] is None else _told_by(model, texts, rows, examples)
    return {**found, "pairs_words": told}


def _told_by(
    model: Any, texts: np.ndarray, rows: SplitRows, examples: Sequence[LabelledPrompt]
) -> list[str]:
    """What adds most to the mean difference of the two sides' logits."""
    words, regression = model
    paired = np.array([example.pair is not None for example in examples])
    harmful = rows.harmful[: len(texts)]
    sides = [words.transform(texts[paired & side]).mean(axis=0) for side in (harmful, ~harmful)]
    share = np.asarray(sides[0] - sides[1]).ravel() * regression.coef_[0]
    return words.get_feature_names_out()[np.argsort(-share)[:3]].tolist()


def auroc_of_pairs(
    examples: Sequence[LabelledPrompt], rows: SplitRows, probability: np.ndarray
) -> float | None:
    """AUROC on the matched pairs of the hold-out alone; None where there are none.

    Other rows are easier: what tells a request for a recipe from one for a bomb need not tell who
    asks about a bomb and why. `probability` is [examples or more], the examples first.
    """
    paired = [example.pair is not None for example in examples]
    chosen = np.flatnonzero(rows.where("hold_out")[: len(examples)] & paired)
    found = auroc(probability[chosen], rows.harmful[chosen]) if len(chosen) else float("nan")
    return None if np.isnan(found) else found


def is_as_good(control: dict[str, Any], metrics: dict[str, Any]) -> bool:
    """Whether the bag of words does about as well as a probe of these figures, or on the pairs."""
    named = ("auroc", "pairs_auroc")
    return any(reaches(control, metrics, name) for name in named)


def reaches(control: dict[str, Any], metrics: dict[str, Any], name: str) -> bool:
    """Whether the bag of words does about as well in one figure, where the probe has it."""
    return metrics.get(name) is not None and control[name] >= metrics[name] - AS_GOOD


def _text(example: LabelledPrompt, position: str) -> str:
    turns = [message["content"] for message in example.messages]
    answer = [example.response] if position == "response" and example.response else []
    return " ".join([*turns, *answer])
