"""A judge behind an OpenAI-compatible server: an asynchronous client in a thread of its own.

One judgement, with all its requests and retries, has `timeout_s` from the moment it may begin; a
slow response body counts too. At most `concurrency` judgements are in flight. Retried, with
exponential backoff and full jitter: 408, 425, 5xx, lost connections, attempts that take more than
half of the deadline, malformed answers. 429 is retried after its Retry-After (so is a 5xx that has
one), as often as the deadline allows.

If the server sends a verdict that does not arrive (a lost connection, an attempt given up), the
client asks again. Only then is a conversation judged twice.

Nothing of the data and no key is in any log or error. Collectives: none.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import httpx

from safereg_dist.config.risk import CriticConfig
from safereg_dist.critic.answers import Judgement, MalformedAnswer, read_reply
from safereg_dist.critic.endpoint import (
    PLAIN,
    AnswerRefused,
    base_url,
    bounded_body,
    is_loopback,
    key_headers,
)
from safereg_dist.critic.formats import FORMATS, VERSION, Format, Question
from safereg_dist.critic.retrying import CircuitBreaker, backoff_s, retry_after_s
from safereg_dist.critic.verdict import JudgementFailed, Messages, Verdict, failed_verdict
from safereg_dist.errors import ConfigError, CriticUnavailable

_ATTEMPT_SHARE = 0.5  # of the deadline, so that a server that hangs once can be retried
_CONNECT_S = 5.0
_RETRIED = {408, 425}
_KEY_REFUSED = {401, 403}
_REFUSED_ROW = {400, 413, 422}  # this conversation is too long or otherwise not for this judge


class _Retry(Exception):  # noqa: N818 - it never leaves this module
    """A failed attempt that is worth a retry."""

    def __init__(self, reason: str, *, wait_s: float = 0.0, is_counted: bool = True) -> None:
        super().__init__(reason)
        self.wait_s, self.is_counted = wait_s, is_counted


class RemoteCritic:
    """The judge at `settings.endpoint`, checked once on construction.

    Raises:
        ConfigError: an unknown format, an endpoint that is no URL, a key that is no header value.
        CriticUnavailable: nobody answers, or the key is refused.
    """

    def __init__(self, settings: CriticConfig) -> None:
        self._format = _format(settings.format)
        self._settings = settings
        self._late = f"no answer within {settings.timeout_s:g} s, retries included"
        self._url = base_url(settings.endpoint or "")
        self._name = f"remote {self._format.name}.{VERSION} {settings.model}"
        self.identity = self._name
        try:
            _ = httpx.URL(self._url).host
        except (httpx.InvalidURL, UnicodeError) as err:  # a host that cannot be one
            raise ConfigError("expected the endpoint as a URL, got one that names no host") from err
        self._key = key_headers(
            settings.api_key_env, self._url, allow_plain_http=settings.allow_plain_http
        )
        self._breaker = CircuitBreaker()
        self._has_succeeded = False
        self._clients: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="critic client", daemon=True)
        self._thread.start()
        try:
            self._call(self._open())
            self.check()
        except BaseException:
            self.close()
            raise

    def submit(self, messages: Messages) -> Future[Verdict]:
        """See `Critic.submit`."""
        return asyncio.run_coroutine_threadsafe(self._judge(messages), self._loop)

    def check(self) -> None:
        """Requests the list of models, to check that the endpoint answers and accepts the key.

        The quality of answers is left to the fail mode.

        Raises:
            CriticUnavailable: nobody answers within the deadline, or the key is refused.
        """
        try:
            self._call(self._check())
        except (TimeoutError, JudgementFailed) as err:
            reason = str(err) or f"no answer within {self._settings.timeout_s:g} s"
            raise CriticUnavailable(
                f"expected a judge at {self._url}, found none ({reason}): start the server "
                "(safereg serve-critic serves a local guard; wait for its line `serving`), or "
                "correct the endpoint"
            ) from err

    def close(self) -> None:
        """Cancels requests in flight, closes the connections, ends the thread."""
        if not self._thread.is_alive():
            return
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        # One client for each judgement in flight, with one connection that is kept alive: the
        # work of a pool grows with its size (64 connections: twice the time of a request).
        trusted = httpx.create_ssl_context()
        for _ in range(self._settings.concurrency):
            client = httpx.AsyncClient(
                headers=PLAIN | self._key,
                verify=trusted,
                # Deadlines are set around whole requests: these would start anew at every byte.
                timeout=httpx.Timeout(None, connect=_CONNECT_S),
                limits=httpx.Limits(max_connections=1),
                # Requests to this machine must not go through the environment's proxy.
                trust_env=not is_loopback(self._url),
            )
            self._clients.put_nowait(client)

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[httpx.AsyncClient]:
        """Yields one of the `concurrency` clients once it is free."""
        client = await self._clients.get()
        try:
            yield client
        finally:
            self._clients.put_nowait(client)

    async def _shut(self) -> None:
        # Judgements only: they end the tasks that the library has started for them.
        tasks = [task for task in asyncio.all_tasks() if _is_judgement(task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not self._clients.empty():
            await self._clients.get_nowait().aclose()

    async def _check(self) -> None:
        async with asyncio.timeout(self._settings.timeout_s), self._slot() as client:
            for attempt in range(self._settings.retries + 1):
                try:
                    async with self._sent(client, "GET", "models", None) as response:
                        if response.status_code in _KEY_REFUSED:
                            raise self._refused(response.status_code)
                        weights = await _weights_of(response, self._settings.model)
                        self.identity = self._name + weights
                        return
                except _Retry as err:
                    problem = err
                await asyncio.sleep(backoff_s(attempt + 1))
        raise JudgementFailed(str(problem))

    async def _judge(self, messages: Messages) -> Verdict:
        async with self._slot() as client:
            deadline = self._loop.time() + self._settings.timeout_s
            try:
                judgements = [
                    await self._ask(client, question, deadline)
                    for question in self._format.questions(messages)
                ]
            except JudgementFailed as err:
                return failed_verdict(self._settings.fail, str(err))
        self._has_succeeded = True
        return Verdict(*max(judgements, key=lambda judgement: judgement.score))

    async def _ask(
        self, client: httpx.AsyncClient, question: Question, deadline: float
    ) -> Judgement:
        """The answer to one question; retries until the deadline."""
        attempt = rate_limits = 0
        while True:
            try:
                return await self._attempt(client, question, deadline)
            except _Retry as err:
                problem = err
            attempt += problem.is_counted
            rate_limits += not problem.is_counted
            wait_s = problem.wait_s + backoff_s(attempt + rate_limits)
            if attempt > self._settings.retries:
                raise JudgementFailed(str(problem)) from problem
            if self._loop.time() + wait_s >= deadline:
                is_late = str(problem) == self._late
                told = self._late if is_late else f"{problem}, no time left for another try"
                raise JudgementFailed(told) from problem
            await asyncio.sleep(wait_s)

    async def _attempt(
        self, client: httpx.AsyncClient, question: Question, deadline: float
    ) -> Judgement:
        now = self._loop.time()
        limit_s = min(self._settings.timeout_s * _ATTEMPT_SHARE, deadline - now)
        is_chat = not isinstance(question.input, str)
        body = {
            "model": self._settings.model,
            "messages" if is_chat else "prompt": question.input,
            "temperature": 0,
            **self._format.options(),
        }
        try:
            async with asyncio.timeout(limit_s):
                path = "chat/completions" if is_chat else "completions"
                async with self._sent(client, "POST", path, body) as response:
                    content = await _content(response)
        except TimeoutError as err:
            raise _Retry(self._late) from err
        self._check_status(response)
        try:
            answer = read_reply(json.loads(content), is_chat=is_chat)
            return self._format.read(answer, question)
        except (ValueError, RecursionError) as err:
            raise _Retry("malformed answer: not JSON") from err
        except MalformedAnswer as err:
            raise _Retry(f"malformed answer: {err}") from err

    @contextlib.asynccontextmanager
    async def _sent(
        self, client: httpx.AsyncClient, method: str, path: str, body: Any
    ) -> AsyncIterator[httpx.Response]:
        """A request up to the head of its response; a body is escaped to ASCII by us.

        Raises:
            _Retry: the connection failed; the circuit breaker has been told.
            JudgementFailed: the breaker is open.
        """
        if not self._breaker.lets_through():
            raise JudgementFailed("the endpoint is down")
        request = client.build_request(
            method,
            f"{self._url}/{path}",
            content=None if body is None else json.dumps(body).encode(),
            headers={} if body is None else {"Content-Type": "application/json"},
        )
        try:
            response = await client.send(request, stream=True)
        except httpx.TransportError as err:
            self._breaker.failed()
            raise _Retry(f"connection failed: {type(err).__name__}") from err
        except BaseException:
            self._breaker.abandoned()
            raise
        self._breaker.answered()
        try:
            yield response
        finally:
            await response.aclose()

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        wait_s = retry_after_s(response.headers.get("retry-after"))
        if status == 429 or status >= 500 or status in _RETRIED:
            raise _Retry(f"HTTP {status}", wait_s=wait_s, is_counted=status != 429)
        if status in _REFUSED_ROW or self._has_succeeded:
            # Once a judgement has come about the configuration is right, and a gateway in trouble
            # shall not end a run: the fail mode decides.
            raise JudgementFailed(f"HTTP {status}")
        raise self._refused(status)

    def _refused(self, status: int) -> ConfigError | CriticUnavailable:
        if status in _KEY_REFUSED:
            key = self._settings.api_key_env
            state = "holds a key that it does not accept" if self._key else "is not set"
            return CriticUnavailable(
                f"the judge at {self._url} wants a key (HTTP {status}) and the environment "
                f"variable {key} {state}: export the right key in it"
            )
        return ConfigError(
            f"the judge at {self._url} answers HTTP {status} to requests for the model "
            f"{self._settings.model!r} in the format {self._format.name}: check the endpoint "
            "(it ends in /v1 as a rule), the model's name there, and the format"
        )


def _is_judgement(task: asyncio.Task[Any]) -> bool:
    name = getattr(task.get_coro(), "__qualname__", "")
    return name == RemoteCritic._judge.__qualname__


def _format(name: str | None) -> Format:
    if name not in FORMATS:
        raise ConfigError(
            f"the format of the judge must be one of {', '.join(sorted(FORMATS))}, got {name!r}"
        )
    return FORMATS[name]()


async def _weights_of(response: httpx.Response, model: str | None) -> str:
    """The fingerprint of the model's weights, if the server sends one (`safereg serve-critic`).

    Then a retrained guard does not get cached scores of the old one under the same name. With other
    servers, change the name or the cache together with the model.
    """
    try:
        listed = json.loads(await _content(response))["data"]
        told = next((m["fingerprint"] for m in listed if m["id"] == model), "")
    except (_Retry, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" {str(told)[:64]}" if told else ""


async def _content(response: httpx.Response) -> bytes:
    """The whole body; half of it is a malformed answer, since the endpoint is not down."""
    try:
        return await bounded_body(response.headers, response.aiter_raw())
    except httpx.TransportError as err:
        raise _Retry("malformed answer: half of it") from err
    except AnswerRefused as err:
        raise _Retry(f"malformed answer: {err}") from err
