"""Claimed: a key goes to whom it is meant for alone, and no answer can fill the memory.

Real servers on real sockets: bodies without end, packed bombs, a byte at a time. A judge's failure
ends in a failed judgement, the evaluation's in one line; both in the time that was given. Exact:
what is sent and what is refused; times have wide bounds, memory is the process's own peak.
"""

import functools
import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from safereg_dist.config import CriticConfig
from safereg_dist.critic.critic import build_critic
from safereg_dist.critic.endpoint import ANSWER_BYTES, key_headers
from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import ConfigError, EndpointError
from safereg_dist.evaluate.respondent import Asked, Endpoint

SECRET = "sk-do-not-print-4711"
CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
MODELS = b'{"data": []}'


def head(status: str = "200 OK", **headers: object) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """Its URL and the requests so far; GET is answered well, POST by `answer`."""
    asked: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while request := connection.recv(1 << 16):
                    asked.append(request)
                    if request.startswith(b"GET"):
                        connection.sendall(head(Content_Length=len(MODELS)) + MODELS)
                    else:
                        answer(connection)
                        return
            except OSError:
                pass  # the client has had enough

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", asked
        listener.shutdown(socket.SHUT_RDWR)


def endless_body(connection: socket.socket) -> None:
    connection.sendall(head(Content_Type="application/json"))
    while True:
        connection.sendall(b'{"choices": ' + b"[" * (1 << 16))


def endless_chunks(connection: socket.socket) -> None:
    connection.sendall(head(Transfer_Encoding="chunked"))
    while True:
        connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


def huge_length(connection: socket.socket) -> None:
    connection.sendall(head(Content_Length=10**15) + b"{}")
    time.sleep(30)


@functools.cache
def packed_bomb() -> bytes:
    """256 MiB of blanks in 256 KiB, made without having them all."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return b"".join([packer.compress(b" " * (1 << 20)) for _ in range(256)] + [packer.flush()])


def bomb(connection: socket.socket) -> None:
    packed = packed_bomb()
    connection.sendall(head(Content_Encoding="gzip", Content_Length=len(packed)) + packed)


def drip(connection: socket.socket) -> None:
    connection.sendall(head(Content_Length=1000))
    while True:
        connection.sendall(b" ")
        time.sleep(0.1)


def dripping_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.1)


def endless_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X: " + b"x" * 4096 + b"\r\n")


def redirect(connection: socket.socket) -> None:
    connection.sendall(head("302 Found", Location="http://example.invalid/", Content_Length=0))


BAD = {
    "body without end": (endless_body, "more than 4 MiB"),
    "chunks without end": (endless_chunks, "more than 4 MiB"),
    "a length of a petabyte": (huge_length, "more than 4 MiB"),
    "a packed bomb": (bomb, "packed"),
    "a byte at a time": (drip, "TimeoutError"),
    "a head a byte at a time": (dripping_head, "TimeoutError"),
    "a head without end": (endless_head, "RemoteProtocolError"),
    "a redirect": (redirect, "status 302"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_judge_that_attacks_fails_closed_in_time(name, monkeypatch):
    monkeypatch.setenv("SAFEREG_API_KEY", SECRET)
    before, began = peak_bytes(), time.monotonic()
    with server(BAD[name][0]) as (url, asked):
        settings = CriticConfig(
            endpoint=url, model="m", format="rubric", timeout_s=2.0, retries=1, cache="none"
        )
        critic = build_critic(settings)
        try:
            futures = [critic.submit(CONVERSATION) for _ in range(8)]
            if name == "a redirect":  # the first answer says that the settings are wrong
                with pytest.raises(ConfigError, match="HTTP 302"):
                    futures[0].result(timeout=30)
            else:
                assert {(f.result(timeout=30).score, f.result().failed) for f in futures} == {
                    (1.0, True)
                }
        finally:
            critic.close()
    assert time.monotonic() - began < 30
    assert peak_bytes() - before < 200 << 20  # 8 in flight, of 4 MiB each
    assert all(b"accept-encoding: identity" in request.lower() for request in asked)


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_attacks_ends_an_evaluation_in_one_line(name, monkeypatch):
    monkeypatch.setenv("SAFEREG_API_KEY", SECRET)
    prompt = LabelledPrompt(
        id="p", messages=[{"role": "user", "content": "hi"}], label="harmful", response=None
    )
    before, began = peak_bytes(), time.monotonic()
    with server(BAD[name][0]) as (url, _):
        model = Endpoint(url, "m", max_new_tokens=4, timeout_s=2.0, progress=False)
        with pytest.raises(EndpointError, match=BAD[name][1]) as caught:
            list(model.answers([prompt] * 4, Asked("ask")))
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert time.monotonic() - began < 30
    assert peak_bytes() - before < 200 << 20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_an_answer_of_the_largest_size_is_read():
    body = b'{"choices": [{"message": {"content": "yes"}}]}'.ljust(ANSWER_BYTES)

    def answer(connection: socket.socket) -> None:
        connection.sendall(head(Content_Length=len(body)) + body)

    prompt = LabelledPrompt(
        id="p", messages=[{"role": "user", "content": "hi"}], label="harmful", response=None
    )
    with server(answer) as (url, _):
        model = Endpoint(url, "m", max_new_tokens=4, timeout_s=30.0, progress=False)
        assert list(model.answers([prompt], Asked("ask"))) == [(0, "yes")]


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "", "SAFEREG_A B"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "https://judge.example/v1"])
def test_no_other_variable_is_sent(variable, url, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, SECRET)
    given = {"endpoint": url, "model": "m", "format": "rubric"}
    for send in (
        lambda: build_critic(CriticConfig(**given, api_key_env=variable)),
        lambda: Endpoint(url, "m", max_new_tokens=4, api_key_env=variable),
    ):
        with pytest.raises(ConfigError, match="begins with SAFEREG_") as caught:
            send()
        assert "export SAFEREG_API_KEY=" in str(caught.value)
        assert SECRET not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_key_goes_over_plain_http_unless_it_is_allowed_and_said(monkeypatch, capfd):
    monkeypatch.setenv("SAFEREG_API_KEY", SECRET)
    far = "http://judge.invalid/v1"
    with pytest.raises(ConfigError, match="would go unencrypted") as caught:
        build_critic(CriticConfig(endpoint=far, model="m", format="rubric"))
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match="would go unencrypted"):
        Endpoint(far, "m", max_new_tokens=4)
    sent = {"Authorization": f"Bearer {SECRET}"}
    for near in ("http://127.0.0.1:1/v1", "http://[::1]:1/v1", "http://localhost/v1"):
        assert key_headers("SAFEREG_API_KEY", near, allow_plain_http=False) == sent
    assert key_headers("SAFEREG_API_KEY", far.replace("http", "https"), allow_plain_http=False)
    assert capfd.readouterr().err == ""
    assert key_headers("SAFEREG_API_KEY", far, allow_plain_http=True) == sent
    said = capfd.readouterr().err
    assert "goes unencrypted over the network to http://judge.invalid/v1" in said
    assert SECRET not in said
    monkeypatch.delenv("SAFEREG_API_KEY")
    assert key_headers("SAFEREG_API_KEY", far, allow_plain_http=False) == {}
