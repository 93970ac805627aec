"""The verbs of the `safereg` command in the order of a user's work, and its parser."""

import argparse
import importlib
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from safereg_dist.commands.options import VerbParser
from safereg_dist.commands.versions import versions
from safereg_dist.errors import EXIT_CODES

STAGES = {
    "set up": {
        "config": "a file to start from, the JSON schema, one key explained",
        "convert-gguf": "a GGUF file as a Hugging Face folder",
        "plan": "memory, FLOPs, bytes and time before you pay for them",
        "doctor": "what would fail, before a job is paid for",
        "completion": "completion of this command in a shell",
    },
    "find the risk": {
        "probe": "activation probes: fit, compare, evaluate, seal",
        "anchor": "anchor rows: what the reference answers",
        "score": "the risk of every row of a data set, ahead of time",
        "serve-critic": "a local guard behind the API of OpenAI",
        "audit": "what a run would hold back, before any training",
        "reference": "stored states of the reference",
    },
    "train": {
        "train": "fine-tune with the configuration of a YAML file",
        "launch": "train on several ranks: the launcher that fits the configuration",
        "watch": "follow a run in the terminal",
        "stop": "ask a run to save and end, whatever started it",
        "sweep": "many runs from one description, in one table",
    },
    "see what came of it": {
        "eval": "attack success, over-refusal and task accuracy",
        "report": "HTML and figures of one or several runs",
        "ledger": "the log of every row's risk: verify its chain of hashes",
    },
}
"""Stage -> verb -> its purpose."""
VERBS = {name: what for verbs in STAGES.values() for name, what in verbs.items()}
QUICK_START = (
    "safereg config init --model MODEL --data ROWS.jsonl --out run.yaml",
    "safereg probe fit --model MODEL --data LABELLED.jsonl --out runs/probe-MODEL",
    "safereg anchor build --model MODEL --prompts LABELLED.jsonl --out runs/anchor-MODEL.jsonl",
    "safereg audit run.yaml",
    "safereg train run.yaml",
    "safereg eval --model runs/my-run/model --prompts HELD_OUT.jsonl --out runs/my-run/eval.json",
    "safereg report runs/my-run",
)
"""A first run, from a model and rows to its report."""


class _Version(argparse.Action):
    """Prints the versions when it is asked for: looking for them takes time."""

    def __init__(self, option_strings: Sequence[str], dest: str, **how: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **how)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(versions())
        parser.exit()


class _Command(VerbParser):
    """Its help lists the verbs by stage."""

    def format_help(self) -> str:
        return f"{self.format_usage()}\n{self.description}\n\n{_overview()}\n"


def command_parser(loaded: Collection[str] = tuple(VERBS)) -> argparse.ArgumentParser:
    """Knows all verbs, and the options of those in `loaded`: others' files are not imported."""
    parser = _Command(
        prog="safereg",
        usage="safereg VERB ...",
        description="Fine-tuning of language models that keeps their safety.",
    )
    # `deepspeed --module safereg_dist VERB ...` puts it before the verb.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--version", action=_Version, help="of this and of what it runs on")
    verbs = parser.add_subparsers(
        prog="safereg", metavar="VERB", dest="verb", required=True, parser_class=VerbParser
    )
    for name, what in VERBS.items():
        verb = verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        if name in loaded:
            module = f"safereg_dist.commands.{name.replace('-', '_')}"
            file = importlib.import_module(module)
            file.add_arguments(verb)
            verb.set_defaults(run=file.run)
    return parser


def _overview() -> str:
    """The verbs by stage, a first run, and the exit statuses."""
    lines = []
    names = max(map(len, VERBS))
    for stage, verbs in STAGES.items():
        lines += [f"{stage}:", *(f"  {name:{names}}  {what}" for name, what in verbs.items()), ""]
    lines += ["a first run (each command says the next one):", *(f"  {c}" for c in QUICK_START)]
    lines += ["", "exit status:"]
    for code, meaning in EXIT_CODES.items():
        first, *more = textwrap.wrap(meaning, 88)
        lines += [f"  {code:>3}  {first}", *(f"       {line}" for line in more)]
    lines += ["", "options:", "  --version  versions of this and of what it runs on"]
    lines += ["", "`safereg VERB --help` has the options of a verb and an example."]
    return "\n".join(lines)
