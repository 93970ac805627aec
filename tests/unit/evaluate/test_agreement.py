"""Claimed: figures of `safereg eval` equal those of reference implementations on fixed cases, and
benchmarks/results/agreement*.csv say so.

SQuAD and ROUGE-L against the packages, and against their rules as exact fractions without any code
in common: 1e-6. Choices and perplexity against transformers' own loss, float32: 1e-4. The keyword
judge against verdicts by the meaning of 200 answers, written before it was asked: it differs on 22,
all in the file.
"""

import csv

import agreement
import pytest
from agreement import RESULTS, all_rows, drawn_texts, is_differing, keyword_pairs
from support.text_oracles import rouge_l_score, squad_scores


@pytest.fixture(scope="module")
def rows():
    return list(all_rows())


def table(name):
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_cases_are_equal_but_for_the_judge(rows):
    judge, *others = rows
    assert judge.cases == 200
    assert [row for row in others if row.equal != row.cases or row.cases == 0] == []
    figures = {row.figure for row in others}
    assert {"squad_f1", "squad_exact_match", "rouge_l", "log-likelihood", "choice"} < figures


def test_the_committed_table_is_that_of_this_code(rows):
    here = {(row.figure, row.against): (row.cases, row.equal) for row in rows}
    if agreement.squad_peer() is None:
        pytest.skip("torchmetrics is not installed (an extra of `dev`)")
    known = {
        (row["figure"], row["against"]): (int(row["cases"]), int(row["equal"]))
        for row in table("agreement.csv")
    }
    assert known == here


def test_the_judge_differs_on_the_listed_pairs_alone():
    pairs = keyword_pairs()
    assert len(pairs) == len({(pair["prompt"], pair["answer"]) for pair in pairs}) == 200
    assert sum(pair["refuses"] for pair in pairs) == 100
    listed = table("agreement_keyword.csv")
    assert [row["answer"] for row in listed] == [p["answer"] for p in filter(is_differing, pairs)]
    assert all(row["refuses"] != row["judged"] for row in listed)


def test_cases_reach_every_rule():
    cases = drawn_texts(400)
    squad = [squad_scores(*case) for case in cases]
    partial = [f1 for _, f1 in squad if 0 < f1 < 1]
    assert min(len(partial), sum(exact for exact, _ in squad)) > 40
    assert any(not answer for answer, _ in cases)
    assert sum(0 < rouge_l_score(*case) < 1 for case in cases) > 100


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "f1"),
    [
        ("The Cat, sat", ["cat sat"], True, 1),
        ("cat dog", ["the cat"], False, 2 / 3),
        ("a", ["an"], True, 1),
        ("anthem", ["them"], False, 0),
    ],
)
def test_the_rules_by_hand(answer, accepted, exact, f1):
    assert squad_scores(answer, accepted) == (exact, pytest.approx(f1))


def test_the_subsequence_by_hand():
    # "cat", "sit" and "mat" in this order, of six and four words: P = 3/6, R = 3/4.
    assert float(rouge_l_score("my cat can sit on mat", ["cat sit the mat"])) == pytest.approx(0.6)
    assert rouge_l_score("running", ["runs"]) == 1
