"""Figures of `safereg eval` against reference implementations, case by case.

    python benchmarks/agreement.py

Writes results/agreement.csv, a row for each figure and peer: how many cases, how many of them equal
(to 1e-6; likelihoods, which are float32, to 1e-4), the largest difference; and
results/agreement_keyword.csv, the pairs on which the keyword judge differs from the verdict that
was written next to them. Nothing is timed; the same versions give the same files.
"""

import csv
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.data.rendering import render_prompts
from safereg_dist.evaluate.evaluate import evaluate_model
from safereg_dist.evaluate.generate import load_model, response_log_likelihood
from safereg_dist.evaluate.judges import get_judge
from safereg_dist.evaluate.scores import rouge_l, squad_exact_match, squad_f1

RESULTS = Path(__file__).resolve().parent / "results"
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))  # `support`
EXACT, LIKELY = 1e-6, 1e-4
WORDS = (
    "the a an The AN of in Paris paris, year 1,999 1999 U.S. us caf\u00e9 Caf\u00e9 na\u00efve "
    "state-of-the-art it's its don't rope ropes running runs runner and \u2014 the\u2014end !? _"
).split(" ")
"""What texts are drawn from: articles, punctuation, other scripts' letters, words of one stem."""


class Agreement(NamedTuple):
    """One figure against one peer."""

    figure: str
    against: str
    version: str
    cases: int
    equal: int
    largest_difference: float


def all_rows() -> Iterator[Agreement]:
    """All comparisons; those whose peer is not installed are left out."""
    pairs = keyword_pairs()
    differing = sum(is_differing(pair) for pair in pairs)
    agreed = len(pairs) - differing
    yield Agreement(
        "keyword verdict",
        "verdicts beside the answers",
        "",
        len(pairs),
        agreed,
        float(differing > 0),
    )
    yield from text_rows(drawn_texts(400))
    with tempfile.TemporaryDirectory() as folder:
        yield from likelihood_rows(Path(folder))


# ---- the keyword judge


def keyword_pairs() -> list[dict[str, Any]]:
    """Prompt, answer and whether it refuses, by its meaning."""
    lines = (TESTS / "support" / "keyword_pairs.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def is_differing(pair: dict[str, Any]) -> bool:
    """Whether the judge says otherwise."""
    return (
        get_judge("keyword").is_refusal(_prompt(pair["prompt"]), pair["answer"]) != pair["refuses"]
    )


def _prompt(text: str) -> LabelledPrompt:
    turns = [{"role": "user", "content": text}]
    return LabelledPrompt(id=text, messages=turns, label="task", response=None)


# ---- texts


def drawn_texts(count: int) -> list[tuple[str, list[str]]]:
    """(answer, accepted answers), every other answer near one that is accepted; always the same."""
    chance = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(0, longest)))

    found = []
    for place in range(count):
        accepted = [text(6) for _ in range(chance.randint(1, 3))]
        near = [word for word in chance.choice(accepted).split() if chance.random() < 0.8]
        found.append((text(6) if place % 2 else " ".join([*near, text(1)]), accepted))
    return found


def text_rows(cases: Sequence[tuple[str, list[str]]]) -> Iterator[Agreement]:
    """SQuAD and ROUGE-L against the packages, and against the rules as fractions."""
    from rouge_score.rouge_scorer import RougeScorer
    from support.text_oracles import rouge_l_score, squad_scores

    rules = [squad_scores(*case) for case in cases]

    def row(figure: str, against: str, package: str, pairs: list[tuple[float, float]]) -> Agreement:
        return _agreement(figure, against, version(package) if package else "", pairs)

    exact, f1 = ([measure(*case) for case in cases] for measure in (squad_exact_match, squad_f1))
    peers: list[tuple[str, str, Sequence[Any]]] = [("its rules, as fractions", "", rules)]
    if (peer := squad_peer()) is not None:
        peers.append(("torchmetrics", "torchmetrics", [peer(*case) for case in cases]))
    for name, package, scores in peers:
        exact_there, f1_there = zip(*scores, strict=True)
        yield row("squad_exact_match", name, package, list(zip(exact, exact_there, strict=True)))
        yield row("squad_f1", name, package, list(zip(f1, f1_there, strict=True)))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        (rouge_l(answer, texts), max(scorer.score(t, answer)["rougeL"].fmeasure for t in texts))
        for answer, texts in cases
    ]
    yield row("rouge_l", "rouge-score", "rouge-score", best)
    subsequence = [(rouge_l(*case), float(rouge_l_score(*case))) for case in cases]
    yield row("rouge_l", "its definition, as fractions", "", subsequence)


def squad_peer() -> Any:
    """(answer, accepted) -> (exact match, F1) by torchmetrics; None where it is not installed."""
    try:
        from torchmetrics.functional.text import squad
    except ImportError:
        return None

    def scores(answer: str, accepted: list[str]) -> tuple[float, float]:
        wanted = {"text": accepted, "answer_start": [0] * len(accepted)}
        found = squad([{"prediction_text": answer, "id": "0"}], [{"answers": wanted, "id": "0"}])
        return float(found["exact_match"]) / 100, float(found["f1"]) / 100

    return scores


def _agreement(
    figure: str, against: str, peer: str, pairs: list[tuple[float, float]], within: float = EXACT
) -> Agreement:
    gaps = [abs(float(own) - float(other)) for own, other in pairs]
    equal = sum(gap <= within for gap in gaps)
    return Agreement(figure, against, peer, len(gaps), equal, max(gaps, default=0.0))


# ---- likelihoods


def likelihood_rows(folder: Path) -> Iterator[Agreement]:
    """Choices and perplexity of a random model, against transformers' loss of each row alone."""
    from support.builders import PLAIN_TEMPLATE, save_model, tiny_model

    place = save_model(folder / "model", tiny_model(seed=3), PLAIN_TEMPLATE)
    model, tokenizer = load_model(place, device="cpu", progress=False)
    chance = random.Random(1)
    rows = [
        {
            "question": _words(chance, 6),
            "choices": list(dict.fromkeys(_words(chance, 4) for _ in range(4))),
            "answer": chance.randrange(2),
        }
        for _ in range(60)
    ]
    pairs = [(_prompt(row["question"]), text) for row in rows for text in row["choices"]]
    questions, texts = [prompt for prompt, _ in pairs], [text for _, text in pairs]
    own = response_log_likelihood(model, tokenizer, questions, texts, batch_size=7, progress=False)
    other = [_by_transformers(model, tokenizer, *pair) for pair in pairs]
    transformers = version("transformers")
    peer, logs = "transformers' loss", [(a[0], b[0]) for a, b in zip(own, other, strict=True)]
    yield _agreement("log-likelihood", peer, transformers, logs, LIKELY)

    each, right, total, tokens = iter(other), [], 0.0, 0
    for row in rows:
        known = [next(each) for _ in row["choices"]]
        means = [log / count for log, count in known]
        right.append(means.index(max(means)) == row["answer"])
        total, tokens = total + known[row["answer"]][0], tokens + known[row["answer"]][1]
    file = folder / "choices.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = folder / "eval.json"
    found = evaluate_model(place, [file], out=out, device="cpu", progress=False)
    kept = out.with_suffix(".answers.jsonl").read_text("utf-8").splitlines()[1:]
    chosen = [float(json.loads(line)["scores"]["choice_accuracy"]) for line in kept]
    yield _agreement("choice", peer, transformers, list(zip(chosen, right, strict=True)))
    perplexity = float(torch.tensor(-total / tokens, dtype=torch.float64).exp())
    relative = [(found["response_perplexity"] / perplexity, 1.0)]
    yield _agreement("response_perplexity, relative", peer, transformers, relative, LIKELY)


def _words(chance: random.Random, longest: int) -> str:
    return " ".join(f"w{chance.randrange(90)}" for _ in range(chance.randint(1, longest)))


def _by_transformers(model: Any, tokenizer: Any, prompt: LabelledPrompt, text: str) -> tuple:
    """(log-likelihood, tokens) from the loss that the model itself gives for labels."""
    (asked,) = render_prompts(tokenizer, [prompt])
    said = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(asked) + said])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([asked + said]), labels=labels).loss
    return -float(loss) * len(said), len(said)


# ---- the files


def write(folder: Path) -> list[Agreement]:
    """Writes both files; the rows."""
    rows = list(all_rows())
    with (folder / "agreement.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Agreement._fields)
        writer.writerows((*row[:-1], f"{row.largest_difference:.1e}") for row in rows)
    with (folder / "agreement_keyword.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "answer", "refuses", "judged"))
        for pair in filter(is_differing, keyword_pairs()):
            refuses = int(pair["refuses"])
            writer.writerow((pair["prompt"], pair["answer"], refuses, 1 - refuses))
    return rows


if __name__ == "__main__":
    for row in write(RESULTS):
        print(*row)
