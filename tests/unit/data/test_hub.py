"""Claimed: prompts of a Hugging Face dataset are read as those of a file with the same columns.

Real datasets in folders, as the hub stores them (parquet with features, JSONL by split). Exact:
texts, labels, ids. Without a network the error says what to do.
"""

import json
from dataclasses import replace

import datasets
import pytest

from safereg_dist.data.files import read_prompts
from safereg_dist.data.hub import dataset_rows
from safereg_dist.errors import DataError

ROWS = [
    {"goal": "Rob it", "target": "Sure", "id": "a"},
    {"goal": "Kill time", "id": "b"},
    {"goal": "Open it", "target": "Yes", "id": "c"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_dataset_is_as_a_file(tmp_path):
    file = written(tmp_path / "set" / "train.jsonl", ROWS)
    found = read_prompts(f"hub:{tmp_path}/set", label="harmful")
    assert found == read_prompts(file, label="harmful")
    assert found[1].complying is None  # the column is there, and null
    unnamed = [{key: value for key, value in row.items() if key != "id"} for row in ROWS]
    file = written(tmp_path / "unnamed" / "train.jsonl", unnamed)
    here, there = read_prompts(f"hub:{tmp_path}/unnamed"), read_prompts(file)
    assert [replace(prompt, id="") for prompt in here] == [replace(p, id="") for p in there]
    assert [prompt.id for prompt in here] == ["unnamed-0", "unnamed-1", "unnamed-2"]


def test_splits(tmp_path):
    for name, rows in (("train", ROWS), ("test", ROWS[1:])):
        written(tmp_path / "set" / f"{name}.jsonl", rows)
    name = f"hub:{tmp_path}/set"
    assert [p.id for p in read_prompts(f"{name}@test")] == ["b", "c"]
    assert [p.id for p in read_prompts(f"{name}@train[1:2]")] == ["b"]
    with pytest.raises(DataError, match="splits train, test: name one"):
        read_prompts(name)
    with pytest.raises(DataError, match='Unknown split "dev"'):
        read_prompts(f"{name}@dev")
    with pytest.raises(DataError, match=r"expected hub:OWNER/NAME"):
        read_prompts(f"{name}@train@test")


def test_configurations(tmp_path):
    (tmp_path / "set").mkdir()
    for name, rows in (("one", ROWS[:1]), ("two", ROWS[1:])):
        written(tmp_path / "set" / f"{name}.jsonl", rows)
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- {config_name: one, data_files: one.jsonl}\n"
        "- {config_name: two, data_files: two.jsonl}\n---\n"
    )
    assert [p.id for p in read_prompts(f"hub:{tmp_path}/set:two@train")] == ["b", "c"]


def test_class_labels_are_names(tmp_path):
    """Their numbers follow the order of the names, which may be the other way round than ours."""
    labels = datasets.ClassLabel(names=["unsafe", "safe"])
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "label": labels, "answer": labels}
    )
    columns = {"prompt": ["Rob it", "Kill time"], "label": [0, 1], "answer": [0, 1]}
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(tmp_path / "set" / "train.parquet")
    found = read_prompts(f"hub:{tmp_path}/set@train")
    assert [prompt.label for prompt in found] == ["harmful", "benign"]
    assert [row["answer"] for _, row in dataset_rows(f"hub:{tmp_path}/set")] == [0, 1]


def test_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hub:owner/name@test .*without a network give a folder"):
        read_prompts("hub:owner/name@test")
