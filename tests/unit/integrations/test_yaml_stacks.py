"""Claimed: the section of a stack's YAML is checked before anything is loaded, and batches as
axolotl and LLaMA-Factory pack them are read row by row. Exact.

The stacks themselves pin other versions of transformers and run in environments of their own:
benchmarks/stacks_yaml.sh.
"""

import pytest
import torch
import yaml
from support.builders import write_jsonl

from safereg_dist.errors import ConfigError, DataError
from safereg_dist.integrations.collator import KEY, RowCollator
from safereg_dist.integrations.llamafactory import _check, run
from safereg_dist.integrations.yaml_section import read_section


def section(given):
    return read_section(given, stack="axolotl", model="-")


BAD = {
    "none": (None, "no `safereg:` section"),
    "a list": ([1], "expected a mapping or the path"),
    "no file": ("not-there.yaml", "cannot be read"),
    "another section": ({"optimizer": {}}, "optimizer"),
    "another key": ({"risk": {"estimator": "lookup", "pth": "x"}}, "path"),
    "a column": ({"risk": {"estimator": "column"}}, "estimator=lookup"),
    "no scored file": ({"risk": {"estimator": "lookup", "path": "no.jsonl"}}, "no.jsonl"),
    "no path": ({"risk": {"estimator": "lookup"}}, "risk.path"),
    "no anchors": ({"risk": {"estimator": "none"}, "data": {"anchor": "no.jsonl"}}, "anchor build"),
    "a part": (
        {"risk": {"estimator": "max", "parts": [{"category": "a", "estimator": "column"}]}},
        r"risk.parts\[0\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_sections_that_cannot_be_used(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        section(given)


def test_a_mapping_and_a_file_of_it_are_the_same(tmp_path):
    scored = write_jsonl(tmp_path / "scored.jsonl", [{"prompt": "a", "response": "b", "risk": 0}])
    given = {"risk": {"estimator": "lookup", "path": str(scored)}}
    (tmp_path / "safety.yaml").write_text(yaml.safe_dump(given))
    assert section(given) == section(str(tmp_path / "safety.yaml")) == given


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"stage": "dpo"}, "stage=dpo"),
        ({"use_ray": True}, "use_ray"),
        ({"packing": True}, "neat_packing"),
        ({"neat_packing": True, "cutoff_len": 95}, "multiple of 8"),
    ],
    ids=str,
)
def test_runs_of_llamafactory_that_cannot_work(own, message):
    with pytest.raises(ConfigError, match=message):
        _check(own)


def test_anchors_do_not_mix_with_packed_lines(tmp_path):
    anchors = write_jsonl(tmp_path / "anchors.jsonl", [{"prompt": "a", "response": "b"}])
    settings = {"risk": {"estimator": "none"}, "data": {"anchor": str(anchors)}}
    with pytest.raises(ConfigError, match="neat_packing"):
        run({"stage": "sft", "neat_packing": True, "safereg": settings})


# ---- packed lines

FEATURES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "id": "a"},
    {"input_ids": [8, 9], "labels": [-100, 9], "id": "b"},
    {"input_ids": [4, 3, 2], "labels": [-100, 3, 2], "id": "c"},
]


def packed(features, *, mask, fill):
    """Lines as axolotl packs them: bins of rows, filled up, their rows numbered in the mask."""
    lines = []
    for rows in features:
        assert all("id" not in row for row in rows)
        line = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
        for number, row in enumerate(rows, start=1):
            length = len(row["input_ids"])
            line["input_ids"] += row["input_ids"]
            line["labels"] += row["labels"]
            line["attention_mask"] += [number] * length
            line["position_ids"] += range(length)
        missing = 8 - len(line["input_ids"])
        line["input_ids"] += [0] * missing
        line["labels"] += [-100] * missing
        line["attention_mask"] += [0] * missing
        line["position_ids"] += list(range(missing)) if fill == "counted" else [0] * missing
        lines.append(line)
    batch = {key: torch.tensor([line[key] for line in lines]) for key in lines[0]}
    if mask == "none":
        del batch["attention_mask"]
    elif mask == "blocks":
        number = batch["attention_mask"]
        sees = (number[:, None, :, None] == number[:, None, None, :]).float()
        batch["attention_mask"] = torch.where(sees.bool(), 0.0, -1e9)
    return batch


@pytest.mark.parametrize("fill", ["counted", "zeros"])
@pytest.mark.parametrize("mask", ["numbered", "none", "blocks"])
def test_rows_of_bins_are_found(mask, fill):
    def collate(features):
        return packed(features, mask=mask, fill=fill)

    batch = RowCollator(collate, needs_positions=True)([FEATURES[:2], FEATURES[2:]])[KEY]
    assert batch.error is None
    assert [(row.id, row.input_ids) for row in batch.rows] == [
        ("a", [5, 6, 7]),
        ("b", [8, 9]),
        ("c", [4, 3, 2]),
    ]
    assert batch.labels.tolist() == [6, 7, 9, 3, 2]
    assert batch.response_index.tolist() == [0, 1, 3, 8, 9]


def test_packed_rows_without_position_ids_are_refused():
    def collate(features):
        batch = packed(features, mask="numbered", fill="zeros")
        del batch["position_ids"]
        return batch

    batch = RowCollator(collate, needs_positions=True)([FEATURES[:2]])[KEY]
    assert isinstance(batch.error, DataError)
    assert "position_ids" in str(batch.error)
