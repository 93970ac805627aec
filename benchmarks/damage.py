"""Damages checkpoints of real runs, and counts what is found and what is loaded.

    python benchmarks/damage.py [--tries 2000] [--resumes 14] [--out benchmarks/results/damage.csv]

Each try changes one place of the newest checkpoint, in every file in turn, and asks what each rank
asks before it loads anything: of a run of two ranks, and of Trainers (half as many each), with a
key and without one; there a file that was added or lost is refused with a key alone. Resumes start
the run's own command on the damaged folder: it must name the damage, go on from the checkpoint
before, and end with the undamaged run's bits. The hostile ones put a pickle in place of a file that
would write a marker, and make the manifest anew as somebody would who can write to the folder.
"""

import argparse
import csv
import os
import pickle
import random
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # the tests' builders and launcher
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.launching import FINETUNE, Launcher
from support.ranks import ALONE
from support.trainer_runs import Losses, settings, trainer, write_reference

from safereg_dist.config import SigningConfig
from safereg_dist.errors import CheckpointError
from safereg_dist.integrations.state import STATE, check_checkpoint, load_state
from safereg_dist.run.manifest import (
    NAME,
    Manifest,
    files_below,
    files_of_rank,
    first_changed,
    first_changed_log,
    own_digests,
    read_manifest,
    write_manifest,
)

RANKS = 2
COLUMNS = ("what", "kind", "tried", "detected", "loaded")
_BLOCK = 4096
_KEY = "SAFEREG_DAMAGE_KEY"


# ---- one place


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _zeros(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    end = min(start + _BLOCK, len(content))
    return content[:start] + bytes(end - start) + content[end:]


def _longer(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randrange(1, 9))


def _blocks(content: bytes, rng: random.Random) -> bytes:
    """Two blocks of the file change places."""
    size = min(_BLOCK, len(content) // 2)
    first = rng.randrange(len(content) - 2 * size + 1)
    second = rng.randrange(first + size, len(content) - size + 1)
    parts = content[first : first + size], content[second : second + size]
    between, after = content[first + size : second], content[second + size :]
    return content[:first] + parts[1] + between + parts[0] + after


INSIDE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": _flip,
    "cut": _cut,
    "zeros": _zeros,
    "longer": _longer,
    "blocks swapped": _blocks,
}
BETWEEN = ("files swapped", "file lost", "file added")
KINDS = (*INSIDE, *BETWEEN)


class Damaged:
    """A checkpoint and the logs of its run, to damage and to mend again."""

    def __init__(self, checkpoint: Path, run: Path, *, of_logs: str = ".") -> None:
        """`of_logs` is the folder below the checkpoint whose manifest is about the logs too."""
        self.checkpoint, self.run = checkpoint, run
        names = [*files_below(checkpoint), NAME]
        logs = read_manifest(checkpoint / of_logs, None).logs
        self._touched: set[Path] = set()
        self._log_ends = {run / name: end.bytes for name, end in logs.items()}
        self.kept = {p: p.read_bytes() for p in (*(checkpoint / n for n in names), *self._log_ends)}

    def damage(self, kind: str, rng: random.Random, path: Path) -> bool:
        """Damages `path`; False where the chance left all bytes as they were."""
        content = self.kept[path]
        self._touched.add(path)
        if kind == "file lost":
            path.unlink()
        elif kind == "file added":
            path.with_name(f"more-{path.name}").write_bytes(content)
            return path not in self._log_ends
        elif kind == "files swapped":
            other = rng.choice([p for p in self.kept if p not in self._log_ends])
            if path in self._log_ends or self.kept[other] == content:
                return False
            self._touched.add(other)
            path.write_bytes(self.kept[other])
            other.write_bytes(content)
        else:  # of a log the part that the checkpoint is about
            end = self._log_ends.get(path, len(content))
            changed = INSIDE[kind](content[:end], rng)
            path.write_bytes(changed + content[end:])
            return changed != content[:end] and not (kind == "longer" and path in self._log_ends)
        return True

    def mend(self) -> None:
        """Puts everything back."""
        for path in self._touched:
            path.with_name(f"more-{path.name}").unlink(missing_ok=True)
            path.write_bytes(self.kept[path])
        self._touched.clear()

    def found(self) -> str | None:
        """What the ranks find; None where they would load it."""
        try:
            manifest = read_manifest(self.checkpoint, None)
        except ValueError as err:
            return str(err)
        for rank in range(RANKS):
            files, logs = (
                files_of_rank(names, rank, RANKS) for names in (manifest.files, manifest.logs)
            )
            found = first_changed(self.checkpoint, manifest.files, files)
            if found := found or first_changed_log(self.run, manifest.logs, logs):
                return found
        return None


def try_all(
    damaged: Damaged, tries: int, seed: int = 0, *, kinds: Sequence[str] = KINDS
) -> list[dict[str, object]]:
    """Rows of so many tries, over all kinds and files in turn; the checkpoint is whole after."""
    rng, tried, detected = random.Random(seed), Counter(), Counter()
    assert damaged.found() is None
    paths, number = sorted(damaged.kept), 0
    while tried.total() < tries:
        kind, path = kinds[number % len(kinds)], paths[number // len(kinds) % len(paths)]
        number += 1
        if damaged.damage(kind, rng, path):
            tried[kind] += 1
            detected[kind] += damaged.found() is not None
        damaged.mend()
    assert damaged.found() is None
    return [row("checked", kind, tried[kind], detected[kind]) for kind in kinds]


def row(what: str, kind: str, tried: int, detected: int) -> dict[str, object]:
    """A row of the table; what is not detected would be loaded."""
    return dict(zip(COLUMNS, (what, kind, tried, detected, tried - detected), strict=True))


# ---- hostile files


class Marker:
    """Unpickled as it asks to be, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._path}",)


def put_hostile(path: Path, marker: Path) -> None:
    """Puts a pickle that would run code in place of a file of a checkpoint."""
    path.write_bytes(pickle.dumps(Marker(marker), protocol=2))  # torch.load names its class


def make_manifest_anew(checkpoint: Path) -> None:
    """What somebody can do who can write to the folder, where no key signs."""
    before = Manifest.from_bytes((checkpoint / NAME).read_bytes())
    files = {n: d for rank in range(RANKS) for n, d in own_digests(checkpoint, rank, RANKS).items()}
    write_manifest(checkpoint, Manifest(before.step, files, before.logs), None)


# ---- real runs


class OfTrainer(Damaged):
    """The newest checkpoint of a Trainer's killed run."""

    def __init__(self, run: Path, signing: dict[str, str] | None, told: dict[str, Any]) -> None:
        self._signing = None if signing is None else SigningConfig(**signing)
        self._settings = told
        super().__init__(run / "checkpoint-4", run, of_logs=STATE)

    def found(self) -> str | None:
        """What is refused before the Trainer loads anything."""
        regularizer: Any = SimpleNamespace(
            ranks=ALONE, settings=self._settings, load_state=lambda path, state: None
        )
        try:
            step = check_checkpoint(self.checkpoint, signing=self._signing, ranks=ALONE)
            how = {"logs": self.run, "signing": self._signing}
            load_state(self.checkpoint / STATE, step, regularizer=regularizer, **how)
        except CheckpointError as err:
            return str(err)
        return None


def train_and_kill(folder: Path, reference: Path, signing: dict[str, str] | None) -> OfTrainer:
    """A Trainer's run, killed in its fifth step, with checkpoints after steps 2 and 4."""
    made = trainer(
        folder,
        safereg=settings(reference, **({} if signing is None else {"signing": signing})),
        callbacks=[Losses(crash=5)],
        args={"save_strategy": "steps", "save_steps": 2},
    )
    with suppress(KeyboardInterrupt):
        made.train()
    return OfTrainer(folder, signing, made.safereg.settings)


def try_trainers(folder: Path, tries: int) -> Iterator[dict[str, object]]:
    """Rows of so many tries on a Trainer's checkpoint without a key, and on one with a key."""
    reference = write_reference(folder / "reference")
    os.environ[_KEY] = secrets.token_hex(16)
    for what, signing, kinds in (
        ("Trainer", None, (*INSIDE, "files swapped")),
        ("Trainer, signed", {"hmac_env": _KEY}, KINDS),
    ):
        damaged = train_and_kill(folder / what, reference, signing)
        yield from ({**each, "what": what} for each in try_all(damaged, tries, kinds=kinds))


def make_run(folder: Path, *, steps: int = 6) -> Path:
    """The configuration of a small run of two ranks with a checkpoint every two steps."""
    save_model(folder / "model", tiny_model(seed=0, num_hidden_layers=2))
    rows = write_jsonl(folder / "train.jsonl", random_rows(24))
    path = folder / "run.yaml"
    path.write_text(
        f"model: {folder / 'model'}\ndata: {{train: {rows}}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\noptimizer: {lr: 1.0e-3}\n"
        f"train: {{steps: {steps}, precision: fp32, micro_batch_size: 2, save_every: 2, "
        f"keep_checkpoints: 3}}\noutput_dir: {folder / 'whole'}\n"
    )
    return path


def interrupted(whole: Path, copy: Path) -> Path:
    """A copy of a finished run as a kill before its end leaves it; its newest checkpoint."""
    from safereg_dist.run.ledger import reopen_ledger

    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    (copy / "summary.json").unlink()
    reopen_ledger(copy)
    return max((copy / "checkpoint").glob("step-*"))


def main() -> None:
    """Makes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=2000)
    parser.add_argument("--resumes", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/damage.csv"))
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as name:
        rows = _measure(Path(name), options.tries, options.resumes)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(options.out.read_text("utf-8"))


def _measure(folder: Path, tries: int, resumes: int) -> list[dict[str, object]]:
    launch = Launcher(folder)
    config = make_run(folder)
    done = launch(FINETUNE, config, ranks=RANKS)
    assert done.status == 0, done.output
    checkpoint = interrupted(folder / "whole", folder / "checked")
    rows = try_all(Damaged(checkpoint, folder / "checked"), tries)
    rows += try_trainers(folder / "trainers", tries // 2)
    rng, tried, detected = random.Random(1), Counter(), Counter()
    for number in range(resumes):
        kind = (*KINDS, "hostile", "hostile, manifest made anew")[number % (len(KINDS) + 2)]
        tried[kind] += 1
        detected[kind] += _is_resumed_behind(launch, config, folder / f"{number}", kind, rng)
        print(f"{sum(detected.values())} of {tried.total()}: {kind}", flush=True)
    return rows + [row("resumed", kind, tried[kind], detected[kind]) for kind in tried]


def _is_resumed_behind(
    launch: Launcher, config: Path, run: Path, kind: str, rng: random.Random
) -> bool:
    """True if a run goes on behind its damaged checkpoint, to the bits of the undamaged run."""
    whole, marker = config.parent / "whole", run.with_suffix(".marker")
    checkpoint = interrupted(whole, run)
    if kind in KINDS:
        damaged = Damaged(checkpoint, run)
        while not damaged.damage(kind, rng, checkpoint / rng.choice(files_below(checkpoint))):
            damaged.mend()
    else:
        put_hostile(rng.choice(sorted(checkpoint.rglob("*.pt"))), marker)
        if "anew" in kind:
            make_manifest_anew(checkpoint)
    done = launch(FINETUNE, config, f"output_dir={run}", ranks=RANKS)
    same = [f"{name}" for name in ("ledger.jsonl", "model/model.safetensors")]
    return (
        done.status == 0
        and f"checkpoint {checkpoint} cannot be used" in done.output
        and not marker.exists()
        and all((run / name).read_bytes() == (whole / name).read_bytes() for name in same)
    )


if __name__ == "__main__":
    main()
