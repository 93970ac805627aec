"""How much a run of the tests repeats: `SAFEREG_TESTS=full` takes every case of the long proofs.

Without it each claim keeps the fewest cases that can break it.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

FULL = os.environ.get("SAFEREG_TESTS") == "full"
T = TypeVar("T")


def cases(few: Sequence[T], more: Sequence[T] = ()) -> list[T]:
    """The few, and in the full mode the others too."""
    return [*few, *(more if FULL else ())]
