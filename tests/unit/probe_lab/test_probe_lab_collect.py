"""Claimed: the states that the laboratory stores are those of plain transformers, one row at a
time, in eight families; a collection that was stopped goes on, does no work twice and mixes with no
other; a layer is read back whole or not at all; what cannot be read is told by name.

The judges are unpadded forwards of single rows, and the files themselves. Exact: what is stored
again, refusals. Rounds: whole forwards in float32 (1e-4).
"""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import oracles
from support.builders import WORDS, save_model, tiny_model, word_tokenizer, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

from safereg_dist.errors import CheckpointError, ConfigError, DataError
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.probe_lab.collect import collect_hidden_states, collect_states
from safereg_dist.probe_lab.fit import fit_probe
from safereg_dist.probe_lab.rows import ProbedRow, read_examples, tokenize_examples
from safereg_dist.probe_lab.store import Manifest, StateStore, digest_rows
from safereg_dist.risk.probe import POOLINGS, POOLINGS_OF, RESPONSE_POOLINGS

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
SMALL = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "llama": SMALL,
    "falcon": {},
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "phi3": {**SMALL, "rope_scaling": None},
    # Layers alternate between all and the last four positions, and logits are capped.
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 4},
    "mistral": {**SMALL, "sliding_window": 5},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def random_model(family, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config).float().eval()


def examples(folder, count=9, **changes):
    """Rows of very different lengths, some with an earlier turn."""
    rows = []
    for i in range(count):
        prompt = " ".join(WORDS[i : i + 1 + (7 * i) % 11])
        messages = [{"role": "user", "content": prompt}]
        if i % 3 == 2:
            messages = [
                {"role": "user", "content": "w3"},
                {"role": "assistant", "content": "w4 w5"},
                *messages,
            ]
        answer = {"role": "assistant", "content": " ".join(WORDS[40 + i : 41 + i + i % 4])}
        rows.append({"id": f"r{i}", "messages": [*messages, answer]})
    data = write_jsonl(folder / "rows.jsonl", [{**row, **changes} for row in rows])
    return read_examples(data, "response")


def states_alone(model, tokenizer, example, position):
    """[layers + 1, span, H] of one unpadded row by plain transformers."""
    answer = {"role": "assistant", "content": example.response}
    prompt = tokenizer.apply_chat_template(
        example.messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    full = tokenizer.apply_chat_template([*example.messages, answer], return_dict=True)["input_ids"]
    ids = prompt if position == "prompt" else full
    with torch.no_grad():
        states = torch.stack(model(torch.tensor([ids]), output_hidden_states=True).hidden_states)
    return states[:, 0] if position == "prompt" else states[:, 0, len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_states_are_those_of_each_row_alone(family, tmp_path):
    model, tokenizer, rows = random_model(family), word_tokenizer(), examples(tmp_path)
    for position, poolings in POOLINGS_OF.items():
        store = collect(model, rows, tmp_path / position, position=position, batch_size=2)
        for layer in (1, 2, 3):
            for pooling in poolings:
                got = store.layer(pooling, layer)
                for place, example in enumerate(rows):
                    states = states_alone(model, tokenizer, example, position)[layer]
                    truth = torch.from_numpy(oracles.pooled(states, pooling)).float()
                    torch.testing.assert_close(got[place], truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", [*POOLINGS, *RESPONSE_POOLINGS])
def test_states_in_memory_are_the_stored_ones(pooling, tmp_path):
    model, rows = random_model("llama"), examples(tmp_path)
    position = "prompt" if pooling in POOLINGS else "response"
    store = collect(model, rows, tmp_path / "states", position=position, batch_size=3)
    whole = collect_hidden_states(
        model, word_tokenizer(), rows, pooling=pooling, batch_size=5, progress=False
    )
    assert whole.shape == (4, 9, 64 if pooling.startswith("both") else 32)
    for layer in (1, 2, 3):
        torch.testing.assert_close(store.layer(pooling, layer), whole[layer], rtol=1e-4, atol=1e-5)


def make_store(model, rows, folder, *, position="prompt", batch_size=2, shard_rows=4):
    """(store, tokenised rows) with small shards."""
    tokens = tokenize_examples(word_tokenizer(), rows, position, max_length=None)
    manifest = Manifest(
        fingerprint=model_fingerprint(model),
        dtype=str(model.dtype),
        template_sha256="t",
        rows_sha256=digest_rows(tokens),
        num_rows=len(tokens),
        position=position,
        poolings=POOLINGS_OF[position],
        num_layers=3,
        hidden_size=32,
        rows_per_shard=shard_rows,
    )
    store = StateStore(folder, manifest)
    store.prepare(replace_stale=False)
    return store, tokens


def collect(model, rows, folder, *, rank=0, world_size=1, batch_size=2, **how):
    store, tokens = make_store(model, rows, folder, **how)
    collect_states(
        model,
        tokens,
        store,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        progress=False,
    )
    return store


def test_low_precision_is_stored_as_it_is(tmp_path):
    model, rows = random_model("llama").bfloat16(), examples(tmp_path)
    store = collect(model, rows, tmp_path / "states")
    with safe_open(tmp_path / "states" / "states-00000.safetensors", framework="pt") as file:
        assert file.get_tensor("last_prompt_token").dtype == torch.bfloat16
        assert file.get_tensor("mean_prompt").dtype == torch.float32
    assert store.layer("last_prompt_token", 1).dtype == torch.float32


# Stopped, and gone on


class StoppedError(Exception):
    pass


class StoppedModel(torch.nn.Module):
    """A model that is cut off after some forwards, as by a kill between two batches."""

    def __init__(self, model, forwards):
        super().__init__()
        self.model, self.left = model, forwards

    @property
    def base_model(self):
        if self.left == 0:
            raise StoppedError
        self.left -= 1
        return self.model.base_model

    @property
    def device(self):
        return self.model.device


def test_a_collection_goes_on_where_it_was_stopped(tmp_path):
    model, rows = random_model("llama"), examples(tmp_path)
    whole = collect(model, rows, tmp_path / "whole")
    folder = tmp_path / "states"
    store, tokens = make_store(model, rows, folder)
    with pytest.raises(StoppedError):  # in the middle of the second of three shards
        collect_states(StoppedModel(model, 3), tokens, store, batch_size=2, progress=False)
    assert [store.has_shard(s) for s in range(3)] == [True, False, False]
    assert [p for p in os.listdir(folder) if p.endswith(".tmp")] == []
    with pytest.raises(CheckpointError, match="run the same command again"):
        store.layer("mean_prompt", 1)
    first = (folder / "states-00000.safetensors").stat().st_mtime_ns
    store, tokens = make_store(model, rows, folder)
    # 9 rows in batches of 2: the five left take three forwards, a fourth would be work done twice.
    collect_states(StoppedModel(model, 3), tokens, store, batch_size=2, progress=False)
    assert (folder / "states-00000.safetensors").stat().st_mtime_ns == first
    for layer in (1, 2, 3):
        assert torch.equal(store.layer("mean_prompt", layer), whole.layer("mean_prompt", layer))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_ranks_makes_the_same_files(world_size, tmp_path):
    model, rows = random_model("llama"), examples(tmp_path)
    collect(model, rows, tmp_path / "one")
    for rank in reversed(range(world_size)):
        collect(model, rows, tmp_path / "many", rank=rank, world_size=world_size)
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == sorted(os.listdir(tmp_path / "many"))
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


@pytest.mark.parametrize("changed", ["model", "rows", "position", "batch size"])
def test_states_of_another_collection_are_refused(changed, tmp_path, capsys):
    model, rows, folder = random_model("llama"), examples(tmp_path), tmp_path / "states"
    collect(model, rows, folder)
    other = {
        "model": lambda: make_store(random_model("llama", seed=1), rows, folder),
        "rows": lambda: make_store(model, rows[::-1], folder),
        "position": lambda: make_store(model, rows, folder, position="response"),
        "batch size": lambda: make_store(model, rows, folder, shard_rows=5),
    }[changed]
    with pytest.raises(ConfigError, match=r"another collection \(differs.*give another --work"):
        other()
    assert len(os.listdir(folder)) == 4
    store, _ = make_store(model, rows, folder)
    store = StateStore(folder, replace(store.manifest, template_sha256="u"))
    store.prepare(replace_stale=True)
    assert "template_sha256" in capsys.readouterr().out
    assert os.listdir(folder) == ["manifest.json"]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    model, rows = random_model("llama"), examples(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match="give another --work"):
            make_store(model, rows, tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_a_shard_that_is_torn_or_foreign(tmp_path):
    model, rows = random_model("llama"), examples(tmp_path)
    store = collect(model, rows, tmp_path / "states")
    other = collect(model, rows[::-1], tmp_path / "other")
    path = tmp_path / "states" / "states-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="states-00001"):
        store.layer("mean_prompt", 2)
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    with pytest.raises(CheckpointError, match="another collection"):
        store.layer("mean_prompt", 2)
    path.unlink()
    whole_again = collect(model, rows, tmp_path / "states").layer("mean_prompt", 2)
    torch.testing.assert_close(whole_again, other.layer("mean_prompt", 2).flip(0))


def peak_mib(*, reset=False):
    """Peak resident memory of this process since the last reset; Linux."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pytest.skip("the peak of this process cannot be reset here")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def test_memory_holds_a_shard_and_not_the_collection(tmp_path):
    """64 layers of 2,000 rows are 125 MiB; a shard of 64 rows is 4."""
    torch.manual_seed(0)
    wide = {"hidden_size": 256, "num_hidden_layers": 64, "intermediate_size": 8, "head_dim": 8}
    one = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", **{**COMMON, **SMALL, **wide, **one})
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = [
        ProbedRow(id=str(i), input_ids=[1, 6 + i % 90, 6 + i // 90], first=0, last=2)
        for i in range(2000)
    ]
    store, _ = make_store(random_model("llama"), examples(tmp_path), tmp_path / "small")
    changed = {"num_rows": 2000, "num_layers": 64, "hidden_size": 256, "rows_per_shard": 64}
    manifest = replace(store.manifest, poolings=("last_prompt_token",), **changed)
    store = StateStore(tmp_path / "states", manifest)
    before = peak_mib(reset=True)
    collect_states(model, rows, store, batch_size=8, progress=False)
    assert store.layer("last_prompt_token", 64).shape == (2000, 256)
    stored = sum(path.stat().st_size for path in (tmp_path / "states").iterdir()) / 2**20
    assert stored > 120
    assert peak_mib() - before < stored / 2


# What cannot be read


def test_states_that_are_not_finite_are_told_by_row_and_layer(tmp_path):
    model, rows = random_model("llama"), examples(tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[word_tokenizer().convert_tokens_to_ids("w7")] = math.nan
    with pytest.raises(DataError, match=r"prompt 'r\d' at layer 1 are not finite") as caught:
        collect(model, rows, tmp_path / "states")
    named = str(caught.value).split("'")[1]
    texts = {row.id: [m["content"].split() for m in row.messages] for row in rows}
    assert any("w7" in words for words in texts[named])
    assert json.loads((tmp_path / "states" / "manifest.json").read_text())["num_rows"] == 9


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "w1", "label": "benign"}], "has no answer"),
        ([{"prompt": "w1", "response": "", "label": "benign"}], "has no answer"),
        ([{"prompt": "w1", "response": 3, "label": "benign"}], "`response` as text"),
        ([{"messages": [{"role": "assistant", "content": "w1"}]}], "no prompt"),
    ],
)
def test_rows_without_the_answer_that_the_position_needs(rows, says, tmp_path):
    model_dir = save_model(tmp_path / "model", tiny_model())
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=says) as caught:
        fit_probe(model_dir, data, tmp_path / "probe", position="response", progress=False)
    assert str(data) in str(caught.value)
