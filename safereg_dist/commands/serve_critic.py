"""`safereg serve-critic`: a local causal guard on loopback with the API of OpenAI, for small jobs.

    safereg serve-critic --model FOLDER --format llama_guard [--host H] [--port 8800]

GET /v1/models, POST /v1/chat/completions and /v1/completions: one answer at a time, greedy whatever
the temperature asked for, with logprobs and top_logprobs. `--port 0` takes a free port; one line
says which. Ends on SIGTERM and SIGINT. There is no key: keep it on loopback; there it answers only
to requests that name this machine, so that no web page reaches it by a name of its own.
"""

import argparse
import contextlib
import json
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import torch

from safereg_dist.commands.options import example
from safereg_dist.critic.endpoint import is_loopback
from safereg_dist.critic.formats import FORMATS, Format
from safereg_dist.critic.local_models import CausalGuard
from safereg_dist.errors import ConfigError
from safereg_dist.evaluate.generate import load_model
from safereg_dist.models.architecture import cache_name
from safereg_dist.models.fingerprint import model_fingerprint

MAX_BODY_BYTES = 16 << 20
MAX_CONNECTIONS = 256  # each has a thread; clients keep theirs open between requests
IDLE_S = 60.0  # without a byte, then a connection ends
MAX_ALTERNATIVES = 20  # as vLLM and OpenAI
_BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"
DEFAULT_TOKENS = 64  # a verdict of any format but those that reason


class BadRequest(Exception):  # noqa: N818 - named after the status it becomes
    """What is wrong with a request; it becomes HTTP 400."""


class Step(NamedTuple):
    """One generated token."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


class Guard:
    """A causal model with its tokenizer; one request at a time.

    Raises:
        ConfigError: it does not load, or its tokenizer does not have the labels of the format.
    """

    def __init__(self, folder: Path, form: Format) -> None:
        self._model, self._tokenizer = load_model(folder, progress=False)
        if form.local_prefix is not None:
            CausalGuard(self._model, self._tokenizer, form)
        self.fingerprint = model_fingerprint(self._model)
        self._lock = threading.Lock()
        ends = self._model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id}
        config = self._model.config
        self._room = getattr(config, "max_position_embeddings", None) or 1 << 30

    def render(self, messages: Any) -> list[int]:
        """Token ids of chat turns, up to where the answer begins."""
        try:
            return list(
                self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        except Exception as err:  # templates raise whatever their author chose
            raise BadRequest("the chat template refuses these messages") from err

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a raw prompt, with the special tokens that the tokenizer puts around it."""
        if not isinstance(prompt, str) or not prompt:
            raise BadRequest("`prompt` must be one text")
        try:
            return list(self._tokenizer(prompt)["input_ids"])
        except (TypeError, ValueError) as err:  # half a surrogate pair is no text
            raise BadRequest("`prompt` cannot be tokenised") from err

    @torch.inference_mode()
    def answer(
        self, ids: list[int], limit: int, alternatives: int, is_gone: Callable[[], bool]
    ) -> tuple[str, str, list[Step]]:
        """(text, finish reason, tokens) of the greedy answer of at most `limit` tokens.

        Raises:
            ConnectionAbortedError: `is_gone` says that nobody waits for it any more.
        """
        if len(ids) + limit > self._room:
            raise BadRequest(f"{len(ids)} + {limit} tokens, the model takes {self._room}")
        said: list[int] = []
        steps: list[Step] = []
        cache, new, name = None, ids, cache_name(self._model)
        with self._lock:
            while len(said) < limit:
                if is_gone():  # else those who still wait would be late as well, and so on
                    raise ConnectionAbortedError("the client has hung up")
                inputs = torch.tensor([new], device=self._model.device)
                before = {name: cache}
                out = self._model(inputs, **before, use_cache=True, logits_to_keep=1)
                cache, logprobs = out[name], out.logits[0, -1].float().log_softmax(-1)
                token = int(logprobs.argmax())
                if token in self._ends:
                    return self._text(said), "stop", steps
                steps.append(self._step(said, token, logprobs, alternatives))
                said.append(token)
                new = [token]
        return self._text(said), "length", steps

    def _step(self, said: list[int], token: int, logprobs: torch.Tensor, count: int) -> Step:
        top = logprobs.topk(min(count, len(logprobs))) if count else None
        listed = [] if top is None else list(zip(*(t.tolist() for t in top), strict=True))
        named = [(self._addition(said, i), value) for value, i in listed]
        return Step(self._addition(said, token), float(logprobs[token]), named)

    def _addition(self, said: list[int], token: int) -> str:
        """What a token adds to the text; decoding it alone would lose the space before it."""
        return self._text([*said, token])[len(self._text(said)) :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class Handler(BaseHTTPRequestHandler):
    """The three paths of the API; the server's `guard` and `name` answer."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server: "GuardServer"

    def parse_request(self) -> bool:
        """False, after a reply, where the request is malformed or not meant for this machine."""
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "")
        if self.server.is_local and not _is_local(host):
            self.close_connection = True
            self._reply(403, {"error": {"message": "ask by the name localhost, or the address"}})
            return False
        return True

    def do_GET(self) -> None:
        """The list of models."""
        if self.path.rstrip("/") != "/v1/models":
            return self._reply(404, {"error": {"message": "no such path"}})
        model = {
            "id": self.server.name,
            "object": "model",
            "owned_by": "local",
            "fingerprint": self.server.guard.fingerprint,  # so that clients know new weights
        }
        self._reply(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        """One answer of the guard."""
        told = self.headers.get("Content-Length", "")
        length = int(told) if told.isascii() and told.isdecimal() and len(told) < 10 else 0
        if not 0 < length <= MAX_BODY_BYTES:
            self.close_connection = True
            return self._reply(400, {"error": {"message": "no body, or one beyond 16 MiB"}})
        raw = self.rfile.read(length)
        kinds = {"/v1/chat/completions": _chat, "/v1/completions": _completion}
        if self.path not in kinds:
            return self._reply(404, {"error": {"message": "no such path"}})
        try:
            body = json.loads(raw)
            if not isinstance(body, dict):
                raise BadRequest("the body must be an object")
            if body.get("model") not in (None, self.server.name):
                message = f"no model of this name, only {self.server.name}"
                return self._reply(404, {"error": {"message": message}})
            choice = kinds[self.path](self.server.guard, body, self._is_gone)
        except (BadRequest, ValueError, RecursionError) as err:
            return self._reply(400, {"error": {"message": str(err)[:200]}})
        self._reply(200, {"model": self.server.name, "created": int(time.time()), **choice})

    def _is_gone(self) -> bool:
        """True where the client has closed its connection, as one that waited in vain does."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def _reply(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a log of requests would be one line for every row."""


class GuardServer(ThreadingHTTPServer):
    """One thread for each of a bounded number of connections; more get a 503.

    A client that goes away is no error.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], guard: Guard, name: str) -> None:
        super().__init__(address, Handler)
        self.guard, self.name = guard, name
        self.is_local = _is_local(f"[{address[0]}]" if ":" in address[0] else address[0])
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread that answers, where one is left."""
        if self._free.acquire(blocking=False):
            try:
                return super().process_request(request, client_address)
            except BaseException:
                self._free.release()
                raise
        with contextlib.suppress(OSError):
            request.settimeout(0.1)
            request.sendall(_BUSY)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints what went wrong, unless the connection was lost."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _is_local(host: str) -> bool:
    """True where a Host header names this machine."""
    try:
        return is_loopback(f"http://{host}")
    except ValueError:
        return False


def _chat(guard: Guard, body: dict, is_gone: Callable[[], bool]) -> dict:
    wants = body.get("logprobs") is True
    count = _number(body, "top_logprobs", 0, MAX_ALTERNATIVES) if wants else 0
    limit = _number(body, "max_tokens", DEFAULT_TOKENS, 1 << 16)
    text, reason, steps = guard.answer(guard.render(body.get("messages")), limit, count, is_gone)
    content = [
        {
            "token": step.text,
            "logprob": step.logprob,
            "top_logprobs": [{"token": t, "logprob": p} for t, p in step.top],
        }
        for step in steps
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
        "logprobs": {"content": content} if wants else None,
    }
    return {"object": "chat.completion", "choices": [choice]}


def _completion(guard: Guard, body: dict, is_gone: Callable[[], bool]) -> dict:
    count = _number(body, "logprobs", 0, MAX_ALTERNATIVES)
    limit = _number(body, "max_tokens", DEFAULT_TOKENS, 1 << 16)
    text, reason, steps = guard.answer(guard.encode(body.get("prompt")), limit, count, is_gone)
    logprobs = {
        "tokens": [step.text for step in steps],
        "token_logprobs": [step.logprob for step in steps],
        "top_logprobs": [dict(reversed(step.top)) for step in steps],  # of equals, the likelier
    }
    choice = {
        "index": 0,
        "text": text,
        "finish_reason": reason,
        "logprobs": logprobs if count else None,
    }
    return {"object": "text_completion", "choices": [choice]}


def _number(body: dict, key: str, default: int, most: int) -> int:
    value = body.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 <= value <= most:
        raise BadRequest(f"`{key}` must be a whole number from 0 to {most}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example("safereg serve-critic --model GUARD --format llama_guard --port 8800")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="folder of the guard"
    )
    parser.add_argument(
        "--format", required=True, choices=sorted(FORMATS), help="how the guard is asked"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8800, help="TCP port to listen at")
    parser.add_argument("--name", help="of the model (default: the folder's)")


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal comes; 0.

    Raises:
        ConfigError: the model does not load, or nobody can listen there.
    """
    guard = Guard(arguments.model, FORMATS[arguments.format]())
    name = arguments.name or arguments.model.resolve().name
    address = (arguments.host, arguments.port)
    try:
        server = GuardServer(address, guard, name)
    except OSError as err:
        raise ConfigError(
            f"cannot listen on {address[0]}:{address[1]} ({err.strerror or err}): choose another "
            "--host or --port (0 = a free one)"
        ) from err
    # `shutdown` waits for the loop that this thread is in, so another thread calls it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    host, port = server.server_address[:2]
    print(f"serving {name} on http://{host}:{port}/v1", flush=True)
    server.serve_forever(poll_interval=0.2)
    server.server_close()
    return 0
