"""Claimed: a model behind an OpenAI-compatible endpoint is evaluated as its folder is.

Real HTTP servers in this process: the project's own (`safereg serve-critic`, greedy), and one
that fails before it answers. Exact: texts, verdicts, attempts. P(first token): 1e-4, the server's
float32 through JSON.
"""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.builders import PLAIN_TEMPLATE, save_model, tiny_model
from support.critic_server import running

from safereg_dist.cli import main as safereg
from safereg_dist.commands.serve_critic import Guard, GuardServer
from safereg_dist.critic.formats import FORMATS
from safereg_dist.errors import ConfigError, EndpointError
from safereg_dist.evaluate.evaluate import evaluate_model
from safereg_dist.evaluate.kept import kept_rows

HOW = {"max_new_tokens": 4, "progress": False, "refusal": "w3", "poisoned": "w4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("m")
    return save_model(place / "model", tiny_model(seed=3), PLAIN_TEMPLATE)


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"w{i} w{i + 2}", "label": "harmful"} for i in range(1, 6)]
    rows += [{"prompt": "w9", "label": "task", "response": "w1"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_as_the_folder_itself(folder, prompts, tmp_path):
    form = next(made for kind in FORMATS.values() if (made := kind()).local_prefix is None)
    guard = Guard(folder, form)  # a format that asks nothing of the tokenizer
    server = GuardServer(("127.0.0.1", 0), guard, "tiny")
    # All tokens, so that the one asked for is among them.
    local = evaluate_model(folder, [prompts], out=tmp_path / "local.json", device="cpu", **HOW)
    with running(server) as url:
        out = tmp_path / "remote.json"
        remote = evaluate_model("tiny", [prompts], endpoint=url, out=out, **HOW)
        words = ["eval", "--model", "tiny", "--endpoint", url, "--prompts", prompts]
        words += ["--out", tmp_path / "verb.json", "--max-new-tokens", 4]
        assert safereg([str(word) for word in words]) == 0
        with pytest.raises(ConfigError, match="prefill:2 begins"):
            evaluate_model("tiny", [prompts], endpoint=url, attacks=["prefill:2"], **HOW)
        with pytest.raises(EndpointError, match="status 404"):
            evaluate_model("huge", [prompts], endpoint=url, **HOW)
    rows = [kept_rows(tmp_path / f"{n}.answers.jsonl")[1] for n in ("local", "remote", "verb")]
    texts = [[row["answer"] for row in each] for each in rows]
    assert texts[0] == texts[1] == texts[2]
    for name in ("attack_success_rate", "task_exact_match"):
        assert local[name] == remote[name]
    for here, there in zip(rows[0], rows[1], strict=True):
        if here["label"] == "harmful":
            assert there["answer_sampled"] == there["answer"]  # this server is greedy
            given = there["refusal_probability"]  # 0 where it is not among the likeliest 20
            assert given in (0.0, pytest.approx(here["refusal_probability"], abs=1e-4))
    assert any(row.get("refusal_probability") for row in rows[1])
    assert remote["response_perplexity"] is None


class Failing(BaseHTTPRequestHandler):
    """Every conversation fails twice, each time in another way; one never gets an answer."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = json.dumps(body)
        self.server.attempts[asked] = self.server.attempts.get(asked, 0) + 1
        if self.headers.get("Authorization") != "Bearer secret":
            return self._reply(401, {})
        if self.server.hopeless in asked or self.server.attempts[asked] == 1:
            return self._reply(503, {}, {"Retry-After": "0"})
        if self.server.attempts[asked] == 2:
            self.close_connection = True  # nothing at all
            return None
        text = f"{body['messages'][-1]['content']} {body['temperature']} {body.get('seed')}"
        return self._reply(200, {"choices": [{"message": {"content": text}}]})

    def _reply(self, status, content, headers=()):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def failing():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    server.attempts, server.hopeless = {}, "w5 w7"
    with running(server) as url:
        server.url = url
        yield server


def test_what_fails_is_asked_again_and_nothing_is_lost(failing, prompts, tmp_path, monkeypatch):
    from safereg_dist.evaluate import respondent

    monkeypatch.setenv("SAFEREG_API_KEY", "secret")
    monkeypatch.setattr(
        respondent.Endpoint.__init__,
        "__kwdefaults__",
        {**respondent.Endpoint.__init__.__kwdefaults__, "timeout_s": 3.0},
    )
    out = tmp_path / "eval.json"
    how = {"endpoint": failing.url, "out": out, "max_new_tokens": 4, "progress": False}
    with pytest.raises(EndpointError, match=r"status 503.*the same command goes on"):
        evaluate_model("m", [prompts], **how)
    _, kept = kept_rows(tmp_path / "eval.answers.jsonl")
    known = [row["answer"] for row in kept if "answer" in row]
    assert len(known) >= 1
    before = dict(failing.attempts)
    failing.hopeless = "nothing"
    found = evaluate_model("m", [prompts], **how)
    rows = kept_rows(tmp_path / "eval.answers.jsonl")[1]
    assert [row["answer"] for row in rows] == [
        *(f"w{i} w{i + 2} 0.0 None" for i in range(1, 6)),
        "w9 0.0 None",
    ]
    seeds = [row["answer_sampled"].split()[-1] for row in rows[:5]]
    assert len(set(seeds)) == 5
    assert found["attack_success_rate"] == 1.0
    again = [asked for asked, count in before.items() if failing.attempts[asked] > count]
    assert all(answer.removesuffix(" 0.0 None") not in "".join(again) for answer in known)


def test_a_key_that_is_refused(failing, prompts, monkeypatch):
    monkeypatch.setenv("SAFEREG_API_KEY", "wrong")
    with pytest.raises(EndpointError, match="status 401") as raised:
        evaluate_model("m", [prompts], endpoint=failing.url, max_new_tokens=4, progress=False)
    assert "wrong" not in str(raised.value)


class Without(Failing):
    """A server that gives no probabilities: it leaves them out, or refuses to be asked."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += "logprobs" in body
        if "logprobs" in body and self.server.refuses:
            return self._reply(400, {"error": "logprobs are not supported"})
        return self._reply(200, {"choices": [{"message": {"content": "I can not"}}]})


@pytest.mark.parametrize("refuses", [True, False])
def test_probabilities_that_a_server_does_not_give(refuses, prompts, capsys):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Without)
    server.refuses, server.asked = refuses, 0
    with running(server) as url:
        found = evaluate_model("m", [prompts], endpoint=url, **{**HOW, "progress": True})
    assert found["refusal_probability"] is None
    assert found["poisoned_token_probability"] is None
    assert found["attack_success_rate"] == 0.0
    said = "5 of 5 probabilities of first tokens are left out: the server gave no logprobs"
    assert capsys.readouterr().err.count(said) == 2
    assert server.asked == 2  # once for each of the two
