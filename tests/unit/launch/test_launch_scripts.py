"""The launch scripts: what they say when something is missing, and how a job saves and requeues.

Claimed: every script parses; each check of setup_env.sh ends with status 2 and one line that names
the remedy, from any working folder, having made nothing; the pins cover both packages' needs; the
Slurm job hands an early signal to its ranks and requeues itself exactly when they saved. The
cluster's commands (srun, scontrol) are stand-ins of a few lines; the agent and torchrun are the
real ones. Everything here is exact.
"""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "launch"
BASH = shutil.which("bash") or "/bin/bash"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*.sbatch")])


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder to be the whole PATH: what the checks use, but no compiler and no Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("df", "awk", "sed", "grep", "cat", "tail"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def run_check(call: str, tools: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs one function of setup_env.sh from a foreign folder with PATH = tools."""
    return subprocess.run(
        [BASH, "-c", f'source "{LAUNCH}/setup_env.sh"; {call}'],
        env={"PATH": str(tools), "HOME": str(tools), **env},
        cwd=tools,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("[setup] error: ")
    for part in parts:
        assert part in result.stderr


def pretend_python(path: Path, *, version: str = "3.11", broken_import: str = "") -> Path:
    """This interpreter, which says it is another version or fails on code that names a module."""
    return executable(
        path,
        f'#!{BASH}\ncase "$2" in\n'
        f'*version_info*) echo "{version}"; exit 0;;\n'
        f'*{broken_import or "no-such-code"}*) exit 1;;\nesac\nexec "{sys.executable}" "$@"\n',
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_on_errors(script: Path) -> None:
    result = subprocess.run([BASH, "-n", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "set -euo pipefail" in script.read_text()


def test_sourcing_makes_nothing(tools: Path) -> None:
    result = run_check('echo "$PROJECT_ROOT"', tools)
    assert result.stdout.strip() == str(ROOT)
    assert result.stderr == ""


# ---- the checks --------------------------------------------------------------------------------


def test_no_compiler(tools: Path) -> None:
    assert_refused(run_check("check_compiler", tools), "C++ compiler", "apt-get install g++")


def test_a_compiler_of_another_name_is_exported(tools: Path) -> None:
    executable(tools / "clang++", f"#!{BASH}\n")
    assert run_check('check_compiler; echo "$CXX"', tools).stdout == "clang++\n"


def test_no_python(tools: Path) -> None:
    assert_refused(run_check("find_python", tools), "3.11 or 3.12", "found none:", "apt-get")


def test_python_of_another_version(tools: Path) -> None:
    pretend_python(tools / "python3", version="3.9")
    assert_refused(run_check("find_python", tools), "python3 is 3.9", "apt-get")


def test_a_shim_that_does_not_run_is_skipped(tools: Path) -> None:
    executable(tools / "python3", f"#!{BASH}\necho 'pyenv: command not found' >&2; exit 127\n")
    pretend_python(tools / "python3.12", version="3.13")
    pretend_python(tools / "python3.11")
    result = run_check('find_python; echo "$BASE_PYTHON"', tools)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == sys._base_executable  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("version", "message"), [(None, "does not run"), ("3.10", "is 3.10"), ("3.13", "is 3.13")]
)
def test_the_python_asked_for_is_not_replaced(
    tools: Path, version: str | None, message: str
) -> None:
    pretend_python(tools / "python3")
    if version is not None:
        pretend_python(tools / "mine", version=version)
    result = run_check("find_python", tools, PYTHON=str(tools / "mine"))
    assert_refused(result, "PYTHON=", message)


def test_no_venv_module(tools: Path) -> None:
    python = pretend_python(tools / "python3", broken_import="ensurepip")
    result = run_check(f"check_venv_module {python}", tools)
    assert_refused(result, "no venv module", "apt-get install python3-venv (or python3.11-venv)")


def test_no_headers(tools: Path) -> None:
    python = pretend_python(tools / "python3", broken_import="Python.h")
    result = run_check(f"check_headers {python}", tools)
    assert_refused(result, "Python.h", "apt-get install python3-dev (or python3.11-dev)")


def test_too_little_disk(tools: Path) -> None:
    result = run_check("check_disk", tools, SAFEREG_MIN_DISK_GB="99999999")
    assert_refused(result, "expected 99999999 GB free", str(ROOT), "SAFEREG_MIN_DISK_GB")
    assert run_check("check_disk", tools, SAFEREG_MIN_DISK_GB="0").returncode == 0


@pytest.mark.parametrize(
    ("folder", "message"), [("copy", "C++ compiler"), ("a copy", "without spaces")]
)
@pytest.mark.parametrize("script", ["setup_env.sh", "test.sh", "demo.sh"])
def test_whole_scripts_fail_early(
    tools: Path, tmp_path: Path, script: str, folder: str, message: str
) -> None:
    """In a copy of the project, from a foreign folder: one line, and no .venv."""
    copy = tmp_path / folder / "launch"
    shutil.copytree(LAUNCH, copy)
    result = subprocess.run(
        [BASH, copy / script],
        env={"PATH": str(tools), "HOME": str(tools)},
        cwd=tools,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert_refused(result, message)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["launch"]


@pytest.fixture
def environment(tools: Path, tmp_path: Path) -> str:
    """Shell code that makes this interpreter's pip that of an environment; its log is empty."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    return f'VENV="{tmp_path / "venv"}"; '


def test_pip_is_silent_and_its_output_kept(environment: str, tools: Path, tmp_path: Path) -> None:
    result = run_check(f'{environment} quietly "no reason" "$VENV/bin/python" -m pip -V', tools)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert "pip" in (tmp_path / "venv" / "setup.log").read_text()


def test_what_pip_said_is_shown_where_it_fails(environment: str, tools: Path) -> None:
    """A package that no index has: the end of pip's own output, then one line with the remedy."""
    call = 'quietly "installing it failed: check the index" pip_install --no-index no-such-thing'
    # The environment here is a link to this interpreter, which a distribution may call its own.
    own = {"PIP_BREAK_SYSTEM_PACKAGES": "1"}
    result = run_check(f"{environment} {call}; echo went on", tools, **own)
    assert (result.returncode, result.stdout) == (2, "")
    *tail, last = result.stderr.splitlines()
    assert last == "[setup] error: installing it failed: check the index"
    assert tail[0].startswith("[setup] the end of ")
    assert any("No matching distribution found for no-such-thing" in line for line in tail)


def test_the_end_of_the_log_is_fifteen_lines(environment: str, tools: Path) -> None:
    call = "talk() { for i in {1..40}; do echo line $i; done; return 1; }; quietly why talk"
    lines = run_check(f"{environment} {call}", tools).stderr.splitlines()
    assert lines[1:-1] == [f"    line {n}" for n in range(26, 41)]


def test_kernels_alone_need_a_python_only(tools: Path) -> None:
    """test_kernels.sh compiles nothing: it stops where there is no Python, having made nothing."""
    result = subprocess.run(
        [BASH, LAUNCH / "test_kernels.sh"],
        env={"PATH": str(tools), "HOME": str(tools), "TMPDIR": str(tools)},
        cwd=tools,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert_refused(result, "3.11 or 3.12", "found none:", "apt-get")
    assert not [path for path in tools.iterdir() if not path.is_symlink()]


def test_the_stamp_covers_both_packages(tools: Path, tmp_path: Path) -> None:
    """An environment is out of date when either package's metadata changes."""
    copy = tmp_path / "project"
    for name in ("launch", "setup.py", "pyproject.toml", "kernels/pyproject.toml"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        copying = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copying(ROOT / name, copy / name)
    executable(copy / ".venv" / "bin" / "python", f"#!{BASH}\necho 3.11\n")
    for name in ("sha256sum", "cut"):
        (tools / name).symlink_to(str(shutil.which(name)))
    call = f'source "{copy}/launch/setup_env.sh"; stamp_value'
    stamps = [run_check(call, tools).stdout]
    covered = ("setup.py", "pyproject.toml", "kernels/pyproject.toml")
    for name in (*covered, "launch/constraints.txt", "launch/hashes.txt"):
        with (copy / name).open("a") as file:
            file.write("# changed\n")
        stamps.append(run_check(call, tools).stdout)
    assert all(re.fullmatch(r"[0-9a-f]{64}\n", stamp) for stamp in stamps), stamps
    assert len(set(stamps)) == 6


def test_accelerator_without_a_gpu(tools: Path) -> None:
    call = 'choose_accelerator; echo "${DS_ACCELERATOR:-unset}"'
    has_device = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if not has_device and not Path("/dev/kfd").exists():
        assert run_check(call, tools).stdout == "cpu\n"
    assert run_check(call, tools, DS_ACCELERATOR="cuda").stdout == "cuda\n"


# ---- files -------------------------------------------------------------------------------------


def test_pins_cover_every_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    """But those of the documentation and lm-eval, which environments of their own have."""
    lines = (LAUNCH / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values()), "no local tags"
    project: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **said: project.update(said))
    runpy.run_path(str(ROOT / "setup.py"))
    extras = {k: v for k, v in project["extras_require"].items() if k not in ("docs", "lm-eval")}
    kernels = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]
    needs = [*kernels["dependencies"], *kernels["optional-dependencies"]["test"]]
    needs += [*project["install_requires"], *(need for extra in extras.values() for need in extra)]
    wanted = {re.split(r"[^\w-]", need)[0] for need in needs} - {"safereg-kernels", "safereg-dist"}
    assert {"torch", "deepspeed", "pytest", "pyyaml"} <= wanted
    assert wanted <= set(pins) | {"triton"}
    assert {"pip", "setuptools", "wheel", "ninja", "packaging"} <= set(pins)
    assert not {"triton", "safereg_dist"} & set(pins)


def test_every_pin_but_torch_has_hashes() -> None:
    """hashes.txt is that of constraints.txt as it stands, and names no index."""
    pins = re.findall(r"^([\w.-]+==\S+)", (LAUNCH / "constraints.txt").read_text(), re.MULTILINE)
    text = (LAUNCH / "hashes.txt").read_text()
    blocks = re.findall(
        r"^([\w.-]+==\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE
    )

    def plain(pin: str) -> str:
        return re.sub(r"[-_.]+(?=.*==)", "-", pin.lower())

    assert {plain(pin) for pin, _ in blocks} == {
        plain(p) for p in pins if not p.startswith("torch==")
    }
    assert text.count("==") == len(blocks)
    assert "://" not in text


def test_hostfile_lines() -> None:
    lines = (LAUNCH / "hostfile.example").read_text().splitlines()
    hosts = [line for line in lines if line and not line.startswith("#")]
    assert len(hosts) == 2
    assert all(re.fullmatch(r"\S+ slots=\d+", line) for line in hosts)


def test_trainjob_names_fit_together() -> None:
    runtime, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
    assert runtime["apiVersion"] == job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"] == "TrainingRuntime"
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert "launch/finetune.py" in job["spec"]["trainer"]["command"]
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    assert node["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = node["spec"]["template"]["spec"]
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert set(mounts) == set(volumes)
    shared = next(name for name, path in mounts.items() if path == "/dev/shm")
    assert volumes[shared]["emptyDir"]["medium"] == "Memory"


def test_sbatch_options() -> None:
    text = (LAUNCH / "slurm" / "train.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert options["signal"] == "B:USR1@600"
    assert options["ntasks-per-node"] == "1"
    assert options["open-mode"] == "append"
    assert "requeue" in options
    # Slurm stops reading options at the first command.
    assert text.index("set -euo") > text.rindex("#SBATCH --")


# ---- a job -------------------------------------------------------------------------------------

RANK = """
import os, signal, sys, time
from pathlib import Path
rank, case = os.environ["RANK"], sys.argv[1]
def save(signum, frame):
    Path(f"saved.{rank}").touch()
    while not all(Path(f"saved.{r}").exists() for r in range(2)):
        time.sleep(0.01)
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
Path(f"ready.{rank}").touch()
if case == "fail" and rank == "1":
    sys.exit(3)
if case == "finish":
    sys.exit(0)
time.sleep(60)
"""
SRUN = """
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 SLURM_NNODES=1 "$@" &
task=$!
trap 'kill -USR1 "$task"' USR1
while true; do
    status=0; wait "$task" || status=$?
    ((status == 138)) || exit "$status"
done
"""
SCONTROL = """
if [[ "$1" == show ]]; then echo 127.0.0.1; else echo "$@" >>scontrol.log; fi
"""


@pytest.mark.parametrize(
    ("case", "status", "is_requeued"), [("save", 0, True), ("fail", 3, False), ("finish", 0, False)]
)
def test_a_job_saves_and_requeues_itself(
    tmp_path: Path, case: str, status: int, is_requeued: bool
) -> None:
    executable(tmp_path / ".venv/bin/python", f'#!{BASH}\nexec "{sys.executable}" "$@"\n')
    executable(tmp_path / "bin/srun", f"#!{BASH}\n{SRUN}")
    executable(tmp_path / "bin/scontrol", f"#!{BASH}\n{SCONTROL}")
    executable(tmp_path / "launch/finetune.py", RANK)
    (tmp_path / "launch/slurm").symlink_to(LAUNCH / "slurm")
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node",
        "SLURM_GPUS_ON_NODE": "2",
        "OMP_NUM_THREADS": "1",
    }
    job = subprocess.Popen(
        [BASH, tmp_path / "launch/slurm/train.sbatch", case],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        if case == "save":
            deadline = time.monotonic() + 60
            while len(list(tmp_path.glob("ready.*"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == status, output
    log = tmp_path / "scontrol.log"
    assert log.exists() == is_requeued, output
    if is_requeued:
        assert log.read_text() == f"requeue {os.getpid()}\n"
    assert not list(tmp_path.glob(".requeue-*"))
