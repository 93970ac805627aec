"""What the verbs' parsers share: their help, and the options that several have."""

import argparse
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

STDOUT = "-"
"""In place of a file's name: print it."""


class VerbParser(argparse.ArgumentParser):
    """A parser whose help shows every default, and that names the nearest of a misspelt word."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **how})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # Python 3.14 does it by itself (`suggest_on_error`); until then this is the only hook.
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near = difflib.get_close_matches(str(value), known, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise argparse.ArgumentError(
            action, f"unknown {value!r}: {meant}expected one of {', '.join(known)}"
        )


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and numbers as N (whole) and X."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return help_of(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "")
        named = super()._get_default_metavar_for_optional(action)
        return {"int": "N", "float": "X"}.get(kind, named)


def help_of(action: argparse.Action) -> str:
    """What an option says of itself, with its default as `%(default)s` where it has one.

    Off, none and nothing go without saying.
    """
    text = action.help or ""
    has_none = action.default is None or action.default in (argparse.SUPPRESS, [])
    if has_none or action.default is False or "default" in text:
        return text
    return f"{text} (default: %(default)s)"


def values_of(action: argparse.Action) -> str:
    """The values that an option takes, as its help shows them; empty for a switch."""
    if action.nargs == 0:
        return ""
    formatter = _Help("")
    if action.option_strings:
        named = formatter._get_default_metavar_for_optional(action)
    else:
        named = formatter._get_default_metavar_for_positional(action)
    return formatter._format_args(action, named)


def example(*lines: str) -> str:
    """The end of a verb's help: commands to copy."""
    return "\n  ".join(["example:", *lines])


def add_action(
    actions: "argparse._SubParsersAction[Any]", name: str, what: str, *, shows: str
) -> argparse.ArgumentParser:
    """The parser of one action of a verb, with its purpose and an example."""
    about = f"{what[0].upper()}{what[1:]}."
    return actions.add_parser(name, help=what, description=about, epilog=example(shows))


def at_least(low: int) -> Callable[[str], int]:
    """The type of an integer option that must not be below `low`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    parse.__name__ = "int"  # argparse's name of the type in its message
    return parse


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """A configuration file and `key=value` overrides."""
    parser.add_argument(
        "config",
        type=Path,
        nargs=None if required else "?",
        metavar="CONFIG.yaml",
        help="as `safereg config init` writes it",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="in place of the file's, e.g. train.steps=100",
    )
    add_local_rank(parser)


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """What older launchers append to the command; it is read from the environment."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`: see `outcome.finish`."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the same figures as JSON; - prints them, and all other text goes to stderr",
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """`--quiet`: see `outcome.finish`."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no next step")


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Options of a model behind a server, in place of a folder."""
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="of an OpenAI-compatible server that has the model, e.g. http://host:8000/v1",
    )
    parser.add_argument(
        "--api-key-env",
        default="SAFEREG_API_KEY",
        metavar="VARIABLE",
        help="environment variable that holds its key",
    )
    parser.add_argument("--allow-plain-http", action="store_true", help="send the key over http")
