"""Claimed: the runner of planted bugs tells killed from survived, stale and misnamed ones, finds
tests whose file has moved, and what a test starts imports the planted code too. Exact, on a
repository of three files.
"""

import subprocess
import sys

import pytest
import yaml
from support.launching import ROOT

RUNNER = ROOT / "tests" / "mutation" / "run.py"
TESTS = """
import subprocess, sys
from safereg_dist import double

def test_two():
    assert double(1) == 2

def test_zero():
    assert double(0) == 0

def test_elsewhere(tmp_path):
    code = "import safereg_kernels; assert safereg_kernels.ONE == 1"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
"""
KERNELS = "kernels/safereg_kernels/__init__.py"
TREBLE = {"file": "safereg_dist/__init__.py", "find": "2 * x", "replace": "3 * x"}
BUGS = [
    {"id": "seen", **TREBLE, "tests": ["tests/test_toy.py::test_two"]},
    {
        "id": "seen-by-a-child",
        **{"file": KERNELS, "find": "ONE = 1", "replace": "ONE = 2"},
        "tests": ["tests/test_toy.py::test_elsewhere"],
    },
    {"id": "seen-elsewhere", **TREBLE, "tests": ["tests/unit/gone/test_toy.py::test_two"]},
    {"id": "unseen", **TREBLE, "tests": ["tests/test_toy.py::test_zero"]},
    {
        "id": "gone",
        **{**TREBLE, "find": "4 * x"},
        "tests": ["tests/test_toy.py::test_two"],
    },
    {"id": "misnamed", **TREBLE, "tests": ["tests/test_toy.py::test_three"]},
]


@pytest.fixture
def run(tmp_path):
    """Runs the runner on the small repository; returns (exit status, what it printed)."""
    for path, text in {
        "safereg_dist/__init__.py": "def double(x):\n    return 2 * x\n",
        KERNELS: "ONE = 1\n",
        "tests/test_toy.py": TESTS,
        "bugs/toy.yaml": yaml.safe_dump(BUGS),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    command = [sys.executable, str(RUNNER), "--root", str(tmp_path), "--bugs", "bugs"]
    command += ["--preload", "pytest", "yaml", "tqdm"]  # the toys need nothing else

    def start(*options):
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    return start


@pytest.mark.slow
def test_killed_survived_stale_and_misnamed(run):
    status, output = run("--no-baseline")
    assert status == 1
    assert "SURVIVED unseen" in output
    assert "STALE gone: its text occurs 0 times in safereg_dist/__init__.py" in output
    assert "ERROR misnamed: exit code 4" in output
    assert output.count("SURVIVED") == output.count("STALE") == output.count("ERROR ") == 1
    assert "killed 3 of 6 (50.0 %)" in output


@pytest.mark.slow
def test_a_list_whose_bugs_are_all_seen(run):
    status, output = run("--only", "seen-by-a-child", "gone", "--file", "kernels")
    assert status == 0, output
    assert "killed 1 of 1 (100.0 %)" in output


def test_every_bug_still_has_its_text():
    planted = sorted((RUNNER.parent / "bugs").glob("*.yaml"))
    bugs = [bug for path in planted for bug in yaml.safe_load(path.read_text())]
    assert len(bugs) > 100
    gone = [b["id"] for b in bugs if (ROOT / b["file"]).read_text().count(b["find"]) != 1]
    assert gone == []
