"""Distributions built from copies of the projects, and environments that see a few of them."""

import importlib.metadata as metadata
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LEFTOVERS = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__", "results", "runs")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def copied(folder: Path) -> Path:
    """The root project's packaging with everything a build could wrongly take along."""
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("safereg_dist", "kernels", "tests", "benchmarks", "launch", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=LEFTOVERS)
    return folder


def build(project: Path, out: Path, kind: str = "wheel", *, epoch: int | None = None) -> Path:
    """What the project's build backend makes in `out`, without an index or an environment."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))"
    env = dict(os.environ) | ({} if epoch is None else {"SOURCE_DATE_EPOCH": str(epoch)})
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


def needs(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(archive.read(name).decode())
    return told.get_all("Requires-Dist", [])


def closure(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that these need, without their extras, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        wanted = need.marker is None or any(
            need.marker.evaluate({"extra": extra}) for extra in ("", *need.extras)
        )
        if name in found or not wanted or name.startswith("safereg"):
            continue
        found[name] = metadata.distribution(name)
        waiting += [Requirement(text) for text in found[name].requires or ()]
    return found


def environment(folder: Path, seen: dict[str, metadata.Distribution], *wheels: Path) -> Path:
    """A virtual environment with these wheels that sees those distributions alone; its Python.

    The distributions are links to what is installed here: nothing is copied or fetched.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for each in seen.values():
        for top in {Path(file).parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            target = Path(str(each.locate_file(top)))
            if not (site / top).exists() and target.exists():
                (site / top).symlink_to(target)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index"]
    done = subprocess.run([*pip, "--no-deps", *map(str, wheels)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python
