"""What a verb has come to, and how it is given out: text, JSON, and the next step."""

import argparse
import json
import shlex
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safereg_dist.commands.options import STDOUT
from safereg_dist.errors import EXIT_DONE, printable
from safereg_dist.screen.progress import quiet
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import json_ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of a verb on the rank that speaks; on the others it is empty."""

    status: int = EXIT_DONE
    figures: Any = None
    """What `--json` writes: mappings, lists, texts and numbers; None = nothing was computed."""
    now: str = ""
    """The command that most users run next; empty = there is none."""


def finish(arguments: argparse.Namespace, *, hints: bool = True) -> int:
    """Runs the chosen verb and gives out what it found; its exit status.

    With `--json -` stdout holds the JSON alone, and what else is printed goes to stderr. The next
    step is a line on stderr, where no pipe reads it.

    Raises:
        CheckpointError: the JSON cannot be written; and the verb's errors.
    """
    to, is_quiet = getattr(arguments, "json", None), getattr(arguments, "quiet", False)
    with quiet(is_quiet), redirect_stdout(sys.stderr) if to == STDOUT else nullcontext():
        outcome = arguments.run(arguments)
    if isinstance(outcome, int):
        return outcome
    if to is not None and outcome.figures is not None:
        _write(to, json.dumps(json_ready(outcome.figures), indent=2, allow_nan=False) + "\n")
    if outcome.now and hints and not is_quiet:
        sys.stdout.flush()
        print(f"now: {printable(outcome.now)}", file=sys.stderr, flush=True)
    return outcome.status


def command(*words: object) -> str:
    """A `safereg` command as it is typed into a shell."""
    return " ".join(["safereg", *(shlex.quote(str(word)) for word in words)])


def training_verb(engine: str) -> str:
    """The verb that trains on all GPUs: `launch`, but of an engine of one process."""
    return "train" if engine == "single" else "launch"


def _write(to: str, text: str) -> None:
    if to == STDOUT:
        print(text, end="", flush=True)
    else:
        write_atomically(Path(to), text)
