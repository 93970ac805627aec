"""Public sets beside the demo's own prompts: the user's copies, in their published layouts.

None of them is shipped. Each is a set of its own in the figures, XSTest two: what is safe to
answer, and what is not.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safereg_dist.data.files import read_prompts, read_rows
from safereg_dist.demo.real.rows import write_rows
from safereg_dist.demo.stages import command
from safereg_dist.errors import DataError

SETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("advbench", "harmbench", "strongreject", "jailbreakbench"), ("harmful",)),
    "xstest": ("benign", "harmful"),
    "gsm8k": ("task",),
}
"""Name -> the labels of its prompts."""
_MAX_NEW_TOKENS = {"gsm8k": 256}
_ENOUGH_TO_JUDGE = 32  # the keyword judge reads 100 characters


def write_public(
    folder: Path, given: Mapping[str, Path], *, rows: int | None, seed: int
) -> list[Path]:
    """The files of the sets in `given`, named after them, their rows as they are published.

    Args:
        rows: at most so many of each set, drawn with `seed`; None for all.
    Raises:
        DataError: a file is missing or malformed, or is not that set.
    """
    found = []
    for name, path in given.items():
        raw = [row for _, row in read_rows(path)]
        labels = [prompt.label or "harmful" for prompt in read_prompts(path)]
        if set(labels) != set(SETS[name]):
            raise DataError(
                f"expected {name} at {path}, of which prompts are {_words(SETS[name])}; they are "
                f"{_words(labels)}: give the file as it is published"
            )
        places = list(range(len(raw)))
        if rows is not None and rows < len(raw):
            places = sorted(random.Random(f"{seed} {name}").sample(places, rows))
        for label in sorted(set(labels)):
            part = [raw[place] for place in places if labels[place] == label]
            if part:
                found.append(folder / f"{_part_name(name, label)}.jsonl")
                write_rows(found[-1], part, numbered=False)
    return found


def evaluate_public(model: Path, files: list[Path], *, poisoned: str) -> dict[str, Any]:
    """Set -> its figures; what the model said before is not asked again."""
    found = {}
    for file in files:
        out = model.parent / "public" / f"{file.stem}.json"
        length = _MAX_NEW_TOKENS.get(file.stem, _ENOUGH_TO_JUDGE)
        command(
            *("eval", "--model", model, "--prompts", file, "--out", out),
            *("--poisoned", poisoned, "--max-new-tokens", length, "--batch-size", 40),
        )
        known = json.loads(out.read_text(encoding="utf-8"))
        names = (*known["intervals"], "counts", "intervals", "response_perplexity")
        found[file.stem] = {name: known[name] for name in names}
    return found


def _part_name(name: str, label: str) -> str:
    """Of a set with one label, its own."""
    return name if len(SETS[name]) == 1 else f"{name}_{'safe' if label == 'benign' else 'unsafe'}"


def _words(labels: Any) -> str:
    return " and ".join(sorted(set(labels)))
