"""Secrets in environment variables: read where they are used, and never written anywhere."""

import os

from safereg_dist.errors import ConfigError

LEAST_CHARACTERS = 16


def secret_in(variable: str) -> bytes | None:
    """The secret in an environment variable; None where it is not set, or empty.

    Raises:
        ConfigError: it is too short to be a secret.
    """
    given = os.environ.get(variable, "")
    if 0 < len(given) < LEAST_CHARACTERS:
        raise too_short(variable, len(given))
    return os.fsencode(given) or None


def too_short(variable: str, found: int) -> ConfigError:
    """The error of a secret that has `found` characters only."""
    return ConfigError(
        f"expected a secret of {LEAST_CHARACTERS} characters or more in the environment variable "
        f"{variable}, found {found}: set it in this process's environment, e.g. from `openssl rand "
        "-hex 32`"
    )
