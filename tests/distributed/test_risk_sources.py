"""Claimed: whatever gives the risk, ranks run the same collectives in the same order: a rank whose
judge is slow, a rank whose judge fails, a policy-side probe that falls back, a probe that reads
answers. And each gives the risk that it should.

Judges are real HTTP servers; probes are compared with plain transformers in float64. Rounds: 1e-5
in probabilities. Collectives, ledgers and decisions are exact.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.launching import FINETUNE, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from safereg_dist.data import tokenize_row
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
WORKER = ROOT / "tests" / "distributed" / "critic_worker.py"
FAILING = ROOT / "tests" / "distributed" / "failing_risk_worker.py"
LAYER = 2


class Judge(BaseHTTPRequestHandler):
    """Finds answers of more than four words unsafe; slow to one rank, broken for it on demand."""

    def do_GET(self):
        """The list of models, which a client may ask for at its start."""
        self._reply(200, {"object": "list", "data": []})

    def do_POST(self):
        """One judgement."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] == "slow-rank1":
            time.sleep(0.3)
        if body["model"] == "broken-rank1":
            self._reply(200, {"choices": [{"message": {"content": "who knows"}}]})
            return
        words = len(body["messages"][-1]["content"].split())
        text = "unsafe\nS1" if words > 4 else "safe"
        choice = {"index": 0, "finish_reason": "stop",
                  "message": {"role": "assistant", "content": text}}  # fmt: skip
        self._reply(200, {"choices": [choice]})

    def _reply(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def judge_url():
    """A judge on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def make_run(folder, *, epochs=2, **risk):
    """A model of 3 layers, rows of several lengths and turns."""
    model = tiny_model(seed=0, num_hidden_layers=3)
    save_model(folder / "model", model)
    rows = random_rows(21, risk=True)
    turns = ["w1 w2", "w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12"]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
    ]
    rows.append({"id": "turns", "messages": messages, "risk": 0.5})
    write_jsonl(folder / "train.jsonl", rows)
    text = {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "train.jsonl")},
        "risk": {"max_held_back": 1.0, **risk},
        "train": {"epochs": epochs, "precision": "fp32", "micro_batch_size": 3},
        "reference": {"rows_per_pass": 2},
        "output_dir": str(folder / "out"),
    }
    (folder / "run.yaml").write_text(json.dumps(text))
    return model


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rank_with_a_slow_or_broken_judge(tmp_path, launch, judge_url):
    make_run(tmp_path, epochs=1)
    done = launch(WORKER, str(tmp_path), judge_url, ranks=2)
    assert done.status == 0, done.output[-4000:]
    found = [json.loads((tmp_path / f"found.rank{r}.json").read_text()) for r in range(2)]
    for name in ("quick", "slow", "broken"):
        assert [f[name]["error"] for f in found] == ["", ""]
        assert found[0][name]["collectives"] == found[1][name]["collectives"]
    assert found[0]["slow"]["collectives"] == found[0]["quick"]["collectives"]
    assert len(found[0]["quick"]["collectives"]) > 50
    # A failure under `stop` is agreed upon: nobody is left waiting.
    assert "CriticUnavailable" in found[0]["stop"]["error"]
    assert "rank 1" in found[0]["stop"]["error"]
    assert found[1]["stop"]["error"]

    words = {}
    for row in read_jsonl(tmp_path / "train.jsonl"):
        answer = row["response"] if "response" in row else row["messages"][-1]["content"]
        words[row["id"]] = len(answer.split())
    for name in ("quick", "slow"):
        for entry in read_jsonl(tmp_path / name / "ledger.jsonl"):
            assert entry["risk"] == (1.0 if words[entry["id"]] > 4 else 0.0)
            assert entry.get("note") == ("judge: S1" if entry["risk"] else None)
    failed = 0
    for entry in read_jsonl(tmp_path / "broken" / "ledger.jsonl"):
        if entry["rank"] == 1:
            assert (entry["risk"], entry["kl_coef"]) == (1.0, 1.0)
            assert entry["note"].startswith("judge failed")
            failed += 1
    metrics = read_jsonl(tmp_path / "broken" / "metrics.jsonl")
    assert sum(row["risk_failed"] for row in metrics) == failed > 10


def test_what_fails_on_one_rank_fails_on_all(tmp_path, launch):
    """A judge or a disk of rank 1, before, between and after collectives of other signals."""
    done = launch(FAILING, str(tmp_path), ranks=2)
    assert done.status == 0, done.output[-4000:]
    found = [json.loads((tmp_path / f"found.rank{r}.json").read_text()) for r in range(2)]
    assert len(found[0]) == 9
    for name in found[0]:
        own, other = found[1][name], found[0][name]
        said = "a judgement failed" if "judge" in name else "the disk does not"
        assert said in own["error"], name
        assert other["error"].endswith(own["error"].partition(": ")[2]), name
        assert "rank 1" in other["error"], name
        assert own["collectives"] == other["collectives"], name


def make_probe(model, position, pooling, seed):
    generator = torch.Generator().manual_seed(seed)
    return Probe(
        layer=LAYER,
        pooling=pooling,
        position=position,
        mean=torch.randn(32, generator=generator),
        scale=torch.rand(32, generator=generator) + 0.5,
        weight=torch.randn(32, generator=generator) / 4,
        bias=0.1,
        threshold=0.4,
        fingerprint=model_fingerprint(model),
    )


def spans(row, position):
    """Tokens that a probe reads: each prompt from the start, or each answer."""
    found = []
    for end in row.prompt_ends:
        last = end
        while last < len(row.loss_mask) and row.loss_mask[last]:
            last += 1
        found.append((0, end) if position == "prompt" else (end, last))
    return found


def expected_risk(folder, probe):
    """Largest probability over turns, by plain transformers in float64 and NumPy."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    risk = {}
    for raw in read_jsonl(folder / "train.jsonl"):
        row = tokenize_row(raw, "", tokenizer, default_id="")
        with torch.no_grad():
            output = model(torch.tensor([row.input_ids]), output_hidden_states=True)
        states = output.hidden_states[LAYER][0].numpy()
        values = []
        for first, last in spans(row, probe.position):
            is_mean = probe.pooling.startswith("mean")
            pooled = states[first:last].mean(0) if is_mean else states[last - 1]
            z = (pooled - probe.mean.numpy()) / probe.scale.numpy()
            values.append(1 / (1 + np.exp(-(z @ probe.weight.numpy() + probe.bias))))
        risk[row.id] = max(values)
    return risk


def rescaled(risk, threshold=0.4):
    return float(np.interp(risk, [0, threshold, 1], [0, 0.5, 1]))


def test_probes_on_prompts_and_answers_under_zero3(tmp_path, launch):
    model = make_run(tmp_path, estimator="probe", path=str(tmp_path / "probe"))
    probes = [
        make_probe(model, "prompt", "mean_prompt", 1),
        make_probe(model, "response", "mean_response", 2),
    ]
    for probe in probes:
        probe.save(tmp_path / "probe" / probe.position)
    done = launch(FINETUNE, tmp_path / "run.yaml", ranks=2)
    assert done.status == 0, done.output[-4000:]
    sides = {probe.position: expected_risk(tmp_path, probe) for probe in probes}
    ledger = read_jsonl(tmp_path / "out" / "ledger.jsonl")
    assert {entry["id"] for entry in ledger} == set(sides["prompt"])
    leaders = set()
    for entry in ledger:
        parts = {name: rescaled(risk[entry["id"]]) for name, risk in sides.items()}
        assert entry["risk"] == pytest.approx(max(parts.values()), abs=1e-5)
        assert entry["estimator"] == "max:" + max(parts, key=parts.get)
        leaders.add(entry["estimator"])
    assert len(leaders) == 2
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert {"risk_mean/prompt", "risky_rows/response"} <= metrics[0].keys()


@pytest.mark.parametrize("drift", ["fallback", "realign"])
def test_a_drifting_probe_under_zero3(tmp_path, launch, drift):
    """The policy is another model than the reference, as if it had drifted all the way."""
    model = make_run(
        tmp_path, estimator="probe", path=str(tmp_path / "probe"), source="policy", force=True,
        drift=drift, drift_every=2, drift_recall=1.0,
    )  # fmt: skip
    probe = make_probe(model, "prompt", "last_prompt_token", 1)
    probe.save(tmp_path / "probe")
    save_model(tmp_path / "other", tiny_model(seed=5, num_hidden_layers=3))
    done = launch(
        FINETUNE,
        tmp_path / "run.yaml",
        f"model={tmp_path / 'other'}",
        f"reference.model={tmp_path / 'model'}",
        ranks=2,
    )
    assert done.status == 0, done.output[-4000:]
    assert done.output.count("the policy-side probe finds") >= 1, done.output[-3000:]
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    recalls = [row.get("probe_recall") for row in metrics]
    names = [
        {e["estimator"] for e in read_jsonl(tmp_path / "out" / "ledger.jsonl") if e["step"] == s}
        for s in range(len(metrics))
    ]
    assert names[0] == {"probe-policy"}
    assert all(len(found) == 1 for found in names), "ranks differ in what gives the risk"
    assert recalls[0] < 1
    assert recalls[1] is None
    if drift == "realign":
        assert names[1] == {"probe-policy-realigned"}
        return
    assert names[-1] == {"probe-reference"}
    frozen = expected_risk(tmp_path, probe)
    for entry in read_jsonl(tmp_path / "out" / "ledger.jsonl"):
        if entry["estimator"] == "probe-reference":
            assert entry["risk"] == pytest.approx(frozen[entry["id"]], abs=1e-5)
