"""What happens to runs over several hosts: every launcher, and every fault, tried and written down.

    python benchmarks/hosts.py [--out benchmarks/results/hosts.csv] [--only WORD]  as root, long

Hosts are those of `tests/hosts.sh`, the run is that of `tests/multinode`. A row of the table is one
launch: what was done to it, whether nothing of it was left on any host, after how many seconds of
its ranks and of the launchers too, what it said, the launcher's status, and whether the run, gone
on with by the same command where it had ended, has the bits of as many ranks on one host. A row is
written once it is known; rows of an older file that `--only` leaves out stay.
"""

import argparse
import csv
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.host_faults import FAULTS, strike, write_run  # noqa: E402
from support.hosts import LAUNCHERS, Hosts, missing  # noqa: E402
from support.launching import FINETUNE, Launcher  # noqa: E402
from support.results import result  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "hosts.csv"
PROVENANCE = ("date", "hardware", "commit", "torch")
KEY = ("fault", "launcher", "hosts", "ranks_per_host")
COLUMNS = (
    *(*KEY, "ended_on_all_hosts", "ranks_ended_s", "seconds", "status", "line", "same_bits"),
    *PROVENANCE,
)
TRIED = (
    *(("nothing", launcher, 2, 1) for launcher in LAUNCHERS),
    *(("nothing", "pdsh", 2, 2), ("nothing", "torchrun", 4, 1)),
    *((fault, "pdsh", 2, 1) for fault in FAULTS if fault != "nothing"),
    *((fault, "no_ssh", 2, 1) for fault in ("SIGKILL of a rank", "link down")),
    *((fault, "torchrun", 2, 1) for fault in ("SIGKILL of a rank", "link down")),
    *((fault, "openmpi", 2, 1) for fault in ("SIGKILL of a rank", "link down")),
    *(("SIGKILL of a rank", "pdsh", 2, 2), ("link down", "torchrun", 4, 1)),
)


def main() -> int:
    """Tries all, or those whose row has the word; 1 where one did not go as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help="part of `fault,launcher,hosts,ranks`")
    options = parser.parse_args()
    if missing() is not None:
        raise SystemExit(f"expected hosts, but {missing()}")
    chosen = [case for case in TRIED if options.only in ",".join(map(str, case))]
    rows = {tuple(row[name] for name in KEY): row for row in read(options.out)}
    facts = provenance(torch.device("cpu"))
    common = {name: facts[name] for name in PROVENANCE}
    with tempfile.TemporaryDirectory(prefix="hosts-") as name:
        folder = Path(name)
        write_run(folder)
        for case in sorted(chosen, key=lambda case: case[2]):
            row = {**tried(folder, *case), **common}
            print({key: value for key, value in row.items() if key not in PROVENANCE}, flush=True)
            rows[tuple(map(str, case))] = row
            write(options.out, list(rows.values()))
    return int(any(not went_well(row) for row in rows.values()))


def went_well(row: dict[str, Any]) -> bool:
    """Whether the bits are the same, and a run that had to end has said why."""
    has_said = row.get("line") or not FAULTS[row["fault"]].ends
    return str(row["same_bits"]) == "True" and bool(has_said)


def tried(folder: Path, name: str, launcher: str, count: int, ranks: int) -> dict[str, Any]:
    """The row of one launch."""
    row: dict[str, Any] = dict(zip(KEY, (name, launcher, count, ranks), strict=True))
    expected = one_host(folder, count * ranks)
    out = folder / re.sub(r"\W", "-", "-".join(map(str, row.values())))
    arguments = [folder / "run.yaml", f"output_dir={out}"]
    hosts = Hosts(folder / f"hosts-{out.name}", count)
    try:
        outcome = strike(hosts, FAULTS[name], arguments, out, launcher=launcher, ranks=ranks)
        row |= {"ended_on_all_hosts": True, "seconds": round(outcome.seconds, 1)}
        row |= {"ranks_ended_s": round(outcome.ranks_ended_s, 1)}
        row |= {"status": outcome.status, "line": " | ".join(outcome.lines)}
        if not (out / "summary.json").exists():
            hosts(arguments, launcher=launcher, ranks=ranks)
        row["same_bits"] = result(out) == expected
    except (AssertionError, FileNotFoundError) as error:
        row.setdefault("ended_on_all_hosts", False)
        row["same_bits"] = f"no: {str(error).splitlines()[0][:200]}"
        print(error, file=sys.stderr)
    finally:
        hosts.close()
    return row


def one_host(folder: Path, ranks: int) -> dict[str, Any]:
    """The result of the same run with as many ranks on this machine."""
    out = folder / f"one-host-{ranks}"
    if not (out / "summary.json").exists():
        done = Launcher(folder)(FINETUNE, folder / "run.yaml", f"output_dir={out}", ranks=ranks)
        assert done.status == 0, done.output[-4000:]
    return result(out)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier call; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
