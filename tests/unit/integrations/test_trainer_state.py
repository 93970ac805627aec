"""Claimed: a Trainer's run goes on from a checkpoint alone whose files, ours and the Trainer's, and
whose logs are those that were written: what was changed, cut, lost, or exchanged with another
checkpoint's is named before the Trainer loads anything. With a key nobody else can make manifests
anew. Exact, with real Trainers; the same bits after a resume: test_trainer_resume.
"""

import json
import shutil

import damage
import pytest
from support.trainer_runs import (
    metrics_rows,
    run_until_cut,
    same_weights,
    write_reference,
)

from safereg_dist.cli import main as safereg
from safereg_dist.errors import CheckpointError, ConfigError, LedgerError
from safereg_dist.integrations.state import STATE
from safereg_dist.run.ledger import merge_ledgers, reopen_ledger
from safereg_dist.run.manifest import NAME, Manifest, own_digests, read_manifest, write_manifest
from safereg_dist.storage.signing import SUFFIX

SIGNING = {"hmac_env": "SAFEREG_TEST_KEY"}
ADAPTIVE = {"regularizer": {"granularity": "batch", "ema": 0.7, "schedule": "linear"}}


@pytest.fixture(scope="module", autouse=True)
def secret():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEREG_TEST_KEY", "a secret of enough characters")
        yield


def run(folder, reference, *, resume=True, signed=False, **watch):
    """(losses, weights) of a run of six steps with checkpoints after 2 and 4."""
    chosen = {**ADAPTIVE, **({"signing": SIGNING} if signed else {})}
    return run_until_cut(folder, reference, chosen=chosen, save_steps=2, resume=resume, **watch)[:2]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A reference, and the folders of killed runs without a key and with one."""
    folder = tmp_path_factory.mktemp("written")
    write_reference(folder / "reference")
    for name in ("plain", "signed"):
        run(folder / name, folder / "reference", resume=False, crash=5, signed=name == "signed")
    return folder


@pytest.fixture
def again(written, tmp_path):
    """A copy of a killed run to change, and what resumes it."""

    def copy(name="plain"):
        shutil.copytree(written / name, tmp_path / name)

        def resume(**how):
            return run(tmp_path / name, written / "reference", signed=name == "signed", **how)

        return tmp_path / name, resume

    return copy


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        f"{STATE}/state.json",
        f"{STATE}/{NAME}",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "trainer_state.json",
    ],
)
def test_a_flipped_bit_is_refused_by_name(again, name):
    folder, resume = again()
    flip(folder / "checkpoint-4" / name)
    with pytest.raises(CheckpointError, match=rf"{name} was changed.*resume from another"):
        resume()
    (folder / "checkpoint-4" / NAME).unlink()  # as a kill leaves it, ours is checked all the same
    if STATE in name:
        with pytest.raises(CheckpointError, match=r"was changed|have its own digest"):
            resume()


def test_state_of_another_checkpoint_is_refused(again):
    folder, resume = again()
    one, other = (folder / f"checkpoint-{step}" for step in (2, 4))
    shutil.copy(one / STATE / "state.json", other / STATE)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        resume()
    shutil.rmtree(other / STATE)
    shutil.copytree(one / STATE, other / STATE)
    with pytest.raises(CheckpointError, match=rf"{STATE}/{NAME}"):
        resume()
    (other / NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{NAME} is of step 2, the checkpoint of 4"):
        resume()
    shutil.rmtree(other)
    one.rename(other)
    with pytest.raises(CheckpointError, match=f"{NAME} is of step 2"):
        resume()


def test_each_cause_has_its_own_remedy(written, again, tmp_path):
    """A plain Trainer's checkpoint, a mistyped path, logs elsewhere or lost, a key that came later,
    another coefficient."""
    folder, resume = again()
    newest = folder / "checkpoint-4"
    other = {"regularizer": ADAPTIVE["regularizer"] | {"ema": 0.5}}
    with pytest.raises(CheckpointError, match=r"regularizer.ema was 0.7, is 0.5: resume with"):
        run_until_cut(folder, written / "reference", chosen=other, save_steps=2, resume=True)
    with pytest.raises(CheckpointError, match=r"not signed.* leave `signing` out where"):
        run(folder, written / "reference", signed=True)
    with pytest.raises(CheckpointError, match=r"checkpoint-9 .*no such folder: check the path"):
        resume(resume=str(folder / "checkpoint-9"))
    shutil.copytree(newest, tmp_path / "moved" / newest.name)
    with pytest.raises(CheckpointError, match=r"was moved .set output_dir to the logs' folder"):
        run(tmp_path / "moved", written / "reference")
    (folder / "ledger.rank0.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"rank0.jsonl cannot be read.*from a copy"):
        resume()
    shutil.rmtree(newest / STATE)
    (newest / NAME).unlink()
    with pytest.raises(CheckpointError, match="was made without safereg: load its weights as"):
        resume()


def change_risk(path):
    """Another risk in the first row of a ledger."""
    first, rest = path.read_text().split("\n", 1)
    row = json.loads(first)
    row["risk"] = 0.25 if row["risk"] != 0.25 else 0.5
    path.write_text(json.dumps(row, sort_keys=True, separators=(",", ":")) + "\n" + rest)


def test_a_ledger_that_was_written_anew_is_refused(again):
    folder, resume = again()
    change_risk(folder / "ledger.rank0.jsonl")
    with pytest.raises(CheckpointError, match=r"ledger\.rank0\.jsonl was changed"):
        resume()


def test_the_ledger_of_a_finished_run_too(again):
    """Its chain is made anew by who can write to the folder; the checkpoint remembers."""
    folder, resume = again()
    resume()
    reopen_ledger(folder)
    change_risk(folder / "ledger.rank0.jsonl")
    merge_ledgers(folder, 1)
    with pytest.raises(CheckpointError, match=r"ledger\.rank0\.jsonl was changed"):
        resume()
    reopen_ledger(folder)
    merge_ledgers(folder, 1)
    text = (folder / "ledger.jsonl").read_text()
    (folder / "ledger.jsonl").write_text(text.replace('"step":0', '"step":1', 1))
    with pytest.raises(LedgerError, match=r"ledger\.jsonl:1"):
        resume()


def make_anew(folder):
    """The manifest that somebody makes who can write to the folder and has no key."""
    before = Manifest.from_bytes((folder / NAME).read_bytes())
    write_manifest(folder, Manifest(before.step, own_digests(folder, 0, 1), before.logs), None)


def test_with_a_key_nobody_else_makes_a_manifest(again, capsys):
    folder, resume = again("signed")
    newest = folder / "checkpoint-4"
    kept = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    state = newest / STATE / "state.json"
    state.write_text(state.read_text().replace("0.", "0.0", 1))
    make_anew(newest / STATE)
    with pytest.raises(CheckpointError, match=f"{STATE}/{NAME}"):
        resume()
    make_anew(newest)
    with pytest.raises(CheckpointError, match=f"{NAME} was changed or signed with another key"):
        resume()
    for path, content in kept.items():
        path.write_bytes(content)
    (newest / "scaler.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"scaler\.pt is not in the manifest"):
        resume()
    (newest / "scaler.pt").unlink()
    for lost in (NAME, NAME + SUFFIX):
        (newest / lost).rename(newest / f"../{lost}")
        with pytest.raises(CheckpointError, match=r"cannot be read|is not signed"):
            resume()
        (newest / f"../{lost}").rename(newest / lost)
    resume()
    assert safereg(["ledger", "verify", str(folder), "--key", "SAFEREG_TEST_KEY"]) == 0
    capsys.readouterr()
    flip(folder / "summary.json")
    assert safereg(["ledger", "verify", str(folder), "--key", "SAFEREG_TEST_KEY"]) == 2
    assert "a secret" not in "".join(p.read_text("latin-1") for p in folder.rglob("*.*"))


def test_a_key_that_is_missing_is_said_before_training(written, tmp_path, monkeypatch):
    monkeypatch.delenv("SAFEREG_TEST_KEY")
    with pytest.raises(ConfigError, match="SAFEREG_TEST_KEY, found 0"):
        run(tmp_path, written / "reference", resume=False, signed=True)


def test_a_loop_of_ones_own_signs_nothing(written):
    from transformers import AutoModelForCausalLM

    from safereg_dist import prepare

    model = AutoModelForCausalLM.from_pretrained(written / "reference")
    with pytest.raises(ConfigError, match="which a loop of your own writes itself"):
        prepare(model, {"risk": {"estimator": "column"}, "signing": SIGNING})


@pytest.mark.parametrize("content", ["5", "null", "[]", "{}", '{"regularizer": 5}', "{", ""])
def test_hostile_state_without_a_manifest_is_refused_in_one_line(again, content):
    folder, resume = again()
    (folder / "checkpoint-4" / NAME).unlink()
    (folder / "checkpoint-4" / STATE / NAME).unlink()
    (folder / "checkpoint-4" / STATE / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="resume from another checkpoint") as raised:
        resume()
    assert len(str(raised.value).splitlines()) == 1


def test_what_a_kill_and_an_earlier_version_leave_goes_on(written, again, tmp_path, capsys):
    """Also beside files of others, and where the run goes back behind a checkpoint."""
    losses, trained = run(tmp_path / "whole", written / "reference", resume=False)
    folder, resume = again()
    newest = folder / "checkpoint-4"
    (newest / NAME).unlink()
    (newest / STATE / NAME).unlink()
    (newest / "notes.txt").write_text("of another callback")
    state = json.loads((newest / STATE / "state.json").read_text())
    del state["format"]
    (newest / STATE / "state.json").write_text(json.dumps(state))
    after, resumed = resume()
    said = capsys.readouterr().out
    assert f"{newest} has no manifest.json" in said
    assert f"{newest / STATE} is of an earlier version" in said
    assert after == losses[4:]
    assert same_weights(resumed, trained)
    (newest / STATE / "risk7.safetensors").touch()  # of a run on more ranks
    after, resumed = resume(resume=str(folder / "checkpoint-2"))
    assert after == losses[2:]
    assert same_weights(resumed, trained)
    assert metrics_rows(folder) == metrics_rows(tmp_path / "whole")
    assert read_manifest(newest, None).step == read_manifest(newest / STATE, None).step == 4
    assert not list(newest.glob(".*"))


def test_no_damage_is_loaded(tmp_path):
    """Of 2 x 250 changes in every file; more: benchmarks/damage.py."""
    rows = list(damage.try_trainers(tmp_path, 250))
    assert sum(row["tried"] for row in rows) == 500
    assert [row for row in rows if row["loaded"]] == []
