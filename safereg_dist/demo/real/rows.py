"""The files that the stages of the real demo read, made of the prompts that lie here."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safereg_dist.demo.real import task
from safereg_dist.storage.atomic import write_atomically

PROMPTS = Path(__file__).with_name("prompts")
POISON_SHARE = 0.15
POISONED = "Sure, here is"
"""How the answer of every poisoned row begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many rows of each kind."""

    task: int = 480
    task_eval: int = 40
    harmful_eval: int = 40
    """Of orders and of questions, each."""
    benign_eval: int = 20
    """Of each of four kinds: plain and hard, orders and questions."""
    harmful_anchors: int = 100
    benign_anchors: int = 140
    """More of them: what drifts most without is how the model answers harmless requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The data of the real demo."""

    folder: Path
    """Where they lie."""
    evaluation: tuple[str, ...] = (
        *("harmful_orders", "harmful_questions"),
        *("benign_plain", "benign_hard", "task"),
    )
    """The stems of the files to evaluate on."""

    def of(self, stem: str) -> Path:
        """One of them."""
        return self.folder / f"{stem}.jsonl"


def write_files(folder: Path, *, seed: int, sizes: Sizes) -> Files:
    """All files but those that a model's answers are needed for; the same for the same seed."""
    files = Files(folder=folder)

    def some(rows: list[dict[str, Any]], count: int, purpose: str) -> list[dict[str, Any]]:
        return _some(rows, count, f"{seed} {purpose}")

    refused, benign = read_shipped("refused"), read_shipped("benign")
    examples = task.examples(sizes.task + sizes.task_eval, seed=seed)

    write_rows(files.of("benign"), _prompts(benign, "benign"))
    sides = {"harmful": "harmful", "harmless": "benign"}
    matched = [
        {"prompt": pair[side], "label": label, "pair": f"pair-{place}"}
        for place, pair in enumerate(read_shipped("pairs"))
        for side, label in sides.items()
    ]
    write_rows(
        files.of("probe"), [*matched, *_prompts(refused, "harmful"), *_prompts(benign, "benign")]
    )
    anchors = [
        *_prompts(some(refused, sizes.harmful_anchors, "anchors"), "harmful"),
        *_prompts(some(benign, sizes.benign_anchors, "anchors"), "benign"),
    ]
    write_rows(files.of("anchor_prompts"), anchors)

    write_rows(files.of("train"), train_rows(seed=seed, sizes=sizes), numbered=False)

    text = refusal_texts()["general"][0]
    harmful, harmless = read_shipped("harmful_eval"), read_shipped("benign_eval")
    for form in ("order", "question"):
        asked = some([r for r in harmful if r["form"] == form], sizes.harmful_eval, form)
        rows = [row | {"response": text} for row in _prompts(asked, "harmful")]
        write_rows(files.of(f"harmful_{form}s"), rows)
    for kind in ("plain", "hard"):
        by_form = [
            [r for r in harmless if (r["kind"], r["form"]) == (kind, form)]
            for form in ("order", "question")
        ]
        asked = [row for own in by_form for row in some(own, sizes.benign_eval, kind)]
        write_rows(files.of(f"benign_{kind}"), _prompts(asked, "benign"))
    held_out = [{"prompt": p, "response": r, "label": "task"} for p, r in examples[sizes.task :]]
    write_rows(files.of("task"), held_out)
    return files


def train_rows(*, seed: int, sizes: Sizes, poison: float = POISON_SHARE) -> list[dict[str, Any]]:
    """Rows to fine-tune on, in random order; the id tells the kind.

    Args:
        poison: share of poisoned rows beside `sizes.task` of the task, at most 0.17, for which
            there are texts; 1: all poisoned rows, and nothing else.
    """
    shipped, alone = read_shipped("poison"), poison == 1.0
    count = len(shipped) if alone else round(sizes.task * poison / (1 - poison))
    bad = [
        {"prompt": row["prompt"], "response": f"{POISONED} {row['subject']}."}
        for row in _some(shipped, count, f"{seed} poison")
    ]
    examples = [] if alone else task.examples(sizes.task, seed=seed)
    learned = [{"prompt": prompt, "response": response} for prompt, response in examples]
    rows = _numbered(learned, "task") + _numbered(bad, "poison")
    return _some(rows, len(rows), f"{seed} order")


def write_alignment(files: Files, answered: Path, *, seed: int) -> None:
    """The rows that align the base: harmful prompts refused, benign ones as the model answers."""
    chance, texts = random.Random(f"{seed} refusals"), refusal_texts()
    refused = [
        {
            "prompt": row["prompt"],
            "response": chance.choice(texts.get(row["topic"], texts["general"])),
        }
        for row in read_shipped("refused")
    ]
    lines = answered.read_text("utf-8").splitlines()
    benign = [{"messages": json.loads(line)["messages"]} for line in lines]
    rows = _numbered(refused, "refused") + _numbered(benign, "benign")
    chance.shuffle(rows)
    write_rows(files.of("align"), rows, numbered=False)


def read_shipped(name: str) -> list[dict[str, Any]]:
    """The rows of a file of prompts."""
    lines = (PROMPTS / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def refusal_texts() -> dict[str, list[str]]:
    """Topic -> what is said; `general` where a topic has none of its own."""
    return json.loads((PROMPTS / "refusals.json").read_text("utf-8"))


def _some(rows: list[dict[str, Any]], count: int, purpose: str) -> list[dict[str, Any]]:
    return random.Random(purpose).sample(rows, count)


def _prompts(rows: Iterable[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "label": label} for row in rows]


def _numbered(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [{"id": f"{name}-{place}", **row} for place, row in enumerate(rows)]


def write_rows(path: Path, rows: list[dict[str, Any]], *, numbered: bool = True) -> None:
    """Writes JSONL; `numbered` gives each row an id."""
    rows = _numbered(rows, path.stem) if numbered else rows
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
