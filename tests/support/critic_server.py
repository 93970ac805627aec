"""A judge that misbehaves on purpose: a real HTTP server, in a process of its own.

    python tests/support/critic_server.py MODE        prints `port N`

It answers as Llama Guard does, to conversations that name a pair: `pair 00017`. The last number in
one decides the verdict (`risk_of`) and, in the mode `chaos`, what goes wrong before it comes
(`plan_of`); both functions are the oracle of the tests. `hasty chaos` leaves out what takes half of
a client's deadline. Any other mode is one behaviour for every request. It counts a verdict when a
good answer has been sent to the last byte; GET /counts tells.
Standard library.
"""

import asyncio
import json
import math
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

TRANSIENT = (
    *("delay", "rate_limit", "rate_limit_date", "error", "half", "wrong_json", "not_json"),
    *("garbage", "refusal", "cut", "two_verdicts", "reset", "drop", "empty"),
)
HOPELESS = ("error", "half", "wrong_json", "garbage", "reset", "too_long")
RETRIES = 4
DRIP_S = 0.25  # between two bytes: a whole answer would take minutes


def risk_of(number: int) -> float:
    """P(unsafe) that the judge gives the pair; from 0.001 to 0.999."""
    return (1 + number * 7 % 999) / 1000


def plan_of(number: int) -> list[str]:
    """What the first attempts at a pair meet; one that holds 99 things never gets a verdict."""
    if number % 89 == 0:
        return [HOPELESS[number // 89 % len(HOPELESS)]] * 99
    if number < 600 and number % 60 == 7:  # early: one takes half of the deadline
        return ["drip"]
    chance = random.Random(number)
    if chance.random() < 0.85:
        return []
    return [chance.choice(TRANSIENT) for _ in range(chance.randint(1, RETRIES))]


def is_hopeless(number: int) -> bool:
    """True where no attempt gets a verdict."""
    return len(plan_of(number)) == 99


class Judge:
    """The server's state and its behaviours."""

    def __init__(self, mode: str, answers: int) -> None:
        self.mode, self.answers = mode, answers
        self.attempts: Counter[int] = Counter()
        self.verdicts: Counter[int] = Counter()
        self.met: Counter[str] = Counter()
        self.requests: list[dict] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept alive until something breaks it."""
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1])) if length else b""
        if head.startswith("GET"):
            path = head.split()[1]
            tells = {"verdicts": self.verdicts, "met": self.met, "requests": self.requests}
            await _reply(writer, 200, tells if path == "/counts" else {"data": []})
            return True
        request = json.loads(body)
        number = int(re.findall(r"pair (\d+)", json.dumps(request))[-1])
        self.requests[:] = [{"head": head, "body": request}]
        plan = plan_of(number) if "chaos" in self.mode else [self.mode] * 99
        if self.mode == "hasty chaos":
            plan = [kind for kind in plan if kind != "drip"]
        attempt = self.attempts[number]
        self.attempts[number] += 1
        kind = plan[attempt] if attempt < len(plan) else "good"
        self.met[kind] += 1
        return await self._behave(kind, number, writer)

    async def _behave(self, kind: str, number: int, writer: asyncio.StreamWriter) -> bool:
        good = json.dumps(_answer(number))
        if kind in ("good", "delay", "slow"):
            await asyncio.sleep({"good": 0.0, "delay": 0.1, "slow": 0.02}[kind])
            await _reply(writer, 200, good)
            self.verdicts[number] += 1
            if self.verdicts.total() == self.answers:
                await asyncio.sleep(0.2)  # until the last answer is out
                os._exit(1)
        elif kind in ("reset", "drop"):
            if kind == "reset":  # the peer sees ECONNRESET instead of an end of file
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
            writer.transport.abort()
            return False
        elif kind in ("half", "drip"):
            writer.write(_head(200, len(good)))
            sent = good.encode()[: len(good) // 2] if kind == "half" else good.encode()
            for start in range(0, len(sent), 1 if kind == "drip" else len(sent)):
                writer.write(sent[start : start + (1 if kind == "drip" else len(sent))])
                await writer.drain()
                await asyncio.sleep(DRIP_S if kind == "drip" else 0)
            return False
        else:
            status, content, *headers = _WRONG[kind](number)
            await _reply(writer, status, content, *headers)
        return True


def _answer(number: int, text: str | None = None, reason: str = "stop") -> dict:
    risk = risk_of(number)
    label = "unsafe" if risk > 0.5 else "safe"
    rest = f"\nS{1 + number % 14}" if label == "unsafe" else ""
    top = [
        {"token": "safe", "logprob": math.log(1 - risk)},
        {"token": "unsafe", "logprob": math.log(risk)},
    ]
    tokens = [{"token": label, "top_logprobs": top}, {"token": rest, "top_logprobs": []}]
    message = {"role": "assistant", "content": label + rest if text is None else text}
    logprobs = {"content": tokens} if text is None else None
    return {"choices": [{"message": message, "finish_reason": reason, "logprobs": logprobs}]}


_WRONG = {
    "rate_limit": lambda n: (429, {}, "Retry-After: 1"),
    "rate_limit_date": lambda n: (
        *(429, {}),
        f"Retry-After: {formatdate(time.time() + 1, usegmt=True)}",
    ),
    "error": lambda n: (500, "oops"),
    "wrong_json": lambda n: (200, {"answer": "safe"}),
    "not_json": lambda n: (200, "<html>safe</html>"),
    "garbage": lambda n: (200, _answer(n, "I think that this is safe, all in all.")),
    "refusal": lambda n: (200, _answer(n, "I'm sorry, but I can't assess this.")),
    "cut": lambda n: (200, _answer(n, "unsafe\nS1", "length")),
    "two_verdicts": lambda n: (200, _answer(n, "unsafe\nS1\nsafe")),
    "empty": lambda n: (200, _answer(n, "\n\n")),
    "too_long": lambda n: (400, {"error": f"pair {n} is too long"}),
    "no_key": lambda n: (401, {"error": "who are you?"}),
    "no_model": lambda n: (404, {"error": "no such model"}),
}


def _head(status: int, length: int, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {length}", *headers, "", ""]
    return "\r\n".join(lines).encode()


async def _reply(writer: asyncio.StreamWriter, status: int, content, *headers: str) -> None:
    body = (content if isinstance(content, str) else json.dumps(content)).encode()
    writer.write(_head(status, len(body), *headers) + body)
    await writer.drain()


@contextmanager
def running(server):
    """The `/v1` of an HTTP server that answers in a thread of this process."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    host, port = server.server_address[:2]
    try:
        yield f"http://{host}:{port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class RunningServer:
    """The server as the tests see it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self._counts = f"http://127.0.0.1:{port}/counts"

    def counts(self) -> dict:
        """What the server has counted so far: verdicts and attempts met, and the last request."""
        with urllib.request.urlopen(self._counts, timeout=30) as reply:
            told = json.load(reply)
        return {**told, "verdicts": {int(n): c for n, c in told["verdicts"].items()}}


@contextmanager
def running_server(mode: str, *, answers: int = 0):
    """The server in a process of its own; killed at the end, or it dies after some `answers`."""
    command = [sys.executable, str(Path(__file__)), mode, str(answers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield RunningServer(int(process.stdout.readline().split()[1]))
        finally:
            process.kill()


async def _main(mode: str, answers: int) -> None:
    judge = Judge(mode, answers)
    server = await asyncio.start_server(judge.serve, "127.0.0.1", 0, backlog=512)
    print(f"port {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2])))
