"""Every arm on every combination of the axes: trained, evaluated, and a row in one tidy table.

A cell is one arm at one value of each axis. It is done once its run is complete and its evaluation
is there, so the same command goes on where it was cut off; a cell that failed is tried again.

    config: run.yaml                          # what every cell begins from
    out: runs/sweep
    axes:
      seed: {0: [train.seed=0], 1: [train.seed=1]}
      poison: {0: [data.train=clean.jsonl], 0.15: [data.train=poisoned.jsonl]}
    arms:
      sft: &sft [regularizer.objective=none, data.anchor=null]
      adaptive: []
      halfway: {overrides: *sft, after: {interpolate: 0.5}}
    evaluation: {prompts: [held_out.jsonl], max_new_tokens: 20}

In overrides and in files of the evaluation `{seed}` and the like stand for the value of an axis.
Relative paths begin at the folder of the sweep's file, those of overrides too.
An arm with `after` changes a trained model (`after_training.After`): that of the first arm without
it whose overrides are the same, which is trained once, else its own.
"""

import csv
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field, model_validator

from safereg_dist.config import load_config, placed_override, replace, section_from_dict
from safereg_dist.config.paths import Origin
from safereg_dist.config.section import MODEL, READ, WRITTEN, Section
from safereg_dist.config.yaml_text import read_yaml
from safereg_dist.errors import ConfigError, SafeRegError, printable
from safereg_dist.evaluate.evaluate import evaluate_model
from safereg_dist.evaluate.rates import table_rows
from safereg_dist.evaluate.table import TITLES
from safereg_dist.experiments.after_training import After, change_model
from safereg_dist.factory.model_folder import resolve_model
from safereg_dist.parallel.single import single_ranks
from safereg_dist.screen.progress import progress_bar
from safereg_dist.screen.table import aligned
from safereg_dist.storage.atomic import write_atomically

Train = Callable[[str, Sequence[str]], int]
"""Trains as a configuration with overrides says; its exit status. A function that pickles."""
BASE = "base"
"""The arm that is not trained: the model that the others begin from."""
TABLE = "results.csv"
FIGURES = (
    *("attack_success_rate", "attack_success_rate_sampled", "poisoned_token_probability"),
    *("refusal_probability", "task_score", "benign_exact_match", "over_refusal_rate"),
)
"""Columns of the table after arm, axes and set; `seconds` and `status` follow."""


class Evaluation(Section):
    """How the model of a cell is evaluated: the options of `safereg eval`."""

    prompts: Annotated[tuple[str, ...], READ]
    benign: Annotated[tuple[str, ...], READ] = ()
    attacks: tuple[str, ...] = ()
    refusal: str | None = None
    poisoned: str | None = None
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=32, ge=1)


class ArmSettings(Section):
    """An arm; a list stands for its overrides."""

    overrides: tuple[str, ...] = ()
    """`key=value`, after those of the axes."""
    after: After | None = None
    """What is done to the trained model; null = nothing."""


class Sweep(Section):
    """A description of many runs."""

    config: Annotated[str, READ]
    """YAML of the configuration that every cell begins from."""
    out: Annotated[str, WRITTEN]
    """Folder of all runs, and of the table."""
    folder: Annotated[str, READ] = "."
    """Where the relative paths of overrides begin; default: the folder of the sweep's file."""
    arms: dict[str, ArmSettings]
    """Name -> overrides (`key=value`), or a section of them and of `after`; `base` is the model
    before training, and needs none."""
    axes: dict[str, dict[str, tuple[str, ...]]] = Field(default_factory=dict)
    """Name -> value -> overrides: every combination of values is run for every arm."""
    skip: tuple[dict[str, str], ...] = ()
    """Cells to leave out: those that have all these values (of `arm` and axes)."""
    launcher: tuple[str, ...] = ()
    """What starts a training, e.g. [safereg, launch, --nproc, '2']; empty: it runs in the process
    that evaluates it. It is started in the working folder."""
    jobs: int = Field(default=1, ge=1)
    """Cells at a time, >= 1, each in a process of its own that writes `ARM.log`."""
    evaluation: Evaluation

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, raw: Any) -> Any:
        """YAML reads names such as 0.15 as numbers, and lists where tuples stand."""
        if not isinstance(raw, dict):
            return raw
        found = dict(raw)
        if "axes" in found:
            found["axes"] = _named(found["axes"], lambda values: _named(values, _tuple))
        if "arms" in found:
            found["arms"] = _named(found["arms"], _section_of)
        if isinstance(skip := found.get("skip"), list):
            found["skip"] = tuple(_named(each, str) for each in skip)
        return found

    @model_validator(mode="after")
    def _check(self) -> "Sweep":
        if not self.arms:
            raise ConfigError("a sweep needs `arms`: give one name or more, each with overrides")
        if BASE in self.arms and self.arms[BASE].after is not None:
            raise ConfigError(f"arm {BASE!r} is the model before training: it has no `after`")
        taken = {"arm", "set", "status", "seconds", *FIGURES} & set(self.axes)
        if taken:
            raise ConfigError(f"axis {min(taken)!r} has the name of a column: choose another")
        return self

    @property
    def origin(self) -> Origin:
        """Where the relative paths of overrides begin."""
        return Origin(Path(os.path.abspath(self.folder)), Path("the sweep"))


class Cell(NamedTuple):
    """One arm at one value of each axis."""

    arm: str
    axes: dict[str, str]
    folder: Path
    """Of its run; of the base arm, of its evaluation."""
    overrides: tuple[str, ...]
    trained: Path
    """Folder of the run that trains its model: its own, but where it changes another arm's."""
    after: After | None = None

    @property
    def is_changed(self) -> bool:
        """Whether another arm trains its model: then it comes after all those that train."""
        return self.trained != self.folder

    def named(self, texts: Iterable[str]) -> list[str]:
        """Texts with the values of axes in the place of their names in braces."""
        found = list(texts)
        for axis, value in self.axes.items():
            found = [text.replace(f"{{{axis}}}", value) for text in found]
        return found

    @property
    def name(self) -> str:
        """As it is printed."""
        return ", ".join([*(f"{axis} {value}" for axis, value in self.axes.items()), self.arm])


class Swept(NamedTuple):
    """What a sweep came to."""

    rows: list[dict[str, Any]]
    """Of the table."""
    failed: int
    """Number of cells."""


def read_sweep(path: Path) -> Sweep:
    """The description in a YAML file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        raw = read_yaml(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(f"cannot read the sweep {path}: {err}") from err
    if not isinstance(raw, Mapping):
        raise ConfigError(f"expected the keys of a sweep in {path}, got {raw!r}")
    return section_from_dict(Sweep, Origin.of_file(path).section(Sweep, raw))


def run_sweep(sweep: Sweep, train: Train, *, progress: bool = True) -> Swept:
    """Runs what is not done yet; all rows and what failed. The table is `out`/results.csv.

    Args:
        train: trains in this process, where the sweep has no launcher.
    Raises:
        ConfigError: a cell's configuration is none; before anything runs.
    """
    cells = list(cells_of(sweep))
    for cell in cells:
        load_config(sweep.config, list(cell.overrides))
    out = Path(sweep.out)
    out.mkdir(parents=True, exist_ok=True)
    todo = sorted((cell for cell in cells if not is_done(cell)), key=lambda cell: cell.is_changed)
    print(
        f"{len(cells)} cells, {len(todo)} to run; {_expected(sweep, cells, len(todo))}", flush=True
    )
    failed: set[str] = set()
    write_table(sweep, cells, failed)
    for cell, error in _each(sweep, todo, train, progress=progress):
        if error is not None:
            failed.add(cell.name)
            print(f"failed: {printable(cell.name)}: {error}", flush=True)
        write_table(sweep, cells, failed)
    swept = Swept(list(table_of(sweep, cells, failed)), len(failed))
    print(f"\n{_text_of(sweep, swept.rows)}")
    failures = f"; {len(failed)} cells failed" if failed else ""
    print(f"\nwritten: {printable(out / TABLE)}{failures}")
    return swept


def _text_of(sweep: Sweep, rows: list[dict[str, Any]]) -> str:
    """The cells in short: the figures that any of them has, over all prompts."""
    whole = [row for row in rows if not row.get("set")]
    shown = [name for name in FIGURES if any(row.get(name) is not None for row in whole)]
    named = ["arm", *sweep.axes, "status"]
    cells = [[*named, *(TITLES[name] for name in shown)]]
    for row in whole:
        values = [row.get(name) for name in shown]
        figures = ["-" if value is None else f"{value:.3f}" for value in values]
        cells.append([*(printable(row[name], 40) for name in named), *figures])
    return "\n".join(aligned(cells, left=len(named)))


def cells_of(sweep: Sweep) -> Iterator[Cell]:
    """All cells, in order: for each combination of the axes all arms."""
    for values in itertools.product(*(sweep.axes[axis] for axis in sweep.axes)):
        axes = dict(zip(sweep.axes, values, strict=True))
        place = Path(sweep.out, *(f"{axis}={value}" for axis, value in axes.items()))
        common = [text for axis, value in axes.items() for text in sweep.axes[axis][value]]
        arms = {
            arm: settings
            for arm, settings in sweep.arms.items()
            if not any({"arm": arm, **axes}.items() >= each.items() for each in sweep.skip)
        }
        for arm, settings in arms.items():
            trained = place / (_trained_by(arms, settings) or arm)
            cell = Cell(arm, axes, place / arm, (), trained, settings.after)
            named = cell.named([*common, *settings.overrides])
            placed = [placed_override(text, sweep.origin) for text in named]
            yield cell._replace(overrides=(*placed, f"output_dir={trained}"))


def _trained_by(arms: Mapping[str, ArmSettings], settings: ArmSettings) -> str | None:
    """The arm that trains the model which an arm with `after` changes; None: it does so itself."""
    if settings.after is None:
        return None
    same = (
        name
        for name, other in arms.items()
        if name != BASE and other.after is None and other.overrides == settings.overrides
    )
    return next(same, None)


def write_table(sweep: Sweep, cells: list[Cell], failed: Collection[str]) -> None:
    """The rows of all cells that are done or have failed; without `set`, of all prompts."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(sweep), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(table_of(sweep, cells, failed))
    write_atomically(Path(sweep.out, TABLE), text.getvalue())


def table_of(sweep: Sweep, cells: list[Cell], failed: Collection[str]) -> Iterator[dict[str, Any]]:
    """The rows of the table; without `set`, of all prompts. What is not known is left out."""
    columns = _columns(sweep)
    for cell in cells:
        if cell.name in failed:
            yield {"arm": cell.arm, **cell.axes, "status": "failed"}
        for row in rows_of(cell):
            yield {name: row[name] for name in columns if name in row}


def _columns(sweep: Sweep) -> list[str]:
    return ["arm", *sweep.axes, "set", *FIGURES, "seconds", "status"]


def rows_of(cell: Cell) -> Iterator[dict[str, Any]]:
    """The rows of a cell that is done, as in `rates.table_rows`; of another none."""
    if not is_done(cell):
        return
    seconds = _read(cell.folder / "seconds.json")
    for row in table_rows(_read(cell.folder / "eval.json")):
        yield {"arm": cell.arm, **cell.axes, **row, "seconds": seconds, "status": "done"}


def _each(
    sweep: Sweep, cells: list[Cell], train: Train, *, progress: bool
) -> Iterator[tuple[Cell, str | None]]:
    """Runs the cells; each as it ends, with what went wrong."""
    if sweep.jobs == 1:
        for number, cell in enumerate(cells, start=1):
            print(f"\n== {number}/{len(cells)} {printable(cell.name)}", flush=True)
            yield cell, _attempt(sweep, cell, train, progress=progress)
        return
    done = progress_bar(total=len(cells), unit="cell", shown=progress)
    context = multiprocessing.get_context("spawn")
    # Others are compared with the base, or change what a third has trained.
    for stage in range(3):
        group = [c for c in cells if (0 if c.arm == BASE else 1 + c.is_changed) == stage]
        pool = ProcessPoolExecutor(sweep.jobs, mp_context=context)
        try:
            running = {pool.submit(_attempt_aside, sweep, cell, train): cell for cell in group}
            for ended in as_completed(running):
                done.update()
                yield running[ended], ended.result()
        finally:
            pool.shutdown(cancel_futures=True)
    done.close()


def _attempt_aside(sweep: Sweep, cell: Cell, train: Train) -> str | None:
    """`_attempt` in a process that has nothing else to do, its output in a file."""
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    with cell.folder.with_name(f"{cell.arm}.log").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    error = _attempt(sweep, cell, train, progress=False)
    if error is not None:
        print(f"failed: {error}", flush=True)
    return error


def _attempt(sweep: Sweep, cell: Cell, train: Train, *, progress: bool) -> str | None:
    try:
        _run(sweep, cell, train, progress=progress)
    except SafeRegError as error:
        return str(error)
    except Exception as error:  # the other cells may still be worth something
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def _run(sweep: Sweep, cell: Cell, train: Train, *, progress: bool) -> None:
    began = time.perf_counter()
    model = cell.trained / "model"
    if cell.arm == BASE:
        model = Path(load_config(sweep.config, list(cell.overrides)).model)
    elif not (cell.trained / "summary.json").is_file():
        if cell.is_changed:
            raise ConfigError(f"expected the model that {cell.trained} trains, which failed")
        if sweep.launcher:
            command = [*sweep.launcher, sweep.config, *cell.overrides]
            status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
        else:
            status = train(sweep.config, cell.overrides)
        if status != 0:
            raise ConfigError(f"training ended with status {status}, see above")
    if cell.after is not None:
        model = _changed(sweep, cell, cell.after, model)
    asked = sweep.evaluation
    base = cell.folder.parent / BASE / "eval.json"
    evaluate_model(
        model,
        [Path(file) for file in cell.named(asked.prompts)],
        benign_files=[Path(file) for file in cell.named(asked.benign)],
        attacks=asked.attacks,
        base=base if cell.arm != BASE and base.is_file() else None,
        refusal=asked.refusal,
        poisoned=asked.poisoned,
        max_new_tokens=asked.max_new_tokens,
        batch_size=asked.batch_size,
        out=cell.folder / "eval.json",
        progress=progress,
    )
    seconds = round(time.perf_counter() - began, 1)
    write_atomically(cell.folder / "seconds.json", json.dumps(seconds) + "\n")


def _changed(sweep: Sweep, cell: Cell, after: After, model: Path) -> Path:
    """The folder of the trained model as `after` changes it."""
    base, ranks = load_config(sweep.config, list(cell.overrides)).model, single_ranks()
    if after.safe_lora is not None:
        [unaligned] = cell.named([after.safe_lora.unaligned])
        unaligned = sweep.origin.path(unaligned, MODEL, "after.safe_lora.unaligned")
        unaligned = str(resolve_model(unaligned, ranks))
        after = After(safe_lora=replace(after.safe_lora, unaligned=unaligned))
    out = cell.folder / "changed"
    change_model(after, resolve_model(base, ranks), model, out)
    return out


def _named(raw: Any, read: Callable[[Any], Any]) -> Any:
    """A mapping with texts as names; what is none is left to the check that refuses it."""
    return {str(k): read(v) for k, v in raw.items()} if isinstance(raw, dict) else raw


def _tuple(raw: Any) -> Any:
    return tuple(raw or ()) if isinstance(raw, list | tuple | None) else raw


def _section_of(arm: Any) -> Any:
    """An arm as the section that a list of overrides stands for."""
    overrides = _tuple(arm)
    return {"overrides": overrides} if isinstance(overrides, tuple) else arm


def is_done(cell: Cell) -> bool:
    """Trained and evaluated."""
    return (cell.folder / "seconds.json").is_file()


def _expected(sweep: Sweep, cells: list[Cell], todo: int) -> str:
    """How long the rest will take, from the cells that are done."""
    known = [_read(c.folder / "seconds.json") for c in cells if c.arm != BASE and is_done(c)]
    if not known:
        return "how long a cell takes is not known yet"
    return f"about {todo * sum(known) / len(known) / sweep.jobs / 3600:.1f} h"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
