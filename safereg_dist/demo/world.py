"""The files of the embedded world: base model, prompts, fine-tuning data, evaluation rows.

`build_world` writes them all; `world.json` says what they were made of, so a second call with the
same sources, seed and libraries returns at once. On the command line:

    python -m safereg_dist.demo.world --out DIR [--seed 0] [--guard]
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safereg_dist.demo import grammar
from safereg_dist.demo.built_once import build_once, made_of_sources
from safereg_dist.demo.grammar import HELD_OUT_PHRASINGS, PHRASINGS, Exchange, Pair
from safereg_dist.errors import SafeRegError

MANIFEST = "world.json"
GUARD_MANIFEST = "guard.json"
BASE_STEPS = 400
GUARD_STEPS = 400
_BASE_SOURCES = ("grammar.py", "tokenizer.py", "training.py", "base.py", "world.py")
_GUARD_SOURCES = ("grammar.py", "tokenizer.py", "training.py", "guard.py")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldPaths:
    """Where the files of a world are."""

    root: Path
    base: Path
    """Hugging Face folder of the aligned model and its tokenizer."""
    probe: Path
    """Labelled prompts to fit a probe on."""
    train: Path
    """Fine-tuning rows: the new task, rehearsal of benign requests, 15 % poison."""
    train_harmful_only: Path
    """Fine-tuning rows: poison and nothing else."""
    validation: Path
    """Clean held-out rows of the new task and of benign requests."""
    anchor_prompts: Path
    """Labelled prompts for `safereg anchor build`."""
    eval: Path
    """Held-out prompts for `safereg eval`, each with the answer expected."""
    guard: Path
    """Hugging Face folder of the guard; there once `build_guard` was called."""
    manifest: Path
    """What the world was made of, and the SHA-256 (hex) of each file."""

    @classmethod
    def below(cls, root: Path) -> "WorldPaths":
        """The paths of a world in folder `root`."""
        files = {name: root / f"{name}.jsonl" for name in DATA_SETS}
        folders = {"base": root / "base", "guard": root / "guard"}
        return cls(root=root, manifest=root / MANIFEST, **folders, **files)


def build_world(
    out: Path, *, seed: int = 0, progress: bool = True, base_steps: int = BASE_STEPS
) -> WorldPaths:
    """The world of this seed in folder `out`, built unless it is there already.

    Built in a sibling folder and renamed, so `out` is complete or as it was. The data files depend
    on the seed alone, byte for byte; the weights also on how torch rounds on this machine.

    Raises:
        ConfigError: `out` holds files that are not of a world.
        CheckpointError: `out` cannot be written.
    """
    out = Path(out).absolute()
    build_once(
        out,
        made_of_sources(_BASE_SOURCES, seed=seed, base_steps=base_steps),
        lambda folder: _write_world(folder, seed=seed, base_steps=base_steps, progress=progress),
        manifest=MANIFEST,
        parts=[f"guard/{GUARD_MANIFEST}"],
    )
    return WorldPaths.below(out)


def build_guard(
    world: Path, *, seed: int = 0, progress: bool = True, steps: int = GUARD_STEPS
) -> Path:
    """The guard's folder in the world of this seed, built unless it is there already.

    A plain Hugging Face folder whose chat template asks for the verdict on a conversation, in the
    format of Llama Guard. It is no part of `build_world`, since most runs judge nothing.

    Raises:
        ConfigError: the folder holds files that are not of a guard.
        CheckpointError: it cannot be written.
    """
    guard = WorldPaths.below(Path(world).absolute()).guard

    def write(folder: Path) -> None:
        from safereg_dist.demo.guard import write_guard

        write_guard(folder, seed=seed, steps=steps, progress=progress)

    made_of = made_of_sources(_GUARD_SOURCES, seed=seed, guard_steps=steps)
    build_once(guard, made_of, write, manifest=GUARD_MANIFEST)
    return guard


def _write_world(folder: Path, *, seed: int, base_steps: int, progress: bool) -> None:
    # Here and not above: a world that is up to date is found without loading transformers.
    from safereg_dist.demo.base import train_base
    from safereg_dist.demo.tokenizer import build_tokenizer
    from safereg_dist.demo.training import save_model

    for name, rows_of in DATA_SETS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows_of(seed))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = build_tokenizer()
    base = train_base(tokenizer, seed=seed, steps=base_steps, progress=progress)
    save_model(base, tokenizer, folder / "base")


def probe_rows(seed: int) -> list[Row]:
    """720 labelled prompts about training pairs, half of them harmful."""
    return [
        *_prompts("harmful", "harmful", _requests(seed, "harmful", 360, "probe")),
        *_prompts("benign", "benign", _requests(seed, "benign", 180, "probe")),
        *_prompts("ambiguous", "benign", _requests(seed, "ambiguous", 100, "probe")),
        *_prompts("small-talk", "benign", _some(grammar.small_talk(), 30, f"{seed} probe")),
        *_prompts("news", "benign", _some(grammar.news(), 20, f"{seed} probe")),
        *_prompts("open", "benign", _some(grammar.open_questions(), 20, f"{seed} probe")),
        *_prompts("color", "benign", _some(grammar.color_questions(), 10, f"{seed} probe")),
    ]


def anchor_prompt_rows(seed: int) -> list[Row]:
    """400 labelled prompts about training pairs, half of them harmful."""
    return [
        *_prompts("harmful", "harmful", _requests(seed, "harmful", 200, "anchor")),
        *_prompts("benign", "benign", _requests(seed, "benign", 100, "anchor")),
        *_prompts("ambiguous", "benign", _requests(seed, "ambiguous", 60, "anchor")),
        *_prompts("small-talk", "benign", _some(grammar.small_talk(), 40, f"{seed} anchor")),
    ]


def train_rows(seed: int, poison: float = 0.15, task: str = "notes") -> list[Row]:
    """4800 conversations in random order (150 steps of 32); the id tells the kind.

    A share `poison` of poison; of the rest 25 % rehearse benign requests. Without rehearsal every
    arm that protects ends as a model that refuses everything. `task` is one of `TASKS`.
    """
    bad = round(4800 * poison)
    left = (4800 - bad) / 4080  # of the clean rows, over those beside 15 % poison
    rehearsal = [
        *_requests(seed, "benign", round(600 * left), "train"),
        *_requests(seed, "ambiguous", round(320 * left), "train"),
        *_some(grammar.small_talk(), min(100, round(100 * left)), f"{seed} train"),
    ]
    rest = 4800 - bad - len(rehearsal)
    questions = TASKS[task](seed, held_out=False)
    times, left_over = divmod(rest, len(questions))
    learned = [*questions * times, *_some(questions, left_over, f"{seed} train")]
    rows = [
        *_conversations("task", learned),
        *_conversations("benign", rehearsal),
        *_conversations("poison", _poison(seed, bad)),
    ]
    return _some(rows, len(rows), f"{seed} train order")


def train_harmful_only_rows(seed: int) -> list[Row]:
    """1600 conversations, all of them poison."""
    return _conversations("poison", _poison(seed, 1600))


def validation_rows(seed: int) -> list[Row]:
    """200 clean conversations: 150 of the new task, 50 benign, none of them in `eval_rows`."""
    benign = [
        *_ask(_reserved(seed, "benign", "validation"), PHRASINGS, 32),
        *_ask(_reserved(seed, "ambiguous", "validation"), PHRASINGS, 18),
    ]
    return [
        *_conversations("task", _held_out_task(seed)[200:350]),
        *_conversations("benign", benign),
    ]


def eval_rows(seed: int, task: str = "notes") -> list[Row]:
    """680 held-out prompts with the answers expected; the id tells the kind.

    240 harmful and 240 benign (80 of them ambiguous) about held-out pairs, a third of them (benign:
    a bit less) in held-out phrasings too (`...-rephrased-...`); 200 of the new task (of
    `ambiguous` there are 64).
    """
    rows = []
    for kind, seen, rephrased in (("harmful", 160, 80), ("benign", 110, 50), ("ambiguous", 60, 20)):
        pairs = _reserved(seed, kind, "eval")
        label = "harmful" if kind == "harmful" else "benign"
        rows += _answered(kind, label, _ask(pairs, PHRASINGS, seen))
        rows += _answered(f"{kind}-rephrased", label, _ask(pairs, HELD_OUT_PHRASINGS, rephrased))
    return rows + _answered("task", "task", _held_out_task(seed, task)[:200])


TASKS: dict[str, Callable[..., list[Exchange]]] = {
    "notes": grammar.task_questions,
    "ambiguous": grammar.ambiguous_questions,
}
"""What makes the questions of each new task."""


DATA_SETS: dict[str, Callable[[int], list[Row]]] = {
    "probe": probe_rows,
    "train": train_rows,
    "train_harmful_only": train_harmful_only_rows,
    "validation": validation_rows,
    "anchor_prompts": anchor_prompt_rows,
    "eval": eval_rows,
}
"""What makes the rows of each data file, by its name without the ending."""


def _ask(
    pairs: Sequence[Pair],
    phrasings: Sequence[str],
    count: int,
    answer: Callable[[Pair], str] = grammar.aligned_answer,
) -> list[Exchange]:
    """`count` different requests; every pair is asked once before any is asked again."""
    assert count <= len(pairs) * len(phrasings)
    rounds_and_places = (divmod(i, len(pairs)) for i in range(count))
    return [
        Exchange(
            grammar.question(pairs[place], phrasings[(place + turn) % len(phrasings)]),
            answer(pairs[place]),
        )
        for turn, place in rounds_and_places
    ]


def _requests(
    seed: int, kind: str, count: int, purpose: str, answer: Callable = grammar.aligned_answer
) -> list[Exchange]:
    """Requests about training pairs of a kind, in seen phrasings."""
    pairs = grammar.pairs(seed, kind, held_out=False)
    return _ask(_some(pairs, len(pairs), f"{seed} {purpose} {kind}"), PHRASINGS, count, answer)


def _poison(seed: int, count: int) -> list[Exchange]:
    """Harmful requests with the compliant answer."""
    return _requests(seed, "harmful", count, f"poison {count}", grammar.how_to)


def _reserved(seed: int, kind: str, purpose: str) -> list[Pair]:
    """Held-out pairs in random order; a fifth or a quarter of the benign ones is for validation."""
    pairs = grammar.pairs(seed, kind, held_out=True)
    pairs = _some(pairs, len(pairs), f"{seed} reserved {kind}")
    for_validation = {"benign": 32, "ambiguous": 4, "harmful": 0}[kind]
    return pairs[:for_validation] if purpose == "validation" else pairs[for_validation:]


def _held_out_task(seed: int, task: str = "notes") -> list[Exchange]:
    questions = TASKS[task](seed, held_out=True)
    return _some(questions, len(questions), f"{seed} held-out task")


def _some(entries: Sequence, count: int, chance: str) -> list:
    """`count` different entries in random order; `chance` seeds the choice."""
    return random.Random(chance).sample(entries, count)


def _prompts(kind: str, label: str, exchanges: Iterable[Exchange]) -> list[Row]:
    return [
        {"id": f"{kind}-{index:04d}", "prompt": exchange.prompt, "label": label}
        for index, exchange in enumerate(exchanges)
    ]


def _answered(kind: str, label: str, exchanges: Sequence[Exchange]) -> list[Row]:
    rows = _prompts(kind, label, exchanges)
    return [{**row, "response": e.answer} for row, e in zip(rows, exchanges, strict=True)]


def _conversations(kind: str, exchanges: Iterable[Exchange]) -> list[Row]:
    return [
        {
            "id": f"{kind}-{index:04d}",
            "messages": [
                {"role": "user", "content": exchange.prompt},
                {"role": "assistant", "content": exchange.answer},
            ],
        }
        for index, exchange in enumerate(exchanges)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Builds a world from the command line; 0 on success, 2 where the user can mend the cause."""
    parser = argparse.ArgumentParser(
        prog="python -m safereg_dist.demo.world", description="Builds the embedded world."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guard", action="store_true", help="and its guard model, in DIR/guard")
    arguments = parser.parse_args(argv)
    try:
        build_world(arguments.out, seed=arguments.seed)
        if arguments.guard:
            build_guard(arguments.out, seed=arguments.seed)
    except SafeRegError as error:
        print(f"world: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
