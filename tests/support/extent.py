"""How much a run of the tests repeats: `SAFEREG_TESTS=full` takes every case of the long proofs.

Without it each claim keeps the fewest cases that can break it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

FULL = os.environ.get("SAFEREG_TESTS") == "full"
HAS_CPU_ADAM = (
    FULL
    or Path(
        os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions"),
        "cpu_adam",
        "cpu_adam.so",
    )
    .expanduser()
    .is_file()
)
"""Whether to run DeepSpeed's optimizer for the CPU, which it compiles first (3 minutes of a core):
where that has been done, and in the full mode."""
T = TypeVar("T")


def cases(few: Sequence[T], more: Sequence[T] = ()) -> list[T]:
    """The few, and in the full mode the others too."""
    return [*few, *(more if FULL else ())]
