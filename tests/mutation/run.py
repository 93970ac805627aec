"""Plants one small bug at a time and sees whether a test fails: `python tests/mutation/run.py`.

A bug is an entry of `bugs/*.yaml`: the text `find`, which occurs once in `file`, becomes `replace`,
and at least one of the `tests` (pytest's node ids) must fail. A bug whose text is gone is an error:
whoever rewrites the line rewrites its bug. Each runs in a copy of the repository, so that whatever
a test starts, from whichever folder, imports the planted code; and in a fork of one process that
has imported the libraries but none of the project, so that a bug costs little but its tests.
"""

import argparse
import compileall
import gc
import importlib
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

HERE = Path(__file__).resolve().parent
PACKAGES = {"safereg_dist": ".", "safereg_kernels": "kernels"}  # name: the folder that holds it
TESTS = ("tests", "kernels/tests")
PRELOADED = (
    *("numpy", "torch", "transformers", "pytest", "triton", "yaml", "tqdm", "hypothesis", "httpx"),
    *("torch.distributed.run", "transformers.models.llama.modeling_llama", "scipy.stats"),
    *("datasets", "deepspeed", "torch.utils.flop_counter"),
)
NOT_COPIED = (".git", ".venv", "__pycache__", "runs", "build", "dist", "*.egg-info", ".*_cache")
TIMEOUT_S = 300.0  # of one bug; a test that waits for ranks gives up by itself before
PASSED, FAILED = 0, 1  # pytest's exit codes; with any other one no test has judged
SHARE_WANTED = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """One entry of a list; without a file, and so without a bug, a part of the baseline."""

    id: str
    file: str
    """From the root of the repository."""
    find: str
    replace: str
    tests: list[str]
    """Node ids, the fewest and fastest of which one must fail; see `located`."""
    quick: bool = False
    """Part of the short list."""
    hangs: bool = False
    """True where no end within the time limit is how the bug shows."""


class Outcome(NamedTuple):
    """How the tests of a bug ended."""

    bug: Bug
    status: int | None
    """pytest's exit code; None at the time limit."""
    seconds: float
    cpu_seconds: float
    """Of the processors, which other work on the machine does not change."""
    output: str

    @property
    def is_killed(self) -> bool:
        """True where the tests have seen the bug."""
        has_judged = self.status == FAILED or (self.status is None and self.bug.hangs)
        return has_judged and bool(self.bug.file)


def read_bugs(folder: Path) -> list[Bug]:
    """All entries of the lists in a folder; ids must differ."""
    import yaml

    lists = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(folder.glob("*.yaml"))]
    bugs = [Bug(**entry) for entries in lists for entry in entries or []]
    ids = [bug.id for bug in bugs]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise SystemExit(f"ids that occur more than once: {', '.join(twice)}")
    return bugs


def stale_reason(bug: Bug, root: Path) -> str | None:
    """Why the bug cannot be planted any more, or None."""
    path = root / bug.file
    if not path.is_file():
        return f"there is no {bug.file}"
    count = path.read_text("utf-8").count(bug.find)
    return None if count == 1 else f"its text occurs {count} times in {bug.file}"


def test_files(root: Path) -> list[Path]:
    """Every file of tests of a repository."""
    return [file for folder in TESTS for file in (root / folder).rglob("test_*.py")]


def located(test: str, root: Path) -> str:
    """A node id whose file may have moved: names of test files are unique, folders may change."""
    path, colons, name = test.partition("::")
    if not (root / path).is_file():
        found = [file for file in test_files(root) if file.name == Path(path).name]
        if len(found) == 1:  # else pytest says what is missing
            path = found[0].relative_to(root).as_posix()
    return f"{path}{colons}{name}"


def baseline(bugs: list[Bug]) -> list[Bug]:
    """Every test that a bug names, once, without any bug: one run per file of tests."""
    files: dict[str, list[str]] = {}
    for test in dict.fromkeys(test for bug in bugs for test in bug.tests):
        files.setdefault(test.partition("::")[0], []).append(test)
    return [
        Bug(id=f"(no bug) {file}", file="", find="", replace="", tests=tests)
        for file, tests in files.items()
    ]


def clean_copy(root: Path, scratch: Path) -> Path:
    """A copy of the repository from which all others are made, with its packages compiled once."""
    clean = scratch / "clean"
    shutil.copytree(root, clean, ignore=shutil.ignore_patterns(*NOT_COPIED))
    # By content: times of files are compared in whole seconds, a bug may be planted within one.
    by_content = py_compile.PycInvalidationMode.CHECKED_HASH
    for name, parent in PACKAGES.items():
        compileall.compile_dir(clean / parent / name, quiet=2, invalidation_mode=by_content)
    return clean


def run_bugs(bugs: list[Bug], clean: Path, scratch: Path) -> Iterator[Outcome]:
    """Outcomes in the order in which they come, as many at once as there are processors."""
    waiting, running = list(reversed(bugs)), {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            bug = waiting.pop()
            folder = Path(tempfile.mkdtemp(dir=scratch))
            running[_start(bug, clean, folder)] = bug, folder, time.monotonic()
        time.sleep(0.02)
        for pid, (bug, folder, begin) in list(running.items()):
            seconds = time.monotonic() - begin
            ended, status, used = os.wait4(pid, os.WNOHANG)
            if not ended and seconds < TIMEOUT_S * (1 if bug.file else len(bug.tests)):
                continue
            code = os.waitstatus_to_exitcode(status) if ended else None
            if not ended:
                _kill_with_children(pid)
            output = (folder / "output").read_text("utf-8", errors="replace")
            shutil.rmtree(folder, ignore_errors=True)
            del running[pid]
            yield Outcome(bug, code, seconds, used.ru_utime + used.ru_stime, output)


def _start(bug: Bug, clean: Path, folder: Path) -> int:
    """Process id of a child that runs the tests of a bug in its folder."""
    pid = os.fork()
    if pid == 0:
        try:
            _become(bug, clean, folder)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(70)  # tests that came to their end have left with their own code
    return pid


def _become(bug: Bug, clean: Path, folder: Path) -> NoReturn:
    """Plants a bug, runs its tests and ends with pytest's exit code."""
    import pytest

    os.setsid()
    sink = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    copy = folder / "copy"
    shutil.copytree(clean, copy, copy_function=os.link)
    if bug.file:
        planted = copy / bug.file
        text = planted.read_text("utf-8").replace(bug.find, bug.replace)
        planted.unlink()  # the others' file is the same one
        planted.write_text(text, encoding="utf-8")
    ahead = [str(copy / parent) for parent in PACKAGES.values()]
    sys.path[:0] = ahead
    # Some tests import what another file has, whose folder only a run of all of them would add.
    sys.path += sorted({str(path.parent) for path in test_files(copy)})
    os.environ["PYTHONPATH"] = os.pathsep.join(ahead)
    (folder / "t").mkdir()  # short: sockets are made in it
    os.environ["TMPDIR"], tempfile.tempdir = str(folder / "t"), None
    os.chdir(copy)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # nothing of them is needed
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    status = pytest.main([*bug.tests, *options, "--basetemp", str(folder / "tmp")])
    for name, parent in PACKAGES.items():
        module = importlib.import_module(name)
        assert Path(str(module.__file__)).is_relative_to(copy / parent / name), module.__file__
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))


def _kill_with_children(pid: int) -> None:
    """SIGKILL to a child and to whatever its tests have started, in sessions of their own too."""
    for process in [*_descendants(pid), pid]:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
    os.waitpid(pid, 0)


def _descendants(pid: int) -> list[int]:
    """Processes below one, those whose parents have ended left out."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in listed.read_text().split()] if listed.exists() else []
    return [*(below for child in children for below in _descendants(child)), *children]


def report(outcomes: list[Outcome], stale: list[str]) -> int:
    """Prints what went wrong and how many are killed; 0 where enough are, and all are judged."""
    planted = [outcome for outcome in outcomes if outcome.bug.file]
    survivors = [o for o in planted if o.status == PASSED]
    broken = [o for o in outcomes if not o.is_killed and (o.status != PASSED)]
    for outcome in survivors:
        print(f"\nSURVIVED {outcome.bug.id} ({outcome.seconds:.1f} s)\n{_tail(outcome.output)}")
    for outcome in broken:
        how = "no end" if outcome.status is None else f"exit code {outcome.status}"
        print(f"\nERROR {outcome.bug.id}: {how}\n{_tail(outcome.output)}")
    for reason in stale:
        print(f"\nSTALE {reason}")
    killed, total = sum(outcome.is_killed for outcome in planted), len(planted) + len(stale)
    share = killed / total if total else 0.0
    print(f"\nkilled {killed} of {total} ({100 * share:.1f} %)")
    return int(bool(broken or stale) or share < SHARE_WANTED)


def _tail(output: str, lines: int = 15) -> str:
    return "\n".join(f"    {line}" for line in output.splitlines()[-lines:])


def main(arguments: list[str]) -> int:
    """Exit status of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="only those marked so")
    parser.add_argument("--only", nargs="+", default=[""], metavar="ID", help="parts of ids")
    parser.add_argument("--file", default="", help="part of the planted file's path")
    parser.add_argument("--no-baseline", action="store_true", help="without a run without bugs")
    parser.add_argument("--verbose", action="store_true", help="seconds and last line of each")
    parser.add_argument(
        "--preload", nargs="*", default=PRELOADED, metavar="NAME", help="what is imported once"
    )
    parser.add_argument("--bugs", type=Path, default=HERE / "bugs", help="folder of the lists")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="of the repository")
    options = parser.parse_args(arguments)
    bugs = [
        replace(bug, tests=[located(test, options.root) for test in bug.tests])
        for bug in read_bugs(options.bugs)
        if any(part in bug.id for part in options.only)
        and options.file in bug.file
        and (bug.quick or not options.quick)
    ]
    reasons = {bug.id: stale_reason(bug, options.root) for bug in bugs}
    fresh = [bug for bug in bugs if reasons[bug.id] is None]
    runs = [*([] if options.no_baseline else baseline(fresh)), *fresh]
    outcomes = []
    _preload(options.preload)
    from tqdm import tqdm

    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        clean = clean_copy(options.root, Path(scratch))
        done = run_bugs(runs, clean, Path(scratch))
        for outcome in tqdm(done, total=len(runs), unit="run", disable=None):
            outcomes.append(outcome)
            if options.verbose:
                spent = f"{outcome.seconds:6.1f} s {outcome.cpu_seconds:6.1f} s of processors"
                print(f"{outcome.status} {spent}  {outcome.bug.id}", flush=True)
    gc.unfreeze()
    return report(outcomes, [f"{id}: {reason}" for id, reason in reasons.items() if reason])


def _preload(libraries: Sequence[str]) -> None:
    """Imports what most tests need, with the settings under which they run without a GPU."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # no threads before a fork; and a bug takes one processor
    sys.path.insert(0, str(HERE.parent))
    if "torch" in libraries:
        importlib.import_module("conftest")  # before triton: whether kernels are interpreted
    for name in libraries:
        importlib.import_module(name)
    sys.path.pop(0)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("conftest", "support")]:
        del sys.modules[name]  # a copy has its own
    assert not set(PACKAGES) & set(sys.modules)
    gc.freeze()  # or each fork would copy what it collects
    sys.modules["tqdm"].tqdm.monitor_interval = 0  # no thread before a fork


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
