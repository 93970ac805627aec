"""When to try again, and when not: backoff, Retry-After, and the circuit breaker.

closed --(failures in a row over some time)--> open --(cool-down)--> half open: one request tries;
its answer closes the circuit, its failure opens it for another cool-down. Any answer at all, good
or bad, counts as life: malformed ones never open it.
"""

import email.utils
import random
import time
from collections.abc import Callable

BACKOFF_S = 0.25
"""Bound of the wait before the second attempt; it doubles with every one."""
BACKOFF_CAP_S = 10.0
FAILURES = 8
"""Connection failures in a row that open the circuit, if they also last for `SPAN_S`."""
SPAN_S = 2.0
"""Seconds from the first to the last of them: a short outage fails many requests at once."""
COOL_DOWN_S = 10.0


def backoff_s(failures: int) -> float:
    """Seconds to wait after `failures` failures, >= 1: full jitter below a bound that doubles."""
    doublings = min(failures - 1, 32)  # far beyond the cap, and still a float
    return random.uniform(0.0, min(BACKOFF_CAP_S, BACKOFF_S * 2.0**doublings))


def retry_after_s(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as an HTTP date; else 0."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


class CircuitBreaker:
    """Counts connection failures in a row; used from one thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._first_s = 0.0
        self._open_until_s: float | None = None
        self._is_probing = False

    def lets_through(self) -> bool:
        """True where a request may be sent now; each must end in one of the methods below."""
        if self._open_until_s is None:
            return True
        if self._is_probing or self._clock() < self._open_until_s:
            return False
        self._is_probing = True
        return True

    def answered(self) -> None:
        """The endpoint sent an answer of any kind."""
        self._failures, self._open_until_s, self._is_probing = 0, None, False

    def failed(self) -> None:
        """A connection was refused or lost, or the name not found."""
        now = self._clock()
        if self._failures == 0:
            self._first_s = now
        self._failures += 1
        is_gone = self._failures >= FAILURES and now - self._first_s >= SPAN_S
        if is_gone and (self._open_until_s is None or self._is_probing):
            self._open_until_s = now + COOL_DOWN_S
        self._is_probing = False

    def abandoned(self) -> None:
        """The request was given up without an answer or a failure; says nothing."""
        self._is_probing = False
