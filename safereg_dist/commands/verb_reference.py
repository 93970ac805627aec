"""All verbs with their options, and the page that lists them.

`python -m safereg_dist.commands.verb_reference > docs/reference/verbs.md`
"""

import argparse
from collections.abc import Iterable, Iterator

from safereg_dist.commands.config_reference import markdown_table
from safereg_dist.commands.options import help_of, values_of
from safereg_dist.commands.verbs import QUICK_START, STAGES, command_parser
from safereg_dist.errors import EXIT_CODES

HEAD = """# Verbs

Every verb of `safereg`, its options and an example, written by
`python -m safereg_dist.commands.verb_reference` from `safereg_dist/commands/`; `safereg VERB
--help` says the same. `--json FILE` writes the figures that a verb prints; with `--json -` stdout
holds the JSON alone, and all other text goes to stderr. After success a line on stderr, `now: ...`,
is the command that most users run next. Progress bars are drawn where stderr is a terminal.
`--quiet` silences both.
"""


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser, and those of its verbs and of their actions, in order."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers_of(inner)


def actions_of(parser: argparse.ArgumentParser) -> list[str]:
    """The names of a verb's actions; none where it is one itself."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [name for group in groups for name in group.choices]


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Its arguments and options but `--help`, its actions and what no help shows."""
    silent = (argparse._HelpAction, argparse._SubParsersAction)
    return [
        action
        for action in parser._actions
        if not isinstance(action, silent) and action.help != argparse.SUPPRESS
    ]


def examples_of(parser: argparse.ArgumentParser) -> list[str]:
    """The commands at the end of its help."""
    lines = map(str.strip, (parser.epilog or "").splitlines())
    return [line for line in lines if line.startswith("safereg ")]


def reference() -> str:
    """The page of all verbs, in Markdown."""
    whole = command_parser()
    _, *parsers = parsers_of(whole)
    of = {parser.prog.split()[1]: [] for parser in parsers}
    for parser in parsers:
        of[parser.prog.split()[1]].append(parser)
    codes = [(str(code), meaning) for code, meaning in EXIT_CODES.items()]
    parts = [HEAD, "\n## A first run\n\n", _commands(QUICK_START)]
    parts += ["\n## Exit status\n\n", markdown_table(("status", "meaning"), codes)]
    for stage, verbs in STAGES.items():
        parts.append(f"\n## {stage[0].upper()}{stage[1:]}\n")
        parts += [_section(parser) for name in verbs for parser in of[name]]
    return "".join(parts)


def _section(parser: argparse.ArgumentParser) -> str:
    """A verb, or an action of one: what it does, an example, its options."""
    level = "#" * (len(parser.prog.split()) + 1)
    text = f"\n{level} `{parser.prog}`\n\n{parser.description}\n"
    if actions_of(parser):
        return text
    text += f"\n{_commands(examples_of(parser))}"
    rows = [(_name(action), _meaning(action)) for action in options_of(parser)]
    return text + ("\n" + markdown_table(("option", "meaning"), rows) if rows else "")


def _commands(lines: Iterable[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _name(action: argparse.Action) -> str:
    """As a usage line has it, without the brackets of what may be left out."""
    words = [", ".join(action.option_strings), values_of(action)]
    return f"`{' '.join(filter(None, words))}`"


def _meaning(action: argparse.Action) -> str:
    needed = "Required: " if action.option_strings and action.required else ""
    return needed + help_of(action).replace("%(default)s", str(action.default))


if __name__ == "__main__":
    print(reference(), end="")
