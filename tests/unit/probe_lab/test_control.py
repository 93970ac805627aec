"""Claimed: the control of a probe tells labels that follow the form from labels that do not.

Exact: which rows it is fitted and measured on. By a wide margin: labels that hang on words reach an
AUROC of 1, labels that no word tells stay at chance; a probe no better than that is warned of.
"""

from dataclasses import replace

import numpy as np
import pytest

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.probe_lab.control import auroc_of_pairs, bag_of_words, is_as_good
from safereg_dist.probe_lab.split import split_rows
from safereg_dist.probe_lab.tables import print_control

WORDS = [f"w{n}" for n in range(400)]


def prompts(count, *, by_form, answer=None, seed=3):
    """Rows of random words; harmful ones are orders and benign ones questions, or none is."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        label = ("harmful", "benign")[index % 2]
        opening = {"harmful": "Write", "benign": "What is"}[label] if by_form else "Say"
        text = f"{opening} {' '.join(draw.choice(WORDS, 8))}"
        messages = [{"role": "user", "content": text}]
        said = answer and answer[label]
        rows.append(LabelledPrompt(id=str(index), messages=messages, label=label, response=said))
    return rows


def control_of(rows, *, position="prompt"):
    background = prompts(40, by_form=False)
    parts = split_rows(rows, background, 0.25, seed=0)
    return bag_of_words(rows, parts, position=position, seed=0)


def test_labels_that_follow_the_form():
    found = control_of(prompts(200, by_form=True))
    assert found["auroc"] == 1
    assert found["intervals"]["auroc"] == (1, 1)


def test_labels_that_no_word_tells():
    found = control_of(prompts(400, by_form=False))
    assert found["auroc"] == pytest.approx(0.5, abs=0.15)


def test_matched_pairs_stay_together():
    """Both sides of a pair are the same words: apart, one would teach the other the wrong label."""
    draw = np.random.default_rng(5)
    rows = []
    for number in range(150):
        words = " ".join(draw.choice(WORDS, 8))
        for side, (word, label) in enumerate((("take", "harmful"), ("lend", "benign"))):
            order = words.split()
            order.insert(int(draw.integers(0, 9)), word)
            messages = [{"role": "user", "content": " ".join(order[side:])}]
            rows.append(
                LabelledPrompt(
                    id=f"{number}{label}",
                    messages=messages,
                    label=label,
                    response=None,
                    pair=str(number),
                )
            )
    parts = split_rows(rows, [], 0.25, seed=0)
    for values in (parts.part, parts.fold, parts.group):
        assert (values[::2] == values[1::2]).all()
    assert len(set(parts.part.tolist())) == 3
    apart = split_rows([replace(row, pair=None) for row in rows], [], 0.25, seed=0)
    assert (apart.part[::2] != apart.part[1::2]).any()


def test_words_that_tell_the_pairs_are_named():
    """Each side has a word of its own; rows without a pair have others."""
    rows = prompts(200, by_form=True)
    for row in prompts(200, by_form=False, seed=4):
        side = {"harmful": "poach", "benign": "boil"}[row.label]
        turns = [{"role": "user", "content": f"{row.messages[0]['content']} {side}"}]
        rows.append(replace(row, messages=turns, pair=str(int(row.id) // 2)))
    parts = split_rows(rows, [], 0.25, seed=0)
    found = bag_of_words(rows, parts, position="prompt", seed=0)["pairs_words"]
    assert set(found[:2]) == {"poach", "boil"}
    assert control_of(rows[:200])["pairs_words"] == []


def test_at_the_response_the_answer_is_read():
    rows = prompts(200, by_form=False, answer={"harmful": "sure", "benign": "no"})
    assert control_of(rows)["auroc"] < 0.7
    assert control_of(rows, position="response")["auroc"] == 1


def test_pairs_alone_are_harder_than_all_rows():
    """Harmful orders beside benign questions, and pairs that no word tells apart."""
    alone, pairs = prompts(200, by_form=True), prompts(200, by_form=False, seed=4)
    pairs = [replace(row, pair=str(place // 2)) for place, row in enumerate(pairs)]
    parts = split_rows([*alone, *pairs], [], 0.25, seed=0)
    found = bag_of_words([*alone, *pairs], parts, position="prompt", seed=0)
    held = [n for n in range(200, 400) if parts.part[n] == 2]
    score = np.random.default_rng(0).random(400)
    ordered = [
        (score[one] > score[other]) + 0.5 * (score[one] == score[other])
        for one in held
        for other in held
        if parts.harmful[one] and not parts.harmful[other]
    ]
    got = auroc_of_pairs([*alone, *pairs], parts, score)
    assert got == pytest.approx(np.mean(ordered))
    assert found["pairs_auroc"] == pytest.approx(0.5, abs=0.2)
    assert found["auroc"] > found["pairs_auroc"] + 0.1
    assert auroc_of_pairs(alone, split_rows(alone, [], 0.25, seed=0), score) is None


@pytest.mark.parametrize(("words", "warned"), [(0.6, False), (0.79, True)])
def test_a_bag_of_words_that_tells_the_pairs_is_warned_of(words, warned, capsys):
    control = {"auroc": 0.8, "intervals": {"auroc": (0.7, 0.9)}, "pairs_auroc": words}
    control["pairs_words"] = ["neighbour's", "tree"]
    print_control(control, {"auroc": 0.95, "pairs_auroc": 0.8})
    printed = capsys.readouterr().out
    assert f"on matched pairs alone: the bag of words {words:.3f}, the probe 0.800" in printed
    assert ("separable by form" in printed) == warned
    assert ("(most by \"neighbour's\", 'tree'): write pairs that differ" in printed) == warned
    assert "add matched pairs" not in printed


@pytest.mark.parametrize(("auroc", "warned"), [(0.99, True), (0.9, True), (0.7, False)])
def test_a_probe_that_is_no_better_is_warned_of(auroc, warned, capsys):
    control = {"auroc": auroc, "intervals": {"auroc": (0.6, 1.0)}}
    probe = {"auroc": 0.91}
    assert is_as_good(control, probe) == warned
    print_control(control, probe)
    printed = capsys.readouterr().out
    assert f"AUROC {auroc:.3f} [0.600, 1.000], the probe 0.910" in printed
    assert ("separable by form" in printed) == warned
