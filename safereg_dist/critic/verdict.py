"""The interface of a judge: conversations in, verdicts out.

A judgement that fails is a verdict too: risk 1 under `closed`, risk 0 under `open`, both marked; or
`CriticUnavailable` under `stop`.
"""

import hashlib
import json
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from safereg_dist.errors import CriticUnavailable

Messages = list[dict[str, str]]
"""A conversation: turns with `role` and `content`."""


class Verdict(NamedTuple):
    """A judge's verdict on one conversation."""

    score: float
    """Risk in [0, 1]."""
    category: str | None = None
    """Kind of harm in the judge's own words (S1, Violent, ...), where it names one."""
    failed: bool = False
    """True if the judgement failed; the score then follows the fail mode."""
    reason: str | None = None
    """Why it failed, in a few words, none of them from the data."""


class JudgementFailed(Exception):  # noqa: N818 - it passes between a judge and its fail mode only
    """One judgement did not come about; the message is short and holds nothing of the data."""


class Critic(Protocol):
    """Scores conversations in the background."""

    identity: str
    """Everything that a score depends on, but for the conversation; names it in the cache."""

    def submit(self, messages: Messages) -> Future[Verdict]:
        """The verdict to come; may be called from any thread, returns at once.

        A failed judgement is a verdict; under `stop` the future carries CriticUnavailable. It
        carries ConfigError where no judgement can succeed (an unknown model, a refused key).
        """
        ...

    def close(self) -> None:
        """Cancels judgements in flight and frees threads and connections."""
        ...


def conversation_key(messages: Messages) -> str:
    """SHA-256 (hex) of the conversation as canonical JSON of its roles and contents."""
    turns = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps(turns, separators=(",", ":")).encode()).hexdigest()


def failed_verdict(fail: str, reason: str) -> Verdict:
    """The verdict of a failed judgement under `fail`: closed, open or stop.

    Raises:
        CriticUnavailable: under `stop`.
    """
    if fail == "stop":
        raise CriticUnavailable(
            f"a judgement failed ({reason}) and `fail` is `stop`: mend the judge and run the same "
            "command again (what was judged is cached), or choose fail=closed"
        )
    return Verdict(1.0 if fail == "closed" else 0.0, None, True, reason)
