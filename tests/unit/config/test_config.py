"""Claimed: the configuration's defaults are those of the README, what it does not know or cannot be
is refused with one line that names the key, and writing it out and reading it back changes nothing.

Everything here is exact.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from safereg_dist.commands.config_reference import keys_of, sections
from safereg_dist.config import (
    PRESETS,
    Config,
    CriticConfig,
    DataConfig,
    DataSet,
    EngineConfig,
    OptimizerConfig,
    ReferenceConfig,
    RegularizerConfig,
    RiskConfig,
    RiskPart,
    TrackingConfig,
    TrainConfig,
    config_from_dict,
    config_to_yaml,
    load_config,
    load_run_config,
    replace,
    section_from_dict,
)
from safereg_dist.config.section import is_section
from safereg_dist.errors import ConfigError
from safereg_dist.factory import DEFAULT_STEPS
from safereg_dist.run.checkpoint import config_hash, differences

SECTIONS = (
    Config,
    CriticConfig,
    DataConfig,
    DataSet,
    EngineConfig,
    OptimizerConfig,
    ReferenceConfig,
    RegularizerConfig,
    RiskConfig,
    RiskPart,
    TrackingConfig,
    TrainConfig,
)
LEAST = {"model": "m", "data": {"train": "t.jsonl"}, "risk": {"estimator": "column"}}

CONTRACT = """
model: PATH_OR_HUB_ID
reference: {model: null, offload: none, cache: null}
data: {train: FILE.jsonl, validation: null, anchor: null, anchor_fraction: 0.05, max_length: 1024,
       overlong: drop}
risk: {estimator: probe, path: DIR, source: reference}
regularizer: {objective: convex, divergence: kl_forward, schedule: step, threshold: null,
              floor: 0.0, ceiling: 1.0, ema: 0.0, granularity: sequence, preset: null}
optimizer: {lr: 1.0e-5, weight_decay: 0.0, warmup_ratio: 0.03, schedule: cosine, max_grad_norm: 1.0}
train: {steps: 200, epochs: null, micro_batch_size: 4, grad_accum_steps: 1, precision: bf16,
        activation_checkpointing: false, seed: 0, save_every: 0, keep_checkpoints: 2, eval_every: 0}
lora: null
engine: {name: deepspeed, zero_stage: 3}
output_dir: runs/my-run
"""


def with_(section=None, **changes):
    """The least configuration with some keys changed, in a section or at the top."""
    raw = {key: dict(v) if isinstance(v, dict) else v for key, v in LEAST.items()}
    if section is None:
        return {**raw, **changes}
    raw[section] = {**raw.get(section, {}), **changes}
    return raw


def refusal(raw):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(raw)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_the_contract():
    written_out = config_from_dict(yaml.safe_load(CONTRACT))
    least = config_from_dict(
        {"model": "PATH_OR_HUB_ID", "data": {"train": "FILE.jsonl"}, "risk": {"path": "DIR"}}
    )
    assert least.train.steps is None
    assert least.train.epochs is None
    assert DEFAULT_STEPS == 200
    steps = replace(least.train, steps=200)
    assert replace(least, train=steps) == written_out


def test_round_trip_through_yaml(tmp_path):
    raw = {
        **LEAST,
        "regularizer": {"preset": "paper", "ema": 0.5, "threshold": 1 / 3},
        "optimizer": {"lr": 1e-5, "eps": 1e-12},
        "train": {"epochs": 0.1, "seed": 7, "export_shard_bytes": 10**15},
        "output_dir": "runs/with space: and colon",
    }
    config = config_from_dict(raw)
    path = tmp_path / "c.yaml"
    path.write_text(config_to_yaml(config))
    assert load_run_config(path) == config
    assert config_to_yaml(load_run_config(path)) == config_to_yaml(config)


def test_overrides_apply_in_order_and_make_sections(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ndata: {train: t}\nrisk: {estimator: none}\ntrain:\n")
    config = load_config(
        path,
        ["train.steps=3", "optimizer.lr=1e-3", "train.steps=5", "engine.name=single", "model=a=b"],
    )
    assert config.train.steps == 5
    assert config.optimizer.lr == 1e-3
    assert config.engine.name == "single"
    assert config.model == "a=b"
    epochs = load_config(path, ["train.steps=3", "train.steps=null", "train.epochs=2"])
    assert (epochs.train.steps, epochs.train.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    "override",
    "train.steps =3 model.deeper=1 train.steps=[ train.stepz=1 train.steps=1.5 .".split(),
)
def test_overrides_that_do_not_fit(override, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "full", "near"),
    [
        (with_(modle="x"), "modle", "model"),
        (with_(outputdir="x"), "outputdir", "output_dir"),
        (with_("train", stpes=3), "train.stpes", "steps"),
        (with_("train", micro_batch=3), "train.micro_batch", "micro_batch_size"),
        (with_("optimizer", learning_rate=3), "optimizer.learning_rate", None),
        (with_("regularizer", treshold=0.5), "regularizer.treshold", "threshold"),
        (with_("regularizer", ceil=1), "regularizer.ceil", "ceiling"),
        (with_("data", maxlength=3), "data.maxlength", "max_length"),
        (with_("data", **{"7": 3}), "data.7", None),
    ],
)
def test_unknown_keys_name_the_nearest(raw, full, near):
    text = refusal(raw)
    assert repr(full) in text
    assert "did you mean" in text
    if near is not None:
        assert f"did you mean {near!r}?" in text


def test_a_key_that_is_no_text():
    assert "did you mean" in refusal({**LEAST, 7: 1})
    assert "did you mean" in refusal({**LEAST, None: 1})


@pytest.mark.parametrize(
    "raw",
    [
        with_("train", steps="many"),
        with_("train", steps=2.5),
        with_("train", steps=True),
        with_("train", micro_batch_size=None),
        with_("train", activation_checkpointing=1),
        with_("train", activation_checkpointing="yes"),
        with_("train", precision=16),
        with_("optimizer", lr="fast"),
        with_("optimizer", lr=None),
        with_("optimizer", lr=True),
        with_("optimizer", lr=[1e-3]),
        with_("optimizer", lr=10**400),
        with_("data", train=3),
        with_("data", train=None),
        with_(model=None),
        with_(train=3),
        with_(train=[1]),
        with_(output_dir=None),
    ],
)
def test_wrong_types(raw):
    assert "must" in refusal(raw)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("5", 5.0), ("0.5", 0.5), ("+1e-4", 1e-4)]
)
def test_numbers_that_yaml_reads_as_text(text, value, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(LEAST) + f"optimizer: {{lr: {text}}}\n")
    assert load_config(path).optimizer.lr == value
    assert isinstance(load_config(path).optimizer.lr, float)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("section", "key", "values"),
    [
        ("reference", "offload", ["disk"]),
        ("reference", "keep_bytes", [-1]),
        ("reference", "balance", ["even"]),
        ("reference", "rows_per_pass", [0, -1]),
        ("data", "overlong", ["cut"]),
        ("data", "max_length", [1, 0, -5]),
        ("data", "anchor_fraction", [0, 1, -0.1, NAN]),
        ("risk", "estimator", ["judge", "Probe"]),
        ("risk", "source", ["both"]),
        ("regularizer", "objective", ["tokenwise"]),
        ("regularizer", "divergence", ["kl"]),
        ("regularizer", "schedule", ["cosine"]),
        ("regularizer", "granularity", ["token"]),
        ("regularizer", "threshold", [-0.1, 1.1, NAN]),
        ("regularizer", "floor", [-0.1, NAN]),
        ("regularizer", "ceiling", [1.01, -1, NAN, INF]),
        ("regularizer", "slope", [0, -1, NAN, INF]),
        ("regularizer", "preset", ["papr", 3, ["paper"]]),
        ("optimizer", "lr", [0, -1e-5, NAN, INF]),
        ("optimizer", "weight_decay", [-1, NAN, INF]),
        ("optimizer", "warmup_ratio", [-0.1, 1.1, NAN]),
        ("optimizer", "min_lr_ratio", [-0.1, 1.1, NAN]),
        ("optimizer", "schedule", ["step"]),
        ("optimizer", "max_grad_norm", [-1, NAN]),
        ("optimizer", "beta1", [-0.1, 1, NAN]),
        ("optimizer", "beta2", [-0.1, 1, NAN]),
        ("optimizer", "eps", [0, -1, NAN, INF]),
        ("train", "steps", [0, -1]),
        ("train", "epochs", [0, -1, NAN, INF]),
        ("train", "micro_batch_size", [0]),
        ("train", "grad_accum_steps", [0]),
        ("train", "precision", ["fp16"]),
        ("train", "seed", [-1]),
        ("train", "save_every", [-1]),
        ("train", "keep_checkpoints", [0]),
        ("train", "eval_every", [-1]),
        ("train", "chunk_tokens", [0]),
        ("train", "export_shard_bytes", [0]),
        ("engine", "name", ["fsdp", "deepseed"]),
        ("engine", "zero_stage", [0, 4]),
        ("engine", "offload_optimizer", ["nvme"]),
        ("engine", "offload_params", ["nvme"]),
        ("engine", "timeout_s", [0, -1, NAN, INF]),
    ],
)
def test_values_out_of_range(section, key, values):
    for value in values:
        text = refusal(with_(section, **{key: value}))
        assert f"{section}.{key}" in text, value


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ({"model": "m", "data": {"train": "t"}}, ["risk.path", "probe fit"]),
        (with_("train", steps=3, epochs=1), ["train.steps", "train.epochs"]),
        (with_("regularizer", floor=0.5, ceiling=0.4), ["regularizer.ceiling", "floor"]),
        (with_("regularizer", ceiling=2.0), ["additive"]),
        (with_("regularizer", objective="static", ceiling=2.0), ["additive"]),
        (with_("regularizer", ema=0.5), ["granularity=batch"]),
        (with_("regularizer", ema=1.0, granularity="batch"), ["regularizer.ema"]),
        (with_("train", eval_every=2), ["data.validation"]),
        (
            {**with_("risk", estimator="none"), "reference": {"balance": "deal"}},
            ["reference.balance", "safereg score"],
        ),
        (
            {**with_("regularizer", granularity="batch"), "reference": {"balance": "deal"}},
            ["reference.balance", "granularity=sequence"],
        ),
        (
            {**with_("regularizer", objective="static"), "reference": {"balance": "deal"}},
            ["reference.balance", "static"],
        ),
        (
            {**with_("regularizer", objective="none"), "reference": {"cache": "c"}},
            ["reference.cache", "objective=none"],
        ),
        (
            {**with_("regularizer", objective="none"), "reference": {"balance": "exchange"}},
            ["reference.balance", "objective=none"],
        ),
        (
            with_("reference", balance="exchange", cache="c"),
            ["reference.balance", "reference.cache"],
        ),
        (
            {**with_("data", anchor="a"), "regularizer": {"objective": "none"}},
            ["data.anchor", "objective"],
        ),
        (
            with_("engine", name="fsdp2", hpz_partition_size=2),
            ["engine.hpz_partition_size", "got 2 and none", "engine.name=fsdp2"],
        ),
        (
            with_("engine", name="fsdp2", offload_optimizer="cpu"),
            ["engine.offload_optimizer", "got 1 and cpu", "engine.offload_params=cpu"],
        ),
        (with_(lora={"r": 8}), ["lora.r"]),
        ({"data": {"train": "t"}, "risk": {"estimator": "none"}}, ["model"]),
        ({"model": "m", "risk": {"estimator": "none"}}, ["data"]),
        ({"model": "m", "data": {}, "risk": {"estimator": "none"}}, ["data.train"]),
    ],
)
def test_impossible_combinations(raw, names):
    text = refusal(raw)
    for name in names:
        assert name in text


def test_what_is_allowed():
    assert config_from_dict(with_("regularizer", objective="additive", ceiling=7)).needs_risk
    plain = config_from_dict(
        {"model": "m", "data": {"train": "t"}, "regularizer": {"objective": "none"}}
    )
    assert not plain.needs_reference
    assert not plain.needs_risk
    static = config_from_dict(
        {
            "model": "m",
            "data": {"train": "t", "anchor": "a"},
            "regularizer": {"objective": "static", "ceiling": 0},
        }
    )
    assert static.needs_reference
    assert not static.needs_risk


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_fill_what_is_not_given(preset):
    filled = config_from_dict(with_("regularizer", preset=preset)).regularizer
    for key, value in PRESETS[preset].items():
        assert getattr(filled, key) == value
    assert (filled.floor, filled.ceiling, filled.granularity) == (0.1, 0.9, "batch")
    assert filled.schedule == {"paper": "linear", "official": "clamp"}[preset]


def test_explicit_keys_win_over_the_preset(tmp_path):
    path = tmp_path / "c.yaml"
    given = with_("regularizer", preset="paper", ceiling=0.5, schedule="step")
    path.write_text(yaml.safe_dump(given))
    regularizer = load_config(path).regularizer
    assert (regularizer.ceiling, regularizer.schedule, regularizer.floor) == (0.5, "step", 0.1)
    overridden = load_config(path, ["regularizer.granularity=sequence"]).regularizer
    assert overridden.granularity == "sequence"
    added = load_config(path, ["regularizer.preset=official"]).regularizer
    assert (added.preset, added.schedule) == ("official", "step")


def test_reading_does_not_change_what_it_reads():
    raw = with_("regularizer", preset="paper")
    before = yaml.safe_dump(raw)
    config_from_dict(raw)
    assert yaml.safe_dump(raw) == before


@pytest.mark.parametrize(
    "content", [b"", b"- a\n", b"just text\n", b"a: [\n", b"a: b: c\n", b"model: \xff\n", b"\x00"]
)
def test_files_that_are_no_configuration(content, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="check the path"):
            load_config(path)


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_key_is_documented(cls):
    assert cls.__doc__.endswith(".")
    for name, field in cls.model_fields.items():
        if not is_section(field.annotation):
            assert field.description, name
            assert field.description.endswith("."), name


# Several signals

PROBE = {"estimator": "probe", "path": "DIR"}
JUDGE = {"estimator": "critic", "critic": {"endpoint": "http://h/v1", "model": "m", "format": "f"}}


def composite(*parts, estimator="max", **regularizer):
    raw = {**LEAST, "risk": {"estimator": estimator, "parts": list(parts)}}
    return {**raw, "regularizer": regularizer}


def test_parts_are_sections():
    raw = composite({"category": "acts", **PROBE}, {"category": "things", **JUDGE, "ceiling": 0.5})
    config = config_from_dict(raw)
    assert [type(part) for part in config.risk.parts] == [RiskPart, RiskPart]
    assert config.risk.parts[1].critic.endpoint == "http://h/v1"
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (composite(), ["risk.parts", "0 parts"]),
        (composite({"category": "a b", **PROBE}), ["category", "a b"]),
        (composite({"category": "a", **PROBE, "weigth": 1}), ["risk.parts[0].weigth", "weight"]),
        (composite({"category": "a", **PROBE, "weight": 0}), ["risk.parts[a].weight"]),
        (composite({"category": "a", **PROBE}, {"category": "a", **JUDGE}), ["different"]),
        (composite({"category": "a", "estimator": "probe"}), ["risk.parts[a].path", "probe fit"]),
        (composite({"category": "a", "estimator": "critic"}), ["risk.parts[a].critic", "endpoint"]),
        (composite({"category": "a", "estimator": "max"}), ["risk.parts[a].estimator"]),
        (composite({"category": "a", **PROBE, "ceiling": 1.5}), ["risk.parts[a].ceiling"]),
        (
            composite({"category": "a", **PROBE, "ceiling": 0.5}, granularity="batch"),
            ["granularity=sequence"],
        ),
        (
            composite({"category": "a", **PROBE, "ceiling": 0.5}, estimator="weighted"),
            ["risk.estimator=max"],
        ),
        (with_("risk", parts={"category": "a"}), ["risk.parts", "list"]),
        (with_("risk", estimator="critic"), ["risk.critic", "endpoint"]),
        (
            with_("risk", estimator="critic", critic={"endpoint": "http://h/v1"}),
            ["risk.critic.endpoint", "model"],
        ),
        (with_("risk", drift_recall=0), ["risk.drift_recall"]),
        (with_("risk", max_held_back=1.5), ["risk.max_held_back"]),
        (with_("data", declared_poison=2), ["data.declared_poison"]),
    ],
)
def test_impossible_signals(raw, names):
    text = refusal(raw)
    for name in names:
        assert name in text, text


def test_a_run_goes_on_with_its_judge_at_another_place():
    judge = {"endpoint": "http://h:1/v1", "model": "m", "format": "llama_guard"}

    def hashed(**changes):
        part = {"category": "a", "estimator": "critic", "critic": {**judge, **changes}}
        alone = with_("risk", estimator="critic", critic={**judge, **changes})
        return [config_hash(config_from_dict(raw)) for raw in (alone, composite(part))]

    places = {"endpoint": "http://h:2/v1", "timeout_s": 9, "concurrency": 2, "cache": "none"}
    assert hashed(**places) == hashed()
    for decides in ({"model": "n"}, {"format": "qwen3guard"}, {"fail": "open"}):
        assert all(a != b for a, b in zip(hashed(**decides), hashed(), strict=True))


# Several data sets, and rows that are streamed

WEIGHTED = [{"path": "a", "weight": 1}, {"path": "b", "weight": 0.5}]


def test_data_sets_are_a_path_or_a_list():
    for given, sets, names, weights in (
        ("a", [("a", None)], "a", None),
        (["a"], [("a", None)], "a", None),
        (["a", {"path": "b"}], [("a", None), ("b", None)], "a, b", None),
        (WEIGHTED, [("a", 1.0), ("b", 0.5)], "a, b", [1.0, 0.5]),
    ):
        config = config_from_dict(with_("data", train=given))
        assert [(each.path, each.weight) for each in config.data.train_sets] == sets
        assert (config.data.train_names, config.data.train_weights) == (names, weights)
        assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config
        assert replace(config.data, max_length=7).train_sets == config.data.train_sets


def test_data_sets_on_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    config = load_config(path, ["data.train=[a.jsonl, {path: b.jsonl}]"])
    names = [Path(each.path).name for each in config.data.train_sets]
    assert names == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (None, "data.train must be a path or a list of paths, or of `path` and `weight`, got null"),
        (3, "got 3"),
        ({"path": "a"}, "got {'path': 'a'}"),
        ([], "data.train is an empty list: give one path or more"),
        (["a", 3], "data.train[1] must be a path or a section of keys, got 3"),
        (
            [{"path": "a", "wieght": 1}],
            "unknown key 'data.train[0].wieght': did you mean 'weight'?",
        ),
        ([{"weight": 1}], "missing key data.train[0].path"),
        ([{"path": "a", "weight": 0}], "data.train[0].weight must be positive and finite, got 0"),
        ([{"path": "a", "weight": INF}], "data.train[0].weight must be positive and finite"),
        ([*WEIGHTED, "c"], "data.train has a weight for 2 of 3 data sets: give each one, or none"),
        (["a", "b", "a"], "data.train must name each data set once, got ['a', 'b', 'a']"),
    ],
)
def test_data_sets_that_cannot_be(train, says):
    assert says in refusal(with_("data", train=train))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"train": {"epochs": 1}}, "train.epochs"),
        ({"reference": {"cache": "c"}}, "reference.cache"),
        ({"reference": {"balance": "deal"}}, "reference.balance=deal"),
    ],
)
def test_what_needs_all_rows_is_refused_of_streams(changes, name):
    assert config_from_dict({**LEAST, **changes}) != config_from_dict(LEAST)
    text = refusal({**with_("data", streaming=True), **changes})
    assert text.startswith(f"{name} needs to know all rows beforehand")


@pytest.mark.parametrize(
    ("tracking", "says"),
    [
        ({"to": "wandb"}, "tracking.to must be a list, as [tensorboard], got 'wandb'"),
        ({"to": ["wandb", "mflow"]}, "got 'mflow': did you mean 'mlflow'?"),
        ({"projet": "p"}, "unknown key 'tracking.projet': did you mean 'project'?"),
        ({"alerts": {"canary": {}}}, "unknown key 'tracking.alerts.canary': did you mean 'canary_"),
        ({"alerts": {"held_back": {"max": 1, "min": 2}}}, "has min 2.0 above max 1.0"),
        ({"alerts": {"held_back": {"steps": 0}}}, "tracking.alerts.held_back.steps must be finite"),
    ],
)
def test_tracking_that_cannot_be(tracking, says):
    assert says in refusal({**LEAST, "tracking": tracking})


def test_tracking_that_is_not_said_is_not_written():
    """Runs of earlier versions go on, and their folders keep the same file."""
    said = config_from_dict({**LEAST, "tracking": {"alerts": None, "to": None}})
    assert said.tracking == TrackingConfig(to=(), alerts=None)
    assert config_from_dict({**LEAST, "tracking": None}) == config_from_dict(LEAST)
    assert "tracking" not in config_to_yaml(config_from_dict(LEAST))
    assert "alerts: null" in config_to_yaml(said)
    assert config_hash(said) == config_hash(config_from_dict(LEAST))


def test_weights_are_no_even_deal():
    raw = with_("data", train=WEIGHTED)
    config_from_dict({**raw, "train": {"epochs": 1}, "reference": {"cache": "c"}})
    text = refusal({**raw, "reference": {"balance": "deal"}})
    assert text.startswith("reference.balance=deal shows each row once an epoch")


def test_a_newer_key_at_its_default_leaves_file_and_hash_alone():
    plain = config_from_dict(LEAST)
    said = config_from_dict(with_("data", streaming=False, shuffle_buffer=10_000))
    assert config_to_yaml(said) == config_to_yaml(plain)
    assert "streaming" not in config_to_yaml(plain)
    streamed = config_from_dict(with_("data", streaming=True))
    assert config_hash(said) == config_hash(plain) != config_hash(streamed)
    assert "streaming: true" in config_to_yaml(streamed)
    assert differences(plain, streamed) == ["data.streaming was False, is True"]


# What a run that was begun before goes on by

FULL = """
model: m
data: {train: t.jsonl, validation: v.jsonl, anchor: a.jsonl, max_length: 77, declared_poison: 0.25}
reference: {model: r, offload: cpu, keep_bytes: 5}
risk:
  estimator: max
  max_held_back: 0.5
  parts:
    - {category: acts, path: DIR, threshold: 0.25, ceiling: 1}
    - {category: words, estimator: critic, weight: 2,
       critic: {endpoint: "http://h:1/v1", model: guard, format: llama_guard, retries: 1}}
regularizer: {objective: additive, schedule: sigmoid, ceiling: 2, slope: 8}
optimizer: {lr: 1e-4, beta2: 0.95}
train: {epochs: 1, micro_batch_size: 3, precision: fp32, eval_every: 5, save_every: 2}
engine: {name: single, timeout_s: 60}
output_dir: runs/x
profile: true
"""


@pytest.mark.parametrize(
    ("raw", "hashed"),
    [
        (LEAST, "77408f55e6efe6af24ab7d7cd190a420b7ea8e09de89f8d3eb67d9fe312de260"),
        (
            yaml.safe_load(FULL),
            "b0032e0df376b48416b1045f87625f53c4ab439dc8cbd81990725b0a26507c65",
        ),
    ],
    ids=["least", "full"],
)
def test_runs_of_version_0_1_go_on(raw, hashed):
    """Keys that came later do not count where they have their default."""
    assert config_hash(config_from_dict(raw)) == hashed


ASIDE = {
    *("signing.hmac_env", "signing.ed25519", "train.resume"),
    *("output_dir", "profile", "data.declared_poison", "reference.cache", "reference.keep_bytes"),
    "reference.engine",
    *("risk.max_held_back", "risk.max_hidden", "risk.gate_rows", "risk.cache", "train.save_every"),
    *("train.async_save", "train.save_staging"),
    *("train.keep_checkpoints", "train.export_shard_bytes", "engine.timeout_s"),
    *("risk.critic.endpoint", "risk.critic.concurrency", "risk.critic.timeout_s"),
    *("risk.critic.retries", "risk.critic.cache", "risk.critic.api_key_env"),
    "risk.critic.allow_plain_http",
    *(f"tracking.{key}" for key in ("to", "project", "run_name", "folder", "alerts.stop")),
    *(
        f"tracking.alerts.{band}.{key}"
        for band in ("held_back", "divergence", "canary_refusal", "non_finite")
        for key in ("min", "max", "steps")
    ),
}
OTHER_VALUES = {
    "output_dir": "elsewhere",
    "signing.hmac_env": "SAFEREG_OTHER",
    "signing.ed25519": "other.pem",
    "train.resume": "never",
    "profile": False,
    "data.declared_poison": 0.5,
    "reference.cache": "store",
    "reference.engine": "whole",
    "risk.cache": "none",
    "risk.critic.endpoint": "http://h:2/v1",
    "risk.critic.cache": "none",
    "risk.critic.api_key_env": "SAFEREG_KEY",
    "risk.critic.allow_plain_http": True,
    "risk.max_held_back": 0.75,
    "risk.max_hidden": 0.75,
    "train.async_save": True,
    "train.save_staging": "elsewhere",
    "tracking.to": ["mlflow"],
    "tracking.project": "other",
    "tracking.run_name": "other",
    "tracking.folder": "elsewhere",
    "tracking.alerts.stop": True,
    "tracking.alerts.non_finite.min": -7,
}


@pytest.mark.parametrize("key", sorted(ASIDE))
def test_a_key_that_changes_no_result_changes_no_hash(key):
    raw = yaml.safe_load(FULL)
    *parents, leaf = key.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
    before = config_from_dict(yaml.safe_load(FULL))
    section[leaf] = OTHER_VALUES.get(key, 7)
    if key == "train.save_staging":
        section["async_save"] = True  # alone it is refused
    now = config_from_dict(raw)
    assert now != before
    assert config_hash(now) == config_hash(before)
    assert differences(before, now) == []


def test_all_other_keys_change_the_result():
    marked = {
        key.name for name, cls in sections() for key in keys_of(cls, name) if not key.changes_result
    }
    of_parts = {key for key in marked if key.startswith("risk.parts[].")}
    assert marked - of_parts == ASIDE
    assert {key.removeprefix("risk.parts[].") for key in of_parts} == {
        key.removeprefix("risk.") for key in ASIDE if key.startswith("risk.critic.")
    }


def test_differences_name_the_key_and_both_values():
    before = config_from_dict(with_("train", steps=3, save_every=1))
    now = config_from_dict(with_("train", steps=4, save_every=2))
    assert differences(before, now) == ["train.steps was 3, is 4"]


# The objects

PYTHON_WITHOUT_TORCH = "import safereg_dist.{}, sys; print('torch' in sys.modules)"


@pytest.mark.parametrize("module", ["config", "commands.config", "cli"])
def test_a_configuration_is_read_without_torch(module):
    code = PYTHON_WITHOUT_TORCH.format(module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_sections_are_frozen_and_know_their_keys_only():
    config = config_from_dict(LEAST)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="stpes"):
        TrainConfig(stpes=3)  # type: ignore[call-arg]
    assert hash(config) == hash(config_from_dict(LEAST))


def test_replacing_checks_again():
    rule = RegularizerConfig(preset="paper", ceiling=0.5)
    assert (rule.floor, rule.ceiling) == (0.1, 0.5)
    assert replace(rule, ceiling=0.7) == RegularizerConfig(preset="paper", ceiling=0.7)
    assert rule.ceiling == 0.5
    with pytest.raises(ConfigError, match=r"regularizer\.floor"):
        replace(rule, ceiling=0.0)
    with pytest.raises(ConfigError, match="must be float"):
        replace(rule, ceiling="high")


def test_a_section_alone_names_where_it_belongs():
    given = {"local": "folder", "timeout_s": 0.0}
    with pytest.raises(ConfigError) as caught:
        section_from_dict(CriticConfig, given, "risk.critic")
    assert str(caught.value) == "risk.critic.timeout_s must be positive and finite, got 0.0"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (
            with_("train", steps="many", stpes=3),
            "unknown key 'train.stpes': did you mean 'steps'? (valid here: steps, epochs,",
        ),
        (
            {"risk": {"estimator": "none"}, "train": {"steps": 0}},
            "train.steps must be finite and at least 1, got 0",
        ),
        ({"risk": {"estimator": "none"}}, "missing key model, data: add it to the configuration"),
        (
            with_("engine", name="deepseed"),
            "engine.name must be one of deepspeed, fsdp2, single, got 'deepseed': did you mean "
            "'deepspeed'?",
        ),
        (
            with_("data", anchor_fraction=1),
            "data.anchor_fraction must lie in (0, 1), got 1: set data.anchor=null to train "
            "without anchor rows",
        ),
        (with_("train", steps=2.5), "train.steps must be int | null, got 2.5"),
        (with_("train", seed=None), "train.seed must not be null: give a int"),
        (with_("engine", zero_stage=4), "engine.zero_stage must be one of 1, 2, 3, got 4"),
        (
            with_("engine", zero_stage=2, offload_params="cpu"),
            "engine.hpz_partition_size and engine.offload_params are for sharded weights, got 1 "
            "and cpu with engine.zero_stage=2: set them to 1 and none, or zero_stage=3",
        ),
        (with_(lora=3), "lora must be a section of keys, got 3"),
        (with_(train=3), "train must be a section of keys, got 3"),
        (with_("risk", parts=3), "risk.parts must be a list of sections, got 3"),
    ],
)
def test_the_first_mistake_in_one_line(raw, says):
    assert refusal(raw).startswith(says)
