"""The verbs of the `safereg` command, and its parser."""

import argparse
import importlib
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from safereg_dist.commands.extras import versions

VERBS = {
    "train": "fine-tune with the configuration of a YAML file",
    "launch": "train on several ranks: the launcher that fits the configuration",
    "probe": "activation probes",
    "anchor": "anchor rows",
    "score": "the risk of every row of a data set, ahead of time",
    "serve-critic": "a local guard behind the API of OpenAI",
    "audit": "what a run would hold back, before any training",
    "reference": "stored states of the reference",
    "eval": "attack success, over-refusal and task accuracy",
    "sweep": "many runs from one description, in one table",
    "doctor": "what would fail, before a job is paid for",
    "watch": "follow a run in the terminal",
    "stop": "ask a run to save and end, whatever started it",
    "report": "HTML and figures of one or several runs",
    "plan": "memory, FLOPs, bytes and time before you pay for them",
    "ledger": "the log of every row's risk",
    "convert-gguf": "a GGUF file as a Hugging Face folder",
    "completion": "completion of this command in a shell",
    "config": "JSON schema, a starter file, one key explained",
}
"""The verbs, each with its purpose."""


class _Version(argparse.Action):
    """Prints the versions when it is asked for: looking for them takes time."""

    def __init__(self, option_strings: Sequence[str], dest: str, **how: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **how)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(versions())
        parser.exit()


def command_parser(loaded: Collection[str] = tuple(VERBS)) -> argparse.ArgumentParser:
    """Knows all verbs, and the options of those in `loaded`: others' files are not imported."""
    parser = argparse.ArgumentParser(
        prog="safereg", description="Safety-regularised fine-tuning of language models."
    )
    # `deepspeed --module safereg_dist VERB ...` puts it before the verb.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--version", action=_Version, help="of this and of what it runs on")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, what in VERBS.items():
        verb = verbs.add_parser(name, help=what)
        if name in loaded:
            module = name.replace("-", "_")
            command = importlib.import_module(f"safereg_dist.commands.{module}")
            command.add_arguments(verb)
            verb.set_defaults(run=command.run)
    return parser
