"""URL and API key of a remote judge, checked before any use."""

import ipaddress
import os
from urllib.parse import urlsplit

from safereg_dist.errors import ConfigError


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


def key_headers(variable: str) -> dict[str, str]:
    """The header with the key that the environment variable holds; none where it holds none.

    Raises:
        ConfigError: its value cannot be a header. The message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the environment variable {variable} holds characters that no key has: export the "
            "key alone, on one line"
        )
    return {"Authorization": f"Bearer {key}"}
