r"""Keys over files of a run: HMAC-SHA256 with a shared secret, or Ed25519 with a pair of keys.

The signature of `manifest.json` or `summary.json` stands beside it in `*.sig`: its raw bytes, over
the file's very bytes, so that other tools check them too:

    openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in summary.json \
        -sigfile summary.json.sig

Secrets are read where they are used, and never written anywhere.
"""

import hashlib
import hmac
import os
import re
from pathlib import Path
from typing import Any, Protocol

from safereg_dist.config import SigningConfig
from safereg_dist.errors import ConfigError
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.secret import secret_in, too_short

SUFFIX = ".sig"
_VARIABLE = re.compile(r"SAFEREG_[A-Z0-9_]+")


class Key(Protocol):
    """Signs and checks; a public key checks only."""

    name: str
    """What it is, for messages."""

    def sign(self, content: bytes) -> bytes:
        """The signature of these bytes."""
        ...

    def holds(self, content: bytes, signature: bytes) -> bool:
        """True if the signature is this key's over these bytes."""
        ...


class HmacKey:
    """HMAC-SHA256 with the secret in an environment variable.

    Raises:
        ConfigError: the variable is not set, or too short to be a secret.
    """

    def __init__(self, variable: str) -> None:
        self.name = f"HMAC-SHA256 with the key in {variable}"
        found = secret_in(variable)
        if found is None:
            raise too_short(variable, 0)
        self._secret = found

    def sign(self, content: bytes) -> bytes:
        """The authentication code, 32 bytes."""
        return hmac.digest(self._secret, content, hashlib.sha256)

    def holds(self, content: bytes, signature: bytes) -> bool:
        """True if it is the code of these bytes."""
        return hmac.compare_digest(self.sign(content), signature)


class Ed25519Key:
    """Ed25519 with a private key, or a public one, in a PEM file.

    Raises:
        ConfigError: the file holds no such key, or the package `cryptography` is missing.
    """

    def __init__(self, path: Path) -> None:
        self.name = f"Ed25519 with the key in {path}"
        self._path = path
        self._private, self._public = _read_pem(path)

    def sign(self, content: bytes) -> bytes:
        """The signature, 64 bytes.

        Raises:
            ConfigError: this is a public key.
        """
        if self._private is None:
            raise ConfigError(
                f"expected a private key in {self._path}, found a public one: signing.ed25519 "
                "names the private key"
            )
        return self._private.sign(content)

    def holds(self, content: bytes, signature: bytes) -> bool:
        """True if it is the pair's signature of these bytes."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._public.verify(signature, content)
        except InvalidSignature:
            return False
        return True


def _read_pem(path: Path) -> tuple[Any, Any]:
    """(private key or None, public key)."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as err:
        raise ConfigError(
            "Ed25519 keys need cryptography, which is not installed: pip install "
            "'safereg-dist[sign]', or sign with signing.hmac_env"
        ) from err
    try:
        content = path.read_bytes()
        if b"PRIVATE KEY" not in content:
            private, public = None, serialization.load_pem_public_key(content)
        else:
            private = serialization.load_pem_private_key(content, password=None)
            public = private.public_key()
    except OSError as err:
        raise ConfigError(f"the key {path} cannot be read: {err.strerror}: check its path") from err
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise ConfigError(
            f"expected an Ed25519 key in PEM form without a pass phrase in {path}, found none: "
            "make one with `openssl genpkey -algorithm ed25519 -out private.pem`"
        ) from err
    if not isinstance(public, ed25519.Ed25519PublicKey):
        raise ConfigError(
            f"expected an Ed25519 key in {path}, got one of another kind: make one with "
            "`openssl genpkey -algorithm ed25519 -out private.pem`"
        )
    return private, public


def signing_key(settings: SigningConfig | None) -> Key | None:
    """The key of a configuration; None without one.

    Raises:
        ConfigError: it is missing or cannot be used.
    """
    if settings is None:
        return None
    if settings.hmac_env is not None:
        return HmacKey(settings.hmac_env)
    key = Ed25519Key(Path(settings.ed25519 or ""))
    key.sign(b"")  # a public key is refused now, not at the first checkpoint
    return key


def checking_key(given: str) -> Key:
    """The key that a command line names: a file in PEM form, or a variable SAFEREG_....

    Raises:
        ConfigError: it is neither, or cannot be used.
    """
    if not os.path.exists(given):
        if _VARIABLE.fullmatch(given):
            return HmacKey(given)
        raise ConfigError(  # what was given may be a secret: it is not shown
            "expected the name of a variable (SAFEREG_...) or of a file in PEM form as the key, "
            "found no such file: give the variable's NAME, not its value, or check the path"
        )
    return Ed25519Key(Path(given))


def write_signed(path: Path, content: bytes, key: Key | None) -> None:
    """Writes a file whole or not at all, after its signature where there is a key.

    Raises:
        CheckpointError: it cannot be written.
    """
    if key is not None:
        write_atomically(_beside(path), key.sign(content))
    write_atomically(path, content)


def what_is_wrong(path: Path, content: bytes, key: Key) -> str | None:
    """Why these bytes, read from `path`, are not signed with this key; None where they are."""
    try:
        signature = _beside(path).read_bytes()
    except OSError:
        return f"{path} is not signed, expected {key.name}"
    if not key.holds(content, signature):
        return f"{path} was changed or signed with another key, expected {key.name}"
    return None


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)
