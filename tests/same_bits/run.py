"""The proof that a refactoring changes nothing: the public commands, before and after it.

    python tests/same_bits/run.py TREE OUT [--world DIR] [--only CASE ...]
    python tests/same_bits/run.py --compare OUT_A OUT_B [--rtol CASE=1e-7 ...] [--only CASE ...]

The first runs every case with the code of the folder TREE and writes metrics, ledger rows and
hashes of weights into OUT/CASE, without times, memory and versions. The inputs are made once, by
the tree of this file, into --world (default OUT/world): give both trees the same. The second holds
two such folders against each other, byte for byte; a case named by --rtol may differ in floats by
that share of the largest value of a field. One line a case; status 1 where anything differs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import Bench, CaseError, tree_environment
from cases import CASES
from comparing import differences

HERE = Path(__file__).resolve().parent
PRINT_PATHS = """
from importlib.util import find_spec
print(find_spec("safereg_dist").origin, find_spec("safereg_kernels").origin)
"""


def main() -> int:
    """Runs or compares; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs=2, metavar="FOLDER")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--world", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time")
    parser.add_argument("--rtol", nargs="+", default=[], metavar="CASE=X")
    arguments = parser.parse_args()
    one, other = (folder.absolute() for folder in arguments.folders)
    if arguments.compare:
        allowed = dict(text.split("=") for text in arguments.rtol)
        unknown = sorted(allowed.keys() - CASES)
        if unknown:
            parser.error(f"--rtol names no case: {unknown[0]}")
        return compare(one, other, arguments.only, {k: float(v) for k, v in allowed.items()})
    world = (arguments.world or other / "world").absolute()
    return run(one, other, world, arguments.only, arguments.jobs)


def run(tree: Path, out: Path, world: Path, names: list[str], jobs: int) -> int:
    """Every case of `names` with the code of `tree`; 1 where one fails, the others go on."""
    _require_own_code(tree)
    if not world.is_dir():
        shutil.rmtree(world.with_name(f".{world.name}.partial"), ignore_errors=True)
        words = [sys.executable, str(HERE / "world.py"), str(world)]
        subprocess.run(words, env=tree_environment(HERE.parents[1]), check=True)
    work = out / ".work"
    shutil.rmtree(work, ignore_errors=True)
    benches = [Bench(tree=tree, world=world, work=work / n, out=out / n) for n in names]
    with ThreadPoolExecutor(jobs) as pool:
        passed = list(pool.map(_run_case, benches))
    if all(passed):
        shutil.rmtree(work)
    return 0 if all(passed) else 1


def _run_case(bench: Bench) -> bool:
    name, began = bench.out.name, time.monotonic()
    shutil.rmtree(bench.out, ignore_errors=True)
    bench.work.mkdir(parents=True)
    bench.out.mkdir(parents=True)
    try:
        CASES[name](bench)
    except CaseError as error:
        shutil.rmtree(bench.out)  # half a result would compare as one
        print(f"FAIL {name}: {error}", flush=True)
        return False
    print(f"ok   {name} ({time.monotonic() - began:.0f} s)", flush=True)
    return True


def compare(one: Path, other: Path, names: list[str], rtol: dict[str, float]) -> int:
    """Prints a line for each case; 1 where one differs or is missing."""
    status = 0
    for name in names:
        missing = [str(folder) for folder in (one, other) if not (folder / name).is_dir()]
        found = [f"not in {', '.join(missing)}"] if missing else []
        found = found or differences(one / name, other / name, rtol.get(name))
        within = f" within {rtol[name]:g}" if name in rtol else ""
        print(f"{'DIFFERS' if found else 'same'} {name}{within}{': ' if found else ''}", end="")
        print("; ".join(found), flush=True)
        status = 1 if found else status
    return status


def _require_own_code(tree: Path) -> None:
    """Ends the program unless processes of `tree` load its packages, not an installed one."""
    words = [sys.executable, "-c", PRINT_PATHS]
    found = subprocess.run(
        words, env=tree_environment(tree), cwd=tree, check=True, capture_output=True, text=True
    ).stdout.split()
    if not all(Path(path).is_relative_to(tree) for path in found):
        sys.exit(f"expected the packages of {tree}, found {found}: is it the project's folder?")


if __name__ == "__main__":
    sys.exit(main())
