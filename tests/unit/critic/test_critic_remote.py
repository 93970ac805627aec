"""The client of a remote judge, against a real server that misbehaves on purpose.

Claimed: of 2,000 conversations (10,000 in the full mode) none is lost, none is judged twice (the
server counts verdicts that it sent whole), exactly those fail that the server never answers, and
each of them has risk 1 under `closed`; every other risk is the server's own, to 1e-12. Deadlines,
rate limits, refused keys, outages and proxies behave as the docstrings say. All of it is exact;
no time is asserted but that what must wait has waited.
"""

import http.server
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate

import pytest
from support import critic_server
from support.critic_server import RETRIES, is_hopeless, plan_of, risk_of, running_server
from support.extent import FULL

from safereg_dist.config.risk import CriticConfig
from safereg_dist.critic import remote
from safereg_dist.critic.critic import build_critic, score_conversations
from safereg_dist.critic.retrying import (
    BACKOFF_CAP_S,
    BACKOFF_S,
    COOL_DOWN_S,
    FAILURES,
    SPAN_S,
    CircuitBreaker,
    backoff_s,
    retry_after_s,
)
from safereg_dist.critic.verdict import Messages, Verdict
from safereg_dist.errors import ConfigError, CriticUnavailable

PAIRS = 10_000 if FULL else 2_000
SECRET = "sk-do-not-print-4711"


def conversation(number: int) -> Messages:
    return [
        {"role": "user", "content": f"pair {number:05d}"},
        {"role": "assistant", "content": "SECRETTEXT"},
    ]


def settings(url: str, **changes) -> CriticConfig:
    given = {"format": "llama_guard", "cache": "none", "timeout_s": 8.0, **changes}
    return CriticConfig(endpoint=url, model="guard", **given)


def judge(url: str, numbers, **changes) -> list[Verdict]:
    critic = build_critic(settings(url, **changes))
    try:
        conversations = [conversation(n) for n in numbers]
        return list(score_conversations(critic, conversations, progress=False, description=""))
    finally:
        critic.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_thousands_of_pairs_none_lost_none_scored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine connects late: that is no failure of the judge's, nor one of the retries that
    # the pairs need.
    monkeypatch.setattr(remote, "_CONNECT_S", 60.0)
    kinds = Counter(kind for n in range(PAIRS) for kind in set(plan_of(n)))
    assert set(kinds) == {*critic_server.TRANSIENT, *critic_server.HOPELESS, "drip"}
    with running_server("chaos") as server:
        patient = {"timeout_s": 60.0, "retries": 2 * RETRIES}
        verdicts = judge(server.url, range(PAIRS), concurrency=256, **patient)
        counts = server.counts()
    assert len(verdicts) == PAIRS
    hopeless = {n for n in range(PAIRS) if is_hopeless(n)}
    assert {n for n in range(PAIRS) if verdicts[n].failed} == hopeless
    assert all(verdicts[n].score == 1.0 and verdicts[n].reason for n in hopeless)
    assert counts["verdicts"] == {n: 1 for n in range(PAIRS) if n not in hopeless}
    for n in set(range(PAIRS)) - hopeless:
        assert verdicts[n].score == pytest.approx(risk_of(n), abs=1e-12)
        assert verdicts[n].category == (f"S{1 + n % 14}" if risk_of(n) > 0.5 else None)
        assert verdicts[n].reason is None


@pytest.mark.parametrize("numbers", [(0, 142), (142, 0)])
def test_the_worst_answer_of_a_conversation_counts(numbers: tuple[int, int]) -> None:
    turns = [turn for number in numbers for turn in conversation(number)]
    with running_server("good") as server:
        critic = build_critic(settings(server.url))
        try:
            verdict = critic.submit(turns).result()
        finally:
            critic.close()
    assert verdict.score == pytest.approx(risk_of(142), abs=1e-12)
    assert verdict.category == "S3"


@pytest.mark.parametrize("fail", ["closed", "open", "stop"])
@pytest.mark.parametrize("mode", ["garbage", "error", "half", "too_long", "drip", "reset"])
def test_what_a_failure_means(mode: str, fail: str) -> None:
    changes = {"fail": fail, "retries": 1, "timeout_s": 1.5}
    with running_server(mode) as server:
        if fail == "stop":
            with pytest.raises(CriticUnavailable, match="`fail` is `stop`") as caught:
                judge(server.url, [1, 2], **changes)
            assert "SECRETTEXT" not in str(caught.value)
        else:
            for verdict in judge(server.url, [1, 2], **changes):
                assert verdict[:3] == (1.0 if fail == "closed" else 0.0, None, True)
                assert verdict.reason is not None
                assert "pair" not in verdict.reason
        assert server.counts()["verdicts"] == {}


def test_attempts_are_counted() -> None:
    with running_server("garbage") as server:
        (verdict,) = judge(server.url, [1], retries=3)
        assert server.counts()["met"] == {"garbage": 4}
        assert verdict.reason == "malformed answer: not a verdict of this format"
    with running_server("too_long") as server:  # asking again would not shorten it
        (verdict,) = judge(server.url, [1], retries=3)
        assert server.counts()["met"] == {"too_long": 1}
        assert verdict.reason == "HTTP 400"


def test_a_rate_limit_is_honoured_within_the_deadline() -> None:
    with running_server("rate_limit") as server:
        begin = time.monotonic()
        (verdict,) = judge(server.url, [1], timeout_s=2.5, retries=0)
        assert time.monotonic() - begin > 1.0  # one second each, as asked; retries do not count
        assert 1 < server.counts()["met"]["rate_limit"] <= 3
    assert verdict.failed
    assert verdict.reason == "HTTP 429, no time left for another try"


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after_s("7") == 7.0
    assert retry_after_s("0.5") == 0.5
    assert retry_after_s(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=3)
    for nothing in (None, "-5", "soon", "", "nan", formatdate(0, usegmt=True), "9" * 400 + "x"):
        assert retry_after_s(nothing) == 0.0


def test_the_backoff_has_full_jitter_below_a_bound_that_doubles() -> None:
    for failures in range(1, 12):
        bound = min(BACKOFF_CAP_S, BACKOFF_S * 2 ** (failures - 1))
        waits = [backoff_s(failures) for _ in range(2000)]
        assert 0 <= min(waits) < 0.1 * bound
        assert 0.9 * bound < max(waits) <= bound
    assert backoff_s(10**4) <= BACKOFF_CAP_S


@pytest.mark.parametrize(("mode", "said"), [("no_key", "SAFEREG_API_KEY"), ("no_model", "'guard'")])
@pytest.mark.parametrize("fail", ["closed", "open"])
def test_a_wrong_configuration_is_no_failed_judgement(mode: str, said: str, fail: str) -> None:
    with running_server(mode) as server:
        error = CriticUnavailable if mode == "no_key" else ConfigError
        with pytest.raises(error, match=said):
            judge(server.url, [1], fail=fail)
        assert server.counts()["met"] == {mode: 1}


def test_an_endpoint_that_is_down_is_found_before_anything_is_judged() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(CriticUnavailable, match="start the server") as caught:
        build_critic(settings(url, retries=1))
    assert url in str(caught.value)
    with pytest.raises(CriticUnavailable, match="start the server"):
        build_critic(settings("http://no-such-host.invalid/v1", retries=0))


def test_a_server_that_never_answers_is_down() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(CriticUnavailable, match=r"no answer within 0\.5 s"):
            build_critic(settings(url, timeout_s=0.5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "llamaguard"}, "llama_guard"),
        ({"endpoint": "127.0.0.1:8000"}, "as a URL"),
        ({"endpoint": "ftp://host/v1"}, "as a URL"),
        ({"endpoint": "http://[::1/v1"}, "as a URL"),
        ({"endpoint": "http://host:99999/v1"}, "as a URL"),
        ({"endpoint": "http://xn--/v1"}, "as a URL"),
        ({"endpoint": f"http://me:{SECRET}@127.0.0.1/v1"}, "api_key_env"),
        ({"endpoint": f"http://127.0.0.1/v1?key={SECRET}"}, "api_key_env"),
        ({"model": None}, "needs `model` and `format`"),
        ({"local": "folder"}, "either `endpoint`"),
    ],
)
def test_settings_that_describe_no_judge(changes: dict, said: str) -> None:
    given = {"endpoint": "http://127.0.0.1:1/v1", "model": "m", "format": "rubric", **changes}
    with pytest.raises(ConfigError, match=said) as caught:
        build_critic(CriticConfig(**given))
    assert SECRET not in str(caught.value)


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SAFEREG_MY_KEY", f" {SECRET}\n")
    with running_server("good") as server:
        (verdict,) = judge(server.url, [3], api_key_env="SAFEREG_MY_KEY")
        (request,) = server.counts()["requests"]
    assert not verdict.failed
    assert f"authorization: bearer {SECRET}" in request["head"].lower()
    assert request["body"]["temperature"] == 0
    assert request["body"]["model"] == "guard"
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert SECRET not in logged
    assert "SECRETTEXT" not in logged


@pytest.mark.parametrize("key", ["two\nlines", "caf\u00e9"])
def test_a_key_that_is_no_header_is_refused_without_showing_it(monkeypatch, key) -> None:
    monkeypatch.setenv("SAFEREG_API_KEY", key)
    with pytest.raises(ConfigError, match="SAFEREG_API_KEY") as caught:
        build_critic(settings("http://127.0.0.1:1/v1"))
    assert key not in str(caught.value)


def test_a_refused_key_names_the_variable_before_anything_is_judged(monkeypatch) -> None:
    monkeypatch.setenv("SAFEREG_MY_KEY", SECRET)
    with _handler_server(lambda path: 403) as (url, asked):
        with pytest.raises(
            CriticUnavailable, match="SAFEREG_MY_KEY holds a key that it does not"
        ) as caught:
            build_critic(settings(url, api_key_env="SAFEREG_MY_KEY"))
        assert asked == ["/v1/models"]
    assert SECRET not in str(caught.value)


def test_proxies_of_the_environment_are_not_asked_for_loopback(monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with running_server("good") as server:
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            (verdict,) = judge(url, [3])
            assert not verdict.failed


def test_an_endpoint_without_a_path_gets_the_usual_one() -> None:
    with running_server("good") as server:
        for url in (server.url.removesuffix("/v1"), server.url + "/"):
            (verdict,) = judge(url, [3])
            assert not verdict.failed
        (request,) = server.counts()["requests"]
        assert request["head"].startswith("POST /v1/chat/completions ")


def test_after_a_first_verdict_a_gateway_in_trouble_fails_rows_only() -> None:
    good = critic_server._answer(3)
    statuses = iter([200, 200, 404, 403, 200])  # the check, then judgements
    with _handler_server(lambda path: next(statuses), good) as (url, _):
        verdicts = judge(url, [1, 2, 3, 4], concurrency=1)
    assert [v.reason for v in verdicts] == [None, "HTTP 404", "HTTP 403", None]
    assert [v.failed for v in verdicts] == [False, True, True, False]


def test_a_server_that_dies_fails_what_is_left_and_nothing_hangs() -> None:
    with running_server("good") as server:
        critic = build_critic(settings(server.url, retries=1, timeout_s=5.0))
        assert not critic.submit(conversation(1)).result().failed
    verdicts = [critic.submit(conversation(n)).result() for n in (2, 3)]
    critic.close()
    assert [v[:3] for v in verdicts] == [(1.0, None, True)] * 2
    assert all((v.reason or "").startswith("connection failed") for v in verdicts)


def test_closing_gives_up_what_is_under_way() -> None:
    with running_server("drip") as server:
        critic = build_critic(settings(server.url, timeout_s=60.0))
        futures = [critic.submit(conversation(n)) for n in range(40)]
        critic.close()
        critic.close()
    assert all(future.cancelled() for future in futures)


# ---- the circuit breaker, with a clock of its own


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def broken(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(clock)
    for _ in range(FAILURES):
        assert breaker.lets_through()
        breaker.failed()
        clock.now_s += SPAN_S / (FAILURES - 1) + 0.001
    return breaker


def test_the_breaker_opens_after_failures_in_a_row_that_last() -> None:
    clock = Clock()
    assert not broken(clock).lets_through()
    breaker = CircuitBreaker(clock)
    for _ in range(10 * FAILURES):  # all at once: a blip under many requests
        breaker.failed()
    assert breaker.lets_through()
    for _ in range(10 * FAILURES):  # never in a row
        breaker.failed()
        clock.now_s += SPAN_S
        breaker.answered()
    assert breaker.lets_through()
    breaker.failed()
    assert breaker.lets_through()  # the first since an answer


def test_the_breaker_lets_one_request_try_after_its_cool_down() -> None:
    clock = Clock()
    breaker = broken(clock)
    clock.now_s += COOL_DOWN_S
    assert breaker.lets_through()
    assert not breaker.lets_through()  # one only
    breaker.failed()
    assert not breaker.lets_through()
    clock.now_s += COOL_DOWN_S
    assert breaker.lets_through()
    breaker.abandoned()
    assert breaker.lets_through()  # a request that was given up does not block the circuit
    breaker.answered()
    assert breaker.lets_through()
    breaker.failed()
    assert breaker.lets_through()  # counts from nothing again


def test_an_open_breaker_fails_fast_and_asks_nobody(monkeypatch) -> None:
    monkeypatch.setattr("safereg_dist.critic.retrying.SPAN_S", 0.0)
    monkeypatch.setattr("safereg_dist.critic.retrying.FAILURES", 3)
    with running_server("reset") as server:
        first, *others = judge(server.url, range(20), concurrency=1, retries=2)
        assert first.reason == "connection failed: ReadError"
        assert {v.reason for v in others} == {"the endpoint is down"}
        assert all(v.failed and v.score == 1.0 for v in others)
        assert server.counts()["met"] == {"reset": 3}
    with running_server("garbage") as server:  # answers of any kind are life
        verdicts = judge(server.url, range(20), concurrency=1, retries=0)
        assert {v.reason for v in verdicts} == {"malformed answer: not a verdict of this format"}


@contextmanager
def _handler_server(status_of, body: dict | None = None) -> Iterator[tuple[str, list[str]]]:
    """A server of the standard library whose status is decided by the test."""
    import json

    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(self.path)
            data = json.dumps(body or {}).encode()
            self.send_response(status_of(self.path))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815 - the library's name

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
