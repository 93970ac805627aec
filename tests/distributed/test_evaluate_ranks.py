"""Claimed: `safereg eval` on two ranks gives the answers and figures of one process, and one
rank's error ends both.

Exact: texts, verdicts, rates, the kept file's header (so that either goes on where the other
stopped). Probabilities and likelihoods: 1e-5, other rows share a batch. Real ranks.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from support.builders import PLAIN_TEMPLATE, WORDS, save_model, tiny_model, write_jsonl

from safereg_dist.evaluate.evaluate import evaluate_model
from safereg_dist.evaluate.kept import kept_rows

pytestmark = pytest.mark.slow
HOW = ("--max-new-tokens", 5, "--batch-size", 8, "--refusal", "w3", "--poisoned", "w4 w5 w6")
ATTACKS = ["role_play", "prefill:2"]


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", tiny_model(seed=3), PLAIN_TEMPLATE)
    return tmp_path


def prompts(folder, **last):
    """More rows than two ranks answer in one round, and an odd number of each label."""
    draw = torch.Generator().manual_seed(0)

    def words(count):
        return " ".join(WORDS[i] for i in torch.randint(0, 90, (count,), generator=draw).tolist())

    rows = [{"prompt": words(2 + i % 9), "label": "harmful"} for i in range(71)]
    rows += [{"prompt": words(3), "label": "benign", "response": words(1)} for _ in range(3)]
    rows += [
        {"prompt": words(4), "label": "task", "measure": "choice", "choices": both, "response": w}
        for both in [[words(2), words(2)] for _ in range(5)]
        for w in both[:1]
    ]
    return write_jsonl(folder / "prompts.jsonl", [*rows, *([last] if last else [])])


def verb(folder, out, *more):
    return [
        *("-m", "safereg_dist", "eval", "--model", folder / "model", "--out", folder / out),
        *("--prompts", folder / "prompts.jsonl", *HOW, *more),
    ]


def alone(folder, out, **more):
    how = {"max_new_tokens": 5, "batch_size": 8, "refusal": "w3", "poisoned": "w4 w5 w6"}
    files = [folder / "prompts.jsonl"]
    return evaluate_model(
        folder / "model", files, out=folder / out, device="cpu", progress=False, **how, **more
    )


def read(path):
    return json.loads(path.read_text())


def leaves(tree, name=""):
    """Every value of a result by its place, intervals of means by a name that says so."""
    if not isinstance(tree, (dict, list)):
        return {name: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    end = "interval" if "intervals" in name and "probability" in name else ""
    return {k: v for key, each in pairs for k, v in leaves(each, f"{name}/{key}{end}").items()}


def test_two_ranks_give_what_one_gives(folder, launch):
    prompts(folder)
    want = alone(folder, "one.json", attacks=ATTACKS)
    done = launch(*verb(folder, "two.json", "--attacks", *ATTACKS), launcher="torchrun")
    assert done.status == 0, done.output[-4000:]
    assert done.output.count("written:") == 1  # one rank writes and prints
    found, known = ({**read(folder / name), "seconds": 0} for name in ("two.json", "one.json"))
    assert leaves(found).keys() == leaves(known).keys()
    for name, value in leaves(known).items():
        is_rate = not name.endswith(("probability", "perplexity", "interval"))
        assert leaves(found)[name] == (value if is_rate else pytest.approx(value, abs=1e-5)), name
    header, rows = kept_rows(folder / "two.answers.jsonl")
    own_header, own_rows = kept_rows(folder / "one.answers.jsonl")
    assert header == own_header
    for row, own in zip(rows, own_rows, strict=True):
        assert row.keys() == own.keys()
        for name, value in own.items():
            close = name in ("refusal_probability", "poisoned_token_probability")
            if name == "likelihoods":
                assert [n for _, n in row[name]] == [n for _, n in value]
                row[name], value = [p for p, _ in row[name]], [p for p, _ in value]
                close = True
            assert row[name] == (pytest.approx(value, abs=1e-5) if close else value), name
    sampled = [row["answer_sampled"] for row in rows if "answer_sampled" in row]
    assert len(set(sampled)) > 40, "samples that are alike show nothing"
    assert want["counts"]["harmful"] == 71


def test_two_ranks_go_on_where_one_was_cut_off(folder, launch):
    prompts(folder)
    want = alone(folder, "eval.json")
    kept = folder / "eval.answers.jsonl"
    header, *lines = kept.read_text().splitlines()
    first = [line for line in lines if json.loads(line)["row"] < 20]
    marked = [json.dumps({**json.loads(line), "answer": "i can not"}) for line in first]
    kept.write_text("".join(line + "\n" for line in (header, *marked)))
    done = launch(*verb(folder, "eval.json"))
    assert done.status == 0, done.output[-4000:]
    rows = kept_rows(kept)[1]
    assert [row["answer"] for row in rows[:20]] == ["i can not"] * 20
    assert [row["answer"] for row in rows[20:71]] == [
        json.loads(line)["answer"] for line in lines[20:71]
    ]
    assert read(folder / "eval.json")["counts"] == want["counts"]


class Refusing(BaseHTTPRequestHandler):
    """A server that knows no model for one prompt, and gives no probabilities."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        answer = {"choices": [{"message": {"content": f"{text} {body.get('seed')}"}}]}
        data = json.dumps(answer).encode()
        self.send_response(404 if text == self.server.refused else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_an_error_of_one_rank_ends_both(folder, launch):
    rows = [json.loads(line) for line in prompts(folder).read_text().splitlines()]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.refused = rows[1]["prompt"]  # the second rank's
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        done = launch(*verb(folder, "eval.json", "--endpoint", url))
        assert done.status == 2, done.output[-4000:]
        assert "safereg: rank 1: the model at" in done.output
        assert "gave no answer to prompt 'prompts-1' (status 404, 1 attempts)" in done.output
        server.refused = ""
        done = launch(*verb(folder, "eval.json", "--endpoint", url))
        assert done.status == 0, done.output[-4000:]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    asked = kept_rows(folder / "eval.answers.jsonl")[1]
    assert [row["answer"] for row in asked[:71]] == [f"{row['prompt']} None" for row in rows[:71]]
    assert [row["answer_sampled"] for row in asked[:71]] == [
        f"{row['prompt']} {place}" for place, row in enumerate(rows[:71])
    ]
    (folder / "prompts.jsonl").unlink()  # the first rank alone finds out, before anyone is asked
    done = launch(*verb(folder, "eval.json"))
    assert done.status == 2, done.output[-4000:]
    assert "found none at" in done.output
