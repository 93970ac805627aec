"""Claimed: the site builds without a warning, every link of a page leads somewhere, the program
takes every command that a page shows, and the README is short.

Sphinx itself checks links and anchors between pages of `docs/`; those of the others are followed
here. Commands are parsed by the real parsers, and scripts that are named have to exist;
`tests/distributed/test_pages_run.py` runs them.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import ROOT
from support.pages import PAGES, commands_of, name_of

from safereg_dist import cli

LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)]*))?\)")


def anchors_of(text: str) -> set[str]:
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "docs", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(page.read_text()):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.exists(), f"{page}: {link[0]}"
        if link["anchor"] and target.suffix == ".md":
            assert link["anchor"] in anchors_of(target.read_text()), f"{page}: {link[0]}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_taken(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, _ in commands_of(page.read_text()):
        shown = f"{page}: {' '.join(words)}"
        if words[0] in {"bash", "python"} and "/" in words[1]:
            assert (ROOT / words[1]).exists(), shown
        if words[0] in {"deepspeed", "torchrun"}:
            scripts = [word.rstrip(")") for word in words if word.startswith("launch/")]
            assert all((ROOT / script).exists() for script in scripts), shown
        if words[0] == "safereg":
            assert is_taken(words[1:]), f"{shown}: {capsys.readouterr().err}"


def is_taken(words: list[str]) -> bool:
    try:
        cli._arguments(words)
    except SystemExit as end:
        return not end.code
    return True


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
