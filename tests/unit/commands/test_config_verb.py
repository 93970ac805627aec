"""Claimed: the JSON schema carries every key with its sentence and limits, a starter file loads as
it is and overwrites nothing, any key is explained in its own words, and the page of all keys is
current.

Everything here is exact.
"""

import json
import re

import pytest
import torch
import yaml
from support.launching import ROOT

from safereg_dist import __version__
from safereg_dist.cli import main
from safereg_dist.commands.config_reference import keys_of, reference, sections
from safereg_dist.config import load_config

KEYS = {key.name: key for name, cls in sections() for key in keys_of(cls, name)}


@pytest.fixture
def safereg(capsys):
    """Runs one verb; what it prints, or its one line of error where status 2 is expected."""

    def run(*arguments, status=0):
        assert main(["config", *map(str, arguments)]) == status
        out, err = capsys.readouterr()
        if status == 0:
            assert err == "" or err.startswith("now: safereg ")
            return out + err
        assert out == ""
        assert err.startswith("safereg: ")
        assert err.count("\n") == 1
        return err

    return run


def rows(path, *, risks):
    values = [{"prompt": "p", "response": "r", "risk": risk} for risk in risks]
    lines = [{k: v for k, v in row.items() if v is not None} for row in values]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# The schema


def chosen(node, key):
    return next(choice for choice in node.get("anyOf", [node]) if key in choice)


def resolved(schema, key):
    node = schema
    for name in key.replace("[]", ".[]").split("."):
        if name == "[]":  # a list of sections, for which a path may stand, as for each of them
            node = chosen(chosen(node, "items")["items"], "$ref")
        else:
            node = node["properties"][name]
            node = next((c for c in node.get("anyOf", []) if "$ref" in c), node)  # or null
        node = node.get("allOf", [node])[0]  # how older pydantic refers to a section
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def test_the_schema_has_every_key_with_its_sentence(safereg):
    schema = json.loads(safereg("schema"))
    assert schema["required"] == ["model", "data"]
    for name, key in KEYS.items():
        node = resolved(schema, name)
        assert " ".join(node["description"].split()) == key.sentence, name
        assert node.get("changes_result", True) == key.changes_result, name
        assert ("default" in node) == (key.default != "required"), name
    owners = [schema, *schema["$defs"].values()]
    assert all(owner["additionalProperties"] is False for owner in owners)


def test_the_schema_carries_limits_and_choices(safereg):
    schema = json.loads(safereg("schema"))
    assert resolved(schema, "train.micro_batch_size")["minimum"] == 1
    assert resolved(schema, "optimizer.lr")["exclusiveMinimum"] == 0
    ema = resolved(schema, "regularizer.ema")
    assert (ema["minimum"], ema["exclusiveMaximum"]) == (0, 1)
    assert resolved(schema, "train.steps")["anyOf"] == [
        {"minimum": 1, "type": "integer"},
        {"type": "null"},
    ]
    assert resolved(schema, "engine.name")["enum"] == ["deepspeed", "fsdp2", "single"]
    assert resolved(schema, "engine.zero_stage")["enum"] == [1, 2, 3]


# A file to start from


def test_a_starter_for_rows_with_a_risk_reads_it(safereg, tmp_path):
    data = rows(tmp_path / "rows.jsonl", risks=[0.0, 1, 0.5])
    out = tmp_path / "run.yaml"
    told = safereg("init", "--model", "org/M-1", "--data", data, "--out", out)
    assert told == f"written: {out}; look it through\nnow: safereg audit {out}\n"
    for verb in ("train {}", "doctor {} --hostfile hosts", "launch {} --hostfile hosts"):
        assert f"  safereg {verb.format(out)}\n" in out.read_text()
    config = load_config(out)
    assert (config.model, config.data.train) == ("org/M-1", str(data))
    assert (config.risk.estimator, config.risk.path) == ("column", None)
    assert config.data.anchor is None
    assert "probe fit --model" not in out.read_text()


@pytest.mark.parametrize("risks", [[None], [0.5, None], [None, 0.5]])
def test_a_starter_for_other_rows_tells_how_to_fit_a_probe(risks, safereg, tmp_path):
    data = rows(tmp_path / "rows.jsonl", risks=risks)
    text = safereg("init", "--model", "models/M 1", "--data", data)
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml")
    assert config.risk.estimator == "probe"
    assert config.risk.path == str(tmp_path / "runs" / "probe-M 1")
    assert config.data.anchor == str(tmp_path / "runs" / "anchor-M 1.jsonl")
    assert config.train.save_every > 0
    assert "probe fit --model 'models/M 1' --data LABELLED.jsonl --out 'runs/probe-M 1'\n" in text


def test_a_starter_reads_csv_and_leaves_a_hub_alone(safereg, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response,risk\na,b,0.5\n")
    text = safereg("init", "--model", "m", "--data", tmp_path / "rows.csv")
    assert yaml.safe_load(text)["risk"]["estimator"] == "column"
    text = safereg("init", "--model", "m", "--data", "org/rows")
    assert yaml.safe_load(text)["risk"]["estimator"] == "probe"


def test_a_starter_in_another_folder_names_what_is_there(safereg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "rows.jsonl", risks=[None])
    for name in ("model", "sub"):
        (tmp_path / name).mkdir()
    safereg("init", "--model", "model", "--data", "rows.jsonl", "--out", "sub/run.yaml")
    config = load_config("sub/run.yaml")
    assert config.model == str(tmp_path / "model")
    assert config.data.train == str(tmp_path / "rows.jsonl")
    fitted = re.search(r"--out (\S+)", (tmp_path / "sub" / "run.yaml").read_text())[1]
    assert config.risk.path == str(tmp_path / fitted)


@pytest.mark.parametrize("name", ["a: b #c", "'", '"', "- x", "007", "null", "~/m{}", "e\u00e9"])
def test_a_starter_for_any_name_loads(name, safereg, tmp_path):
    (tmp_path / "run.yaml").write_text(safereg("init", "--model", name, "--data", "org/rows"))
    assert load_config(tmp_path / "run.yaml").model == name


def test_a_starter_has_each_key_under_its_sentence(safereg):
    text = safereg("init", "--model", "m", "--data", "org/rows")
    assert max(map(len, text.splitlines())) <= 100
    comment, section, seen = [], "", []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip(" #"))
        elif line.endswith(":"):
            section, comment = line, []
        elif ":" in line:
            name = section.replace(":", ".") * line.startswith(" ") + line.split(":")[0].strip()
            assert " ".join(comment).endswith(KEYS[name].sentence), name
            seen, comment = [*seen, name], []
    assert len(seen) > 12
    assert {key for key in KEYS if KEYS[key].default == "required"} - {*seen} == {
        *("risk.parts[].category", "data.train[].path", "eval.canary", "lisa.safety")
    }


def test_a_starter_never_overwrites(safereg, tmp_path):
    out = tmp_path / "run.yaml"
    out.write_text("mine")
    arguments = ("init", "--model", "m", "--data", "org/rows", "--out")
    assert "is there already" in safereg(*arguments, out, status=2)
    assert out.read_text() == "mine"
    assert "cannot be written" in safereg(*arguments, tmp_path / "no" / "x.yaml", status=2)


def test_a_starter_needs_readable_data(safereg, tmp_path):
    arguments = ("init", "--model", "m", "--out", tmp_path / "run.yaml", "--data")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "no row" in safereg(*arguments, tmp_path / "empty.jsonl", status=2)
    (tmp_path / "torn.jsonl").write_text("{\n")
    assert "torn.jsonl:1" in safereg(*arguments, tmp_path / "torn.jsonl", status=2)
    assert not (tmp_path / "run.yaml").exists()


def test_a_starter_may_come_before_its_rows(safereg, tmp_path):
    out = tmp_path / "run.yaml"
    told = safereg("init", "--model", "m", "--data", tmp_path / "rows.jsonl", "--out", out)
    assert (
        f"{tmp_path / 'rows.jsonl'} is not there yet: its rows are taken to have no `risk`" in told
    )
    assert load_config(out).risk.estimator == "probe"


# One key


def test_a_key_is_explained(safereg):
    told = safereg("explain", "train.head_bytes")
    for text in (KEYS["train.head_bytes"].sentence, "int | null", "1048576", "changes with it"):
        assert text in told
    assert "may go on" in safereg("explain", "engine.timeout_s")
    assert "deepspeed | fsdp2 | single" in safereg("explain", "engine.name")
    assert "required" in safereg("explain", "model")


def test_every_key_and_section_is_explained(safereg):
    for name, key in KEYS.items():
        told = " ".join(safereg("explain", name).split())
        assert key.sentence in told
    for name, cls in sections():
        told = safereg("explain", name)
        for key in keys_of(cls, name):
            assert f"\n{key.name}\n" in told
    assert safereg("explain") == safereg("explain", "")


def test_a_part_is_explained_by_any_number(safereg):
    told = {safereg("explain", f"risk.parts{n}.weight") for n in ("", "[]", "[0]", "[acts]")}
    assert len(told) == 1


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("train.stpes", ["train.steps"]),
        ("ceiling", ["regularizer.ceiling", "risk.parts.ceiling"]),
        ("regulariser", ["regularizer"]),
        ("output", ["output_dir"]),
    ],
)
def test_a_typo_gets_the_nearest(name, near, safereg):
    line = safereg("explain", name, status=2)
    for each in near:
        assert repr(each) in line


# The page, and the version


def test_the_page_of_all_keys_is_current():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "python -m safereg_dist.commands.config_reference > " + (
        "docs/configuration.md"
    )


def test_the_page_has_one_row_a_key():
    listed = re.findall(r"^\| `(\w+)`", reference(), flags=re.M)
    assert listed == [name.rpartition(".")[2] for name in KEYS]


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert told["safereg"] == __version__
    assert told["torch"] == torch.__version__
    assert {"safereg-kernels", "python", "cuda", "triton", "deepspeed", "megatron-core"} <= set(
        told
    )
