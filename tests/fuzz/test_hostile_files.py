"""Claimed: whatever a file holds that the verbs are given, each ends with status 0, or with 2 and
one line; there is no traceback, no hang (10 s of the processor), no file outside the folders for
results; nothing in a model's folder is run, and no call could ask to.

Files are changed by fixed seeds, in real runs of the verbs (`tests/fuzz/run.py`, whose table with
more cases is `benchmarks/results/fuzz.csv`), and by hypothesis where a reader is called alone.
"""

import ast
import csv
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.builders import (
    TEMPLATE,
    random_rows,
    save_model,
    tiny_model,
    word_tokenizer,
    write_jsonl,
    write_run,
)
from support.extent import FULL
from support.launching import ROOT
from support.said import without_asides

from safereg_dist.cli import main
from safereg_dist.config import load_config
from safereg_dist.config.yaml_text import parse_yaml
from safereg_dist.data import chat_template
from safereg_dist.data.files import read_prompts, read_rows
from safereg_dist.data.tokenized import tokenize_row
from safereg_dist.errors import ConfigError, DataError, SafeRegError, printable
from safereg_dist.risk.override import read_overrides
from safereg_dist.storage.json_text import parse_json

QUICK = settings(
    max_examples=2000 if FULL else 150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(("user", "assistant", "tool", "system")) | VALUES,
        "content": st.text() | VALUES,
        "from": st.sampled_from(("human", "gpt", "function_call")) | VALUES,
        "value": st.text() | VALUES,
        "tool_calls": VALUES,
        "train": VALUES,
        "weight": VALUES,
    },
)
KEYS = (
    *("prompt", "response", "completion", "input", "output", "instruction", "id", "risk", "tools"),
    *("label", "measure", "responses", "choices", "answer", "answers", "answerKey", "question"),
    *("complying", "type", "pair", "context", "Goal", "Index", "Category", "action", "reason"),
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(KEYS, st.text() | VALUES),
        "messages": st.lists(TURNS, max_size=4) | VALUES,
        "conversations": st.lists(TURNS, max_size=4) | VALUES,
    },
)


@pytest.mark.slow
def test_no_verb_fails_on_hostile_files(tmp_path):
    out = tmp_path / "fuzz.csv"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz" / "run.py", "--out", out]
        + (["--cases", "60"] if FULL else ["--cases", "2", "--first", "100000"]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 30
    assert sum(int(row["refused"]) for row in rows) > len(rows)  # else nothing hostile was tried


BOMB = "a0: &a0 [w, w]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 25))


@pytest.mark.parametrize(
    "text",
    [
        *(BOMB, "a: &x [*x]", "a: 2001-99-99", "a: 0b_", f"a: {'9' * 5000}", "[" * 5000),
        *("? " * 3000, "a: !!timestamp x", "a: !!bool x", f"a: 0x{'f' * 9000}", "a: 1\n" * 60_000),
        *("a: !!python/object/apply:os.getpid []", "a: \x00", "{" * 90_000),
    ],
    ids=lambda text: text[:12],
)
def test_yaml_is_refused_in_one_line_and_at_once(tmp_path, capsys, text):
    (tmp_path / "run.yaml").write_text(text)
    started = time.process_time()
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 2
    assert time.process_time() - started < 10
    assert_one_line(capsys.readouterr().err)


def test_aliases_mean_what_they_stand_for():
    text = "a: &sft [x=1, y=2]\nb: {c: *sft, <<: &more {d: 1}}\ne: *more"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_yaml_of_configurations_means_what_it_meant():
    for path in sorted([*ROOT.glob("launch/**/*.yaml"), *ROOT.glob("benchmarks/**/*.yaml")]):
        text = path.read_text(encoding="utf-8")
        try:
            wanted = yaml.safe_load(text)
        except yaml.YAMLError:  # several documents
            continue
        assert parse_yaml(text) == wanted, path


@QUICK
@given(st.text() | VALUES.map(json.dumps))
def test_readers_of_text_raise_one_error(text):
    for parse, error in ((parse_yaml, yaml.YAMLError), (parse_json, json.JSONDecodeError)):
        try:
            parse(text)
        except error:
            pass


@QUICK
@given(rows=st.lists(ROWS, min_size=1, max_size=2))
def test_rows_of_any_shape_are_read_or_refused(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = word_tokenizer()
    for read in (read_prompts, read_overrides):
        refused_or(DataError, lambda read=read: list(read(path)))
    for where, row in read_rows(path):
        refused_or(DataError, lambda row=row, where=where: tokenize_row(
            row, where, tokenizer, default_id="a"))  # fmt: skip


@QUICK
@given(st.text(alphabet=st.characters()), st.integers(1, 50))
def test_printable_text_cannot_move_the_cursor(text, limit):
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown.encode("utf-8")) <= 10 * (limit + 6)


def test_errors_are_one_line_of_bounded_length():
    said = str(SafeRegError("a\x1b[2J\n\u202e" + "x" * 200_000 + " what to do"))
    assert said.isprintable()
    assert len(said) < 520
    assert said.startswith("a\\x1b[2J \\u202e")
    assert said.endswith("what to do")


@pytest.mark.parametrize(
    "override",
    ["train.seed=99999999999999999999", "engine.timeout_s=1e300", "train.steps=*a", "=", "a"],
)
def test_overrides_beyond_reason_are_refused(tmp_path, override):
    write_jsonl(tmp_path / "t.jsonl", random_rows(2))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"model": "m", "data": {"train": str(tmp_path / "t.jsonl")}}))
    with pytest.raises(ConfigError) as refused:
        load_config(path, [override])
    assert len(str(refused.value)) < 520


HARMFUL = {
    "division": "{{ 1/0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "memory": "{{ 'x' * 10**10 }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(70) %}{% set n.s = n.s + n.s %}"
    "{% endfor %}{{ n.s }}",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "length": "{{ 'x' * 9000000 }}",
    "number": "{{ 9 ** (9 ** 9) }}",
}


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.parametrize("place", ["before", "inside"])
def test_a_chat_template_has_bounds(monkeypatch, name, place):
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    harm = HARMFUL[name]
    template = (
        harm + TEMPLATE if place == "before" else TEMPLATE.replace("{{ '<asst> ' }}", harm, 1)
    )
    started = time.process_time()
    with pytest.raises(DataError, match="x:1: chat template or tokenizer fail"):
        tokenize_row(random_rows(1)[0], "x:1", word_tokenizer(template), default_id="a")
    assert time.process_time() - started < 10


def test_the_bounds_are_gone_after_a_template():
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS)
    tokenize_row(random_rows(1)[0], "x:1", word_tokenizer(), default_id="a")
    with pytest.raises(DataError):
        tokenize_row(random_rows(1)[0], "x:1", word_tokenizer("{{ 'x' * 10**10 }}"), default_id="a")
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


class Runs:
    """A pickle that leaves a trace as it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


@pytest.fixture
def pickled(tmp_path):
    """A run whose model has its weights in a pickle, and code of its own."""
    model = save_model(tmp_path / "model", tiny_model())
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "trace")))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        name: "code.Own" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'trace')!r})\n")
    write_jsonl(tmp_path / "train.jsonl", random_rows(4))
    labels = ("harmful", "benign")
    asked = [row["prompt"] for row in random_rows(60, longest=20)]
    prompts = [{"prompt": text, "label": labels[n % 2]} for n, text in enumerate(asked)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    run = {
        "model": str(model),
        "data": {"train": str(tmp_path / "train.jsonl")},
        "risk": {"estimator": "column"},
        "engine": {"name": "single"},
        "train": {"steps": 1, "precision": "fp32"},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    return tmp_path


def test_pickled_weights_are_refused_by_every_verb(pickled, capsys):
    model, prompts = str(pickled / "model"), str(pickled / "prompts.jsonl")
    rows = str(pickled / "train.jsonl")
    out = str(pickled / "result")
    for arguments in (
        ["train", str(pickled / "run.yaml")],
        ["eval", "--model", model, "--prompts", prompts, "--out", out],
        ["probe", "fit", "--model", model, "--data", prompts, "--out", out, "--recall", "0.5"],
        ["anchor", "build", "--model", model, "--prompts", prompts, "--out", out],
        ["score", "--local", model, "--format", "llama_guard", "--data", rows, "--out", out],
    ):
        assert main(arguments) == 2, arguments
        assert "pytorch_model.bin, a pickle" in assert_one_line(capsys.readouterr().err)
    assert not (pickled / "trace").exists()


def test_an_unknown_architecture_brings_no_code(pickled):
    config = json.loads((pickled / "model" / "config.json").read_text())
    (pickled / "model" / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    (pickled / "yes").write_text("y\n" * 20)
    with (pickled / "yes").open() as answers:
        done = subprocess.run(
            [sys.executable, "-m", "safereg_dist", "train", pickled / "run.yaml", "--dry-run"],
            stdin=answers,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert_one_line(done.stderr)
    assert not (pickled / "trace").exists()


LOADERS = ("from_pretrained", "from_config")
OWN = {"PeftConfig"}
"""What has no remote code: settings in JSON."""
SOURCES = [
    *ROOT.glob("safereg_dist/**/*.py"),
    *ROOT.glob("launch/*.py"),
    *ROOT.glob("launch/recipes/*.py"),
]


def loading_calls(path: Path):
    """(line, what is loaded, keywords) of each call that may import code beside weights."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            kind = ast.unparse(node.func.value)
            if node.func.attr in LOADERS and kind.split(".")[-1] not in OWN:
                yield node, kind, {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_no_call_may_import_code_beside_weights():
    found = [(path, *call) for path in SOURCES for call in loading_calls(path)]
    assert len(found) >= 10
    for path, node, _, keywords in found:
        assert keywords.get("trust_remote_code") == "False", f"{path}:{node.lineno}"


def test_no_call_may_load_a_pickle():
    for path in SOURCES:
        for node, kind, keywords in loading_calls(path):
            is_model = "Config" not in kind and "Tokenizer" not in kind
            if is_model and node.func.attr == "from_pretrained" and path.name != "gguf.py":
                assert keywords.get("use_safetensors") == "True", f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "no-such"}},
        *({"hidden_act": "no-such"}, {"num_attention_heads": 0}, {"num_key_value_heads": 3}),
        *(
            {"dtype": "no-such"},
            {"num_hidden_layers": 10**9},
            {"hidden_size": "x"},
            {"vocab_size": -1},
        ),
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": []},
    ],
    ids=str,
)
def test_odd_models_are_refused_in_one_line(tmp_path, capsys, change):
    path, fields = small_run(tmp_path), tmp_path / "model" / "config.json"
    fields.write_text(json.dumps({**json.loads(fields.read_text()), **change}))
    assert main(["train", str(path), "--dry-run"]) == 2
    assert_one_line(capsys.readouterr().err)


def test_a_terminal_is_shown_escapes_and_does_not_get_them(tmp_path, capsys):
    path, rows = small_run(tmp_path), random_rows(4)
    for row in rows:
        row |= {"id": f"\x1b]0;owned\x07{row['id']}\u202e", "risk": 0.5}
        row["prompt"] += " \x1b[2J \x9b31m"
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert main(["audit", str(path), "--show-text"]) == 0
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "\\x1b]0;owned\\x07row-0000\\u202e" in shown
    assert "\\x1b[2J" in shown


def small_run(folder):
    train = {"steps": 1, "precision": "fp32", "micro_batch_size": 2}
    more = {"engine": {"name": "single"}, "train": train, "output_dir": str(folder / "out")}
    return write_run(folder, rows=4, **more)


def refused_or(error, call):
    """The call returns, or raises this error in one line of bounded length."""
    said = ""
    try:
        call()
    except error as err:
        said = str(err)
    assert said.isprintable()
    assert len(said) < 520


def assert_one_line(text: str) -> str:
    """The line, but for bars and what a verb says that it does."""
    said = without_asides(text)
    assert len(said) == 1, text[-2000:]
    assert said[0].startswith("safereg: ")
    assert len(said[0]) < 520
    assert said[0].isprintable()
    return said[0]
