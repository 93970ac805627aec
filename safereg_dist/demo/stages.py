"""What both demos are made of: stages that a user could type, printed before they run."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safereg_dist.cli import main as safereg
from safereg_dist.demo.claims import Claim
from safereg_dist.errors import SafeRegError
from safereg_dist.storage.atomic import write_atomically


class DemoError(SafeRegError):
    """A stage ended with an error of its own, printed above, or a claim does not hold."""


def say(text: str) -> None:
    """A headline."""
    print(f"\n== {text}", flush=True)


def command(*arguments: object) -> None:
    """One verb of the `safereg` command, in this process (its imports are paid once).

    Raises:
        DemoError: it failed.
    """
    words = [str(argument) for argument in arguments]
    print(f"$ safereg {shlex.join(words)}", flush=True)
    if safereg(words, hints=False) != 0:
        raise DemoError(f"`safereg {words[0]}` failed, see above")


def launch(ranks: int, config: Path, *overrides: str) -> None:
    """One training run on several ranks, under the launcher that fits its engine.

    Raises:
        DemoError: it failed.
    """
    words = ["launch", str(config), "--nproc", str(ranks), *overrides]
    print(f"$ safereg {shlex.join(words)}", flush=True)
    # As launch/setup_env.sh does, for a demo that is started without it.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    words = [sys.executable, "-m", "safereg_dist", *words]
    status = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, check=False)
    if status.returncode != 0:
        raise DemoError(f"training ended with status {status.returncode}, see above")


def forget_stale(
    stamp: Path, made_of: Iterable[bytes], stages: Iterable[Path], seconds: float
) -> float:
    """Removes `stages` unless `stamp` says that they were made of the same; its seconds."""
    digest = hashlib.sha256(b"".join(made_of)).hexdigest()
    known = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    if known.get("made_of") != digest:
        for stage in stages:
            shutil.rmtree(stage) if stage.is_dir() else stage.unlink(missing_ok=True)
        known = {"made_of": digest, "seconds": seconds}
        write_atomically(stamp, json.dumps(known) + "\n")
    return known["seconds"]


def finish(summary: dict[str, Any], claims: list[Claim], out: Path, columns: Mapping[str, str]):
    """Writes summary and report, prints the table.

    Args:
        columns: figure -> title in the table.
    Raises:
        DemoError: what was measured is not what is claimed.
    """
    summary["claims"] = [claim._asdict() for claim in claims]
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    command("report", out)
    rows = {"base": summary["base"], **summary["arms"]}
    print("\n" + "arm".ljust(16) + "".join(title.rjust(17) for title in columns.values()))
    for name, values in rows.items():
        cells = ("-" if values[key] is None else f"{values[key]:.3f}" for key in columns)
        print(name.ljust(16) + "".join(cell.rjust(17) for cell in cells))
    print()
    for claim in claims:
        print(f"{'ok  ' if claim.holds else 'FAIL'}  {claim.text}: {claim.measured}")
    print(f"\n{summary['seconds']} s in all", flush=True)
    failed = [claim.text for claim in claims if not claim.holds]
    if failed:
        raise DemoError(f"measured otherwise than claimed: {'; '.join(failed)}")
