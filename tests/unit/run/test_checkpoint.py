"""Claimed: checkpoints are whole or not there, the newest are kept, and what is of another run is
refused; damage to a file or a log is found before anything is loaded, the newest whole checkpoint
is taken, or the one asked for and no other; with a key only what it signed is. Exact. A whole
run's resume, to the bit: tests/distributed/test_resume.py.
"""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.ranks import ALONE
from support.saves import Engine, Regularizer, state

from safereg_dist.config import load_config
from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.run.checkpoint import (
    config_hash,
    differences,
    load_checkpoint,
    remove_partial,
    saved_checkpoints,
)
from safereg_dist.run.manifest import own_digests, read_manifest, write_manifest
from safereg_dist.run.resume import find_checkpoint, set_aside_newer
from safereg_dist.run.save import Saver
from safereg_dist.storage.digests import digest_of
from safereg_dist.storage.signing import signing_key


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata: {train: t.jsonl}\nrisk: {estimator: column}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    return lambda *changes: load_config(path, list(changes))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out" / "checkpoint"


def names(folder):
    return [path.name for path in saved_checkpoints(folder)]


def save(folder, run_state, engine, *, risks=1, keep=2, key=None):
    """Beside the logs of a run that has written nothing yet; `risks` = 2: rank 1 has risk 5."""
    regularizer = Regularizer(run_state.step / 8, others=risks - 1)
    logs = {}
    for name in ("metrics.jsonl", *(f"ledger.rank{r}.jsonl" for r in range(run_state.world_size))):
        folder.parent.mkdir(exist_ok=True)
        (folder.parent / name).touch()
        logs[name] = digest_of(folder.parent / name)
    with Saver(folder, engine=engine, regularizer=regularizer, ranks=ALONE, keep=keep) as saver:
        saver.save(run_state, logs=logs, key=key)


def load(found, regularizer, *, order_digest="rows", seed=0):
    engine = Engine()
    load_checkpoint(
        found.path,
        found.state,
        seed=seed,
        engine=engine,
        regularizer=regularizer,
        ranks=ALONE,
        order_digest=order_digest,
    )
    return engine


def found_by(config):
    return find_checkpoint(config, ALONE)


def draws():
    return [random.random(), float(torch.rand(1)), float(np.random.rand())]


def test_the_newest_are_kept_and_random_states_come_back(config, folder):
    random.seed(1), torch.manual_seed(2), np.random.seed(3)
    for number in (1, 2, 10, 11):
        save(folder, state(config(), number), Engine(number))
    expected = draws()
    assert names(folder) == ["step-00000010", "step-00000011"]
    random.seed(7), torch.manual_seed(7), np.random.seed(7)
    regularizer = Regularizer()
    found = found_by(config())
    engine = load(found, regularizer)
    assert draws() == expected
    assert (found.state.step, engine.number, found.damaged) == (11, 11, 0)
    assert regularizer.coefficient.state_dict() == found.state.regularizer == {"ema": 11 / 8}
    assert regularizer.risk == 11 / 8


def test_only_whole_checkpoints_count(config, folder, capsys):
    """What a kill left of a save is none; what was whole once is damaged, and named."""
    assert found_by(config()) is None
    save(folder, state(config(), 3), Engine())
    (folder / ".step-00000010.partial").mkdir()
    assert found_by(config()).path.name == "step-00000003"
    assert capsys.readouterr().out == ""
    (folder / "step-00000009").mkdir()
    assert found_by(config())[::2] == (folder / "step-00000003", 1)
    assert "step-00000009 cannot be used: " in capsys.readouterr().out
    remove_partial(folder)
    assert not (folder / ".step-00000010.partial").exists()
    assert (folder / "step-00000003" / "state.json").is_file()


def test_what_is_of_another_run_is_refused(config, folder):
    save(folder, state(config(), 1), Engine())
    with pytest.raises(CheckpointError, match="another configuration"):
        found_by(config("train.seed=5"))
    with pytest.raises(CheckpointError, match="dealt as risky"):
        load(found_by(config()), Regularizer(), order_digest="other rows")


def test_another_number_of_ranks_has_all_risks_and_draws_anew(config, folder):
    """What it draws follows from the seed, the step and the rank; not from what drew before."""
    for step in (3, 4):
        two = state(config(), step, world_size=2, began_with=4, ledger_bytes=[0, 0])
        save(folder, two, Engine(), risks=2)
    found = found_by(config())
    assert found.began_with == 4
    drawn = []
    for step, seed in ((3, 0), (3, 0), (4, 0), (4, 5)):
        regularizer = Regularizer()
        own = found._replace(
            path=folder / f"step-{step:08d}", state=replace(found.state, step=step)
        )
        load(own, regularizer, seed=seed)
        drawn.append(draws())
        assert regularizer.risk == step / 8 + 5
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) == 3


def rewrite_state(folder, change):
    """Changes `state.json` of the only checkpoint, which then has no manifest, as in format 2."""
    (path,) = saved_checkpoints(folder)
    (path / "manifest.json").unlink()
    values = change(json.loads((path / "state.json").read_text()))
    (path / "state.json").write_text(values if isinstance(values, str) else json.dumps(values))


@pytest.mark.parametrize("written", [1, 4, None])
def test_another_format_is_refused(config, folder, written):
    """The first version of the format did not say which it was."""
    save(folder, state(config(), 3), Engine())
    rewrite_state(
        folder,
        lambda values: {k: v for k, v in {**values, "format": written}.items() if v is not None},
    )
    with pytest.raises(CheckpointError, match=rf"has format {written or 1}, .* reads 2 and 3"):
        found_by(config())


def test_the_format_without_a_manifest_goes_on_with_a_warning(config, folder, capsys, monkeypatch):
    """But not where this version's manifest was lost, and not where a key is asked for."""
    save(folder, state(config(), 3), Engine(5))
    rewrite_state(folder, lambda values: values)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        found_by(config())
    old = ("damaged_checkpoints", "saves", "save_seconds", "save_blocked_seconds")
    (path,) = saved_checkpoints(folder)
    values = json.loads((path / "state.json").read_text())
    kept = {k: v for k, v in values.items() if k not in old}
    (path / "state.json").write_text(json.dumps({**kept, "format": 2}))
    assert load(found_by(config()), Regularizer()).number == 5
    assert "has format 2, which had no manifest" in capsys.readouterr().out
    monkeypatch.setenv("SAFEREG_TEST_KEY", "k" * 16)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        found_by(config("signing.hmac_env=SAFEREG_TEST_KEY"))


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{", '{"format": 2}', '{"format": 2, "more": 1}', "[" * 9999),
        *({"step": "3"}, {"ledger_bytes": 0}, {"seconds": None}, {"more": 1}),
    ],
)
def test_a_state_that_cannot_be_read_is_refused(config, folder, content):
    save(folder, state(config(), 3), Engine())
    if isinstance(content, str):
        rewrite_state(folder, lambda _: content)
    else:
        rewrite_state(folder, lambda values: {**values, "format": 2, **content})
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        found_by(config())


def test_places_and_patience_do_not_change_a_run(config):
    for change in (
        *("output_dir=elsewhere", "train.save_every=3", "risk.critic.timeout_s=77"),
        *("risk.critic.endpoint=http://127.0.0.1:9/v1", "engine.timeout_s=99", "profile=true"),
    ):
        assert config_hash(config(change)) == config_hash(config()), change
    assert config_hash(config("optimizer.lr=0.5")) != config_hash(config())
    assert differences(config(), config("optimizer.lr=0.5", "output_dir=elsewhere")) == [
        f"optimizer.lr was {config().optimizer.lr}, is 0.5"
    ]


# ---- which one


def three(config, folder):
    """Checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        save(folder, state(config(), step), Engine(step), keep=3)
    return saved_checkpoints(folder)


def test_a_step_or_a_folder_can_be_asked_for(config, folder, tmp_path):
    three(config, folder)
    assert found_by(config()).state.step == 6
    assert found_by(config("train.resume=4")).state.step == 4
    shutil.copytree(folder / "step-00000002", tmp_path / "copy")
    found = found_by(config(f"train.resume={tmp_path / 'copy'}"))
    assert (found.path, found.state.step) == (tmp_path / "copy", 2)
    assert load(found, Regularizer()).number == 2


def test_what_the_run_goes_back_behind_is_renamed(config, folder):
    for _ in range(2):
        three(config, folder)
        set_aside_newer(folder, 4)
    assert names(folder) == ["step-00000002", "step-00000004"]
    aside = sorted(path.name for path in folder.glob("unused*"))
    assert aside == ["unused-1-step-00000006", "unused-2-step-00000006"]


def test_what_was_asked_for_and_cannot_be_used_is_an_error(config, folder):
    """Nothing else is taken in its place."""
    three(config, folder)
    (folder / "step-00000004" / "engine" / "number").write_text("7")
    with pytest.raises(CheckpointError, match=r"number was changed.*train.resume=4 asks for"):
        found_by(config("train.resume=4"))
    with pytest.raises(CheckpointError, match="holds step-00000006, step-00000004, step-00000002"):
        found_by(config("train.resume=3"))
    with pytest.raises(CheckpointError, match="nowhere, which is no folder"):
        found_by(config("train.resume=nowhere"))
    with pytest.raises(CheckpointError, match=r"train.resume=never, but .* holds step-00000006"):
        found_by(config("train.resume=never"))
    assert len(names(folder)) == 3


def test_never_begins_a_folder_without_checkpoints(config):
    assert found_by(config("train.resume=never")) is None


@pytest.mark.parametrize("value", ["0", "-4", "''", "true", "[1]", "1.5"])
def test_other_values_of_resume_are_refused(config, value):
    with pytest.raises(ConfigError, match="resume"):
        config(f"train.resume={value}")


def test_the_newest_whole_one_is_taken_and_the_damaged_ones_are_counted(config, folder, capsys):
    for path in three(config, folder)[1:]:
        (path / "rank0.safetensors").write_bytes(b"")
    found = found_by(config())
    assert (found.state.step, found.damaged) == (2, 2)
    assert capsys.readouterr().out.count("rank0.safetensors: expected") == 2
    (folder / "step-00000002" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing; none of 3 can be used"):
        found_by(config())


def test_a_log_that_was_changed_behind_a_checkpoint_is_found(config, folder):
    """A row of the ledger of a run that has not finished; what came after the save may change."""
    log = folder.parent / "ledger.rank0.jsonl"
    folder.parent.mkdir()
    log.write_text("first\n")
    save(folder, state(config(), 2, ledger_bytes=[6]), Engine())
    log.write_text("first\nsecond\n")
    save(folder, state(config(), 4, ledger_bytes=[13]), Engine())
    log.write_text("first\nsecond\nthird\n")
    assert found_by(config()).state.step == 4
    log.write_text("first\nsecund\nthird\n")
    assert found_by(config()).state.step == 2
    log.write_text("first\n")
    assert found_by(config()).state.step == 2
    log.write_text("farst\nsecond\nthird\n")
    with pytest.raises(CheckpointError, match=r"ledger.rank0.jsonl was changed.*none of 2"):
        found_by(config())


# ---- keys


def signed(config, folder, monkeypatch, secret="a secret of enough characters"):
    monkeypatch.setenv("SAFEREG_TEST_KEY", secret)
    with_key = config("signing.hmac_env=SAFEREG_TEST_KEY")
    save(folder, state(with_key, 2), Engine(), key=signing_key(with_key.signing))
    return with_key


def test_a_checkpoint_that_is_not_signed_with_the_key_is_refused(config, folder, monkeypatch):
    """A manifest that somebody without the key made anew, another key, and no signature at all."""
    with_key = signed(config, folder, monkeypatch)
    assert found_by(with_key).state.step == 2
    (path,) = saved_checkpoints(folder)
    manifest = read_manifest(path, None)
    (path / "engine" / "number").write_text("7")
    write_manifest(path, replace(manifest, files=own_digests(path, 0, 1)), None)
    assert found_by(config()).state.step == 2  # who has no key believes it
    with pytest.raises(CheckpointError, match="was changed or signed with another key"):
        found_by(with_key)
    (path / "manifest.json.sig").unlink()
    with pytest.raises(CheckpointError, match=r"is not signed, expected HMAC-SHA256"):
        found_by(with_key)
    signed(config, folder, monkeypatch)
    monkeypatch.setenv("SAFEREG_TEST_KEY", "another secret, long enough")
    with pytest.raises(CheckpointError, match="was changed or signed with another key"):
        found_by(with_key)


def test_a_key_that_is_missing_ends_the_run_before_it_begins(config, monkeypatch):
    monkeypatch.delenv("SAFEREG_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="SAFEREG_TEST_KEY, found 0"):
        found_by(config("signing.hmac_env=SAFEREG_TEST_KEY"))
