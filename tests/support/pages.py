"""The pages that users read, and the commands, files and snippets of Python that they show."""

import re
import shlex
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
    blocks = [
        fenced or re.sub(r"^    ", "", indented, flags=re.MULTILINE)
        for fenced, indented in BLOCK.findall(text)
    ]
    return "\n".join(blocks)


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
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    ends = [at for at, word in enumerate(words) if word in {"&", "|", ">"}]
    return words[: min(ends, default=len(words))]
