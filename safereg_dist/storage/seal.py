"""Seals: by what is read back, a reader knows that it is what was written, and by whom.

A digest finds damage, but whoever can change a file can also write the digest of the change. So
what stays with one user (scores, tokenised rows) is sealed with HMAC-SHA256 under a key of that
user: $SAFEREG_CACHE_KEY where it is set, else 32 random bytes in `seal.key` of the cache folder,
which its owner alone may read. What goes from hand to hand (probes, stored states) carries a plain
SHA-256, or a keyed one where $SAFEREG_CACHE_KEY was set when it was written; once that variable is
set, a reader takes nothing without its key.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from safereg_dist.errors import ConfigError
from safereg_dist.storage.secret import secret_in

KEY_VARIABLE = "SAFEREG_CACHE_KEY"
_KEY_FILE = "seal.key"
_KEY_BYTES = 32
_PLAIN, _KEYED = "sha256:", "hmac-sha256:"


def cache_folder() -> Path:
    """$SAFEREG_CACHE, by default ~/.cache/safereg."""
    return Path(os.environ.get("SAFEREG_CACHE", "~/.cache/safereg")).expanduser()


def user_key() -> bytes:
    """The 32 bytes that seal this user's caches; made on first use, once for all processes.

    Raises:
        ConfigError: the key is too short, others may read its file, or it cannot be written.
    Collectives: none.
    """
    given = _given_key()
    if given is not None:
        return given
    path = cache_folder() / _KEY_FILE
    try:
        if not path.exists():
            _make_key(path)
        is_private = path.stat().st_mode & 0o077 == 0
        key = path.read_bytes()
    except OSError as err:
        raise ConfigError(
            f"the key of the caches at {path} cannot be read or written ({err.strerror or err}): "
            f"set SAFEREG_CACHE to a folder of your own, or a key in {KEY_VARIABLE}"
        ) from err
    if not is_private or len(key) != _KEY_BYTES:
        found = "others may read it" if not is_private else f"it has {len(key)} bytes"
        raise ConfigError(
            f"expected at {path} a key of {_KEY_BYTES} bytes that its owner alone may read, but "
            f"{found}: delete it (cached scores and rows are then made again), or set "
            f"{KEY_VARIABLE}"
        )
    return key


def keyed(key: bytes, *parts: bytes) -> bytes:
    """[32] HMAC-SHA256 of the parts; each goes in with its length, so that none runs into another.

    Args:
        key: see `user_key`.
    """
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "little") + part)
    return mac.digest()


def seal_of(content: bytes) -> str:
    """`sha256:HEX`, or `hmac-sha256:HEX` where $SAFEREG_CACHE_KEY is set.

    Raises:
        ConfigError: the key is too short.
    """
    key = _given_key()
    if key is None:
        return _PLAIN + hashlib.sha256(content).hexdigest()
    return _KEYED + keyed(key, content).hex()


def flaw_of(content: bytes, seal: object) -> str | None:
    """Why the content cannot be believed under this seal, as half a sentence; None where it can.

    Raises:
        ConfigError: the key is too short.
    """
    if not isinstance(seal, str) or not seal.startswith((_PLAIN, _KEYED)):
        return "no seal is on it"
    if seal.startswith(_KEYED) and _given_key() is None:
        return f"it is sealed with a key: set {KEY_VARIABLE}"
    if seal.startswith(_PLAIN) and _given_key() is not None:
        return f"it is not sealed with the key in {KEY_VARIABLE}"
    if not hmac.compare_digest(seal.encode(), seal_of(content).encode()):
        return "it has been changed, or was sealed with another key"
    return None


def _given_key() -> bytes | None:
    """The key in the environment, where there is one."""
    given = secret_in(KEY_VARIABLE)
    return None if given is None else hashlib.sha256(given).digest()


def _make_key(path: Path) -> None:
    """Writes a key aside and links it to its place: of several processes the first one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            os.fsync(file.fileno())
        os.link(aside, path)
    except FileExistsError:
        pass  # another process was faster: its key counts
    finally:
        aside.unlink(missing_ok=True)
