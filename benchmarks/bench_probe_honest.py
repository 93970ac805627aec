"""Judges probes on a real chat model where the form of a prompt does not give the answer away.

    safereg convert-gguf ... --out FOLDER      (or bash launch/demo.sh --real, then its smollm2/)
    python benchmarks/bench_probe_honest.py --model FOLDER --xstest CSV --harmbench CSV

The headline is XSTest's unsafe prompts against its safe ones: both are questions with the same
dangerous words. Beside it HarmBench against harmless orders of this project. All is fitted on
the shipped prompts (matched pairs, requests to refuse, harmless ones; `--advbench CSV` adds one
attempt), as written and with final marks stripped; layer, penalty and the attempt are chosen by
AUROC out-of-fold on the matched pairs. No row of the two tests is fitted on or chosen by: the best
attempt on the test is marked as that, and is not a result. AdvBench's attempt stands outside of the
choice.

Hidden states are kept in `--cache`, so that a second run only fits.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import installed, provenance, write_csv
from honest_attempts import FOLDS, Rows, attempts, learning_curve, with_advbench
from honest_features import States, public_sets, shipped_sets, stripped
from transformers.utils import logging

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.evaluate.generate import load_model
from safereg_dist.evaluate.statistics import bounds_of
from safereg_dist.probe_lab.fit import choose
from safereg_dist.probe_lab.layer_fit import Recipe, fit_layer
from safereg_dist.probe_lab.near_duplicates import near_duplicate_groups
from safereg_dist.probe_lab.scores import bootstrap, interval, measure
from safereg_dist.probe_lab.split import split_rows

RESULTS = Path(__file__).resolve().parent / "results" / "probe"
TEXTS = ("as written", "final mark stripped")
OWN = "own pairs, out of fold"
TESTS = {
    "XSTest unsafe, safe": ("xstest-unsafe", "xstest-safe"),
    "HarmBench, benign orders": ("harmbench", "benign_eval"),
}
LAB_LAYERS = (14, 18, 22)
"""Those that the real demo's probe tries."""
LAB = "probe fit, "
CURVE = "learning curve"
FIGURES = ("auroc", "recall_at_fpr_1", "recall_at_fpr_5")
COLUMNS = [
    *("date", "hardware", "commit", "torch", "transformers", "model", "text", "attempt", "chosen"),
    *("pairs", "draw", "is_picked", "is_best_on_test", "test", "harmful", "benign"),
    *(name + bound for name in FIGURES for bound in ("", "_low", "_high")),
    "pair_accuracy",
]
DRAWS, SEED = 1000, 0
EXTRA = "advbench"


def rows_of(sets: dict[str, list[LabelledPrompt]]) -> tuple[list[LabelledPrompt], Rows]:
    """All prompts, those fitted on first, and the same as `Rows` still without states."""
    fitted = [name for name in ("pairs", "refused", "benign", EXTRA) if name in sets]
    order = [*fitted, *dict.fromkeys(name for pair in TESTS.values() for name in pair)]
    prompts = [prompt for name in order for prompt in sets[name]]
    names = np.concatenate([[name] * len(sets[name]) for name in order])
    seen = np.isin(names, fitted)
    group = split_rows(prompts[: seen.sum()], [], 0.2, SEED).group
    fold = np.full(len(prompts), -1)
    drawn = np.random.default_rng(SEED).permutation(len(group)) % FOLDS
    fold[seen] = drawn[group]
    rows = Rows(
        texts=[prompt.messages[0]["content"] for prompt in prompts],
        sets=names,
        harmful=np.array([prompt.label == "harmful" for prompt in prompts]),
        fold=fold,
        alike=near_duplicate_groups([prompt.messages[0]["content"] for prompt in prompts]),
        states={},
    )
    return prompts, rows


def with_states(rows: Rows, sets: dict[str, Any], states: States, views: Sequence[str]) -> Rows:
    """The rows with what the model makes of them."""
    order = list(dict.fromkeys(rows.sets.tolist()))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for view in views:
        parts = [states.of(sets[name], view) for name in order]
        found[view] = {
            name: torch.cat([part[name] for part in parts], dim=max(parts[0][name].dim() - 2, 0))
            for name in parts[0]
        }
    return replace(rows, states=found)


def measured(rows: Rows, scores: np.ndarray, test: str, chosen: np.ndarray) -> dict[str, Any]:
    """Columns of one score on some rows, near-duplicates drawn together."""
    labels, spread = rows.harmful[chosen], scores[chosen].std() or 1.0
    # The figures ask for probabilities; these keep the order, which is all that is read here.
    risk = 1 / (1 + np.exp(-(scores[chosen] - scores[chosen].mean()) / spread))
    own_pairs = np.arange(len(chosen)) // 2
    groups = own_pairs if test == OWN else rows.alike[chosen]
    drawn = bootstrap(risk, labels, groups, threshold=0.5, draws=DRAWS, seed=SEED)
    found = measure(risk, labels, threshold=0.5)
    figures = {name: float(found[name][0]) for name in FIGURES}
    bounds = bounds_of({name: interval(drawn[name]) for name in FIGURES})
    counts = {"harmful": int(labels.sum()), "benign": int((~labels).sum())}
    own = {"pair_accuracy": float(np.mean(risk[::2] > risk[1::2]))} if test == OWN else {}
    return {"test": test, **counts, **figures, **bounds, **own}


def rows_of_tests(rows: Rows, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    """Rows of the table for both tests."""
    for test, sets in TESTS.items():
        yield measured(rows, scores, test, rows.of(*sets))


def lab_rows(prompts: list[LabelledPrompt], rows: Rows) -> Iterator[dict[str, Any]]:
    """What `safereg probe fit` makes of the same prompts: fitted on 60 % of them, no background."""
    fitted = np.flatnonzero(rows.fold >= 0)
    parts = split_rows([prompts[row] for row in fitted], [], 0.2, SEED)
    state = rows.states["prompt"]
    for pooling, names in (("last_prompt_token", ["last"]), ("both_prompt", ["last", "mean"])):
        every = {k: torch.cat([state[name][k] for name in names], dim=1) for k in LAB_LAYERS}
        recipe = Recipe(pooling=pooling, seed=SEED)
        fits = [fit_layer(every[k][: len(fitted)], parts, k, recipe) for k in LAB_LAYERS]
        report = choose([fit.report for fit in fits])
        fit = fits[LAB_LAYERS.index(report.layer)]
        scores = fit.probe.logit(every[report.layer]).double().numpy()
        for found in rows_of_tests(rows, scores):
            chosen = f"layer {report.layer}, penalty {report.l2}"
            yield {"attempt": f"{LAB}{pooling}", "chosen": chosen, **found}


def curve_rows(rows: Rows) -> Iterator[dict[str, Any]]:
    """More pairs beside the same unpaired rows: the tests, and the pairs that were left out."""
    for count, draw, left, scores in learning_curve(rows, draws=3):
        common = {"attempt": CURVE, "pairs": count, "draw": draw}
        for found in rows_of_tests(rows, scores):
            yield {**common, **found}
        if len(left) > 200:
            yield {**common, **measured(rows, scores, OWN, left)}


def table(prompts: list[LabelledPrompt], rows: Rows) -> list[dict[str, Any]]:
    """All rows for one text."""
    found: list[dict[str, Any]] = []
    for name, scores in attempts(rows):
        common = {"attempt": name, "chosen": scores.chosen}
        mine = [measured(rows, scores.out_of_fold, OWN, rows.pairs)]
        mine += rows_of_tests(rows, scores.out_of_fold)
        found += [{**common, **row} for row in mine]
        print(_line(name, mine), flush=True)
    mark(found)
    for row in lab_rows(prompts, rows):
        found.append(row)
        print(_line(f"{row['attempt']} ({row['chosen']})", [row]), flush=True)
    return [*found, *curve_rows(rows)]


def advbench_rows(rows: Rows) -> Iterator[dict[str, Any]]:
    """The one attempt with AdvBench's orders in the fit; they are many and all of one form."""
    scores = with_advbench(rows)
    common = {"attempt": "layers concatenated, last and mean, AdvBench too"}
    common["chosen"] = scores.chosen
    yield {**common, **measured(rows, scores.out_of_fold, OWN, rows.pairs)}
    for row in rows_of_tests(rows, scores.out_of_fold):
        yield {**common, **row}


def mark(found: list[dict[str, Any]]) -> None:
    """Marks the attempt that our own pairs pick, and the best on each test, which is no result."""
    own = max((row for row in found if row["test"] == OWN), key=lambda row: row["auroc"])
    for row in found:
        row["is_picked"] = row["attempt"] == own["attempt"]
    for test in TESTS:
        mine = [row for row in found if row["test"] == test]
        top = max(mine, key=lambda row: row["recall_at_fpr_5"])
        for row in mine:
            row["is_best_on_test"] = row is top


def _line(name: str, found: Sequence[dict[str, Any]]) -> str:
    figures = (
        f"{row['auroc']:.3f} [{row['auroc_low']:.2f}, {row['auroc_high']:.2f}] "
        f"{row['recall_at_fpr_1']:.2f} {row['recall_at_fpr_5']:.2f} "
        f"[{row['recall_at_fpr_5_low']:.2f}, {row['recall_at_fpr_5_high']:.2f}]"
        for row in found
    )
    return f"{name:58s} {' | '.join(figures)}"


def main() -> None:
    """Collects states, tries everything, and writes `honest.csv`."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--xstest", type=Path, required=True)
    parser.add_argument("--harmbench", type=Path, required=True)
    parser.add_argument("--advbench", type=Path, help="adds one attempt")
    parser.add_argument("--cache", type=Path, default=Path("runs/honest_states"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    states = States(*load_model(arguments.model, progress=False), arguments.cache)
    written = {**shipped_sets(), **public_sets(vars(arguments))}
    common = {k: v for k, v in provenance(torch.device("cpu")).items() if k in COLUMNS}
    common |= {"transformers": installed("transformers"), "model": arguments.model.name}
    found: list[dict[str, Any]] = []
    for text in TEXTS:
        sets = written if text == TEXTS[0] else stripped(written)
        views = ("prompt", "template", *(("question", "answer") if text == TEXTS[0] else ()))
        prompts, rows = rows_of({name: part for name, part in sets.items() if name != EXTRA})
        print(f"\n{text}: {OWN} | {' | '.join(TESTS)}: AUROC, recall at 1 % and 5 %", flush=True)
        found += [
            {"text": text, **row} for row in table(prompts, with_states(rows, sets, states, views))
        ]
        if EXTRA in sets:
            _, rows = rows_of(sets)
            more = list(advbench_rows(with_states(rows, sets, states, ["prompt"])))
            print(_line(more[0]["attempt"], more), flush=True)
            found += [{"text": text, **row} for row in more]
        write_csv([{**common, **row} for row in found], arguments.out / "honest.csv", COLUMNS)
    print(f"\nwritten: {arguments.out / 'honest.csv'}")


if __name__ == "__main__":
    sys.exit(main())
