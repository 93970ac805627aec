"""A judge with its cache, and verdicts of many conversations in order.

Claimed: equal content is asked for once, however many ask at the same time; a verdict is on disk
before anyone is told; failures are not kept; an error of the judge or of the disk reaches whoever
waits; order is kept whatever order the judge answers in. All of it is exact. The judges here
are plain objects that answer when the test says so; the real ones have tests of their own.
"""

import hashlib
import json
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from safereg_dist.config import CriticConfig
from safereg_dist.critic import critic as critic_module
from safereg_dist.critic.critic import CachedCritic, score_conversations
from safereg_dist.critic.verdict import Messages, Verdict, conversation_key, failed_verdict
from safereg_dist.errors import CheckpointError, ConfigError, CriticUnavailable
from safereg_dist.storage.score_cache import CachedScore, ScoreCache


def conversation(number: int) -> Messages:
    return [
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "content": "answer"},
    ]


def verdict_of(messages: Messages) -> Verdict:
    number = int(messages[0]["content"].split()[1])
    return Verdict(number % 101 / 100, f"S{number}" if number % 2 else None)


class PatientJudge:
    """Keeps what it is asked until the test answers."""

    identity = "patient"

    def __init__(self) -> None:
        self.asked: list[tuple[Messages, Future[Verdict]]] = []
        self.is_closed = False

    def submit(self, messages: Messages) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        self.asked.append((messages, future))
        return future

    def answer_all(self) -> None:
        for messages, future in self.asked:
            if not future.done():
                future.set_result(verdict_of(messages))

    def close(self) -> None:
        self.is_closed = True
        for _, future in self.asked:
            if future.cancel():
                future.set_running_or_notify_cancel()


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    return ScoreCache(tmp_path / "scores.sqlite")


def stored(tmp_path: Path, numbers) -> dict[int, CachedScore]:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    keys = {conversation_key(conversation(n)): n for n in numbers}
    found = {keys[key]: cached for key, cached in cache.get_many("patient", list(keys)).items()}
    cache.close()
    return found


def test_the_key_is_of_roles_and_contents_in_canonical_json() -> None:
    messages = [{"content": "caf\u00e9 \ud800", "role": "user"}, {"role": "tool", "content": "x"}]
    canonical = r'[["user","caf\u00e9 \ud800"],["tool","x"]]'
    assert json.loads(canonical) == [[m["role"], m["content"]] for m in messages]
    assert conversation_key(messages) == hashlib.sha256(canonical.encode()).hexdigest()
    assert conversation_key([{**messages[0], "name": "me"}, messages[1]]) == conversation_key(
        messages
    )
    assert conversation_key(messages[::-1]) != conversation_key(messages)
    assert conversation_key([{"role": "user", "content": 'a","b'}]) != conversation_key(
        [{"role": "user", "content": "a"}, {"role": "b", "content": ""}]
    )


def test_callers_at_the_same_time_share_one_request(cache: ScoreCache, tmp_path: Path) -> None:
    judge = PatientJudge()
    critic = CachedCritic(judge, cache)
    futures: list[Future[Verdict]] = []
    callers = [
        threading.Thread(
            target=lambda: futures.extend(critic.submit(conversation(n % 7)) for n in range(70))
        )
        for _ in range(6)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(m[0]["content"] for m, _ in judge.asked) == [f"question {n}" for n in range(7)]
    assert not any(future.cancel() for future in futures)  # they are not one caller's to cancel
    judge.answer_all()
    assert len({id(future) for future in futures}) == 7
    assert {future.result() for future in futures} == {
        verdict_of(conversation(n)) for n in range(7)
    }
    # Known now: the judge is not asked again, and not by the next process either.
    assert critic.submit(conversation(3)).result() == verdict_of(conversation(3))
    assert len(judge.asked) == 7
    critic.close()
    assert judge.is_closed
    assert stored(tmp_path, range(7)) == {
        n: CachedScore(*verdict_of(conversation(n))[:2]) for n in range(7)
    }


def test_a_verdict_is_on_disk_before_anyone_is_told(cache: ScoreCache, tmp_path: Path) -> None:
    judge = PatientJudge()
    critic = CachedCritic(judge, cache)
    seen = []
    for n in range(50):
        future = critic.submit(conversation(n))
        future.add_done_callback(lambda _, n=n: seen.append(n in stored(tmp_path, [n])))
        judge.answer_all()
        future.result()
    critic.close()
    assert seen == [True] * 50


def test_failures_are_not_kept(cache: ScoreCache, tmp_path: Path) -> None:
    judge = PatientJudge()
    critic = CachedCritic(judge, cache)
    failed = Verdict(1.0, None, True, "HTTP 500")
    future = critic.submit(conversation(1))
    judge.asked[0][1].set_result(failed)
    assert future.result() == failed
    again = critic.submit(conversation(1))
    assert len(judge.asked) == 2
    judge.asked[1][1].set_exception(CriticUnavailable("stop"))
    with pytest.raises(CriticUnavailable, match="stop"):
        again.result()
    third = critic.submit(conversation(1))
    judge.answer_all()
    assert third.result() == verdict_of(conversation(1))
    critic.close()
    assert set(stored(tmp_path, [1])) == {1}


def test_a_cache_that_cannot_be_read_reaches_whoever_waits(cache: ScoreCache, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise CheckpointError("the score cache cannot be used")

    monkeypatch.setattr(cache, "get_many", broken)
    critic = CachedCritic(PatientJudge(), cache)
    future = critic.submit(conversation(1))  # does not raise: other ranks would wait
    with pytest.raises(CheckpointError, match="score cache"):
        future.result()
    critic.close()


def test_a_disk_that_fails_reaches_whoever_waits(cache: ScoreCache) -> None:
    judge = PatientJudge()
    critic = CachedCritic(judge, cache)
    future, other = critic.submit(conversation(1)), critic.submit(conversation(2))
    cache.path = cache.path.parent / "gone" / "x" / "scores.sqlite"
    (cache.path.parent.parent).write_text("a file where a folder should be")
    judge.answer_all()
    for waiting in (future, other):  # the writer's connection is opened at its first write
        with pytest.raises(CheckpointError, match="score cache"):
            waiting.result(timeout=30)
    critic.close()


def test_closing_tells_those_who_wait(cache: ScoreCache) -> None:
    critic = CachedCritic(PatientJudge(), cache)
    future = critic.submit(conversation(1))
    critic.close()
    with pytest.raises(CriticUnavailable, match="closed before it answered"):
        future.result(timeout=30)


class HastyJudge:
    """Eight threads that take a random while for each answer."""

    identity = "hasty"

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._pool = ThreadPoolExecutor(8)
        self.finished: list[int] = []

    def submit(self, messages: Messages) -> Future[Verdict]:
        return self._pool.submit(self._judge, messages, self._chance.random() / 200)

    def _judge(self, messages: Messages, seconds: float) -> Verdict:
        time.sleep(seconds)
        self.finished.append(int(messages[0]["content"].split()[1]))
        return verdict_of(messages)

    def close(self) -> None:
        self._pool.shutdown()


@pytest.mark.parametrize("in_flight", [1, 7, 4096])
def test_verdicts_come_in_input_order_and_equal_ones_once(in_flight: int, monkeypatch) -> None:
    monkeypatch.setattr(critic_module, "_IN_FLIGHT", in_flight)
    judge = HastyJudge(in_flight)
    chance = random.Random(0)
    numbers = [chance.randrange(150) for _ in range(400)]
    asked = (conversation(n) for n in numbers)
    verdicts = list(score_conversations(judge, asked, progress=False, description=""))
    judge.close()
    assert verdicts == [verdict_of(conversation(n)) for n in numbers]
    assert sorted(judge.finished) == sorted(set(numbers))
    in_order = list(dict.fromkeys(numbers))
    assert (judge.finished == in_order) == (in_flight == 1)


def test_no_more_than_a_bounded_number_is_read_ahead(monkeypatch) -> None:
    monkeypatch.setattr(critic_module, "_IN_FLIGHT", 10)
    judge = PatientJudge()
    read = []

    def conversations():
        for n in range(100):
            read.append(n)
            yield conversation(n)

    verdicts = score_conversations(judge, conversations(), progress=False, description="")
    threading.Timer(0.2, judge.answer_all).start()
    assert next(verdicts) == verdict_of(conversation(0))
    assert len(read) == 10


def test_an_error_of_the_judge_ends_the_scoring() -> None:
    judge = PatientJudge()
    verdicts = score_conversations(
        judge, [conversation(1)], progress=False, description="", total=1
    )
    threading.Timer(0.1, lambda: judge.asked[0][1].set_exception(ConfigError("no model"))).start()
    with pytest.raises(ConfigError, match="no model"):
        next(verdicts)


def test_what_a_failure_means() -> None:
    assert failed_verdict("closed", "HTTP 500") == (1.0, None, True, "HTTP 500")
    assert failed_verdict("open", "HTTP 500") == (0.0, None, True, "HTTP 500")
    with pytest.raises(CriticUnavailable, match="HTTP 500"):
        failed_verdict("stop", "HTTP 500")


class NamedGuard(BaseHTTPRequestHandler):
    """A guard that tells its weights, and says the same of everything."""

    def do_GET(self):
        """The list of models."""
        self._reply({"data": [{"id": "guard", "fingerprint": self.server.fingerprint}]})

    def do_POST(self):
        """One judgement."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        message = {"role": "assistant", "content": self.server.says}
        self._reply({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})

    def _reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Says nothing."""


def test_a_guard_trained_anew_under_its_old_name_is_asked_anew(tmp_path):
    scores, asked = [], []
    for fingerprint, says in (("one", "safe"), ("one", "safe"), ("two", "unsafe\nS1")):
        server = ThreadingHTTPServer(("127.0.0.1", 0), NamedGuard)
        server.fingerprint, server.says, server.asked = fingerprint, says, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = CriticConfig(
            endpoint=f"http://127.0.0.1:{server.server_port}/v1",
            model="guard",
            format="llama_guard",
            cache=str(tmp_path / "scores.sqlite"),
        )
        critic = critic_module.build_critic(settings)
        turns = [("user", "how"), ("assistant", "so")]
        pair = [{"role": role, "content": text} for role, text in turns]
        scores.append(critic.submit(pair).result(30).score)
        asked.append(server.asked)
        critic.close()
        server.shutdown()
        server.server_close()
    assert scores == [0.0, 0.0, 1.0]
    assert asked == [1, 0, 1]
