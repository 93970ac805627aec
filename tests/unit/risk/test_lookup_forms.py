"""Claimed: risk is found by the texts of a row, whatever template a stack has put around them.

Exact: the rows are rendered as axolotl's and LLaMA-Factory's templates do, and tokenised.
"""

import json

import pytest
from support.builders import word_tokenizer, write_jsonl

from safereg_dist.data.collation import row_of
from safereg_dist.errors import DataError
from safereg_dist.risk.lookup import LookupRisk, read_scored

TOKENIZER = word_tokenizer()
ALPACA = {"instruction": "w1 w2 w3", "input": "w4 w5", "output": "w6 w7"}
TEMPLATES = {
    "instruct": "Below is an instruction.\n\n### Instruction:\n{instruction}\n\n### Input:\n"
    "{input}\n\n### Response:\n{output}<eos>",
    "joined": "Human: {instruction}\n{input}\nAssistant: {output}<eos>",
    "phi": "<|user|>\n{instruction}<|end|>{input}<|assistant|>{output}",
}


def lookup(tmp_path, *rows):
    path = write_jsonl(tmp_path / "scored.jsonl", list(rows))
    return LookupRisk(read_scored(str(path)), TOKENIZER, path=str(path))


def risk_of(source, text):
    ids = TOKENIZER(text.replace("<eos>", " <eos>"), add_special_tokens=False).input_ids
    return source([row_of("row", ids, [1] * len(ids), risk=None)], in_first_epoch=True)[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_with_an_input_are_read_field_by_field(name, tmp_path):
    source = lookup(tmp_path, {**ALPACA, "risk": 0.75}, {**ALPACA, "input": "w8", "risk": 0.5})
    text = TEMPLATES[name].replace("{", " {").replace("}", "} ")
    assert risk_of(source, text.format(**ALPACA)) == 0.75


@pytest.mark.parametrize("empty", [{"input": ""}, {"input": None}, {}], ids=str)
def test_a_row_without_input(empty, tmp_path):
    row = {"instruction": "w1 w2", "output": "w3", "risk": 0.25, **empty}
    assert risk_of(lookup(tmp_path, row), "Human: w1 w2 Assistant: w3 <eos>") == 0.25


def test_system_and_history_come_before_the_instruction(tmp_path):
    row = {**ALPACA, "system": "w9", "history": [["w10", "w11"]], "risk": 1.0}
    source = lookup(tmp_path, row)
    assert risk_of(source, "w9 Human: w10 Assistant: w11 Human: w1 w2 w3 w4 w5 : w6 w7") == 1.0
    unknown = risk_of(source, "Human: w1 w2 w3 w4 w5 : w6 w7")
    assert unknown != unknown


def test_conversations_of_from_and_value(tmp_path):
    turns = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]
    source = lookup(tmp_path, {"conversations": turns, "risk": 0.5})
    assert risk_of(source, "<user> w1 w2 <asst> w3 <eos>") == 0.5


def test_a_row_in_two_forms_is_refused(tmp_path):
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(DataError, match="keep the keys of one"):
        lookup(tmp_path, {**ALPACA, "messages": turns, "risk": 0.5})


BAD = {
    "no answer": ({"instruction": "w1", "input": "w2", "risk": 0}, "`output`"),
    "a number": ({"instruction": "w1", "input": 3, "output": "w2", "risk": 0}, "`input`"),
    "no risk": (ALPACA, r"expected `risk` in \[0, 1\]"),
    "no text": (
        {"conversations": [{"from": "gpt", "value": None}], "risk": 0},
        "`value` and `from`",
    ),
    "no turns": ({"conversations": ["w1"], "risk": 0}, "`value` and `from`"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_cannot_be_used(name, tmp_path):
    row, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        lookup(tmp_path, row)
    assert "scored.jsonl:1" in str(caught.value)


def test_a_row_that_was_cut_is_found(tmp_path):
    long = " ".join(f"w{i}" for i in range(30, 60))
    source = lookup(tmp_path, {"instruction": "w1", "output": long, "risk": 0.5})
    assert risk_of(source, "Human: w1 Assistant: " + long[: long.index("w45")]) == 0.5


def test_the_file_of_one_stack_serves_another(tmp_path):
    """One line of JSON each: what axolotl, LLaMA-Factory and `safereg score` write."""
    source = lookup(tmp_path, json.loads(json.dumps({**ALPACA, "id": "a", "risk": 0.5})))
    for name in TEMPLATES:
        text = TEMPLATES[name].replace("{", " {").replace("}", "} ")
        assert risk_of(source, text.format(**ALPACA)) == 0.5
