"""Claimed: what a user can mend ends `safereg` with status 2 and one line on standard error, with
what was expected, what came, where, and what to do; nothing is left half-written, and a dry run
writes nothing at all.

The command runs in this process with the single-process engine on tiny real models. Progress bars
also go to standard error and are left out of the count. Everything here is exact.
"""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.builders import (
    PLAIN_TEMPLATE,
    TEMPLATE,
    random_rows,
    save_model,
    tiny_model,
    word_tokenizer,
    write_jsonl,
)
from support.said import without_asides

from safereg_dist.cli import main
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models: policy, reference, and ones that do not fit them."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "policy", tiny_model(seed=0))
    save_model(root / "reference", tiny_model(seed=1))
    save_model(root / "larger", tiny_model(seed=1, vocab=128))
    spoilt = tiny_model(seed=0)
    with torch.no_grad():
        spoilt.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")
    save_model(root / "not-finite", spoilt)
    save_model(root / "renumbered", tiny_model(seed=1))
    spec = json.loads((root / "renumbered" / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["w1"], vocab["w2"] = vocab["w2"], vocab["w1"]
    (root / "renumbered" / "tokenizer.json").write_text(json.dumps(spec))
    save_model(root / "wide", tiny_model(seed=1, hidden_size=64))
    save_model(root / "small", tiny_model(seed=1, vocab=50))

    def copy(name):
        shutil.copytree(root / "policy", root / name)
        return root / name

    (copy("no-weights") / "model.safetensors").unlink()
    (copy("no-config") / "config.json").unlink()
    (copy("torn") / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    bare = copy("no-tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    lost = copy("lost") / "model.safetensors"
    tensors = load_file(lost)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lost, metadata={"format": "pt"})
    misshapen = copy("misshapen") / "model.safetensors"
    tensors = load_file(misshapen)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, misshapen, metadata={"format": "pt"})
    (copy("no-template") / "chat_template.jinja").unlink()
    return root


@pytest.fixture
def world(models, tmp_path):
    """A run that works: its folder, with `run.yaml`; models are links to the shared ones."""
    write_jsonl(tmp_path / "train.jsonl", random_rows(6))
    config = {
        "model": str(models / "policy"),
        "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 64},
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "train": {"steps": 2, "precision": "fp32", "micro_batch_size": 2},
        "engine": {"name": "single"},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def safereg(world, capfd):
    """Runs `safereg train` on the world; the refusal's line, after the general checks."""

    def run(*arguments, config="run.yaml", status=2):
        before = tree(world)
        capfd.readouterr()
        assert main(["train", str(world / config), *map(str, arguments)]) == status
        printed = capfd.readouterr()
        said = without_asides(printed.err)
        if status:
            assert tree(world) == before
            return refusal(said)
        assert said == []
        return printed.out

    return run


def refusal(said):
    assert len(said) == 1, said
    assert said[0].startswith("safereg: ")
    assert len(said[0]) < 700
    return said[0]


def tree(folder):
    """Every file below a folder with its content."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if not p.is_symlink()
    }


def edit_rows(world, *rows):
    with (world / "train.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_probe(folder, model, **changes):
    values = {
        "layer": 2,
        "pooling": "last_prompt_token",
        "mean": torch.zeros(32),
        "scale": torch.ones(32),
        "weight": torch.ones(32),
        "bias": 0.0,
        "threshold": 0.5,
        "fingerprint": model_fingerprint(model),
    }
    Probe(**{**values, **changes}).save(folder)
    return folder


# The configuration


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stpes=3", ["train.stpes", "did you mean 'steps'"]),
        ("outputdir=x", ["outputdir", "did you mean 'output_dir'"]),
        ("train.steps=many", ["train.steps", "'many'", "int"]),
        ("train.steps=0", ["train.steps", "at least 1", "0"]),
        ("train.epochs=2", ["train.steps", "train.epochs", "keep one"]),
        ("regularizer.ceiling=2", ["regularizer.ceiling", "objective=additive"]),
        ("regularizer.ema=0.5", ["regularizer.ema", "granularity=batch"]),
        ("risk.estimator=probe", ["risk.path", "safereg probe fit"]),
        ("train.eval_every=1", ["data.validation"]),
        ("train.steps", ["key=value"]),
    ],
)
def test_configuration(safereg, override, says):
    line = safereg(override)
    for text in says:
        assert text in line


def test_missing_configuration(safereg, world):
    assert "none.yaml" in safereg(config="none.yaml")
    (world / "torn.yaml").write_text("model: [\n")
    assert "not valid YAML" in safereg(config="torn.yaml")


# Files that are not there


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train={}/none.jsonl", ["none.jsonl", "check the path"]),
        ("data.anchor={}/none.jsonl", ["none.jsonl", "check the path"]),
        ("data.validation={}/none.jsonl", ["none.jsonl", "check the path"]),
        ("data.train=nobody/no-data-set", ["nobody/no-data-set", "check the path"]),
        ("data.chat_template={}/none.jinja", ["data.chat_template", "none.jinja"]),
        ("model={}/none", ["none", "check the path"]),
        ("model=nobody/no-model", ["nobody/no-model", "check the path"]),
        ("reference.model={}/none", ["none", "check the path"]),
    ],
)
def test_missing_files(safereg, world, override, says):
    line = safereg(override.format(world))
    for text in says:
        assert text in line


def test_missing_probe(safereg, world):
    line = safereg("risk.estimator=probe", f"risk.path={world}/none")
    assert "safereg probe fit" in line
    assert f"{world}/none" in line


# Rows


GOOD = {"prompt": "w1", "response": "w2", "risk": 0.5}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "w1"}, ["messages", "prompt", "['text']"]),
        ({**GOOD, "risk": 1.5}, ["risk", "[0, 1]", "1.5"]),
        ({**GOOD, "risk": "high"}, ["risk", "[0, 1]", "'high'"]),
        ({"messages": [{"role": "user", "content": "w1"}]}, ["no assistant turn", "add one"]),
        ({"messages": []}, ["messages", "non-empty"]),
        ({**GOOD, "id": "row-0000"}, ["'row-0000'", "twice"]),
    ],
)
def test_rows(safereg, world, row, says):
    edit_rows(world, GOOD, row)
    line = safereg()
    assert f"{world}/train.jsonl:8" in line
    for text in says:
        assert text in line


def test_a_row_without_risk(safereg, world):
    edit_rows(world, {"id": "bare", "prompt": "w1", "response": "w2"})
    line = safereg()
    assert "'bare'" in line
    assert "risk.estimator=column" in line


def test_long_rows(safereg, world):
    edit_rows(world, {"prompt": "w1", "response": "w2 " * 80, "risk": 0})
    line = safereg("data.overlong=error")
    assert f"{world}/train.jsonl:7" in line
    assert "data.max_length=64" in line
    assert "1 overlong, 1 dropped" in safereg("--dry-run", status=0)
    assert "1 overlong, 0 dropped" in safereg("--dry-run", "data.overlong=truncate", status=0)
    assert "max_length=3" in safereg("data.max_length=3")


# Models


@pytest.mark.parametrize(
    ("key", "name", "says"),
    [
        ("reference.model", "larger", ["vocabulary 128", "96", "same"]),
        ("reference.model", "renumbered", ["tokenizer", "numbers", "choose a reference"]),
        ("reference.model", "no-tokenizer", ["tokenizer", "no-tokenizer"]),
        ("model", "small", ["96 tokens", "50 embeddings"]),
        ("model", "no-weights", ["no-weights", "save_pretrained"]),
        ("model", "no-config", ["no-config"]),
        ("model", "no-tokenizer", ["tokenizer", "no-tokenizer"]),
        ("model", "no-template", ["chat template", "data.chat_template"]),
        ("model", "lost", ["no tensor", "model.layers.1.mlp.up_proj.weight"]),
        ("model", "misshapen", ["misshapen"]),
        ("model", "torn", ["torn"]),
        ("reference.model", "lost", ["no tensor", "lost"]),
        ("model", "not-finite", ["not finite", "model.layers.2.mlp.up_proj.weight"]),
        ("reference.model", "not-finite", ["not finite", "not-finite"]),
    ],
)
def test_models(safereg, models, key, name, says):
    line = safereg(f"{key}={models / name}")
    for text in says:
        assert text in line


def test_a_reference_that_fits(safereg, models):
    safereg(f"reference.model={models / 'reference'}", "--dry-run", status=0)
    safereg(f"reference.model={models / 'wide'}", "--dry-run", status=0)


def test_a_probe_of_another_model(safereg, world, models):
    probe = write_probe(world / "probe", tiny_model(seed=1))
    arguments = ("risk.estimator=probe", f"risk.path={probe}")
    for source in ("reference", "policy"):
        line = safereg(*arguments, f"risk.source={source}")
        assert "fitted on a model with fingerprint" in line
        assert "risk.force=true" in line
    safereg(*arguments, "risk.force=true", "--dry-run", status=0)
    # The reference of another folder is the one that counts.
    safereg(*arguments, f"reference.model={models / 'reference'}", "--dry-run", status=0)
    small = {name: torch.ones(16) for name in ("mean", "scale", "weight")}
    write_probe(world / "probe", tiny_model(seed=0), **small)
    for force in ("true", "false"):
        assert "16 features" in safereg(*arguments, f"risk.force={force}")
    write_probe(world / "probe", tiny_model(seed=0), layer=4)
    assert "layers 1 to 3" in safereg(*arguments)


def test_a_probe_of_another_template(safereg, world, models):
    """The tokens before an answer are the template's, and a probe reads their states."""
    own = hashlib.sha256(TEMPLATE.encode()).hexdigest()
    plain = hashlib.sha256(PLAIN_TEMPLATE.encode()).hexdigest()  # without the generation block
    for template_hash, status in ((own, 0), (plain, 0), ("0" * 64, 2)):
        meta = {"template_sha256": template_hash}
        probe = write_probe(world / "probe", tiny_model(seed=0), meta=meta)
        arguments = ("risk.estimator=probe", f"risk.path={probe}", "--dry-run")
        line = safereg(*arguments, status=status)
        assert ("another chat template" in line) == (status == 2)
    safereg(*arguments, "risk.force=true", status=0)


# The run folder


def test_the_folder_of_another_run(safereg, world):
    safereg(status=0)
    told = safereg("optimizer.lr=1e-3")
    assert "another configuration" in told
    assert "optimizer.lr was" in told
    assert ", is 0.001: to go on with it give" in told  # that key, and no other
    assert "another output_dir" in safereg("train.steps=3")
    assert "already complete" in safereg(status=0)
    assert "already complete" in safereg("train.save_every=1", status=0)


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint/step-00000001/state.json"])
def test_a_folder_that_is_no_run(safereg, world, name):
    path = world / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    line = safereg()
    assert str(world / "out") in line
    assert "config.yaml" in line
    assert "choose another" in line


def test_an_output_folder_that_is_a_file(safereg, world):
    (world / "out").write_text("mine")
    assert str(world / "out") in safereg()


def test_a_run_folder_with_a_torn_configuration(safereg, world):
    (world / "out").mkdir()
    for content in ("model: [\n", "", "modle: x\n"):
        (world / "out" / "config.yaml").write_text(content)
        assert str(world / "out") in safereg()


def test_an_empty_folder_serves(safereg, world):
    (world / "out").mkdir()
    safereg("train.steps=1", status=0)
    assert (world / "out" / "model" / "model.safetensors").is_file()


def test_a_dry_run_writes_nothing(safereg, world):
    before = tree(world)
    out = safereg("--dry-run", status=0)
    assert "2 steps of 2 rows" in out
    assert tree(world) == before
    assert not (world / "out").exists()
    assert "train.stpes" in safereg("--dry-run", "train.stpes=1")
    assert "check the path" in safereg("--dry-run", f"model={world}/none")
    assert "SAFEREG_NO_KEY" in safereg("--dry-run", "signing={hmac_env: SAFEREG_NO_KEY}")


def test_a_mended_configuration_can_go_on(safereg, world):
    """A refused run has not claimed its folder: the same command, mended, works."""
    safereg(f"model={world}/none")
    safereg("train.steps=1", status=0)


def test_a_dry_run_beside_another_run_says_so(safereg, world):
    safereg("train.steps=1", status=0)
    assert "another configuration" in safereg("--dry-run", "train.steps=2")


# The command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["train", "c.yaml", "--dryrun"],
        ["probe"],
        ["probe", "fit", "--model", "m"],
        ["probe", "fit", "--model", "m", "--data", "d", "--out", "o", "--recall", "much"],
        ["probe", "fit", "--model", "m", "--data", "d", "--out", "o", "--batch-size", "0"],
        ["probe", "fit", "--model", "m", "--data", "d", "--out", "o", "--background", "-1"],
        ["probe", "fit", "--model", "m", "--data", "d", "--out", "o", "--seed", "-1"],
        ["anchor", "build", "--model", "m", "--prompts", "p", "--out", "o", "--batch-size", "0"],
        "anchor build --model m --prompts p --out o --max-new-tokens 0".split(),
        ["eval", "--model", "m", "--prompts", "p", "--out", "o", "--batch-size", "x"],
        ["ledger"],
        ["ledger", "verify"],
        ["report"],
    ],
)
def test_arguments(arguments, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capfd.readouterr().err
    assert "usage: safereg" in said
    assert "error: " in said


def test_the_other_verbs(models, tmp_path, capfd):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "w1", "label": "harmful"}] * 3)
    model, out = str(models / "policy"), str(tmp_path / "out")
    missing = str(tmp_path / "none")
    fit = ["probe", "fit", "--out", out]
    judge = ["eval", "--judge", "no"]
    for arguments, says in (
        ([*fit, "--model", missing, "--data", str(prompts)], "none"),
        ([*fit, "--model", model, "--data", missing], "check the path"),
        ([*fit, "--model", model, "--data", str(prompts)], "both kinds"),
        ([*fit, "--model", model, "--data", str(prompts), "--layers", "one"], "--layers"),
        ([*fit, "--model", model, "--data", str(prompts), "--recall", "1"], "--recall"),
        (["anchor", "build", "--model", missing, "--prompts", str(prompts), "--out", out], "none"),
        (["anchor", "build", "--model", model, "--prompts", missing, "--out", out], "none"),
        (["eval", "--model", missing, "--prompts", str(prompts), "--out", out], "none"),
        (["eval", "--model", model, "--prompts", missing, "--out", out], "none"),
        ([*judge, "--model", model, "--prompts", str(prompts), "--out", out], "no"),
        (["report", missing], "none"),
        (["ledger", "verify", missing], "none"),
    ):
        assert main(arguments) == 2, arguments
        assert says in refusal(without_asides(capfd.readouterr().err))
        assert not Path(out).exists()


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small file system: a function of its size."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"mounting a small disk is not permitted: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def on_disk(world, capfd, disk, *arguments):
    capfd.readouterr()
    status = main(
        [
            "train",
            str(world / "run.yaml"),
            f"output_dir={disk / 'run'}",
            "train.steps=6",
            "train.save_every=1",
            *arguments,
        ]
    )
    return status, without_asides(capfd.readouterr().err)


def test_a_disk_too_small_for_a_checkpoint(world, capfd, small_disk):
    disk = small_disk("3m")
    status, said = on_disk(world, capfd, disk)
    assert status == 2
    assert "free" in refusal(said)
    assert str(disk) in refusal(said)
    assert not list((disk / "run").glob("checkpoint/*"))
    assert not list(disk.rglob("*partial*"))


def test_a_disk_that_fills_up(world, capfd, small_disk):
    """A later checkpoint does not fit; earlier ones stay, and the run goes on after a tidy-up."""
    disk = small_disk("70m")
    (disk / "ballast").write_bytes(b"0" * (5 << 20))
    status, said = on_disk(world, capfd, disk, "train.keep_checkpoints=9")
    assert status == 2
    assert str(disk) in refusal(said)
    kept = sorted(p.name for p in (disk / "run" / "checkpoint").iterdir())
    assert kept
    assert kept == [f"step-{i:08d}" for i in range(1, len(kept) + 1)]
    assert not list(disk.rglob("*partial*"))
    assert not (disk / "run" / "summary.json").exists()
    (disk / "ballast").unlink()
    status, said = on_disk(world, capfd, disk, "train.keep_checkpoints=1")
    assert (status, said) == (0, [])
    assert json.loads((disk / "run" / "summary.json").read_text())["status"] == "complete"


def test_a_disk_too_small_for_the_model(world, capfd, small_disk):
    disk = small_disk("140k")
    status, said = on_disk(world, capfd, disk, "train.save_every=0")
    assert status == 2
    assert str(disk) in refusal(said)
    assert not list(disk.rglob("*partial*"))
    assert not (disk / "run" / "model").exists()
    assert not (disk / "run" / "summary.json").exists()


def test_a_disk_without_any_room(world, capfd, small_disk):
    disk = small_disk("16k")
    (disk / "ballast").write_bytes(b"0" * (8 << 10))
    status, said = on_disk(world, capfd, disk, "train.save_every=0")
    assert status == 2
    assert str(disk) in refusal(said)
    assert not list(disk.rglob("*partial*"))


def test_the_shared_models_are_untouched(models):
    assert word_tokenizer().chat_template == TEMPLATE
    assert not list(models.rglob("*partial*"))


def test_judges_and_decisions_are_read_before_a_model_is_loaded(world, models, safereg):
    bad_model = f"model={models / 'no-weights'}"
    judge = 'risk.critic={endpoint: "http://127.0.0.1:9/v1", model: m, format: lama_guard}'
    line = safereg(bad_model, "risk.estimator=critic", judge)
    assert "risk.critic.format" in line
    assert "did you mean 'llama_guard'" in line
    write_jsonl(world / "override.jsonl", [{"id": "x", "action": "alow", "reason": "seen"}])
    assert "allow or hold" in safereg(bad_model, f"risk.override={world / 'override.jsonl'}")


def test_a_folder_of_two_probes_beside_a_part_of_its_name(world, safereg):
    for position in ("prompt", "response"):
        write_probe(
            world / "both" / position,
            tiny_model(seed=0),
            position=position,
            pooling=f"last_{position}_token",
        )
    parts = [
        {"category": "a", "path": str(world / "both")},
        {"category": "a-prompt", "path": str(world / "both" / "prompt")},
    ]
    line = safereg("risk.estimator=max", f"risk.parts={json.dumps(parts)}")
    assert "no category occurs twice" in line
