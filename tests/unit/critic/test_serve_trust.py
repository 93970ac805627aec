"""Claimed: `safereg serve-critic` answers every request, a bounded number of connections, and
only requests that are meant for this machine.

The server itself with a small model, over real sockets: half requests, odd lengths, texts that are
none, the names of strangers. All exact but times, which have wide bounds.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from types import ModuleType

import pytest
from support.builders import save_model, tiny_model

from safereg_dist.commands import serve_critic
from safereg_dist.critic.formats import FORMATS

BODY = {"model": "guard", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def serve() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:  # not to wait for a minute
        patch.setattr(serve_critic, "MAX_CONNECTIONS", 8)
        patch.setattr(serve_critic.Handler, "timeout", 1.5)
        yield serve_critic


@pytest.fixture(scope="module")
def address(serve, tmp_path_factory) -> Iterator[tuple[str, int]]:
    folder = tmp_path_factory.mktemp("guard")
    save_model(folder, tiny_model())
    guard = serve.Guard(folder, FORMATS["wildguard"]())
    server = serve.GuardServer(("127.0.0.1", 0), guard, "guard")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_address[:2]
    server.shutdown()
    thread.join()
    server.server_close()


def ask(address, head: str, body: bytes = b"", *, host: str | None = "localhost") -> tuple:
    """(status, the JSON of the answer) of a request sent as it is."""
    lines = [head, *([] if host is None else [f"Host: {host}"]), "Connection: close"]
    if "Content-Length" not in head and body:
        lines.append(f"Content-Length: {len(body)}")
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    top, _, content = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(content) if content.startswith(b"{") else content


def post(address, body: object, path: str = "/v1/chat/completions", **how) -> tuple:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(address, f"POST {path} HTTP/1.1", raw, **how)


def test_a_good_request_is_answered(address):
    status, answer = post(address, BODY)
    assert status == 200
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_nobody_is_answered_who_has_hung_up(address, serve, monkeypatch):
    """Else those who still wait are late in their turn, and under load no answer is in time."""
    tokens, lock = [], threading.Lock()
    step = serve.Guard._step

    def slow_step(*given):
        with lock:
            tokens.append(given)
        time.sleep(0.2)
        return step(*given)

    monkeypatch.setattr(serve.Guard, "_step", slow_step)
    raw = json.dumps({**BODY, "max_tokens": 50}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}"
    for _ in range(4):
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + raw)
            time.sleep(0.1)
    assert post(address, BODY)[0] == 200
    assert len(tokens) < 25  # of 4 x 50


@pytest.mark.parametrize("length", ["abc", "-1", "", "1e3", "9" * 5000, "\u00b2", "0", "99999999"])
def test_a_length_that_is_none_gets_a_400(address, length):
    head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {length}"
    assert ask(address, head)[0] == 400


BAD = {
    "lone surrogates": {**BODY, "messages": [{"role": "user", "content": "\ud800"}]},
    "messages that are none": {**BODY, "messages": [7]},
    "deep": b"[" * 100_000,
    "bytes": b"\xff\xfe\x00",
    "a list": [],
    "a number of 6000 digits": b'{"max_tokens": ' + b"9" * 6000 + b"}",
    "tokens": {**BODY, "max_tokens": "many"},
}


@pytest.mark.parametrize("name", BAD)
def test_a_body_that_is_none_gets_a_400(address, name):
    assert post(address, BAD[name])[0] == 400


@pytest.mark.parametrize("prompt", ["\ud800", "w1 \udfff", "", 7, None, ["w1"]])
def test_a_prompt_that_is_no_text_gets_a_400(address, prompt):
    body = {"model": "guard", "prompt": prompt, "max_tokens": 1}
    assert post(address, body, "/v1/completions")[0] == 400


@pytest.mark.parametrize(
    "host", ["attacker.example", "localhost.attacker.example", "127.0.0.1.nip.io:80", "[::1", None]
)
def test_a_page_that_rebinds_its_name_is_refused(address, host):
    assert post(address, BODY, host=host)[0] == 403
    assert ask(address, "GET /v1/models HTTP/1.1", host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:8800", "127.0.0.1:1", "[::1]:80"])
def test_this_machine_by_its_names_is_answered(address, host):
    assert ask(address, "GET /v1/models HTTP/1.1", host=host)[0] == 200


def test_an_address_of_the_network_answers_to_every_name(serve):
    server = serve.GuardServer(("0.0.0.0", 0), None, "guard")
    assert not server.is_local
    server.server_close()


def test_half_requests_hold_a_bounded_number_of_threads_and_not_for_ever(address):
    before = threading.active_count()
    half = [socket.create_connection(address, timeout=30) for _ in range(60)]
    try:
        for connection in half:
            try:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Le")
            except OSError:
                pass  # one of those that were sent away
        time.sleep(0.3)
        assert threading.active_count() - before <= 8
        answers = [connection.recv(1 << 10) for connection in half]
        assert sum(b"503" in answer for answer in answers) >= 52
    finally:
        for connection in half:
            connection.close()
    end = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert post(address, BODY)[0] == 200
