"""Claimed: under several ranks a user's mistake is one line, status 2, and nothing left behind;
anchor rows built by two ranks are those of one.

Exact.
"""

import json
import socket

import pytest
import torch
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.extent import FULL
from support.launching import FINETUNE, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


def make_config(folder):
    save_model(folder / "model", tiny_model())
    rows = random_rows(8)
    rows[5]["risk"] = 1.5
    write_jsonl(folder / "bad.jsonl", rows)
    config = folder / "run.yaml"
    config.write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{train: {folder / 'bad.jsonl'}}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "train: {steps: 2, precision: fp32, micro_batch_size: 2}\n"
        f"output_dir: {folder / 'out'}\n"
    )
    return config


def messages(output):
    return [line for line in output.splitlines() if line.startswith("safereg: ")]


def test_a_bad_row_is_one_message_from_two_ranks(tmp_path, launch):
    launcher = "deepspeed" if FULL else "preloaded"
    done = launch(FINETUNE, make_config(tmp_path), ranks=2, launcher=launcher)
    assert done.status == 2, done.output[-3000:]
    assert len(messages(done.output)) == 1, done.output[-3000:]
    assert "bad.jsonl:6: risk must be a number in [0, 1], got 1.5" in messages(done.output)[0]
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named_by_all_ranks(tmp_path, launch):
    config = make_config(tmp_path)
    write_jsonl(tmp_path / "bad.jsonl", random_rows(8))
    spoilt = tiny_model()
    with torch.no_grad():
        spoilt.model.layers[1].mlp.up_proj.weight[-1, -1] = float("nan")  # of the second shard
    save_model(tmp_path / "model", spoilt)
    done = launch(FINETUNE, config, ranks=2)
    assert done.status == 2, done.output[-3000:]
    (message,) = messages(done.output)
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert not (tmp_path / "out").exists()


def test_a_port_in_use_is_named(tmp_path, launch):
    config = make_config(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        done = launch(FINETUNE, config, launcher="python", env={**env, "MASTER_PORT": port})
    assert done.status == 2, done.output[-3000:]
    (message,) = messages(done.output)
    assert f"127.0.0.1:{port}" in message
    assert "port" in message
    assert not (tmp_path / "out").exists()


def test_anchors_of_two_ranks_are_those_of_one(tmp_path, launch):
    model = tiny_model()
    model.lm_head.weight.data[2] *= 4  # <eos> is likely enough for most answers to end
    save_model(tmp_path / "model", model)
    prompts = [{"id": row["id"], "prompt": row["prompt"]} for row in random_rows(11)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    arguments = [
        *("anchor", "build", "--model", tmp_path / "model"),
        *("--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", "40"),
    ]
    entry = ROOT / "safereg_dist" / "__main__.py"
    for ranks in (2, 1):
        out = tmp_path / f"anchor-{ranks}.jsonl"
        done = launch(entry, *arguments, "--out", out, ranks=ranks)
        assert done.status == 0, done.output[-3000:]
    two, one = (
        [json.loads(line) for line in (tmp_path / f"anchor-{n}.jsonl").read_text().splitlines()]
        for n in (2, 1)
    )
    assert two == one
    assert all(row["messages"][-1]["role"] == "assistant" for row in one)
    left = {p.name for p in tmp_path.iterdir() if "rank" in p.name or "partial" in p.name}
    assert not left, left
