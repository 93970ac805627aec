"""Claimed: every verb explains itself (each option its text and default, an example that the real
parser takes), the page of all verbs is current, a misspelt word gets the nearest, figures come out
as JSON that no other text mixes with, and bars are drawn for people only.

Exact. The terminal is a pseudo-terminal, the files are real.
"""

import argparse
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from contextlib import contextmanager, suppress

import pytest
from support.launching import ROOT

from safereg_dist import cli, errors
from safereg_dist.cli import main
from safereg_dist.commands.outcome import Outcome, command, finish
from safereg_dist.commands.verb_reference import (
    actions_of,
    examples_of,
    options_of,
    parsers_of,
    reference,
)
from safereg_dist.commands.verbs import QUICK_START, VERBS, command_parser
from safereg_dist.screen.progress import progress_bar, quiet, shows_bars
from safereg_dist.screen.table import aligned, table

PARSERS = {parser.prog: parser for parser in parsers_of(command_parser())}
LEAVES = {prog: parser for prog, parser in PARSERS.items() if not actions_of(parser)}
SMALL_MODEL = {
    **{"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128},
    "max_position_embeddings": 512,
}


# The help


def test_every_verb_is_a_file_and_every_file_a_verb():
    folder = ROOT / "safereg_dist" / "commands"
    files = {p.stem for p in folder.glob("*.py") if "\ndef add_arguments(" in p.read_text()}
    assert files == {name.replace("-", "_") for name in VERBS}


@pytest.mark.parametrize("prog", PARSERS)
def test_every_option_has_its_text_and_its_default(prog, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    _, *entries = re.split(r"\n  (?=\S)", PARSERS[prog].format_help())
    for option in options_of(PARSERS[prog]):
        assert option.help, f"{prog}: {option.dest} says nothing"
        names = [*option.option_strings, str(option.metavar or option.dest)]
        name = names[0]
        [entry] = [entry for entry in entries if re.match(rf"{re.escape(name)}(?=[ ,\n])", entry)]
        assert len(re.split(r"\s{2,}", entry.strip())) > 1, entry
        if option.default not in (None, "", [], argparse.SUPPRESS) and option.default is not False:
            assert "default" in entry
            assert str(option.default) in entry


@pytest.mark.parametrize("prog", [prog for prog in PARSERS if prog != "safereg"])
def test_every_verb_shows_an_example_that_parses(prog):
    parser = PARSERS[prog]
    assert parser.description
    examples = examples_of(parser)
    assert examples, f"{prog} has no example"
    for line in examples:
        assert line.startswith(f"{prog} "), line
        assert line in parser.format_help().splitlines()[-len(examples) :][-1] or len(examples) > 1
        parsed(line)


def parsed(line: str) -> argparse.Namespace:
    """With the command's own parser; exits where it does not parse."""
    found = cli._arguments(shlex.split(line.split(" > ")[0], comments=True)[1:])
    assert callable(found.run)
    return found


def test_the_quick_start_is_a_chain(capsys):
    found = [parsed(line) for line in QUICK_START]
    init, fit, anchor, audit, train, evaluate, report = found
    assert init.out == audit.config == train.config
    assert init.model == str(fit.model) == str(anchor.model)
    assert fit.data == anchor.prompts[0]
    assert evaluate.model.parent == evaluate.out.parent == report.runs[0]
    shown = []
    for words in (["--help"], []):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
        shown.append(capsys.readouterr().out)
    shown, alone = shown
    assert alone == shown
    for line in QUICK_START:
        assert f"  {line}\n" in shown
    for name, what in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", shown, flags=re.M)


def test_the_starter_file_belongs_to_the_quick_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ROWS.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    assert main(shlex.split(QUICK_START[0])[1:]) == 0
    out, err = capsys.readouterr()
    assert out == "written: run.yaml; look it through\n"
    assert err == f"now: {QUICK_START[1]}\n"
    told = [line.lstrip("# ") for line in (tmp_path / "run.yaml").read_text().splitlines()]
    for line in QUICK_START[1:5]:
        assert line in told, line


def test_the_page_of_all_verbs_is_current():
    page = (ROOT / "docs" / "reference" / "verbs.md").read_text(encoding="utf-8")
    assert page == reference(), (
        "python -m safereg_dist.commands.verb_reference > docs/reference/verbs.md"
    )


# Exit statuses


def test_one_table_of_exit_statuses(monkeypatch):
    """What ends with each of them: 1 test_doctor, 75 test_dealt_resume, 130 test_sweep."""
    assert set(errors.EXIT_CODES) == {0, 1, 2, 75, 130}
    assert main(["config", "explain", "train"]) == errors.EXIT_DONE
    assert main(["config", "explain", "no_such_key"]) == errors.EXIT_REFUSED
    shown = " ".join(command_parser(()).format_help().split())
    for code, meaning in errors.EXIT_CODES.items():
        assert f" {code} {meaning}" in shown
        assert f"| {code} | {meaning} |" in reference()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "x.yaml"], "did you mean 'train'?"),
        (["probe", "evalute"], "did you mean 'evaluate'?"),
        (["probe", "xyz"], "unknown 'xyz': expected one of fit, sweep, evaluate, seal"),
        (["plan", "--precision", "bf61"], "did you mean 'bf16'?"),
    ],
)
def test_a_misspelt_word_gets_the_nearest(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == errors.EXIT_REFUSED
    assert said in capsys.readouterr().err


# Results


def test_json_on_stdout_is_alone_there(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_MODEL))
    words = ["plan", "--model-config", str(tmp_path / "config.json"), "--world-size", "2"]
    words += ["--quiet"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert main([*words, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == text
    assert main([*words, "--json", str(tmp_path / "deep" / "plan.json")]) == 0
    assert (tmp_path / "deep" / "plan.json").read_text() == out
    assert f"{json.loads(out)['model']['parameters']:,} parameters" in text


def test_a_file_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_MODEL))
    words = ["plan", "--model-config", str(tmp_path / "config.json"), "--world-size", "2"]
    assert main([*words, "--json", str(tmp_path / "config.json" / "x.json")]) == 2
    assert "safereg: cannot write" in capsys.readouterr().err


def test_figures_without_a_number_and_the_next_step(capsys):
    figures = {"a": float("nan"), "b": [1, float("inf"), "x"]}
    now = command("eval", "--model", "my model", "--out", "a\nb")
    given = argparse.Namespace(run=lambda _: Outcome(status=1, figures=figures, now=now), json="-")
    assert finish(given) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": None, "b": [1, None, "x"]}
    assert err == "now: safereg eval --model 'my model' --out 'a b'\n"
    given.quiet = True
    finish(given)
    assert capsys.readouterr().err == ""


# The screen


def test_columns_line_up():
    assert aligned([("a", 1), ("bbb", 22)]) == ["a     1", "bbb  22"]
    assert aligned([("aaaaaa", "b"), ("c", "d")], left=2, widest=3) == ["aaaaaa  b", "c    d"]
    assert table("T", ("", "n"), [("x", 5)]) == "T\n     n\n  x  5"


@contextmanager
def on_a_terminal(monkeypatch):
    """stderr as a pseudo-terminal; gives a function that reads what is shown there."""
    own, other = pty.openpty()
    termios.tcsetwinsize(own, (24, 80))
    os.set_blocking(own, False)

    def shown() -> str:
        text = ""
        with suppress(BlockingIOError):
            while True:
                text += os.read(own, 1 << 16).decode()
        return text

    with os.fdopen(other, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield shown
    os.close(own)


def test_a_bar_is_for_people(monkeypatch):
    with on_a_terminal(monkeypatch) as shown:
        assert shows_bars(True)
        assert list(progress_bar(range(3), desc="rows")) == [0, 1, 2]
        assert "rows: 100%" in shown()
        assert not shows_bars(False)
        assert list(progress_bar(range(3), shown=False)) == [0, 1, 2]
        with quiet():
            assert list(progress_bar(range(3))) == [0, 1, 2]
            assert not shows_bars(True)
        assert shown() == ""
        assert shows_bars(True)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    assert list(progress_bar(range(3))) == [0, 1, 2]
    assert pipe.getvalue() == ""


def test_transformers_draws_its_bars_for_people_too():
    code = """
from transformers.utils.logging import is_progress_bar_enabled as has_bars
from safereg_dist.screen.progress import bars_of_transformers
found = [has_bars()]
with bars_of_transformers(shown=True):
    found.append(has_bars())
print(*found, has_bars())
"""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    shown = {}
    own, other = pty.openpty()
    for place in (other, subprocess.DEVNULL):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=place,
            text=True,
            check=True,
        )
        shown[place] = done.stdout.split()
    os.close(own)
    os.close(other)
    assert shown[other] == ["True", "True", "True"]
    assert shown[subprocess.DEVNULL] == ["True", "False", "True"]
