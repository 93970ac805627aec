"""What `bench_probe_honest.py` tries: every way to make a score of the same states.

Most are least squares on two balanced classes with an L2 penalty, which is linear discriminant
analysis with a shrunk covariance. Of several layers it is solved in its kernel form: Gram matrices
are added up over layers and poolings (concatenated features have the sum of theirs), and everything
after is on [rows, rows]. Penalty and layer are chosen out-of-fold on our own pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from honest_features import LAYERS
from scipy.linalg import cho_factor, cho_solve
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor

from safereg_dist.probe_lab.mlp import fit_mlp
from safereg_dist.probe_lab.scores import auroc

Array = np.ndarray

FOLDS = 5
PENALTIES = (0.1, 0.3, 1.0)
SEVERAL = tuple(layer for layer in LAYERS if layer >= 14)
"""The upper half of the model without its last layer: where single layers were good out-of-fold."""
SINGLE = (14, 16, 18, 20, 22, 24, 26)


class Scores(NamedTuple):
    """A score of every row, and how it came about."""

    out_of_fold: Array
    """[rows]; of the rows that were fitted on, by a fit without their fold."""
    chosen: str
    """Layer and penalty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """All rows: those fitted on first, matched pairs at the very beginning, harmful side first."""

    texts: list[str]
    sets: Array
    """[rows] name of each row's set."""
    harmful: Array
    fold: Array
    """[rows] in [0, FOLDS) for rows fitted on, near-duplicates and pairs together; else -1."""
    alike: Array
    """[rows] number that near-duplicates share."""
    states: dict[str, dict[str, Tensor]]
    """View -> name -> [layers, (places,) rows, H]."""

    @property
    def pairs(self) -> Array:
        """Numbers of the rows of matched pairs."""
        return np.flatnonzero(self.sets == "pairs")

    def of(self, *names: str) -> Array:
        """Numbers of the rows of these sets."""
        return np.flatnonzero(np.isin(self.sets, names))

    def joined(self, poolings: Sequence[str], layer: int) -> Array:
        """[rows, H x poolings] features of one layer of the view `prompt`, one after the other."""
        each = [self.features("prompt", pooling, layer) for pooling in poolings]
        return np.concatenate(each, axis=1)

    def features(self, view: str, pooling: str, layer: int) -> Array:
        """[rows, H] float64, each standardised by the rows fitted on, labels unseen."""
        if view == "template":
            states = self.states[view]["tail"][LAYERS.index(layer), int(pooling)]
        else:
            states = self.states[view][pooling][layer]
        values = states.double().numpy()
        seen = values[self.fold >= 0]
        return (values - seen.mean(0)) / (seen.std(0) + 1e-6)


class Grams:
    """Mean Gram matrices of features, each worked out once."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._known: dict[tuple[str, str, int], Array] = {}

    def of(self, view: str, poolings: Sequence[str], layers: Sequence[int]) -> Array:
        """[rows, rows] of the concatenated features, over their number."""
        keys = [(view, pooling, layer) for pooling in poolings for layer in layers]
        return sum((self._one(key) for key in keys), np.zeros(())) / len(keys)

    def _one(self, key: tuple[str, str, int]) -> Array:
        if key not in self._known:
            features = self._rows.features(*key)
            # float32: its rounding is far below the penalty.
            features = features.astype(np.float32)
            self._known[key] = (features @ features.T / features.shape[1]).astype(float)
        return self._known[key]


Fit = Callable[[Array, Array], Array]
"""(rows to fit on, rows to score) -> scores."""


def out_of_fold(rows: Rows, fitted: Array, fit: Fit) -> Array:
    """[rows] scores of all rows, of those fitted on by fits without their fold."""
    everyone = np.arange(len(rows.texts))
    scores = fit(fitted, everyone)
    for held in range(FOLDS):
        outside = np.flatnonzero(rows.fold == held)
        scores[outside] = fit(fitted[rows.fold[fitted] != held], outside)
    return scores


def best(rows: Rows, tried: Iterator[tuple[str, Array]]) -> Scores:
    """Of the scores with their names, those with the largest AUROC out-of-fold on our pairs."""
    pairs = rows.pairs
    ranked = [(auroc(s[pairs], rows.harmful[pairs]), name, s) for name, s in tried]
    _, name, scores = max(ranked, key=lambda entry: entry[0])
    return Scores(scores, name)


def least_squares(gram: Array, rows: Rows, penalty: float) -> Fit:
    """Ridge regression of +-1 with a free bias, both classes weighing the same.

    f(x) = sum_i a_i k(x_i, x) + b with (K + penalty W^-1) a + b = y and sum_i a_i = 0.
    """

    def fit(inside: Array, asked: Array) -> Array:
        harmful = rows.harmful[inside]
        weight = np.where(harmful, 0.5 / harmful.mean(), 0.5 / (1 - harmful.mean()))
        kernel = gram[np.ix_(inside, inside)]
        kernel[np.diag_indices_from(kernel)] += penalty / weight
        sides = np.stack([np.where(harmful, 1.0, -1.0), np.ones(len(inside))], axis=1)
        answer, constant = cho_solve(cho_factor(kernel, overwrite_a=True), sides).T
        bias = answer.sum() / constant.sum()
        return gram[np.ix_(asked, inside)] @ (answer - bias * constant) + bias

    return fit


def least_squares_of(features: Array, rows: Rows, penalty: float) -> Fit:
    """The same as `least_squares` of features @ features.T / H, solved in H features."""

    def fit(inside: Array, asked: Array) -> Array:
        harmful, known = rows.harmful[inside], features[inside]
        weight = np.where(harmful, 0.5 / harmful.mean(), 0.5 / (1 - harmful.mean()))
        center = weight @ known / weight.sum()
        known = known - center
        inner = (known * weight[:, None]).T @ known
        inner[np.diag_indices_from(inner)] += penalty * features.shape[1]
        target = np.where(harmful, 1.0, -1.0)  # its weighted mean is 0, so the bias is too
        solved = cho_solve(cho_factor(inner, overwrite_a=True), known.T @ (weight * target))
        return (features[asked] - center) @ solved

    return fit


def pair_direction(gram: Array, rows: Rows, penalty: float | None) -> Fit:
    """A direction from the differences of pairs alone, d_i = harmful side - harmless side.

    Without a penalty the mean difference; else least squares of d_i . w = 1, which is the mean
    difference whitened by the differences' own second moments.
    """
    first = set(rows.pairs[::2].tolist())

    def fit(inside: Array, asked: Array) -> Array:
        harmful = np.array([row for row in inside if row in first])
        between = gram[harmful] - gram[harmful + 1]
        if penalty is None:
            return between[:, asked].mean(0)
        inner = between[:, harmful] - between[:, harmful + 1]
        return (
            np.linalg.solve(inner + penalty * np.eye(len(inner)), np.ones(len(inner)))
            @ (between[:, asked])
        )

    return fit


def centred_logistic(features: Array, rows: Rows, strength: float) -> Fit:
    """Logistic regression on pair-centred features, no bias: the differences of pairs, and back."""
    first = set(rows.pairs[::2].tolist())

    def fit(inside: Array, asked: Array) -> Array:
        harmful = np.array([row for row in inside if row in first])
        apart = features[harmful] - features[harmful + 1]
        labels = np.repeat([1, 0], len(apart))
        model = LogisticRegression(C=strength, fit_intercept=False, max_iter=300, tol=1e-3)
        return features[asked] @ model.fit(np.concatenate([apart, -apart]), labels).coef_[0]

    return fit


def network(features: Array, rows: Rows, penalty: float) -> Fit:
    """The laboratory's MLP."""
    inputs, labels = torch.from_numpy(features), torch.from_numpy(rows.harmful).double()

    def fit(inside: Array, asked: Array) -> Array:
        fitted = fit_mlp(inputs[inside], labels[inside], penalty, seed=0)
        return fitted.logits(inputs[asked]).double().numpy()

    return fit


def bag_of_words(rows: Rows) -> Fit:
    """The control: TF-IDF of words and pairs of words, as in `probe_lab.control`."""
    texts = np.array(rows.texts)

    def fit(inside: Array, asked: Array) -> Array:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\S+")
        model = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
        return model.fit(texts[inside], rows.harmful[inside]).decision_function(texts[asked])

    return fit


def penalised(rows: Rows, gram: Array, fitted: Array) -> Iterator[tuple[str, Array]]:
    """Least squares by every penalty."""
    for penalty in PENALTIES:
        yield f"penalty {penalty}", out_of_fold(rows, fitted, least_squares(gram, rows, penalty))


def penalised_features(rows: Rows, features: Array, fitted: Array) -> Iterator[tuple[str, Array]]:
    """The same in the features."""
    for penalty in PENALTIES:
        fit = least_squares_of(features, rows, penalty)
        yield f"penalty {penalty}", out_of_fold(rows, fitted, fit)


def by_layer(
    tried: Callable[[int], Iterator[tuple[str, Array]]], layers: Sequence[int] = SINGLE
) -> Iterator[tuple[str, Array]]:
    """What is tried on each layer alone."""
    for layer in layers:
        for name, scores in tried(layer):
            yield f"layer {layer}, {name}", scores


def standardised(scores: Array, rows: Rows) -> Array:
    """The scores with mean 0 and spread 1 over the rows fitted on."""
    seen = scores[rows.fold >= 0]
    return (scores - seen.mean()) / seen.std()


def radial(gram: Array, width: float) -> Array:
    """The Gaussian kernel of a Gram matrix; widths are in medians of the squared distance."""
    norm = np.diag(gram)
    distance = norm[:, None] + norm - 2 * gram
    return np.exp(-distance / np.median(distance) / width)


def attempts(rows: Rows) -> Iterator[tuple[str, Scores]]:
    """Each attempt's name and its scores, in the order of the table."""
    grams, both, own = Grams(rows), ("last", "mean"), rows.states["prompt"]
    fitted = np.flatnonzero(rows.fold >= 0)
    yield "control: bag of words", Scores(out_of_fold(rows, fitted, bag_of_words(rows)), "")
    yield "own P(first token of a refusal)", Scores(own["first"].double().numpy(), "")
    yield "own likelihood of a refusal", Scores(own["refusal"].double().numpy(), "")

    def ridge(gram: Array, chosen: Array = fitted) -> Scores:
        return best(rows, penalised(rows, gram, chosen))

    def layerwise(poolings: Sequence[str]) -> Scores:
        def tried(layer: int) -> Iterator[tuple[str, Array]]:
            return penalised_features(rows, rows.joined(poolings, layer), fitted)

        return best(rows, by_layer(tried))

    for name, poolings in (("last", ["last"]), ("mean", ["mean"]), ("last and mean", both)):
        yield f"one layer, {name}", layerwise(poolings)
    several = {
        name: grams.of("prompt", poolings, SEVERAL)
        for name, poolings in (("last", ["last"]), ("mean", ["mean"]), ("last and mean", both))
    }
    concatenated = {name: ridge(gram) for name, gram in several.items()}
    for name, scores in concatenated.items():
        yield f"layers concatenated, {name}", scores
    whole = several["last and mean"]
    yield "layers concatenated, last and mean, pairs alone", ridge(whole, rows.pairs)
    yield "layers averaged, last and mean", ridge(_averaged(rows, both))
    yield "ensemble over layers, last and mean", _ensemble(rows, fitted)
    yield from _contrastive(rows, grams)
    yield "layers concatenated, Gaussian kernel", best(rows, _radial(rows, whole, fitted))
    yield "MLP on one layer, last and mean", best(rows, _networks(rows, fitted))
    template = grams.of("template", [str(place) for place in range(7)], SEVERAL)
    yield "each token of the template, layers concatenated", ridge(template)
    yield "template and mean", ridge((template + several["mean"]) / 2)
    for view, words in (("question", "asked for a verdict"), ("answer", "the model's own answer")):
        if view in rows.states:
            gram = grams.of(view, both, SEVERAL)
            yield f"{words}, layers concatenated", ridge(gram)
            yield f"{words}, beside the prompt", ridge((gram + whole) / 2)
    yield "union with the own refusal", _union(rows, concatenated["last and mean"], own["refusal"])


def with_advbench(rows: Rows) -> Scores:
    """Layers concatenated, fitted on all rows that there are to fit on."""
    gram = Grams(rows).of("prompt", ("last", "mean"), SEVERAL)
    return best(rows, penalised(rows, gram, np.flatnonzero(rows.fold >= 0)))


def _radial(rows: Rows, gram: Array, fitted: Array) -> Iterator[tuple[str, Array]]:
    for width in (0.5, 1.0, 3.0):
        kernel = radial(gram, width)
        for penalty in (0.01, 0.03, 0.1):
            fit = least_squares(kernel, rows, penalty)
            yield f"width {width}, penalty {penalty}", out_of_fold(rows, fitted, fit)


def _averaged(rows: Rows, poolings: Sequence[str]) -> Array:
    """Gram matrix of features that are means over the layers."""
    total = np.zeros(())
    for pooling in poolings:
        mean = np.mean([rows.features("prompt", pooling, layer) for layer in SEVERAL], axis=0)
        mean = mean / mean[rows.fold >= 0].std(0)
        total = total + mean @ mean.T / mean.shape[1] / len(poolings)
    return total


def _ensemble(rows: Rows, fitted: Array) -> Scores:
    """The mean of one score for each layer and pooling."""
    single = [
        best(rows, penalised_features(rows, rows.joined([pooling], layer), fitted)).out_of_fold
        for pooling in ("last", "mean")
        for layer in SEVERAL
    ]
    return Scores(np.mean([standardised(scores, rows) for scores in single], axis=0), "")


def _contrastive(rows: Rows, grams: Grams) -> Iterator[tuple[str, Scores]]:
    """Directions made of the differences of pairs alone."""
    both, pairs = ("last", "mean"), rows.pairs

    def mean_difference(layer: int) -> Iterator[tuple[str, Array]]:
        gram = grams.of("prompt", both, [layer])
        yield "", out_of_fold(rows, pairs, pair_direction(gram, rows, None))

    def whitened(layer: int) -> Iterator[tuple[str, Array]]:
        gram = grams.of("prompt", both, [layer])
        for penalty in PENALTIES:
            direction = pair_direction(gram, rows, penalty)
            yield f"penalty {penalty}", out_of_fold(rows, pairs, direction)

    def logistic(layer: int) -> Iterator[tuple[str, Array]]:
        features = rows.joined(both, layer)
        for strength in (1e-3, 1e-2):
            fit = centred_logistic(features, rows, strength)
            yield f"C {strength}", out_of_fold(rows, pairs, fit)

    yield "pairs: mean difference", best(rows, by_layer(mean_difference))
    yield "pairs: whitened difference", best(rows, by_layer(whitened))
    yield "pairs: logistic, pair-centred", best(rows, by_layer(logistic, (14, 18, 22)))


def _networks(rows: Rows, fitted: Array) -> Iterator[tuple[str, Array]]:
    for layer in (18, 22):
        features = rows.joined(("last", "mean"), layer)
        for penalty in (0.01, 0.1):
            scores = out_of_fold(rows, fitted, network(features, rows, penalty))
            yield f"layer {layer}, penalty {penalty}", scores


def _union(rows: Rows, scores: Scores, refusal: Tensor) -> Scores:
    """A logistic regression of two numbers: the score, and the log-likelihood of a refusal."""
    told = [standardised(s, rows) for s in (scores.out_of_fold, refusal.double().numpy())]
    two, pairs = np.stack(told, axis=1), rows.pairs

    def fit(inside: Array, asked: Array) -> Array:
        model = LogisticRegression().fit(two[inside], rows.harmful[inside])
        return model.decision_function(two[asked])

    return Scores(out_of_fold(rows, pairs, fit), scores.chosen)


def learning_curve(rows: Rows, draws: int) -> Iterator[tuple[int, int, Array, Array]]:
    """(pairs fitted on, draw, rows of pairs left out, scores); all unpaired rows are fitted on."""
    gram = Grams(rows).of("prompt", ("last", "mean"), SEVERAL)
    alone = rows.of("refused", "benign")
    for count in (0, 50, 100, 200, len(rows.pairs) // 2):
        for draw in range(1 if count in (0, len(rows.pairs) // 2) else draws):
            order = np.random.default_rng(draw).permutation(len(rows.pairs) // 2)
            taken, left = (
                np.sort(np.concatenate([2 * part, 2 * part + 1]))
                for part in (order[:count], order[count:])
            )
            fit = least_squares(gram, rows, 0.3)
            yield count, draw, left, fit(np.append(taken, alone), np.arange(len(rows.texts)))
