"""URL and API key of a remote model, checked before any use, and answers of a bounded size."""

import ipaddress
import os
import sys
from collections.abc import AsyncIterable, Mapping
from urllib.parse import urlsplit

from safereg_dist.errors import ConfigError

KEY_PREFIX = "SAFEREG_"
ANSWER_BYTES = 4 << 20
"""Most bytes of an answer. A verdict with 20 alternatives for each of 1000 tokens has one MiB."""
PLAIN = {"Accept-Encoding": "identity"}
"""What every request asks for: an answer is small, and what is not packed cannot be a bomb."""


class AnswerRefused(Exception):  # noqa: N818 - the condition is the name
    """An answer that is too large, or packed though that was not asked for."""


def base_url(endpoint: str) -> str:
    """The URL that the paths of the API are appended to; `/v1` where the endpoint has no path.

    Raises:
        ConfigError: no http(s) URL, or one with a user, a password or a query. It is not shown,
            since it may hold a secret.
    """
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError(
            "expected the endpoint as a URL such as http://127.0.0.1:8000/v1, got something else"
        )
    if "@" in parts.netloc or parts.query:
        raise ConfigError(
            "the endpoint must be a URL without user, password or query: a key belongs into the "
            "environment variable that `api_key_env` names"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def is_loopback(url: str) -> bool:
    """True where the host is this machine by its name or its address."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def key_headers(variable: str, url: str, *, allow_plain_http: bool) -> dict[str, str]:
    """The header with the key that the environment variable holds; none where it holds none.

    Args:
        url: where the key goes, as `base_url` gives it.
        allow_plain_http: send it unencrypted to another machine too; then stderr says so.
    Raises:
        ConfigError: the variable is not ours (a configuration from elsewhere must not choose which
            secret is sent away), its value cannot be a header, or the key would go over plain
            http. No message shows the key.
    """
    if not variable.startswith(KEY_PREFIX) or not variable.isidentifier():
        raise ConfigError(
            f"`api_key_env` must name a variable that begins with {KEY_PREFIX}, got "
            f"{variable[:60]!r}: a configuration must not choose any secret of the environment; "
            f'export {KEY_PREFIX}API_KEY="$YOUR_VARIABLE" and name that'
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the environment variable {variable} holds characters that no key has: export the "
            "key alone, on one line"
        )
    if url.startswith("http:") and not is_loopback(url):
        if not allow_plain_http:
            raise ConfigError(
                f"the key in {variable} would go unencrypted over the network to {url}: use "
                f"https, tunnel the port to this machine, unset {variable}, or set "
                "allow_plain_http (of `score` and `eval`: --allow-plain-http)"
            )
        print(
            f"safereg: warning: the key in {variable} goes unencrypted over the network to {url} "
            "(allow_plain_http)",
            file=sys.stderr,
            flush=True,
        )
    return {"Authorization": f"Bearer {key}"}


async def bounded_body(headers: Mapping[str, str], pieces: AsyncIterable[bytes]) -> bytes:
    """The body that comes in pieces, as it is on the wire.

    Args:
        headers: those of the response.
    Raises:
        AnswerRefused: more than `ANSWER_BYTES`, announced or sent, or a packed body.
    """
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise AnswerRefused("packed, though no packing was asked for")
    length = headers.get("content-length", "")
    body = bytearray()
    if length.isdecimal() and (len(length) > 12 or int(length) > ANSWER_BYTES):
        raise AnswerRefused(f"more than {ANSWER_BYTES >> 20} MiB")
    async for piece in pieces:
        body += piece
        if len(body) > ANSWER_BYTES:
            raise AnswerRefused(f"more than {ANSWER_BYTES >> 20} MiB")
    return bytes(body)
