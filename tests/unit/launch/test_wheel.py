"""Claimed: the wheel and the source distribution hold the package alone; the wheel has the same
bytes whenever it is built; in an environment that has what its base needs and nothing else the
light verbs run from any folder, and others say in one line which extra is missing.

Exact. The environment is a real one, with the wheels installed by pip and links to the installed
dependencies of the base; deepspeed, accelerate, datasets and the like are not in it.
"""

import json
import os
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.reports import metrics, write_run
from support.wheels import ROOT, build, closure, copied, environment, needs

from safereg_dist import __version__
from safereg_dist.models.extras import EXTRAS
from safereg_dist.run.ledger import RankLedger, merge_ledgers
from safereg_dist.types import LedgerRow

pytestmark = pytest.mark.slow
EPOCH = 1_700_000_000
LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
NAMES_OF_MODULES = {
    "scikit-learn": "sklearn",
    "megatron-core": "megatron",
    "mlflow-skinny": "mlflow",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return copied(tmp_path_factory.mktemp("wheel") / "project")


@pytest.fixture(scope="module")
def wheel(project) -> Path:
    return build(project, project.parent / "out", epoch=EPOCH)


@pytest.fixture(scope="module")
def sdist(project) -> Path:
    return build(project, project.parent / "out", "sdist")


@pytest.fixture(scope="module")
def python(project, wheel) -> Path:
    """Of an environment with the base alone."""
    kernels = build(project / "kernels", project.parent / "out", epoch=EPOCH)
    base = [text for text in [*needs(wheel), *needs(kernels)] if "extra ==" not in text]
    seen = closure(base)
    assert {"torch", "transformers", "pydantic"} <= set(seen)
    assert not {"deepspeed", "accelerate", "datasets", "scipy", "peft", "trl"} & set(seen)
    return environment(project.parent / "venv", seen, kernels, wheel)


@pytest.fixture(scope="module")
def trainer(project, wheel) -> Path:
    """The Python of an environment with the extra `train`."""
    kernels = build(project / "kernels", project.parent / "out", epoch=EPOCH)
    named = [text for text in needs(wheel) if "extra ==" not in text or "train" in text]
    wanted = [text.partition(";")[0] for text in named] + needs(kernels)[:2]
    return environment(project.parent / "train", closure(wanted), kernels, wheel)


@pytest.fixture
def safereg(python, tmp_path):
    """Runs the installed command in a folder that is nobody's."""

    def run(*words: object, status: int = 0) -> str:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SAFEREG_"))}
        command = [python.with_name("safereg"), *map(str, words)]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return run


def sources() -> set[str]:
    """Every file of the package that a distribution must have."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "safereg_dist"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"safereg_dist-{__version__}.dist-info/"
    packed = {name for name in names if not name.startswith(info)}
    assert packed == sources()
    assert {"safereg_dist/py.typed", "safereg_dist/demo/real/prompts/pairs.jsonl"} <= packed
    assert f"{info}licenses/LICENSE" in names
    assert not [name for name in names if "kernels" in name]
    assert "safereg-kernels>=0.2" in needs(wheel)


def test_the_source_distribution_is_the_package_alone(sdist):
    top = f"safereg_dist-{__version__}/"
    with tarfile.open(sdist) as archive:
        names = {m.name.removeprefix(top) for m in archive.getmembers() if m.isfile()}
    own = {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    assert sources() | own <= names
    left = names - sources() - own
    assert all(re.match(r"PKG-INFO|setup\.cfg|safereg_dist\.egg-info/", name) for name in left)


def test_a_wheel_has_the_same_bytes_whenever_and_from_whatever_it_is_built(wheel, sdist, tmp_path):
    again = build(copied(tmp_path / "project"), tmp_path / "out", epoch=EPOCH)
    assert again.read_bytes() == wheel.read_bytes()
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)  # built here: nobody else wrote it
    project = tmp_path / f"safereg_dist-{__version__}"
    unpacked = build(project, tmp_path / "unpacked", epoch=EPOCH)
    assert unpacked.read_bytes() == wheel.read_bytes()


def test_every_extra_brings_what_the_command_says(wheel):
    brought: dict[str, set[str]] = {}
    for text in needs(wheel):
        if found := re.match(r"([\w.-]+)[^;]*; extra == ['\"]([\w-]+)", text):
            name, extra = found.groups()
            module = NAMES_OF_MODULES.get(name, name).replace("-", "_")
            brought.setdefault(extra, set()).add(module)
    assert {"train", "trl", "peft", "megatron", "real", "sign", "eval", "dev"} <= set(brought)
    for extra, modules in EXTRAS.items():
        assert set(modules) <= brought[extra], extra


def test_versions(safereg):
    told = dict(line.split() for line in safereg("--version").splitlines())
    assert told["safereg"] == __version__
    assert told["deepspeed"] == told["accelerate"] == told["peft"] == "-"
    assert re.match(r"\d+\.\d+", told["torch"])
    assert re.match(r"\d+\.\d+", told["safereg-kernels"])


def test_plan(safereg, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    words = ("plan", "--model-config", "config.json", "--world-size", 8, "--json", "plan.json")
    assert "GiB" in safereg(*words)
    assert json.loads((tmp_path / "plan.json").read_text())["arms"]["routed"]


def test_a_ledger_and_a_report(safereg, tmp_path):
    folder = write_run(tmp_path / "run", metrics(coefficient=1.0, active=2, seconds=0.5))
    ledger = RankLedger(folder, 0)
    risk = {"risk": 0.5, "estimator": "probe:reference", "kl_coef": 0.0, "divergence": None}
    for step in range(2):
        ledger.append(LedgerRow(step=step, micro_batch=0, rank=0, row=0, id=f"r{step}", **risk))
    ledger.close()
    head = merge_ledgers(folder, 1)
    summary = {"ledger": {"head": head.head, "rows": head.rows}, "steps": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert f"2 rows, head {head.head}" in safereg("ledger", "verify", "run")
    safereg("report", "run")
    assert "risky_fraction" not in safereg("watch", "nowhere", "--once")
    assert "loss" in safereg("watch", "run", "--once")
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    path = folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b"r1", b"r2"))
    safereg("ledger", "verify", "run", status=2)


def test_a_configuration(safereg, tmp_path):
    safereg("config", "init", "--model", "m", "--data", "hub:owner/rows", "--out", "run.yaml")
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["model"] == "m"
    assert json.loads(safereg("config", "schema"))["properties"]["model"]


def test_a_judge_that_is_down(safereg, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    words = ("score", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--format", "rubric")
    told = safereg(*words, "--data", "rows.jsonl", "--out", "scored.jsonl", status=2)
    assert "expected a judge at http://127.0.0.1:9/v1" in told


def test_the_doctor_of_this_host(safereg, tmp_path):
    write_config(tmp_path)
    told = safereg("doctor", "run.yaml", status=1)
    assert "FAIL  packages are there" in told
    assert '-> there: pip install "safereg-dist[train]"' in told
    assert "ok    inputs are there" in told


@pytest.mark.parametrize("words", [("train", "--dry-run"), ("audit",), ("launch", "--nproc", 2)])
def test_what_an_extra_brings_is_named(safereg, tmp_path, words):
    write_config(tmp_path)
    told = safereg(words[0], "run.yaml", *words[1:], status=2)
    says_what_it_does = words[0] in ("audit", "train")
    assert told.count("\n") == 1 + says_what_it_does
    assert 'pip install "safereg-dist[train]"' in told


def test_the_demo_trains_on_two_ranks_from_an_installed_wheel(trainer, tmp_path):
    """Its own configuration and launcher, on a tiny model in the place of its world."""
    save_model(tmp_path / "model", tiny_model(seed=0))
    write_jsonl(tmp_path / "rows.jsonl", random_rows(16))
    changes = ["model=model", "data.train=rows.jsonl", "data.anchor=null", "risk.path=null"]
    changes += ["risk.estimator=column", "risk.max_held_back=1", "train.steps=2"]
    changes += ["train.micro_batch_size=2", "output_dir=run"]
    code = (
        "import sys; from safereg_dist.demo import stages, toy;"
        "assert 'site-packages' in str(toy.CONFIG); stages.launch(2, toy.CONFIG, *sys.argv[1:])"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [trainer, "-c", code, *changes],
        cwd=tmp_path,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deepspeed on 2 ranks" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "complete"


def write_config(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "tokenizer.json").touch()
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "risk": 0}\n')
    (folder / "run.yaml").write_text(
        "model: model\ndata: {train: rows.jsonl}\nrisk: {estimator: column}\n"
    )
