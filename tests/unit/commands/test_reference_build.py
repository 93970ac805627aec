"""Claimed: `safereg reference build` stores the rows that training asks for, whatever says which
they are; training from the store never loads the trunk, logs the losses of training online, and
refuses a store of another reference, tokenizer, data or precision with status 2.

The judge is the same run without a store, and plain transformers for the stored states. Exact: rows
stored, models loaded. Rounds: states computed in another packing (1e-5, float32).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import (
    PLAIN_TEMPLATE,
    random_rows,
    save_model,
    tiny_model,
    word_tokenizer,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from safereg_dist.cli import main as safereg
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.parallel.single import SingleBackend
from safereg_dist.reference.store import ReferenceStore, StoreIdentity
from safereg_dist.risk.probe import Probe

TOLERANCE = 1e-5


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with policy, another reference, rows, anchors and a configuration; we work in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAFEREG_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "policy", tiny_model(seed=0))
    save_model(tmp_path / "reference", tiny_model(seed=1))
    rows = random_rows(30)
    rows[7] = {**rows[3], "id": "again", "risk": 1.0}  # one content twice
    write_jsonl(tmp_path / "train.jsonl", rows)
    anchors = random_rows(5, seed=5, risk=False)
    write_jsonl(tmp_path / "anchor.jsonl", [{**row, "id": f"a-{row['id']}"} for row in anchors])
    (tmp_path / "base.yaml").write_text(
        "model: policy\n"
        "reference: {model: reference, rows_per_pass: 2}\n"
        "data: {train: train.jsonl, anchor: anchor.jsonl, anchor_fraction: 0.2}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "engine: {name: single}\n"
        "train: {precision: fp32, micro_batch_size: 3, grad_accum_steps: 2, steps: 7}\n"
        "optimizer: {lr: 1.0e-3}\n"
    )
    return tmp_path


@pytest.fixture
def loaded(monkeypatch):
    """Folders from which whole models were loaded."""
    folders = []
    load = SingleBackend.load_model

    def noted(self, folder, **options):
        folders.append(Path(folder).name)
        return load(self, folder, **options)

    monkeypatch.setattr(SingleBackend, "load_model", noted)
    return folders


def build(*overrides, out="store"):
    """The exit status of the verb."""
    figures = ["--json", f"{out}.json"]
    return safereg(["reference", "build", "base.yaml", *overrides, "--out", out, *figures])


def trained(name, *overrides):
    """Metrics of a whole run."""
    assert safereg(["train", "base.yaml", *overrides, f"output_dir={name}"]) == 0
    return [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]


def check_same(online, stored, *, missed=False):
    """Every step, and how often the trunk ran."""
    assert len(online) == len(stored) == 7
    for a, b in zip(online, stored, strict=True):
        for key in ("loss", "task_loss", "divergence", "grad_norm", "active_rows", "kl_coef_mean"):
            assert b[key] == pytest.approx(a[key], rel=TOLERANCE), (a["step"], key)
        assert "reference_misses" not in a
        assert b["reference_rows"] == b["reference_misses"]
    assert sum(row["reference_rows"] for row in online) > 0
    assert (sum(row["reference_misses"] for row in stored) > 0) == missed


def stored_rows(folder="store"):
    """Rows that an index promises, counted in the shards."""
    return sum(len(load_file(f)["keys"]) for f in Path(folder).glob("*.safetensors"))


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_training_from_the_store_is_training_online(run, loaded, family):
    """Also where the reference has another architecture and size than the policy."""
    wider = {"hidden_size": 48} if family == "falcon" else {}
    save_model(run / "reference", tiny_model(family, seed=1, **wider))
    assert build() == 0
    assert loaded == ["reference"]
    loaded.clear()
    online = trained("online")
    assert loaded == ["policy", "reference"]
    loaded.clear()
    stored = trained("stored", "reference.cache=store")
    assert loaded == ["policy"]
    check_same(online, stored)
    text = Path("stored/summary.json").read_text()
    for side in ("policy", "reference"):
        of_run = json.loads(text)["fingerprints"][side]
        assert of_run == json.loads(Path("online/summary.json").read_text())["fingerprints"][side]


def test_stored_states_are_those_of_plain_transformers(run):
    assert build() == 0
    index = json.loads(Path("store/index.json").read_text())
    identity = {**index["identity"], "data": tuple(index["identity"]["data"])}
    store = ReferenceStore.open(Path("store"), StoreIdentity(**identity))
    model = AutoModelForCausalLM.from_pretrained("reference", dtype=torch.float64)
    expected = {}
    tokenizer = word_tokenizer()
    for path in ("train.jsonl", "anchor.jsonl"):
        for row in map(json.loads, Path(path).read_text().splitlines()):
            if row.get("risk", 1.0) >= 0.5:
                expected |= row_states(model, tokenizer, row)
    assert len(store) == len(expected)
    for key, states in expected.items():
        assert torch.allclose(store.read(key).double(), states, atol=1e-5), key
    tokens = sum(len(states) for states in expected.values())
    assert sum(len(load_file(f)["hidden"]) for f in Path("store").glob("*.safetensors")) == tokens


def row_states(model, tokenizer, row):
    """{key: [t, H]} of one row, alone and unpadded, in float64."""
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    with torch.no_grad():
        states = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    key = hashlib.sha256(np.array([ids, mask], dtype="<i8").tobytes()).hexdigest()
    return {key: states[[t - 1 for t in range(len(ids)) if mask[t]]]}


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["regularizer.objective=static", "regularizer.ceiling=0.3"], 34),
        (["regularizer.objective=static", "regularizer.ceiling=0"], 5),
        (["regularizer.granularity=batch", "regularizer.schedule=linear"], 34),
        (["regularizer.schedule=linear", "data.anchor=null"], 29),
        (["regularizer.threshold=1", "data.anchor=null"], 1),
        (["risk.estimator=none"], 5),
    ],
)
def test_rows_that_may_be_active_are_stored_and_no_others(run, overrides, rows):
    """30 rows, of which two are equal and one has risk 1, and 5 anchors."""
    assert build(*overrides) == 0
    assert stored_rows() == rows
    figures = json.loads(Path("store.json").read_text())
    size = sum(file.stat().st_size for file in Path("store").iterdir())
    assert (figures["rows"], figures["num_bytes"], figures["out"]) == (rows, size, "store")
    for step in trained("stored", *overrides, "reference.cache=store"):
        assert step["reference_rows"] == step["reference_misses"] == 0


def test_a_store_of_fewer_rows_falls_back_and_counts(run, loaded, capsys):
    assert build("regularizer.threshold=0.8") == 0
    online = trained("online")
    loaded.clear()
    stored = trained("stored", "reference.cache=store")
    assert loaded == ["policy", "reference"]
    assert capsys.readouterr().err.count("loading its trunk") == 1
    check_same(online, stored, missed=True)
    rows_run = [sum(row["reference_rows"] for row in metrics) for metrics in (online, stored)]
    assert 0 < rows_run[1] < rows_run[0]


def save_probe(run):
    """A probe on the reference's second layer that flags about half of the rows."""
    generator = torch.Generator().manual_seed(1)
    Probe(
        layer=2,
        pooling="last_prompt_token",
        mean=torch.zeros(32),
        scale=torch.ones(32),
        weight=torch.randn(32, generator=generator) / 5,
        bias=0.0,
        threshold=0.5,
        fingerprint=model_fingerprint(tiny_model(seed=1)),
        meta={},
    ).save(run / "probe")


def test_risks_that_the_build_has_written_keep_the_trunk_away(run, loaded):
    save_probe(run)
    probe = ("risk.estimator=probe", "risk.path=probe")
    assert build(*probe) == 0
    assert 5 < stored_rows() < 34
    loaded.clear()
    stored = trained("stored", *probe, "reference.cache=store")
    assert loaded == ["policy"]
    check_same(trained("online", *probe), stored)
    loaded.clear()
    alone = trained("alone", *probe, "reference.cache=store", "risk.cache=none")
    assert loaded == ["policy", "reference"]  # for the probe, on rows that the store holds
    check_same(trained("again", *probe), alone)


def test_a_probe_on_the_policy_is_asked_of_the_reference_while_building(run):
    """Then the policy decides: rows that it alone flags are missing, and run online."""
    save_probe(run)
    probe = ("risk.estimator=probe", "risk.path=probe", "risk.source=policy", "risk.drift=warn")
    probe = (*probe, "risk.force=true")  # it was fitted on the reference, the policy is another
    assert build(*probe) == 0
    assert 5 < stored_rows() < 34
    stored = trained("stored", *probe, "reference.cache=store")
    check_same(trained("online", *probe), stored, missed=True)


def change_reference(run):
    tensors = load_file(run / "reference" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(tensors, run / "reference" / "model.safetensors", metadata={"format": "pt"})
    return []


def change_template(run):
    for name in ("policy", "reference"):
        (run / name / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    return []


def change_rows(run):
    write_jsonl(run / "train.jsonl", random_rows(30, seed=9))
    return []


def change_anchors(run):
    write_jsonl(run / "anchor.jsonl", random_rows(4, seed=9, risk=False))
    return []


def change_length(run):
    return ["data.max_length=12"]


def change_precision(run):
    return ["train.precision=bf16"]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (change_reference, "reference"),
        (change_template, "tokenizer"),
        (change_rows, "data"),
        (change_anchors, "data"),
        (change_length, "data"),
        (change_precision, "precision"),
    ],
)
def test_a_store_of_something_else_is_refused_with_status_2(run, change, differs, capsys):
    assert build() == 0
    overrides = change(run)
    train = ["train", "base.yaml", "reference.cache=store", "output_dir=refused", *overrides]
    assert safereg(train) == 2
    assert f"belong to another {differs}: expected" in capsys.readouterr().err
    assert not Path("refused").exists()
    Path("store").rename("old")
    assert build(*overrides) == 0
    assert safereg([*train, "--dry-run"]) == 0


def test_what_cannot_be_built_is_refused_with_status_2(run, capsys):
    assert build("regularizer.objective=none", "data.anchor=null") == 2
    assert "runs no reference" in capsys.readouterr().err
    (run / "taken").write_text("")
    assert build(out="taken") == 2
    assert "--out taken exists" in capsys.readouterr().err
    assert build(out="taken/below") == 2
    assert "expected to write stored states" in capsys.readouterr().err
    tensors = load_file(run / "reference" / "model.safetensors")
    tensors["model.norm.weight"] *= 3e38  # finite, but what it scales is not
    save_file(tensors, run / "reference" / "model.safetensors", metadata={"format": "pt"})
    assert build() == 2
    assert "are not finite" in capsys.readouterr().err
    assert not Path("store").exists()


def test_a_run_with_a_key_takes_a_store_that_is_signed_with_it(run, monkeypatch, capsys):
    """Signed or not, training reads the same states."""
    signing = "signing={hmac_env: SAFEREG_TEST_KEY}"
    assert build(signing) == 2  # no state was computed for it
    assert "SAFEREG_TEST_KEY, found 0" in capsys.readouterr().err
    monkeypatch.setenv("SAFEREG_TEST_KEY", "a secret of enough characters")
    assert build(out="unsigned") == 0
    assert build(signing) == 0
    assert (run / "store" / "index.json.sig").is_file()
    check_same(trained("online"), trained("stored", signing, "reference.cache=store"))
    capsys.readouterr()
    train = ["train", "base.yaml", "output_dir=refused", signing]
    assert safereg([*train, "reference.cache=unsigned"]) == 2
    assert "unsigned/index.json is not signed" in capsys.readouterr().err
    (run / "unsigned" / "index.json").replace(run / "store" / "index.json")
    assert safereg([*train, "reference.cache=store"]) == 2
    assert "index.json was changed or signed with another key" in capsys.readouterr().err
    assert not Path("refused").exists()
