"""Anchor rows from a tiny random Llama: kept, dropped and merged as documented.

Claimed: rows are the prompts' turns plus the model's greedy answer; of a cut answer the whole
sentences are kept, empty ones and those without any are dropped, all are counted; any number of
ranks writes the same file. Everything here is exact: greedy decoding of a float32 model on the CPU,
with answers far from ties.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.critic_server import running
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from safereg_dist.cli import main as safereg
from safereg_dist.commands.anchor import build_anchors, merge_anchor_parts, whole_sentences
from safereg_dist.commands.serve_critic import Guard, GuardServer
from safereg_dist.critic.formats import FORMATS
from safereg_dist.data.files import read_prompts
from safereg_dist.errors import CheckpointError, ConfigError, DataError, GroupError
from safereg_dist.evaluate.generate import generate_answers, load_model
from safereg_dist.evaluate.respondent import Endpoint

LETTERS = "abcdefghijklmnopqrstuvwx"
# Two of the letters end sentences, where the model says them; many answers begin with the last.
ENDS = {"k": "k.", "q": "q."}
SAID = [(ENDS | {"x": "sorry"}).get(letter, letter) for letter in LETTERS]
WORDS = ["<pad>", "<bos>", "<eos>", "<user>", "<asst>", "<unk>", *SAID]
LENGTH = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose answers end early for some prompts, at once for others."""
    path = tmp_path_factory.mktemp("anchor") / "model"
    core = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<asst>"]})
    tokenizer.chat_template = (
        "{{ '<bos>' }}{% for m in messages %}{{ ' <user> ' if m.role == 'user' else ' <asst> ' }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ ' <asst>' }}{% endif %}"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        max_position_embeddings=64,
        initializer_range=0.6,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two prompt files whose ids clash; one prompt has several turns."""
    path = tmp_path_factory.mktemp("prompts")
    first = [
        {"id": str(i), "prompt": " ".join(LETTERS[i : i + 1 + 3 * i % 7]), "label": "harmful"}
        for i in range(14)
    ]
    turns = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d e f"},
    ]
    second = [{"id": str(i), "prompt": f"{LETTERS[i]} {LETTERS[i + 3]}"} for i in range(15)]
    second.insert(3, {"id": "turns", "messages": turns, "label": "benign"})
    for name, rows in (("one.jsonl", first), ("two.jsonl", second)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [path / "one.jsonl", path / "two.jsonl"]


def build(folder: Path, files: list[Path], out: Path, **more: Any) -> dict:
    return build_anchors(
        folder,
        files,
        out,
        max_new_tokens=LENGTH,
        batch_size=4,
        device="cpu",
        progress=False,
        **more,
    )


def sentences_said(text: str) -> str:
    words = text.split(" ")
    while words and words[-1] not in ENDS.values():
        words.pop()
    return " ".join(words)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It is 3.5 m. Then", "It is 3.5 m."),
        ('He said "no." Then', 'He said "no."'),
        ("Steps:\n1. Take it", ""),
        ("One! Two? Three", "One! Two?"),
        ("Wait ... more", ""),
        ("First.\n\nSecond one", "First."),
        ("好的。然后", "好的。"),
        ("no end", ""),
    ],
)
def test_what_is_kept_of_a_cut_answer(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept


def test_rows_are_the_answers_of_the_reference(
    folder: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data" / "anchor.jsonl"
    counts = build(folder, files, out)
    prompts = [prompt for file in files for prompt in read_prompts(file)]
    model, tokenizer = load_model(folder, device="cpu")
    answers = generate_answers(
        model, tokenizer, prompts, max_new_tokens=LENGTH, batch_size=1, progress=False
    )
    texts = [a.text if a.finished else sentences_said(a.text) for a in answers]
    kept = [
        {
            "id": f"anchor-{index}-{prompt.id}",
            "messages": [*prompt.messages, {"role": "assistant", "content": text}],
        }
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        if text
    ]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == kept
    assert len({row["id"] for row in rows}) == len(rows)
    pairs = zip(prompts, texts, strict=True)
    harmful = [text for prompt, text in pairs if text and prompt.label == "harmful"]
    cut = [bool(text) for text, answer in zip(texts, answers, strict=True) if not answer.finished]
    expected = {
        "prompts": 30,
        "rows": len(kept),
        "shortened": sum(cut),
        "dropped_empty": sum(answer.finished and not answer.text for answer in answers),
        "dropped_cut": len(cut) - sum(cut),
        "harmful_rows": len(harmful),
        "refusals": sum(text.startswith("sorry") for text in harmful),
    }
    assert counts == expected
    assert min(expected.values()) > 0, "the case must have rows of all four kinds"
    *shown, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"anchors: {len(kept)} rows from 30 prompts")
    numbers = [int(line.split()[-1]) for line in shown[2:]]
    assert sum(numbers[:4]) == 30
    told = ("shortened", "dropped_empty", "dropped_cut", "refusals")
    assert numbers[1:] == [expected[k] for k in told]
    assert [path.name for path in out.parent.iterdir()] == ["anchor.jsonl"]


@pytest.mark.parametrize(("refused", "is_warned"), [(3, True), (4, False)])
def test_a_model_that_answers_most_harmful_prompts_is_warned_of(
    folder: Path,
    files: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: int,
    is_warned: bool,
) -> None:
    build(folder, files, tmp_path / "all.jsonl")
    turns = [
        json.loads(line)["messages"] for line in (tmp_path / "all.jsonl").read_text().splitlines()
    ]
    kinds = ([t for t in turns if t[-1]["content"].startswith("sorry") == no] for no in (1, 0))
    chosen = [
        turn for kind, count in zip(kinds, (refused, 4), strict=True) for turn in kind[:count]
    ]
    rows = [{"messages": turn[:-1], "label": "harmful"} for turn in chosen]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    build(folder, [tmp_path / "some.jsonl"], tmp_path / "some-anchor.jsonl")
    shown = capsys.readouterr()
    assert f"refusals, of {len(rows)} rows labelled harmful" in shown.out
    assert (f"refuses {refused} of {len(rows)} prompts labelled harmful" in shown.err) == is_warned


def test_a_model_behind_an_endpoint_gives_the_same_rows(
    folder: Path, files: list[Path], tmp_path: Path
) -> None:
    """Ends and cuts of its answers included; one process asks."""
    counts = build(folder, files, tmp_path / "folder.jsonl")
    form = next(made for kind in FORMATS.values() if (made := kind()).local_prefix is None)
    server = GuardServer(("127.0.0.1", 0), Guard(folder, form), "letters")
    with running(server) as url:
        verb = ["anchor", "build", "--model", "letters", "--endpoint", url, "--prompts", *files]
        verb += ["--out", tmp_path / "endpoint.jsonl", "--max-new-tokens", LENGTH]
        assert safereg([*map(str, verb), "--json", str(tmp_path / "counts.json")]) == 0
        asked = Endpoint(url, "letters", max_new_tokens=LENGTH)
        with pytest.raises(ConfigError, match="asked by one process, got 2"):
            build(folder, files, tmp_path / "x", world_size=2, endpoint=asked)
    assert (tmp_path / "endpoint.jsonl").read_text() == (tmp_path / "folder.jsonl").read_text()
    found = json.loads((tmp_path / "counts.json").read_text())
    assert {name: found[name] for name in counts} == counts


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_writes_the_same_file(
    folder: Path, files: list[Path], tmp_path: Path, world_size: int
) -> None:
    build(folder, files, tmp_path / "one.jsonl")
    out = tmp_path / "many.jsonl"
    ranks = reversed(range(world_size))  # the order of finishing is free
    counts = [build(folder, files, out, rank=r, world_size=world_size) for r in ranks]
    assert not out.exists()
    total = merge_anchor_parts(out, world_size)
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert total == {key: sum(count[key] for count in counts) for key in total}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl", "one.jsonl"]


def test_a_rank_without_prompts_writes_an_empty_part(
    folder: Path, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "anchor.jsonl"
    counts = [build(folder, files, out, rank=rank, world_size=31) for rank in (29, 30)]
    assert [count["prompts"] for count in counts] == [1, 0]
    assert len((tmp_path / "anchor.jsonl.rank30").read_text().splitlines()) == 1


def test_parts_that_do_not_belong_together_are_refused(
    folder: Path, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "anchor.jsonl"
    build(folder, files, out, rank=0, world_size=2)
    with pytest.raises(CheckpointError, match=r"anchor\.jsonl\.rank1, found none"):
        merge_anchor_parts(out, 2)
    build(folder, files[:1], out, rank=1, world_size=2)
    with pytest.raises(CheckpointError, match="do not belong together"):
        merge_anchor_parts(out, 2)
    assert not out.exists()


def test_bad_calls_say_what_is_wrong(folder: Path, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(GroupError, match="rank 2 of 2"):
        build(folder, files, tmp_path / "a.jsonl", rank=2, world_size=2)
    with pytest.raises(ConfigError, match="one prompt file"):
        build(folder, [], tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="raise max_new_tokens"):
        build_anchors(
            folder,
            files,
            tmp_path / "a.jsonl",
            max_new_tokens=1,
            device="cpu",
            progress=False,
        )
    assert list(tmp_path.iterdir()) == []
