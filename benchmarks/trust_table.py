"""The table of docs/trust.md: what was tried against a run, what it survived, what was lost.

    python benchmarks/trust_table.py [--check]

Written from results/damage.csv, hosts.csv, fuzz.csv, hiding.csv and stops.csv. `--check` writes
nothing and exits with 1 where the page is not what they say.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from plot_style import Row, read_csv

PAGE = Path(__file__).resolve().parents[1] / "docs" / "trust.md"
RESULTS = Path(__file__).resolve().parent / "results"
MARKS = re.compile(r"(?<=<!-- tried -->\n).*?(?=<!-- end tried -->)", re.DOTALL)


def main() -> int:
    """Writes, or checks; the exit status."""
    before = PAGE.read_text(encoding="utf-8")
    text = page_of(before)
    if sys.argv[1:] == ["--check"]:
        return int(text != before)
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


def page_of(page: str) -> str:
    """The page with the table as the results say."""
    head = ["| test | tried | survived | lost | command |", "|---|---|---|---|---|"]
    return MARKS.sub(lambda _: "\n".join(["", *head, *rows(), "", ""]), page)


def rows() -> Iterator[str]:
    """A row of each kind of trial."""
    for kind, tried, survived, command in (*damage(), *hosts(), *stops(), *hostile(), *hiding()):
        cells = (kind, f"{tried:,}", f"{survived:,}", f"{tried - survived:,}", f"`{command}`")
        yield f"| {' | '.join(cells)} |"


Trials = Iterator[tuple[str, int, int, str]]


def read(name: str) -> list[Row]:
    """The rows of a result."""
    return read_csv(RESULTS / name)


def damage() -> Trials:
    """Damaged checkpoints; survived: found before anything was loaded."""
    sums: dict[str, list[int]] = {}
    for row in read("damage.csv"):
        place = f"{row['what']}: " if row["what"].startswith("Trainer") else "checkpoint: "
        known = sums.setdefault(place + row["kind"], [0, 0])
        known[0] += int(row["tried"])
        known[1] += int(row["detected"])
    for kind, (tried, survived) in sums.items():
        yield kind, tried, survived, "python benchmarks/damage.py"


def hosts() -> Trials:
    """Faults over hosts; survived: ended everywhere, and the same command got the same bits."""
    for row in read("hosts.csv"):
        survived = row["ended_on_all_hosts"] == row["same_bits"] == "True"
        what = f"{row['fault']} ({row['launcher']}, {row['hosts']} x {row['ranks_per_host']})"
        yield what, 1, int(survived), "python benchmarks/hosts.py"


def stops() -> Trials:
    """Ways to stop a run; survived: nothing that was trained is lost."""
    for outcome in ("saved", "trains on"):
        found = [row for row in read("stops.csv") if row["outcome"] == outcome]
        yield f"asked to stop: {outcome}", len(found), len(found), "python benchmarks/stops.py"


def hostile() -> Trials:
    """Hostile files; survived: accepted, or refused in one line."""
    found = read("fuzz.csv")
    tried = sum(int(row["tried"]) for row in found)
    lost = sum(int(row[name]) for row in found for name in ("tracebacks", "hangs", "outside"))
    what = f"hostile and damaged files, {len(found)} targets"
    yield what, tried, tried - lost, "python tests/fuzz/run.py"


def hiding() -> Trials:
    """Rows that hide below the threshold; survived: refused, and honest data not."""
    sums: dict[str, list[int]] = {}
    for row in read("hiding.csv"):
        draws, refused = int(row["draws"]), round(float(row["refused"]) * int(row["draws"]))
        if row["at"] == "uniform":
            continue  # told in the text: only where they outweigh what may be held back
        share = float(row["placed"])
        name = f"{share:.0%} of the rows at 0.44 or 0.48" if share else "honest rows, let through"
        known = sums.setdefault(name, [0, 0])
        known[0] += draws
        known[1] += refused if share else draws - refused
    for name, (tried, survived) in sums.items():
        yield f"hiding: {name}", tried, survived, "python benchmarks/bench_hiding.py"


if __name__ == "__main__":
    sys.exit(main())
