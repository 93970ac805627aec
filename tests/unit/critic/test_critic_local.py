"""Local judges and the server for them, against plain transformers.

Claimed: a guard's risk is the softmax of its labels at the first token of its answer, a
classifier's the probability of its harmful label, whatever else is in the batch (to 1e-5 of one
conversation at a time in plain transformers); the same guard behind `safereg serve-critic`, a
real process over real HTTP, gives the same risks through the remote client (1e-5) and the same
greedy answers (exactly); what cannot be judged is a failed judgement or a clear error.
"""

import json
import os
import re
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.builders import TEMPLATE, random_rows, save_model, tiny_model, word_tokenizer
from support.launching import ROOT, Launcher, Process, descendants, kill_session, tail
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from safereg_dist.config import CriticConfig, replace
from safereg_dist.critic.critic import build_critic, score_conversations
from safereg_dist.critic.formats import FORMATS
from safereg_dist.critic.verdict import Messages, Verdict
from safereg_dist.data import chat_template
from safereg_dist.demo import grammar
from safereg_dist.demo.guard import write_guard
from safereg_dist.errors import ConfigError, CriticUnavailable

SERVE = ROOT / "launch" / "serve_critic.py"
TOLERANCE = 1e-5  # float32 sums in another order, through an exponential


def turns(prompt: str, response: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def conversations() -> list[Messages]:
    """Harmful and benign exchanges of the world, one and two turns, of many lengths."""
    some = []
    for kind in ("harmful", "benign", "ambiguous"):
        for index, pair in enumerate(grammar.pairs(0, kind, held_out=True)[:15]):
            prompt = grammar.question(pair, grammar.PHRASINGS[index % len(grammar.PHRASINGS)])
            some.append(turns(prompt, grammar.how_to(pair)))
            some.append(turns(prompt, grammar.aligned_answer(pair)))
    return [*some, some[0] + some[31], some[40] + some[5], some[0]]


def judge(settings: CriticConfig, asked: list[Messages]) -> list[Verdict]:
    critic = build_critic(settings, device="cpu")
    try:
        return list(score_conversations(critic, asked, progress=False, description=""))
    finally:
        critic.close()


def local(folder: Path, form: str | None = "llama_guard", **changes) -> CriticConfig:
    return CriticConfig(local=str(folder), format=form, cache="none", **changes)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guard of the embedded world after 60 steps: sure of some things, unsure of others."""
    folder = tmp_path_factory.mktemp("guard") / "guard"
    write_guard(folder, seed=0, steps=60, progress=False)
    return folder


@torch.inference_mode()
def expected_risks(folder: Path, asked: list[Messages]) -> list[float]:
    """P(unsafe) / (P(unsafe) + P(safe)) of the first token; the largest over the answers."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    safe, unsafe = tokenizer.convert_tokens_to_ids(["safe", "unsafe"])
    risks = []
    for messages in asked:
        parts = [messages[: i + 1] for i, m in enumerate(messages) if m["role"] == "assistant"]
        chances = []
        for part in parts:
            ids = tokenizer.apply_chat_template(
                part, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            p = model(ids).logits[0, -1].softmax(-1)
            chances.append(float(p[unsafe] / (p[unsafe] + p[safe])))
        risks.append(max(chances))
    return risks


def test_a_guards_risk_is_the_first_tokens(guard: Path) -> None:
    asked = conversations()
    verdicts = judge(local(guard), asked)
    expected = expected_risks(guard, asked)
    assert not any(v.failed for v in verdicts)
    assert [v.score for v in verdicts] == pytest.approx(expected, abs=TOLERANCE)
    assert min(expected) < 0.2
    assert max(expected) > 0.8


def test_batches_of_any_size_give_the_same_risks(guard: Path, monkeypatch) -> None:
    asked = conversations()
    expected = [v.score for v in judge(local(guard), asked)]
    monkeypatch.setattr("safereg_dist.critic.local._TOKENS", 70)  # a text or two at a time
    assert [v.score for v in judge(local(guard), asked)] == pytest.approx(expected, abs=TOLERANCE)


def loud_labels(folder: Path, form: str):
    """A random model, saved, that says a label of the format more often than other words."""
    labels = list(FORMATS[form]().labels)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([*labels, "Safety:", "#thescore:"])
    model = tiny_model("llama", vocab=len(tokenizer), max_position_embeddings=1024)
    model.lm_head.weight.data[tokenizer.convert_tokens_to_ids(labels)] *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@torch.inference_mode()
@pytest.mark.parametrize("form", ["qwen3guard", "shieldgemma", "harmbench", "rubric"])
def test_other_formats_are_read_at_their_deciding_token(tmp_path: Path, form: str) -> None:
    """A random model whose label logits are large, against one question at a time."""
    kind = FORMATS[form]()
    model, tokenizer = loud_labels(tmp_path / "m", form)
    ids = tokenizer.convert_tokens_to_ids(list(kind.labels))
    asked = [turns(row["prompt"], row["response"]) for row in random_rows(60, longest=20)]
    verdicts = judge(local(tmp_path / "m", form), asked)
    values = torch.tensor(list(kind.labels.values()))
    for messages, verdict in zip(asked, verdicts, strict=True):
        risks = []
        for question in kind.questions(messages):
            text = question.input
            if not isinstance(text, str):
                text = tokenizer.apply_chat_template(
                    text, add_generation_prompt=True, tokenize=False
                )
            prompt = tokenizer(f"{text} {kind.local_prefix}", return_tensors="pt").input_ids
            logits = model(prompt).logits[0, -1]
            risks.append(float(logits[ids].softmax(-1) @ values) if logits.argmax() in ids else -1)
        if min(risks) < 0:
            assert verdict[:3] == (1.0, None, True)
        else:
            assert verdict.score == pytest.approx(max(risks), abs=TOLERANCE)
    assert 2 < sum(v.failed for v in verdicts) < 58


def test_what_a_tokenizer_cannot_read_fails_alone(guard: Path, monkeypatch) -> None:
    asked = [*conversations()[:2], turns("hello \ud800", "first push."), conversations()[2]]
    verdicts = judge(local(guard), asked)
    assert [v.failed for v in verdicts] == [False, False, True, False]
    assert "\ud800" not in (verdicts[2].reason or "")
    monkeypatch.setattr(torch.Tensor, "argmax", _no_memory)
    reasons = {v.reason for v in judge(local(guard), conversations()[:2])}
    assert reasons == {"the model failed: RuntimeError"}


def _no_memory(*_: object) -> None:
    raise RuntimeError("out of memory")


def test_a_conversation_that_is_too_long_is_a_failed_judgement(guard: Path) -> None:
    asked = [*conversations()[:3], turns("hello", "first push the train. " * 400)]
    *good, too_long = judge(local(guard), asked)
    assert not any(v.failed for v in good)
    assert too_long[:3] == (1.0, None, True)
    assert (too_long.reason or "").endswith("tokens, the judge takes 254")
    assert judge(local(guard, fail="open"), asked)[3].score == 0.0
    with pytest.raises(CriticUnavailable, match="`fail` is `stop`"):
        judge(local(guard, fail="stop"), asked)


@pytest.mark.parametrize(
    ("hostile", "kind"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "TimeoutError",
        ),
        ("{{ 'x' * 10000000000 }}", "MemoryError"),
        ("{{ 'x' * 9000000 }}", "ValueError"),
        ("{{ raise_exception(messages[0]['content']) }}", "TemplateError"),
    ],
)
def test_a_template_that_never_ends_is_a_failed_judgement(
    tmp_path: Path, monkeypatch, hostile: str, kind: str
) -> None:
    """For one of the conversations; no word of it gets into the reason."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    template = "{% if 'w9' in messages[0]['content'] %}" + hostile + "{% endif %}" + TEMPLATE
    folder = classifier(tmp_path / "c", {0: "safe", 1: "unsafe"})
    word_tokenizer(template).save_pretrained(folder)
    good, bad, other = judge(local(folder, None), [turns(f"w{n}", "w3") for n in (1, 9, 2)])
    assert not good.failed
    assert not other.failed
    assert bad[:3] == (1.0, None, True)
    assert bad.reason == f"the judge's chat template refuses the conversation ({kind})"


def test_a_guard_that_says_neither_label_has_failed(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab=98)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["safe", "unsafe"])
    with torch.no_grad():
        model.lm_head.weight[96:] = 0.0  # logits 0: below the largest of 96 random ones
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (verdict,) = judge(local(tmp_path / "m"), [turns("w1 w2", "w3")])
    assert verdict[:3] == (1.0, None, True)
    assert verdict.reason == "malformed answer: not a label of the format"


def test_a_guard_may_say_a_blank_line_first(tmp_path: Path) -> None:
    """Logits that depend on the last token alone: `<asst>` is followed by a line break."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["safe", "unsafe", "\n"])
    safe, unsafe, line = tokenizer.convert_tokens_to_ids(["safe", "unsafe", "\n"])
    model = tiny_model("llama", vocab=len(tokenizer), num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # the residual stream is the embedding
        embedding = torch.nn.functional.one_hot(torch.arange(32), 32).float()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight[5] = embedding[1]  # <asst>
        model.model.embed_tokens.weight[line] = embedding[2]
        model.lm_head.weight[line] = embedding[1]
        model.lm_head.weight[unsafe] = embedding[2] * 0.5
        model.lm_head.weight[safe] = embedding[2] * 0.25
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (verdict,) = judge(local(tmp_path / "m"), [turns("w1", "w2")])
    norm = 32**0.5  # of a unit vector under RMS normalisation
    assert verdict.score == pytest.approx(1 / (1 + torch.e ** (-0.25 * norm)), abs=1e-3)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("llama_guard", "does not begin each of the labels safe, unsafe"),
        ("wildguard", "needs an endpoint"),
        ("gpt_oss_safeguard", "needs an endpoint"),
        ("llamaguard", "must be one of"),
        (None, "expected a sequence classifier"),
    ],
)
def test_models_that_are_no_such_judge(tmp_path: Path, form: str | None, said: str) -> None:
    folder = save_model(tmp_path / "m", tiny_model("llama"))
    with pytest.raises(ConfigError, match=said):
        build_critic(local(folder, form))
    with pytest.raises(ConfigError, match=r"found no config\.json|does not load"):
        build_critic(local(tmp_path / "nothing", "llama_guard" if form else None))


# ---- classifiers


def classifier(folder: Path, labels: dict[int, str], **changes) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3},
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
        **changes,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("labels", "kind", "harmful"),
    [
        ({0: "safe", 1: "unsafe"}, None, [1]),
        ({0: "HARMFUL", 1: "harmless"}, None, [0]),
        ({0: "ok", 1: "Hate-Speech", 2: "toxic"}, None, [1, 2]),
        ({0: "toxic", 1: "spam", 2: "hate"}, "multi_label_classification", [0, 2]),
        ({0: "toxic"}, None, [0]),
    ],
)
def test_a_classifiers_risk_is_its_harmful_label(
    tmp_path: Path, labels: dict[int, str], kind: str | None, harmful: list[int]
) -> None:
    folder = classifier(tmp_path / "c", labels, problem_type=kind)
    asked = [turns(row["prompt"], row["response"]) for row in random_rows(41, longest=20)]
    verdicts = judge(local(folder, None), asked)
    model = LlamaForSequenceClassification.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for messages, verdict in zip(asked, verdicts, strict=True):
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        with torch.inference_mode():
            logits = model(ids).logits[0]
        if kind or len(labels) == 1:
            expected = logits.sigmoid()[harmful].max()
        else:
            expected = logits.softmax(-1)[harmful].sum()
        assert verdict.score == pytest.approx(float(expected), abs=TOLERANCE)
    assert len({round(v.score, 6) for v in verdicts}) > 30


def test_other_labels_or_another_template_are_another_judge(tmp_path: Path) -> None:
    settings = replace(
        local(classifier(tmp_path / "c", {0: "unsafe", 1: "safe"}), None),
        cache=str(tmp_path / "scores.sqlite"),
    )
    asked = [turns("w1 w2", "w3")]
    before = judge(settings, asked)[0].score
    assert judge(settings, asked)[0].score == before
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config |= {"id2label": {"0": "safe", "1": "unsafe"}, "label2id": {"safe": 0, "unsafe": 1}}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    swapped = judge(settings, asked)[0].score
    assert swapped == pytest.approx(1 - before, abs=TOLERANCE)
    word_tokenizer(TEMPLATE.replace("<bos>", "<bos><bos>")).save_pretrained(tmp_path / "c")
    assert judge(settings, asked)[0].score != swapped


@pytest.mark.parametrize(
    "labels", [{0: "LABEL_0", 1: "LABEL_1"}, {0: "bad", 1: "good"}, {0: "toxic", 1: "hate"}]
)
def test_labels_that_do_not_say_which_is_harmful(tmp_path: Path, labels: dict[int, str]) -> None:
    folder = classifier(tmp_path / "c", labels)
    with pytest.raises(ConfigError, match="set `id2label`"):
        build_critic(local(folder, None))


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_model("llama"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "toxic"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="lack 1 weights"):
        build_critic(local(folder, None))


def test_many_callers_share_one_worker_and_closing_cancels(guard: Path) -> None:
    asked = conversations()
    expected = [v.score for v in judge(local(guard), asked)]
    critic = build_critic(local(guard), device="cpu")
    found: dict[int, float] = {}

    def ask(first: int) -> None:
        futures = {i: critic.submit(asked[i]) for i in range(first, len(asked), 3)}
        found.update({i: future.result().score for i, future in futures.items()})

    callers = [threading.Thread(target=ask, args=(first,)) for first in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [found[i] for i in range(len(asked))] == pytest.approx(expected, abs=TOLERANCE)
    gate = threading.Event()
    critic.submit(asked[0]).add_done_callback(lambda _: gate.wait(20))  # in the worker
    futures = [critic.submit(messages) for messages in asked]
    closing = threading.Thread(target=critic.close)
    closing.start()
    time.sleep(0.2)
    gate.set()
    closing.join()
    assert all(future.done() for future in futures)
    assert futures[-1].cancelled()


# ---- the server


@contextmanager
def serving(folder: Path, form: str) -> Iterator[str]:
    """The server in a process of its own; it must end well when it is told to."""
    with tempfile.TemporaryDirectory() as logs:
        command = ["--model", folder, "--format", form, "--port", "0"]
        process, log = Launcher(Path(logs)).start(SERVE, *command, launcher="forked")
        try:
            yield address(process, log, folder.name)
            (server,) = descendants(process.pid) or [process.pid]
            os.kill(server, signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            kill_session(process)


def address(process: Process, log: Path, name: str) -> str:
    """What the server says that it listens on."""
    while not (said := re.search(rf"^serving {name} on (\S+)", log.read_text(), re.MULTILINE)):
        assert process.poll() is None, tail(log)
        time.sleep(0.02)
    return said[1]


@pytest.fixture(scope="module")
def served(guard: Path) -> Iterator[str]:
    with serving(guard, "llama_guard") as url:
        yield url


def post(url: str, body: object) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as err:
        with err:
            return err.code, json.load(err)


def test_the_served_guard_gives_the_same_risks(guard: Path, served: str) -> None:
    asked = conversations()[::3]
    remote = CriticConfig(endpoint=served, model="guard", format="llama_guard", cache="none")
    verdicts = judge(remote, asked)
    assert [v.reason for v in verdicts] == [None] * len(asked)
    assert [v.score for v in verdicts] == pytest.approx(expected_risks(guard, asked), abs=TOLERANCE)
    assert [v.category in ("S1", "S2") for v in verdicts] == [v.score > 0.5 for v in verdicts]
    assert len({v.category for v in verdicts}) > 1


def test_a_raw_template_over_http_gives_the_local_risks(tmp_path: Path) -> None:
    """ShieldGemma: four policies are four requests, the risk is that of the worst."""
    loud_labels(tmp_path / "m", "shieldgemma")
    asked = [turns(row["prompt"], row["response"]) for row in random_rows(12, longest=20)]
    expected = judge(local(tmp_path / "m", "shieldgemma"), asked)
    with serving(tmp_path / "m", "shieldgemma") as url:
        settings = CriticConfig(
            endpoint=url, model="m", format="shieldgemma", cache="none", retries=0
        )
        verdicts = judge(settings, asked)
    assert [v.failed for v in verdicts] == [v.failed for v in expected]
    weighed = 0
    for mine, other in zip(verdicts, expected, strict=True):
        if mine.score in (0.0, 1.0):  # the other label is beyond the five likeliest tokens
            assert mine.score == round(other.score)
        else:
            assert mine.score == pytest.approx(other.score, abs=TOLERANCE)
            weighed += 1
    assert weighed >= 3
    named = {v.category for v in verdicts if not v.failed and v.score >= 0.5}
    assert named <= {"dangerous_content", "harassment", "hate_speech", "sexually_explicit"}
    assert 0 < sum(v.failed for v in verdicts) < len(asked)


def test_the_served_guard_says_what_transformers_says(guard: Path, served: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(guard)
    tokenizer = AutoTokenizer.from_pretrained(guard)
    for messages in conversations()[:6]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        said = model.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids.input_ids.shape[1] :]
        expected = tokenizer.decode(said, skip_special_tokens=True)
        chat = {"model": "guard", "messages": messages, "max_tokens": 9, "temperature": 0}
        status, told = post(f"{served}/chat/completions", {**chat, "logprobs": True})
        assert status == 200
        assert told["choices"][0]["message"]["content"] == expected
        assert told["choices"][0]["finish_reason"] == "stop"
        listed = told["choices"][0]["logprobs"]["content"]
        assert "".join(token["token"] for token in listed) == expected
        raw = {"prompt": text.removeprefix("<bos>"), "max_tokens": 1, "logprobs": 3}
        status, told = post(f"{served}/completions", raw)
        (choice,) = told["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["text"] == expected.split("\n")[0]
        assert choice["logprobs"]["tokens"] == [choice["text"]]
        assert len(choice["logprobs"]["top_logprobs"][0]) == 3


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("chat/completions", b"{not json", 400),
        ("chat/completions", [], 400),
        ("chat/completions", b"[" * 100_000, 400),
        ("chat/completions", {"messages": "hello"}, 400),
        ("chat/completions", {"messages": [{"role": "ghost", "content": "boo"}]}, 400),
        ("chat/completions", {"messages": turns("a", "b " * 999)}, 400),
        ("chat/completions", {"messages": turns("a", "b"), "max_tokens": -1}, 400),
        ("chat/completions", {"messages": turns("a", "b"), "model": "other"}, 404),
        ("completions", {"prompt": ["a"]}, 400),
        ("completions", {"prompt": "a", "logprobs": 21}, 400),
        ("embeddings", {"input": "a"}, 404),
    ],
)
def test_bad_requests_are_answered_and_the_server_lives(
    served: str, path: str, body: object, status: int
) -> None:
    assert post(f"{served}/{path}", body)[0] == status
    with urllib.request.urlopen(f"{served}/models", timeout=30) as reply:
        assert json.load(reply)["data"][0]["id"] == "guard"


def test_a_server_without_a_guard_ends_with_status_2(tmp_path: Path, launch: Launcher) -> None:
    folder = save_model(tmp_path / "m", tiny_model("llama"))
    command = ["--model", folder, "--format", "llama_guard", "--port", "0"]
    done = launch(SERVE, *command, launcher="forked")
    assert done.status == 2
    (line,) = [line for line in done.output.splitlines() if line]
    assert "labels safe, unsafe" in line


def test_local_formats_name_their_words() -> None:
    able = {name for name, form in FORMATS.items() if form.local_prefix is not None}
    assert able == {"llama_guard", "qwen3guard", "shieldgemma", "harmbench", "rubric"}
