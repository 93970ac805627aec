"""`safereg config`: the JSON schema, a starter file, and any key in its own words."""

import argparse
import difflib
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

from safereg_dist.commands.config_reference import (
    Key,
    as_yaml,
    keys_of,
    sections,
    sentence_of,
)
from safereg_dist.commands.options import add_action, example
from safereg_dist.commands.outcome import Outcome, command
from safereg_dist.config import Config
from safereg_dist.config.section import Section, section_in
from safereg_dist.errors import ConfigError, DataError, printable

_SCHEMA_HELP = """The JSON schema of the configuration, for editors and pipelines.
Editors that speak to yaml-language-server complete and check a file that begins with
`# yaml-language-server: $schema=safereg.schema.json`."""

_USUAL = (
    *("model", "data.train", "data.anchor", "data.max_length", "risk.estimator", "risk.path"),
    *("regularizer.objective", "regularizer.schedule", "regularizer.ceiling", "optimizer.lr"),
    *("train.epochs", "train.micro_batch_size", "train.grad_accum_steps", "train.precision"),
    *("train.activation_checkpointing", "train.save_every", "engine.name", "output_dir"),
)
"""The keys that most people set, in the order of the starter file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own arguments."""
    shows = "safereg config init --model MODEL --data rows.jsonl --out run.yaml"
    parser.epilog = example(shows)
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    init = add_action(actions, "init", "a commented file to start from", shows=shows)
    init.add_argument("--model", required=True, metavar="DIR", help="folder or hub id")
    init.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="training rows: JSONL, CSV or a Hugging Face dataset id",
    )
    init.add_argument(
        "--out", type=Path, metavar="FILE.yaml", help="a new file (default: print it)"
    )
    explain = add_action(
        actions,
        "explain",
        "what a key or a section means",
        shows="safereg config explain train.steps",
    )
    explain.add_argument(
        "key", nargs="?", default="", help="e.g. train.steps, or a section (default: all)"
    )
    schema = add_action(
        actions,
        "schema",
        "the JSON schema, for editors and pipelines",
        shows="safereg config schema > safereg.schema.json",
    )
    schema.description = _SCHEMA_HELP


def run(arguments: argparse.Namespace) -> Outcome:
    """Prints the requested text, or writes the starter file.

    Raises:
        ConfigError: an unknown key, or a starter file that is there already.
        DataError: no readable data file.
    """
    if arguments.action == "schema":
        print(json.dumps(Config.model_json_schema(), indent=2))
    elif arguments.action == "explain":
        print(explanation(arguments.key))
    elif arguments.out is None:
        print(starter(arguments.model, arguments.data), end="")
    else:
        return _init(arguments.model, arguments.data, arguments.out)
    return Outcome()


def _init(model: str, data: str, out: Path) -> Outcome:
    _write_new(out, starter(model, data, out))
    if Path(data).suffix in (".jsonl", ".json", ".csv") and not Path(data).exists():
        print(f"{printable(data)} is not there yet: its rows are taken to have no `risk`")
    print(f"written: {printable(out)}; look it through")
    return Outcome(now=command("audit", out) if _has_risk(data) else _fit(model, out.parent))


def _fit(model: str, folder: Path) -> str:
    """The command that makes the probe of a starter file in `folder`."""
    given = ("--model", model, "--data", "LABELLED.jsonl", "--out", folder / _probe_of(model))
    return command("probe", "fit", *given)


def _probe_of(model: str) -> str:
    return f"runs/probe-{Path(model).name}"


def _anchor_of(model: str) -> str:
    return f"runs/anchor-{Path(model).name}.jsonl"


def explanation(name: str) -> str:
    """What a key means, or a section and its keys; several lines.

    Raises:
        ConfigError: unknown; the nearest names are suggested.
    """
    bare = re.sub(r"\[[^]]*\]", "", name)  # risk.parts[0].weight is risk.parts[].weight
    explained: dict[str, str] = {}
    for section, cls in sections():
        own = section.replace("[]", "")  # a list of sections may be a key with a value too
        before = f"{explained[own]}\n\n" if own in explained else ""
        explained[own] = before + _explained_section(section, cls)
        explained |= {k.name.replace("[]", ""): _explained_key(k) for k in keys_of(cls, section)}
    if bare in explained:
        return explained[bare]
    known = [*filter(None, explained)]
    # Most who miss leave the section out: `ceiling` is `regularizer.ceiling`, and a part's.
    last = bare.rpartition(".")[2]
    near = [key for key in known if key.endswith(f".{last}")]
    near = near or difflib.get_close_matches(bare, known, n=1, cutoff=0.0)
    raise ConfigError(
        f"unknown key {name!r}: did you mean {' or '.join(map(repr, near))}? "
        "(`safereg config explain` lists the sections)"
    )


def _explained_key(key: Key) -> str:
    facts = {
        "type": key.type,
        "default": key.default,
        "range": key.range,
        "result": "changes with it"
        if key.changes_result
        else "stays the same; a run may go on with another value",
    }
    lines = [key.name, *textwrap.wrap(key.sentence, 96, **_INDENT), ""]
    return "\n".join([*lines, *(f"  {name:9}{fact}" for name, fact in facts.items() if fact)])


_INDENT: dict[str, Any] = dict(initial_indent="  ", subsequent_indent="  ")


def _explained_section(name: str, cls: type[Section]) -> str:
    inner = {
        f"{name}.{key}".lstrip("."): field.description or sentence_of(section)
        for key, field in cls.model_fields.items()
        if (section := section_in(field.annotation)) is not None
    }
    values = {key.name: key.sentence for key in keys_of(cls, name)}
    lines = [name or "the configuration", *textwrap.wrap(sentence_of(cls), 96, **_INDENT)]
    for key, sentence in (values | inner).items():
        lines += ["", f"{key}", *textwrap.wrap(sentence, 96, **_INDENT)]
    return "\n".join(lines)


def starter(model: str, data: str, file: Path = Path("CONFIG.yaml")) -> str:
    """A configuration file for a model and a data set: the usual keys, each under its sentence.

    What is there when seen from the working folder is named as it is seen from the file's folder.
    It uses the column if all rows have a `risk`; else it expects a probe and anchor rows, and says
    how they are made.
    """
    has_risk = _has_risk(data)
    values: dict[str, Any] = {
        "model": _seen_from(file.parent, model),
        "data.train": _seen_from(file.parent, data),
        "data.anchor": None if has_risk else _anchor_of(model),
        "risk.estimator": "column" if has_risk else "probe",
        "risk.path": None if has_risk else _probe_of(model),
        "train.epochs": 1.0,
        "train.save_every": 100,
    }
    labelled = ("anchor", "build", "--model", model, "--prompts", "LABELLED.jsonl", "--out")
    build = f"  {command(*labelled, file.parent / _anchor_of(model))}"
    head = [
        "A run of `safereg train`. All other keys: docs/configuration.md, or",
        "`safereg config explain`.",
        "",
    ]
    if has_risk:
        head += [
            "The risk is that of the rows. Anchor rows, named in `data.anchor`, keep refusals that",
            "a new task takes away even without poison:",
            build,
        ]
    else:
        head += [
            "The rows have no `risk`: a probe gives it, and anchor rows keep refusals that a new",
            "task takes away even without poison. Make both once, of labelled prompts (`prompt`",
            "and `label`: harmful or benign; 95 different harmful ones or more):",
            f"  {_fit(model, file.parent)}",
            build,
        ]
    head += [
        *("Then:", f"  {command('audit', file)}", f"  {command('train', file)}"),
        "On several GPUs `launch` in place of `train`. On several hosts (docs/multi_node.md)",
        "output_dir is a folder that all share; `hosts` names them, a line each: HOST slots=GPUS",
        f"  {command('plan', file, '--world-size', 16)}",
        f"  {command('doctor', file, '--hostfile', 'hosts')}",
        f"  {command('launch', file, '--hostfile', 'hosts')}",
    ]
    lines = [f"# {line}".rstrip() for line in head]
    keys = {key.name: key for group, cls in sections() for key in keys_of(cls, group)}
    before = ""
    for name in _USUAL:
        *section, leaf = name.split(".")
        if section and section[0] != before:
            lines += ["", f"{section[0]}:"]
        elif not section:
            lines.append("")
        before = section[0] if section else ""
        indent = "  " * len(section)
        lines += textwrap.wrap(
            keys[name].sentence,
            98,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
        )
        value = as_yaml(values[name]) if name in values else keys[name].default
        lines.append(f"{indent}{leaf}: {value}")
    return "\n".join([*lines, ""])


def _seen_from(folder: Path, name: str) -> str:
    return os.path.relpath(name, folder) if os.path.exists(name) and name[:1] != "/" else name


def _has_risk(data: str) -> bool:
    """True where every row of the file has a `risk`; what is not here is not looked into."""
    if not Path(data).exists():
        return False
    from safereg_dist.data.files import read_rows  # loads torch, which a configuration does without

    risks = [row.get("risk") is not None for _, row in read_rows(data)]
    if not risks:
        raise DataError(f"{data} has no row: check the file")
    return all(risks)


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as err:
        raise ConfigError(f"{path} is there already: choose another --out, or remove it") from err
    except OSError as err:
        raise ConfigError(f"{path} cannot be written: {err.strerror}") from err
