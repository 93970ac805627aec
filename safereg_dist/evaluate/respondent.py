"""Who answers the prompts of an evaluation: a model of this machine, or one behind an endpoint."""

import asyncio
import json
import math
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx
import torch

from safereg_dist.critic.endpoint import (
    PLAIN,
    AnswerRefused,
    base_url,
    bounded_body,
    is_loopback,
    key_headers,
)
from safereg_dist.critic.retrying import backoff_s, retry_after_s
from safereg_dist.data.files import LabelledPrompt
from safereg_dist.data.rendering import first_response_token
from safereg_dist.errors import ConfigError, EndpointError
from safereg_dist.evaluate.attacks import Attack, begun_answers
from safereg_dist.evaluate.generate import (
    first_token_probability,
    load_model,
    response_log_likelihood,
    stream_answers,
)
from safereg_dist.screen.progress import progress_bar

_TOP = 20
"""Tokens of which an endpoint is asked for probabilities; usual servers give no more."""
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_JSON = {"Content-Type": "application/json"}
_NOT_OFFERED = {400, 422, 501}
"""What servers answer to a parameter that they do not know."""


class Asked(NamedTuple):
    """How prompts are asked."""

    description: str
    """What the progress bar says."""
    without: Collection[int] = ()
    """Places that are left out: their answers are known."""
    seed: int | None = None
    """Of one sample at temperature 1; None = greedy."""
    attack: Attack | None = None
    """The form of attack that all prompts are in."""
    complying: str | None = None
    """How an answer that complies begins, where a prompt does not say."""


class Respondent(Protocol):
    """Answers prompts; what it cannot tell is None."""

    name: str
    identity: dict[str, Any]
    """What its answers depend on."""

    def answers(self, prompts: list[LabelledPrompt], how: Asked) -> Iterator[tuple[int, str]]:
        """(place, text) of each prompt but those `how.without`, as they come."""
        ...

    def first_token(self, asked: list[tuple[LabelledPrompt, str]]) -> list[float | None]:
        """Of each pair the probability that the answer begins with the text's first token."""
        ...

    def likelihoods(
        self, asked: list[tuple[LabelledPrompt, str]]
    ) -> list[tuple[float, int]] | None:
        """Of each pair (log-likelihood of the text as the answer, its tokens)."""
        ...

    def close(self) -> None:
        """Nothing more will be asked."""
        ...


class LocalModel:
    """A Hugging Face folder, loaded when it is first asked.

    Raises:
        ConfigError, DataError: see `generate`, at the first question.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        max_new_tokens: int,
        batch_size: int,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        self.name = str(folder)
        self._load = {"dtype": dtype, "device": device, "progress": progress}
        self._sizes: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        self._max_new_tokens = max_new_tokens
        # Not the weights' own hash: a model whose answers are all known is not read again.
        files = {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(Path(folder).glob("*"))
            if path.is_file()
        }
        self.identity = {"files": files or self.name, "dtype": str(dtype)}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_model(self.name, **self._load)

    def answers(self, prompts: list[LabelledPrompt], how: Asked) -> Iterator[tuple[int, str]]:
        """See `Respondent.answers`."""
        if len(how.without) == len(prompts):
            return
        model, tokenizer = self._loaded
        drawn = {} if how.seed is None else {"temperature": 1.0, "seed": how.seed}
        begun = None
        if how.attack is not None:
            begun = begun_answers(how.attack, prompts, tokenizer, how.complying)
        for place, answer in stream_answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self._max_new_tokens,
            begun=begun,
            without=how.without,
            description=how.description,
            **drawn,
            **self._sizes,
        ):
            yield place, answer.text

    def first_token(self, asked: list[tuple[LabelledPrompt, str]]) -> list[float | None]:
        """See `Respondent.first_token`."""
        if not asked:
            return []
        model, tokenizer = self._loaded
        prompts = [prompt for prompt, _ in asked]
        tokens = [first_response_token(tokenizer, prompt, text) for prompt, text in asked]
        return first_token_probability(model, tokenizer, prompts, tokens, **self._sizes).tolist()

    def likelihoods(
        self, asked: list[tuple[LabelledPrompt, str]]
    ) -> list[tuple[float, int]] | None:
        """See `Respondent.likelihoods`."""
        if not asked:
            return []
        prompts, texts = [prompt for prompt, _ in asked], [text for _, text in asked]
        return response_log_likelihood(*self._loaded, prompts, texts, **self._sizes)

    def close(self) -> None:
        """Frees the model: a judge may want its memory."""
        self.__dict__.pop("_loaded", None)


class _Answer(NamedTuple):
    status: int
    headers: httpx.Headers
    body: bytes


class _Client:
    """An HTTP client whose requests end in time, however slowly the bytes come; for any thread."""

    def __init__(self, **how: Any) -> None:
        self._client = httpx.AsyncClient(**how)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "_Client":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def post(self, url: str, content: dict[str, Any], *, timeout_s: float) -> _Answer:
        """The whole answer.

        Raises:
            httpx.HTTPError, TimeoutError: none came.
            AnswerRefused: it is too large, or packed.
        """
        return self._call(self._post(url, content, timeout_s))

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _post(self, url: str, content: dict[str, Any], timeout_s: float) -> _Answer:
        async with (
            asyncio.timeout(timeout_s),
            self._client.stream("POST", url, content=json.dumps(content), headers=_JSON) as answer,
        ):
            body = await bounded_body(answer.headers, answer.aiter_raw())
            return _Answer(answer.status_code, answer.headers, body)


def _first_choice(body: bytes) -> dict[str, Any]:
    """The first choice of a chat completion, with a text as its content; raises if it is none."""
    choice = json.loads(body)["choices"][0]
    content = choice["message"].get("content")
    if not isinstance(content, str | None):
        raise TypeError("the content is no text")
    # Half a surrogate pair is no text that a file can hold.
    text = (content or "").encode("utf-8", "replace").decode()
    return {**choice, "message": {**choice["message"], "content": text}}


class Endpoint:
    """A model behind an OpenAI-compatible server (`/chat/completions`).

    Samples are drawn by the server, with a seed for each prompt, which not every server honours.

    Args:
        concurrency: requests in flight.
        timeout_s: of one prompt, its retries included.
    Raises:
        ConfigError: no URL; a key that may not be sent (`endpoint.key_headers`); an attack that
            begins the answer, which this API does not have.
        EndpointError: nobody answers in time, or the request is refused.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        max_new_tokens: int,
        api_key_env: str = "SAFEREG_API_KEY",
        allow_plain_http: bool = False,
        concurrency: int = 8,
        timeout_s: float = 300.0,
        progress: bool = True,
    ) -> None:
        self._url = base_url(url)
        self.name = model
        self.identity = {"endpoint": self._url, "model": model}
        self._max_new_tokens = max_new_tokens
        self._concurrency, self._timeout_s, self._progress = concurrency, timeout_s, progress
        self._connection: dict[str, Any] = {
            "headers": PLAIN
            | key_headers(api_key_env, self._url, allow_plain_http=allow_plain_http),
            "timeout": timeout_s,
            "trust_env": not is_loopback(self._url),
        }

    def answers(self, prompts: list[LabelledPrompt], how: Asked) -> Iterator[tuple[int, str]]:
        """See `Respondent.answers`."""
        if how.attack is not None and how.attack.prefill:
            raise ConfigError(
                f"attack {how.attack.name} begins the model's answer, which chat endpoints do not "
                "offer: evaluate the model's folder, or leave it out"
            )
        for place, (text, _) in self.answers_and_ends(prompts, how):
            yield place, text

    def answers_and_ends(
        self, prompts: list[LabelledPrompt], how: Asked
    ) -> Iterator[tuple[int, tuple[str, bool]]]:
        """As `answers`, and whether the answer has its end: false where `max_new_tokens` cut it."""
        wanted = {place: p for place, p in enumerate(prompts) if place not in how.without}

        def ask(client: _Client, place: int) -> tuple[str, bool]:
            drawn: dict[str, Any] = {"temperature": 0.0}
            if how.seed is not None:
                drawn = {"temperature": 1.0, "seed": how.seed * 1_000_003 + place}
            said = self._complete(client, wanted[place], max_tokens=self._max_new_tokens, **drawn)
            return said["message"]["content"].strip(), said.get("finish_reason") != "length"

        yield from self._each(ask, list(wanted), how.description)

    def first_token(self, asked: list[tuple[LabelledPrompt, str]]) -> list[float | None]:
        """See `Respondent.first_token`; 0 where the text's is not among the likeliest 20.

        None of them is known, and it says so, where the server gives no `logprobs`.
        """

        def ask(client: _Client, place: int) -> float | None:
            prompt, text = asked[place]
            how: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "logprobs": True}
            said = self._complete(client, prompt, is_optional=True, **how, top_logprobs=_TOP)
            return _probability_of(said.get("logprobs"), text)

        if not asked:
            return []
        found = dict(self._each(ask, [0], "logprobs?"))
        if found[0] is not None:
            found |= self._each(ask, range(1, len(asked)), "first token")
        self._say_what_is_left_out(found, len(asked))
        return [found.get(place) for place in range(len(asked))]

    def _say_what_is_left_out(self, found: dict[int, float | None], count: int) -> None:
        unknown = count - sum(probability is not None for probability in found.values())
        below = sum(probability == 0.0 for probability in found.values())
        for rows, what in (
            (unknown, "are left out: the server gave no logprobs"),
            (below, f"count as 0: the token was not among the likeliest {_TOP}"),
        ):
            if rows and self._progress:
                print(
                    f"{self._url}: {rows} of {count} probabilities of first tokens {what}",
                    file=sys.stderr,
                    flush=True,
                )

    def likelihoods(
        self, asked: list[tuple[LabelledPrompt, str]]
    ) -> list[tuple[float, int]] | None:
        """None: this API scores no text that it has not written itself."""
        return None

    def close(self) -> None:
        """Nothing is held between questions."""

    def _each(self, ask: Any, places: Sequence[int], description: str) -> Iterator[tuple[int, Any]]:
        with (
            _Client(**self._connection) as client,
            ThreadPoolExecutor(self._concurrency) as pool,
            progress_bar(total=len(places), desc=description, shown=self._progress) as bar,
        ):
            running = {pool.submit(ask, client, place): place for place in places}
            try:
                for done in as_completed(running):
                    yield running[done], done.result()
                    bar.update()
            finally:
                for future in running:
                    future.cancel()

    def _complete(
        self,
        client: _Client,
        prompt: LabelledPrompt,
        *,
        is_optional: bool = False,
        **how: Any,
    ) -> dict[str, Any]:
        """The first choice of the server's answer; empty where an optional one is not offered."""
        asked = {"model": self.name, "messages": prompt.messages, **how}
        until, failures = time.monotonic() + self._timeout_s, 0
        while True:
            wait_s = 0.0
            try:
                left_s = max(until - time.monotonic(), 0.001)
                answer = client.post(f"{self._url}/chat/completions", asked, timeout_s=left_s)
                if answer.status // 100 == 2:
                    return _first_choice(answer.body)
                if is_optional and answer.status in _NOT_OFFERED:
                    return {}
                reason = f"status {answer.status}"
                wait_s = retry_after_s(answer.headers.get("Retry-After"))
                is_final = answer.status not in _RETRIED
            except (httpx.HTTPError, TimeoutError) as err:
                reason, is_final = type(err).__name__, False
            except AnswerRefused as err:
                reason, is_final = f"an answer that is {err}", True
            except (ValueError, LookupError, TypeError, RecursionError):
                reason, is_final = "an answer that is no chat completion", True
            failures += 1
            wait_s = max(wait_s, backoff_s(failures))
            if is_final or time.monotonic() + wait_s > until:
                raise EndpointError(
                    f"the model at {self._url} gave no answer to prompt {prompt.id!r} ({reason}, "
                    f"{failures} attempts): see the server's log; the same command goes on with "
                    "what is missing"
                )
            time.sleep(wait_s)


def respondent_of(
    model: Path | str,
    *,
    endpoint: str | None,
    api_key_env: str,
    allow_plain_http: bool = False,
    batch_size: int,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    **how: Any,
) -> Respondent:
    """The model of a folder, or the one of that name behind an endpoint; `how` as in both.

    Raises:
        ConfigError: see `Endpoint`.
    """
    if endpoint is not None:
        sent = {"api_key_env": api_key_env, "allow_plain_http": allow_plain_http}
        return Endpoint(endpoint, str(model), **sent, **how)
    return LocalModel(model, batch_size=batch_size, dtype=dtype, device=device, **how)


def _probability_of(logprobs: Any, text: str) -> float | None:
    """That of the longest of the likeliest tokens with which the text begins."""
    try:
        likeliest = logprobs["content"][0]["top_logprobs"]
        found = {str(each["token"]).strip(): float(each["logprob"]) for each in likeliest}
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    begins = [token for token in found if token and text.strip().startswith(token)]
    return math.exp(found[max(begins, key=len)]) if begins else 0.0
