"""Claimed: a relative path in a YAML begins at its folder, one on the command line at the working
folder, whatever the section; ids and words stay; what lies elsewhere is said with both places.

Exact. The keys are found by their marks, so a new key with a path is tested without being named.
"""

import json
import os
from pathlib import Path

import pytest
import yaml

from safereg_dist.commands.config_reference import sections
from safereg_dist.config import (
    config_from_dict,
    config_to_yaml,
    load_config,
    load_run_config,
    placed_override,
)
from safereg_dist.config.paths import Origin
from safereg_dist.config.section import place_in
from safereg_dist.errors import ConfigError
from safereg_dist.evaluate.critics import read_critic
from safereg_dist.factory.prepare import read_settings
from safereg_dist.run.checkpoint import config_hash, is_hash_of

ALL = {
    "model": "m",
    "reference": {"model": "r", "cache": "store"},
    "data": {
        "train": ["a.jsonl", {"path": "sub/b.jsonl"}, "hub:owner/rows"],
        "validation": "v.jsonl",
        "anchor": "an.jsonl",
        "chat_template": "t.jinja",
    },
    "risk": {
        "estimator": "max",
        "cache": "risks.sqlite",
        "override": "o.jsonl",
        "critic": {"local": "j", "cache": "none"},
        "parts": [
            {"category": "a", "path": "p"},
            {"category": "b", "estimator": "critic", "critic": {"local": "g", "cache": "c.sqlite"}},
        ],
    },
    "lora": {"path": "l", "frozen": {"aligned": "f"}},
    "train": {"resume": "step"},
    "eval": {"canary": "canary.jsonl"},
    "signing": {"ed25519": "key.pem"},
    "output_dir": "out",
}


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A folder `there` with models, beside the working folder."""
    for name in ("there/m", "there/r", "there/j", "there/g", "here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def written(folder: Path, raw: dict, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(raw))
    return path


def texts(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for each in value.values() for text in texts(each)]
    return [text for each in value for text in texts(each)] if isinstance(value, list) else []


def test_all_paths_of_a_file_begin_at_its_folder(world):
    config = load_config(written(world / "there", ALL))
    found = texts(yaml.safe_load(config_to_yaml(config)))
    for name in (
        *("m", "r", "store", "a.jsonl", "sub/b.jsonl", "v.jsonl", "an.jsonl", "t.jinja", "j", "g"),
        *("risks.sqlite", "o.jsonl", "p", "c.sqlite", "l", "f", "step", "canary.jsonl", "key.pem"),
        "out",
    ):
        assert str(world / "there" / name) in found, name
    assert "hub:owner/rows" in found
    assert config.risk.critic.cache == "none"
    assert not [text for text in found if text.startswith(str(world / "here"))]
    os.chdir(world / "there")
    assert load_config("run.yaml") == config
    assert load_run_config(written(world, yaml.safe_load(config_to_yaml(config)))) == config


def test_every_key_with_a_file_or_folder_is_marked():
    """Whoever adds a key that names one marks it: its sentence says so."""
    words = ("folder", "file", "path", "jsonl", "private key")
    named = {
        f"{section}.{key}".lstrip(".")
        for section, cls in sections()
        for key, field in cls.model_fields.items()
        if any(word in (field.description or "").lower() for word in words)
        and "str" in str(field.annotation)
    }
    marked = {
        f"{section}.{key}".lstrip(".")
        for section, cls in sections()
        for key, field in cls.model_fields.items()
        if place_in(field) is not None
    }
    known = {
        *("lisa.safety", "data.train", "data.validation", "data.anchor", "eval.canary"),
        *("model", "risk.parts[].critic.cache", "train.resume"),
    }
    assert known <= marked
    assert {name.rpartition(".")[2] for name in named - marked} <= {"position", "refusal"}


@pytest.mark.parametrize("folder", ["here", "there"])
def test_paths_of_the_command_line_begin_at_the_working_folder(world, folder):
    os.chdir(world / folder)
    config = load_config(
        written(world / "there", ALL),
        ["data.train=mine.jsonl", 'risk.critic={"local": "./j"}', "output_dir=../o", "model=m"],
    )
    assert config.data.train == str(world / folder / "mine.jsonl")
    assert config.risk.critic.local == str(world / folder / "j")
    assert config.output_dir == str(world / "o")
    # No such folder in `here`: the id of a hub, though the file's folder has one of that name.
    assert config.model == ("m" if folder == "here" else str(world / "there" / "m"))


def test_ids_words_and_absolute_paths_stay(world):
    raw = {"model": "owner/name", "data": {"train": "/data/a.jsonl"}, "train": {"resume": 12}}
    config = load_config(written(world / "there", raw), ["risk.path=p", "risk.cache=none"])
    assert (config.model, config.data.train) == ("owner/name", "/data/a.jsonl")
    assert (config.train.resume, config.risk.cache) == ("12", "none")
    assert config.output_dir == str(world / "there" / "runs" / "my-run")
    raw["model"] = "./owner/name"
    config = load_config(written(world / "there", raw), ["risk.path=p"])
    assert config.model == str(world / "there" / "owner" / "name")


@pytest.mark.parametrize("key", ["data.train", "model", "risk.path"])
def test_what_lies_in_the_working_folder_alone_is_named(world, key):
    raw = {"model": "base", "data": {"train": "rows.jsonl"}, "risk": {"path": "probe"}}
    path = written(world / "there", raw)
    section, _, leaf = key.rpartition(".")
    text = (raw[section] if section else raw)[leaf]
    (world / "here" / text).mkdir()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    said = str(caught.value)
    for part in (key, str(path), str(world / "there" / text), str(world / "here" / text)):
        assert part in said
    assert f"write ../here/{text}" in said
    load_config(path, [f"{key}={text}"])  # what is replaced is not looked for
    (world / "there" / text).mkdir()
    load_config(path)


def test_what_does_not_fit_is_refused_as_before(world):
    for raw in ({"model": 3, "data": {"train": "a"}}, {"model": "m", "data": "a"}):
        with pytest.raises(ConfigError, match="must be"):
            load_config(written(world / "there", raw))


def test_other_files_of_sections(world):
    file = written(world / "there", {"local": "j", "cache": "k.sqlite"})
    critic = read_critic(file)
    assert (critic.local, critic.cache) == (str(world / "there" / "j"), f"{file.parent}/k.sqlite")
    file = written(world / "there", {"risk": {"estimator": "lookup", "path": "scored.jsonl"}})
    assert read_settings(file) == {
        "risk": {"estimator": "lookup", "path": str(world / "there" / "scored.jsonl")}
    }


def test_overrides_of_another_folder(world):
    origin = Origin(world / "there")
    assert placed_override("train.steps=3", origin) == "train.steps=3"
    assert placed_override("model=owner/name", origin) == "model=owner/name"
    key, _, value = placed_override("data.train=[a.jsonl, {path: b}]", origin).partition("=")
    there = str(world / "there")
    assert (key, json.loads(value)) == ("data.train", [f"{there}/a.jsonl", {"path": f"{there}/b"}])
    with pytest.raises(ConfigError, match="must read key=value"):
        placed_override("a", origin)


def test_runs_begun_with_relative_paths_go_on_in_their_folder(world):
    """Version 0.1 hashed paths as written, beginning at the working folder."""
    raw = {k: v for k, v in ALL.items() if k not in ("signing", "eval")}
    before = config_from_dict(raw)
    for name in ("m", "r", "j", "g"):
        (world / "here" / name).mkdir()
    now = load_config(written(world / "here", raw))
    assert config_hash(now) != config_hash(before)
    assert is_hash_of(config_hash(before), now)
    other = load_config(written(world / "here", raw), ["data.validation=w.jsonl"])
    assert not is_hash_of(config_hash(before), other)
    os.chdir(world / "there")
    assert is_hash_of(config_hash(now), load_config(world / "here" / "run.yaml"))
