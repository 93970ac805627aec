"""Claimed: the Dockerfile copies what its steps read, installs what set-up asks for and puts the
command on the PATH; the hooks of a commit are the checks of the CI, with its versions.

Exact. No image is built: files are copied as Docker would, each step's shell is parsed, and the
set-up runs there up to what a fresh machine lacks.
"""

import fnmatch
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support.wheels import ROOT

DOCKERFILE = ROOT / "launch" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(name, words) of each instruction, continuation lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def words_of(name: str) -> list[str]:
    return [words for each, words in instructions() if each == name]


def is_ignored(name: str) -> bool:
    """What .dockerignore says of a path: the last pattern that fits it or a folder above it."""
    ignored = False
    parts = Path(name).parts
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        fits = [
            path
            for path in above
            if fnmatch.fnmatch(path.rpartition("/")[2] if "**/" in line else path, pattern)
        ]
        if fits:
            ignored = not line.startswith("!")
    return ignored


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """The project as `COPY . .` leaves it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = tmp_path_factory.mktemp("image")
    for name in listed.stdout.splitlines():
        if not is_ignored(name) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def test_instructions_are_known_and_name_what_is_declared():
    known = {"ARG", "FROM", "SHELL", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions()} == known
    declared = {words.partition("=")[0] for words in words_of("ARG")} | {"PATH"}
    used = {name for _, words in instructions() for name in re.findall(r"\$\{(\w+)\}", words)}
    assert used == declared
    assert words_of("COPY") == [". ."]


def test_each_step_is_shell(image):
    for words in words_of("RUN"):
        subprocess.run(["bash", "-n", "-c", words], check=True)
        for name in re.findall(r"bash (\S+\.sh)", words):
            subprocess.run(["bash", "-n", image / name], check=True)


def test_the_copy_holds_what_is_installed_and_not_more(image):
    tops = {path.name for path in image.iterdir()}
    assert tops == {
        *("LICENSE", "README.md", "MANIFEST.in", "pyproject.toml", "setup.py"),
        *("kernels", "launch", "safereg_dist"),
    }
    assert not list(image.glob("**/test_*.py"))
    for name in ("launch/hashes.txt", "kernels/pyproject.toml", "safereg_dist/py.typed"):
        assert (image / name).is_file()


def test_packages_are_those_that_set_up_asks_for():
    """The remedies of its checks, on the distribution that the image begins from."""
    (install,) = [words for words in words_of("RUN") if "apt-get install" in words]
    asked = re.findall(r"apt-get install ([\w+ -]+)", (ROOT / "launch/setup_env.sh").read_text())
    wanted = {name for text in asked for name in text.split()}
    assert {"g++", "python3-venv", "python3-dev"} <= wanted
    assert wanted <= set(install.split())


def test_set_up_runs_in_the_copy(image, tmp_path):
    """To its first need of a fresh machine: a compiler, which an empty PATH does not have."""
    (step,) = [words for words in words_of("RUN") if "setup_env.sh" in words]
    done = subprocess.run(
        ["/bin/bash", "-c", step.replace("bash ", "/bin/bash ")],
        cwd=image,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "TORCH_INDEX": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no C++ compiler" in done.stderr


def test_the_command_is_where_set_up_puts_it():
    (path,) = [words for words in words_of("ENV") if "PATH=" in words]
    assert f"PATH={words_of('WORKDIR')[0]}/.venv/bin:" in path
    assert words_of("ENTRYPOINT") == ['["safereg"]']


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_the_linter_has_nothing_to_say():
    subprocess.run(["hadolint", DOCKERFILE], check=True)


def test_hooks_are_the_checks_of_the_ci():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    checks = (ROOT / ".ci" / "run").read_text()
    for name, command in {
        "ruff": "ruff check",
        "ruff-format": "ruff format",
        "pyright": "pyright --pythonpath .venv/bin/python",
    }.items():
        assert command in hooks[name]["entry"]
        assert f"\n{command}" in checks
    pins = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    for name in ("ruff", "ruff-format"):
        assert hooks[name]["additional_dependencies"][0] in pins
    shell = hooks["shell"]["entry"]
    bad = "if then\n"
    for text, status in (("true\n", 0), (bad, 1)):
        done = subprocess.run(
            ["bash", "-c", f"{shell} /dev/stdin"],
            input=text,
            text=True,
            capture_output=True,
            env=os.environ,
        )
        assert done.returncode == status
