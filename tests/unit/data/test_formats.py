"""Claimed: every form of a row becomes the tokens and the mask that are written out here, whichever
way the mask is found; tools reach the template, and judges as text; what is ambiguous or malformed
is refused in one line with file and line number.

Everything here is exact. The judge is the sequence itself, with the trained tokens in brackets.
"""

import json

import pytest
from support.builders import SPECIAL, TEMPLATE, WORDS, word_tokenizer, write_jsonl

from safereg_dist.commands.score import score_with_critic
from safereg_dist.config import CriticConfig, DataConfig
from safereg_dist.data import load_rows, tokenize_row
from safereg_dist.data.files import read_prompts
from safereg_dist.data.formats import FORMATS, conversation_of
from safereg_dist.errors import DataError

# Offered tools and what a tool answers stand behind <unk>; arguments are read, so they are objects.
TOOLS = (
    "{{ '<bos>' }}{% for t in tools or [] %}{{ '<unk> ' + t['function']['name'] + ' ' }}"
    "{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<asst> ' }}{% generation %}"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ ' ' + c['function']['name'] }}"
    "{% for k, v in c['function']['arguments'].items() %}{{ ' ' + k + ' ' + v }}{% endfor %}"
    "{% endfor %}{{ ' <eos>' }}{% endgeneration %}"
    "{% elif m['role'] == 'tool' %}{{ '<unk> ' + m['content'] + ' ' }}"
    "{% else %}{{ '<user> ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<asst> ' }}{% endif %}"
)


def without_block(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def written(text):
    """Ids, mask and prompt ends of a sequence with its trained tokens in brackets."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    ids, mask, ends, is_trained = [], [], [], 0
    for word in text.split():
        if word == "[":
            is_trained = 1
            ends.append(len(ids))
        elif word == "]":
            is_trained = 0
        else:
            ids.append(vocab[word])
            mask.append(is_trained)
    return ids, mask, ends


def tokens(raw, template=TEMPLATE):
    row = tokenize_row(raw, "file:1", word_tokenizer(template), default_id="x")
    return row.input_ids, row.loss_mask, row.prompt_ends


def user(text, **more):
    return {"role": "user", "content": text, **more}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def calls(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


ONE = "<bos> <user> w1 w2 <asst> [ w3 <eos> ]"
TWO = "<bos> <user> w1 <asst> [ w2 <eos> ] <user> w3 <asst> [ w4 <eos> ]"
LAST = "<bos> <user> w1 <asst> w2 <eos> <user> w3 <asst> [ w4 <eos> ]"
FIRST = "<bos> <user> w1 <asst> [ w2 <eos> ] <user> w3 <asst> w4 <eos>"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"messages": [user("w1 w2"), said("w3")]}, ONE),
        ({"prompt": "w1 w2", "response": "w3"}, ONE),
        ({"prompt": "w1 w2", "completion": "w3"}, ONE),
        ({"prompt": [user("w1 w2")], "completion": [said("w3")]}, ONE),
        ({"input": "w1 w2", "output": "w3"}, ONE),
        ({"instruction": "w1 w2", "output": "w3"}, ONE),
        ({"instruction": "w1", "input": "w2", "output": "w3"}, ONE),
        ({"instruction": "w1 w2", "input": "", "output": "w3"}, ONE),
        ({"instruction": "w1 w2", "input": None, "output": "w3"}, ONE),
        (
            {
                "conversations": [
                    {"from": "human", "value": "w1 w2"},
                    {"from": "gpt", "value": "w3"},
                ]
            },
            ONE,
        ),
        # Keys that hold null are not there; keys that no form knows do not matter.
        ({"messages": None, "prompt": "w1 w2", "response": "w3", "source": "w9"}, ONE),
        ({"messages": [user("w1 w2"), said("w3")], "prompt": "w7", "completion": None}, ONE),
        # Several turns: the loss is on every answer that is not taken out.
        ({"messages": [user("w1"), said("w2"), user("w3"), said("w4")]}, TWO),
        ({"messages": [user("w1"), said("w2"), user("w3")], "response": "w4"}, LAST),
        ({"messages": [user("w1"), said("w2"), user("w3"), said("w4")], "response": "w9"}, TWO),
        ({"messages": [user("w1"), said("w2", weight=0), user("w3"), said("w4")]}, LAST),
        ({"messages": [user("w1"), said("w2", weight=0.0), user("w3"), said("w4")]}, LAST),
        ({"messages": [user("w1"), said("w2", train=False), user("w3"), said("w4")]}, LAST),
        ({"messages": [user("w1", weight=0), said("w2"), user("w3"), said("w4", weight=0)]}, FIRST),
        ({"messages": [user("w1"), said("w2", weight=1), user("w3"), said("w4", train=True)]}, TWO),
        (
            {"messages": [user("w1", train=None), said("w2", weight=None), user("w3"), said("w4")]},
            TWO,
        ),
        # The prompt of a prompt and completion is a prompt, whoever speaks in it.
        ({"prompt": [user("w1"), said("w2"), user("w3")], "completion": [said("w4")]}, LAST),
        ({"prompt": [user("w1")], "completion": [said("w2"), user("w3"), said("w4")]}, TWO),
        (
            {
                "conversations": [
                    {"from": "user", "value": "w1"},
                    {"from": "assistant", "value": "w2", "weight": 0},
                    {"from": "human", "value": "w3"},
                    {"from": "gpt", "value": "w4"},
                ]
            },
            LAST,
        ),
        (
            {"messages": [{"role": "system", "content": "w8"}, user("w1 w2"), said("w3")]},
            "<bos> <user> w8 <user> w1 w2 <asst> [ w3 <eos> ]",
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "w8"},
                    {"from": "human", "value": "w1 w2"},
                    {"from": "gpt", "value": "w3"},
                ]
            },
            "<bos> <user> w8 <user> w1 w2 <asst> [ w3 <eos> ]",
        ),
        # Two answers in a row, one of them taken out.
        (
            {"messages": [user("w1"), said("w2", train=False), said("w3")]},
            "<bos> <user> w1 <asst> w2 <eos> <asst> [ w3 <eos> ]",
        ),
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, without_block(TEMPLATE)], ids=["block", "prefix"])
def test_rows_become_the_sequence_that_is_written_out(raw, expected, template):
    assert tokens(raw, template) == written(expected)


CALLING = "<bos> <unk> w7 <unk> w8 <user> w1 <asst> [ w7 w2 w3 <eos> ] <unk> w4 <asst> [ w5 <eos> ]"
OFFERED = [
    {"type": "function", "function": {"name": "w7", "parameters": {}}},
    {"type": "function", "function": {"name": "w8", "parameters": {}}},
]


def calling(call, **more):
    return {
        "messages": [
            user("w1"),
            {"role": "assistant", "tool_calls": [call], **more},
            {"role": "tool", "content": "w4", "tool_call_id": "c", "name": "w7"},
            said("w5"),
        ],
        "tools": OFFERED,
    }


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (calling(calls("w7", {"w2": "w3"})), CALLING),
        (calling(calls("w7", '{"w2": "w3"}', id="c"), content=None), CALLING),
        (calling({"name": "w7", "arguments": {"w2": "w3"}}, content=""), CALLING),
        (calling(calls("w7", {"w2": "w3"})) | {"tools": json.dumps(OFFERED)}, CALLING),
        (
            calling(calls("w7", None), content="w6") | {"tools": []},
            "<bos> <user> w1 <asst> [ w6 w7 <eos> ] <unk> w4 <asst> [ w5 <eos> ]",
        ),
        (
            calling(calls("w7", {}), weight=0) | {"tools": ""},
            "<bos> <user> w1 <asst> w7 <eos> <unk> w4 <asst> [ w5 <eos> ]",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "w1"},
                    {"from": "function_call", "value": '{"name": "w7", "arguments": {"w2": "w3"}}'},
                    {"from": "observation", "value": "w4"},
                    {"from": "gpt", "value": "w5"},
                ],
                "tools": json.dumps(OFFERED),
            },
            CALLING,
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "w1"},
                    {"from": "function_call", "value": '[{"name": "w7"}, {"name": "w8"}]'},
                    {"from": "tool", "value": "w4"},
                    {"from": "gpt", "value": "w5"},
                ]
            },
            "<bos> <user> w1 <asst> [ w7 w8 <eos> ] <unk> w4 <asst> [ w5 <eos> ]",
        ),
        (
            {"prompt": [user("w1")], "completion": [said(None, tool_calls=[calls("w7", {})])]},
            "<bos> <user> w1 <asst> [ w7 <eos> ]",
        ),
        # As tables hold rows that call nothing.
        ({"messages": [user("w1 w2"), said("w3", tool_calls=None)], "tools": None}, ONE),
    ],
)
@pytest.mark.parametrize("template", [TOOLS, without_block(TOOLS)], ids=["block", "prefix"])
def test_tool_calls_are_trained_and_what_a_tool_answers_is_not(raw, expected, template):
    assert tokens(raw, template) == written(expected)


def test_judges_read_tool_calls_as_text():
    raw = calling(calls("w7", '{"w2": "w3"}'), content="w6")
    row = tokenize_row(raw, "file:1", word_tokenizer(TOOLS), default_id="x")
    assert json.loads(row.messages_json) == [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": 'w6\n{"name": "w7", "arguments": {"w2": "w3"}}'},
        {"role": "tool", "content": "w4"},
        {"role": "assistant", "content": "w5"},
    ]
    silent = conversation_of(calling(calls("w7", {})), "").as_text()
    assert silent[1]["content"] == '{"name": "w7", "arguments": {}}'


def test_ids_of_calls_reach_the_template():
    found = conversation_of(calling(calls("w7", {}, id="c")), "")
    assert found.messages[1]["tool_calls"][0]["id"] == "c"
    assert found.messages[2] == {"role": "tool", "content": "w4", "tool_call_id": "c", "name": "w7"}
    assert found.tools == OFFERED
    assert found.is_trained == [False, True, False, True]


def test_a_template_for_tools_beside_the_default():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TOOLS}
    raw = calling(calls("w7", {"w2": "w3"}))
    row = tokenize_row(raw, "file:1", tokenizer, default_id="x")
    assert (row.input_ids, row.loss_mask, row.prompt_ends) == written(CALLING)
    row = tokenize_row({"prompt": "w1 w2", "response": "w3"}, "", tokenizer, default_id="x")
    assert (row.input_ids, row.loss_mask, row.prompt_ends) == written(ONE)


def test_a_template_with_one_block_around_two_turns():
    """Its mask does not tell turns apart: fine without `train`, else refused."""
    merged = TEMPLATE.replace("{{ '<asst> ' }}{% generation %}", "{% generation %}").replace(
        "{{ m['content'] + '<eos>' }}", "{{ '<asst> ' + m['content'] + '<eos>' }}"
    )
    raw = {"messages": [user("w1"), said("w2"), said("w3")]}
    assert tokens(raw, merged)[1] == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    raw["messages"][1]["train"] = False
    with pytest.raises(DataError, match=r"file:1: .* 1 stretches of 2 assistant turns"):
        tokens(raw, merged)


GOOD = {"prompt": "w1", "response": "w2"}
TURN = {"role": "assistant", "content": "w2"}


def chat(*turns, **more):
    return {"messages": [user("w1"), *turns], **more}


def sharegpt(*turns):
    return {"conversations": [{"from": "human", "value": "w1"}, *turns]}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (
            {"text": "w1"},
            "`messages`, or `prompt` and `response`, or `prompt` and `completion`, or",
        ),
        ({"instruction": "w1", "response": "w2"}, "found keys ['instruction', 'response']"),
        ({**GOOD, "completion": "w3"}, "`prompt` and `response`, or `prompt` and `completion`"),
        ({**GOOD, "messages": [user("w1"), TURN]}, "`messages`, or `prompt` and `response`"),
        ({**GOOD, "input": "w1", "output": "w2"}, "keep the keys of one"),
        ({**sharegpt({"from": "gpt", "value": "w2"}), **chat(TURN)}, "keep the keys of one"),
        ({"prompt": "w1", "completion": [TURN]}, "both be text or both be lists"),
        ({"prompt": [user("w1")], "completion": "w2"}, "both be text or both be lists"),
        ({"prompt": [], "completion": [TURN]}, "`prompt` must be a non-empty list"),
        ({"prompt": [user("w1")], "completion": [3]}, "`role` and `content`"),
        ({"prompt": [user("w1"), said("w2")], "completion": [user("w3")]}, "is trained"),
        ({"input": ["w1"], "output": "w2"}, "`input` must be text, got ['w1']"),
        ({"instruction": "w1", "input": 3, "output": "w2"}, "`input` must be text, got 3"),
        ({"instruction": {}, "output": "w2"}, "`instruction` must be text"),
        ({"conversations": "w1"}, "`conversations` must be a non-empty list"),
        (sharegpt({"from": "bard", "value": "w2"}), "gpt, assistant, function_call, tool,"),
        (sharegpt({"from": "gpt"}), "text `value`"),
        (sharegpt({"from": ["gpt"], "value": "w2"}), "text `value`"),
        (sharegpt(TURN), "belong under `messages`"),
        (sharegpt({"from": "function_call", "value": "f(3)"}), "a function_call is not JSON"),
        (sharegpt({"from": "function_call", "value": "3"}), "needs a function with text `name`"),
        (chat(said("w2", train=False)), "no assistant turn is trained"),
        (chat(said("w2", train=0)), "`train` of a turn must be true or false, got 0"),
        (chat(said("w2", weight=0.5)), "`weight` of a turn must be 0 or 1, got 0.5"),
        (chat(said("w2", weight=True)), "`weight` of a turn must be 0 or 1, got True"),
        (chat(said("w2", weight=1, train=False)), "disagree"),
        (chat(user("w3", train=True), TURN), "only assistant turns can be trained"),
        (chat(said(None, tool_calls=[])), "`content`"),
        (chat(said(None, tool_calls="f")), "`tool_calls` must be a list"),
        (chat(user("w1", tool_calls=[calls("f", {})]), TURN), "on an assistant turn"),
        (chat(said("", tool_calls=[{"function": {}}])), "needs a function with text `name`"),
        (chat(said("", tool_calls=[calls("f", "{")])), "the arguments of 'f' is not JSON"),
        (chat(said("", tool_calls=[calls("f", "[1]")])), "must be a JSON object, got [1]"),
        (chat(TURN, tools="[1"), "`tools` is not JSON"),
        (
            chat(TURN, tools={"name": "f"}),
            "`tools` must be a list of objects or its JSON text, got",
        ),
        (chat(TURN, tools=["f"]), "`tools` must be a list of objects or its JSON text, got"),
        (chat(TURN, tools=OFFERED), "`tools`, which the chat template does not write"),
        (chat(said("w2", tool_calls=[calls("w7", {})])), "`tool_calls`, which the chat template"),
    ],
)
def test_rows_that_cannot_be_used(raw, says, tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [GOOD, GOOD, raw])
    with pytest.raises(DataError) as caught:
        load_rows(str(path), word_tokenizer(), DataConfig(train=str(path)), progress=False)
    text = str(caught.value)
    assert text.startswith(f"{path}:3: ")
    assert says in text
    assert "\n" not in text


def test_the_table_names_every_form_that_is_tested():
    assert set(FORMATS) == {
        *(("messages",), ("prompt", "response"), ("prompt", "completion"), ("input", "output")),
        *(("instruction", "output"), ("conversations",)),
    }


def test_prompt_files_hold_text_only(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [chat(said(None, tool_calls=[calls("f", {})]))])
    with pytest.raises(DataError, match=r"p\.jsonl:1: a prompt with tool calls"):
        read_prompts(path)


def test_scoring_refuses_what_training_refuses(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", [GOOD, {**GOOD, "completion": "w3"}])
    with pytest.raises(DataError, match=r"s\.jsonl:2: .*keep the keys of one"):
        score_with_critic(CriticConfig(local="none"), path, tmp_path / "out.jsonl")
