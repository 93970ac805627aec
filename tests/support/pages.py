"""The pages that users read, and the commands, files and snippets of Python that they show."""

import ast
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

from support.launching import ROOT

OUTSIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "kernels/README.md",
    "launch/recipes/README.md",
)
PAGES = [*(ROOT / name for name in OUTSIDE), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^```\w*\n((?:(?!```).*\n)*)^```$|(?<=\n\n)((?:^    .*\n|^\n(?=    ))+)", re.MULTILINE
)
HEREDOC = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?)^\2$", re.MULTILINE | re.DOTALL)
IS_DIFF = re.compile(r"^[+-]", re.MULTILINE)
MARK = re.compile(r"(^|\s)#.*\b(needs|minutes|hours?)\b")


class Command(NamedTuple):
    """One command of a page, its comment, its pipe and its variables left out."""

    words: list[str]
    is_marked: bool
    """A comment on its line, or on the one above, says what it needs or that it takes long."""


def name_of(page: Path) -> str:
    """The page's path in the project."""
    return str(page.relative_to(ROOT))


def code_of(text: str) -> str:
    """All blocks of code, without the indentation of Markdown."""
    return "\n".join(_blocks(text))


def _blocks(text: str) -> list[str]:
    return [fenced or textwrap.dedent(indented) for fenced, indented in BLOCK.findall(text)]


def python_of(text: str) -> list[str]:
    """The blocks that are Python of this package; of a diff what it becomes."""
    found = [
        re.sub(r"^(-.*\n|[+ ])", "", block, flags=re.MULTILINE) if IS_DIFF.search(block) else block
        for block in _blocks(text)
    ]
    return [block for block in found if "safereg_" in block and _is_python(block)]


def _is_python(block: str) -> bool:
    try:
        ast.parse(block)
    except SyntaxError:
        return False
    return True


def files_of(text: str) -> dict[str, str]:
    """Name and content of the files that a page writes with `cat > NAME <<'END'`."""
    return {name: content for name, _, content in HEREDOC.findall(code_of(text))}


def commands_of(text: str) -> list[Command]:
    """Every command of a page's blocks, in order; other lines of code are taken for some too."""
    found, above = [], ""
    for line in HEREDOC.sub("", code_of(text)).replace("\\\n", " ").splitlines():
        is_marked = MARK.search(line) is not None or MARK.match(above) is not None
        above = line
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a line of another language
            continue
        while words:
            ends = [at for at, word in enumerate(words) if word in {"&&", ";"}]
            at = min(ends, default=len(words))
            found.append(Command(_bare(words[:at]), is_marked))
            words = words[at + 1 :]
    return [command for command in found if command.words]


def _bare(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"\$|[A-Z_]+=\S*", words[0]):
        words = words[1:]
    ends = [at for at, word in enumerate(words) if word in {"&", "|", ">"}]
    return words[: min(ends, default=len(words))]
