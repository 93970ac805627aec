"""The page in headless Chromium: phones to wide screens, light and dark, keyboard, paper.

Claimed: the page never scrolls sideways, tables that are too wide scroll in boxes of their own;
text is at least twelve pixels high, contrasts with what is behind it by 4.5 : 1 (WCAG 2), and
spills from no cell; figures that match the page are the ones shown, within it and not so small that
their text has less than nine pixels; the browser complains of nothing. axe-core has no serious or
critical finding. All that scrolls can be reached with the keyboard, and what has the focus shows
it. Printed, the first page has all the answers, no table that fits a page is cut, and every word of
the page is on paper. Skipped where there is no Chromium, or no registry that has axe-core;
SAFEREG_REQUIRE_BROWSER=1 makes that a failure.
"""

import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.axe import fetch_axe, findings
from support.browser import MISSING, Browser
from support.reports import (
    Page,
    evaluation,
    html_of,
    metrics,
    write_demo,
    write_ledger,
    write_run,
)

from safereg_dist.evaluate.report import write_report

WIDTHS = (360, 768, 1280, 1920)
LOOK = """
const shown = [...document.querySelectorAll('body *')].filter(e => e.getClientRects().length);
const ends = e => e.getBoundingClientRect();
const own = e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).slice(0, 3).map(v =>
    (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (c != 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
const contrast = e => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
const texts = shown.filter(own);
const cells = [...document.querySelectorAll('td, th')];
const spilt = cells.filter(e => e.scrollWidth > e.clientWidth + 1);
const boxes = [...document.querySelectorAll('.wide')];
const figures = [...document.querySelectorAll('figure img')];
return {
  page: document.documentElement.scrollWidth, window: innerWidth,
  outside: shown.filter(e => !e.closest('.wide') && ends(e).right > innerWidth + 1).length,
  smallest: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize))),
  contrast: Math.min(...texts.map(contrast)), texts: texts.length,
  spilt: spilt.map(e => e.textContent),
  scrolling: boxes.filter(e => e.scrollWidth > e.clientWidth).length, boxes: boxes.length,
  ground: getComputedStyle(document.body).backgroundColor,
  sources: figures.map(e => e.currentSrc),
  ten_points: figures.map(e => ends(e).width / e.naturalWidth * 10 * 96 / 72),
  complete: figures.every(e => e.complete && e.naturalWidth > 0),
  columns: new Set(figures.map(e => Math.round(ends(e).left))).size,
};
"""
FOCUS = """
const e = document.activeElement, s = getComputedStyle(e), r = e.getBoundingClientRect();
return {tag: e.tagName, name: e.getAttribute('aria-label') || e.textContent.slice(0, 40),
        outline: s.outlineStyle == 'none' ? 0 : parseFloat(s.outlineWidth),
        seen: r.left >= 0 && r.bottom > 0 && r.top < innerHeight && r.width > 0};
"""
TAB, ENTER = "\ue004", "\ue007"


def unavailable(reason: str) -> None:
    """Skips, or fails where a browser was promised."""
    if os.environ.get("SAFEREG_REQUIRE_BROWSER") == "1":
        pytest.fail(f"SAFEREG_REQUIRE_BROWSER=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_demo(tmp_path_factory.mktemp("page") / "demo")
    write_ledger(folder / "adaptive_probe", [f"train-{at}" for at in range(1000, 1012)], held=12)
    arm = "adaptive_probe_with_a_name_that_is_very_long_indeed"
    base = folder.parent / "base_of_another"
    base.mkdir()
    (base / "eval.json").write_text(json.dumps(evaluation(0.1, 0.2, 0.0)))
    (folder.parent / arm).mkdir()
    (folder.parent / arm / "eval.json").write_bytes((base / "eval.json").read_bytes())
    return write_report([folder, base, folder.parent / arm], out=folder / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if MISSING is not None:
        unavailable(MISSING)
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def axe(pytestconfig: pytest.Config) -> str:
    cache = pytestconfig.cache
    assert cache is not None
    try:
        return fetch_axe(cache.mkdir("axe-core"))
    except LookupError as err:
        unavailable(str(err))
        raise


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_reader_sees_all_of_it(
    browser: Browser, page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)
    seen = browser.run(LOOK)
    assert browser.complaints() == []
    assert seen["window"] == width
    assert seen["page"] <= width
    assert seen["outside"] == 0
    assert seen["texts"] > 100
    assert seen["smallest"] >= 12
    assert seen["contrast"] >= 4.5
    assert seen["spilt"] == []
    assert seen["boxes"] >= 5
    assert seen["scrolling"] >= 1 if width == 360 else seen["scrolling"] <= 2
    assert seen["ground"] == ("rgb(22, 24, 29)" if dark else "rgb(255, 255, 255)")
    html = page.read_text(encoding="utf-8")
    for source in seen["sources"]:
        assert (f'srcset="{source}"' in html) == dark
        assert (f'src="{source}"' in html) != dark
    assert seen["complete"]
    assert min(seen["ten_points"]) >= 9
    assert seen["columns"] == (1 if width == 360 else 2)
    browser.screenshot(tmp_path / "shot.png")
    assert (tmp_path / "shot.png").read_bytes().startswith(b"\x89PNG")


def test_the_look_sees_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    """A page with one fault of each kind."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body style='background:#fff'><p style='width:1900px'>wide</p><p style='font-size:9px'>"
        "tiny</p><p style='color:#bbb'>pale</p><table><tr><td style='max-width:40px;white-space:"
        "nowrap;overflow:visible'>cut off in its cell</td></tr></table>"
    )
    browser.open(bad, width=1280, dark=False)
    seen = browser.run(LOOK)
    assert seen["outside"] == 1
    assert seen["smallest"] == 9
    assert seen["contrast"] < 2
    assert seen["spilt"] == ["cut off in its cell"]


# ---- assistive technology, keyboard


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_serious(
    browser: Browser, page: Path, axe: str, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)
    found = findings(browser, axe)
    assert {rule: where for rule, where in found.items() if is_serious(rule)} == {}


def is_serious(finding: str) -> bool:
    return finding.startswith(("serious", "critical"))


def test_axe_finds_what_is_wrong(browser: Browser, axe: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<html><body><img src='x.png'><p style='color:#bbb'>pale</p></body></html>")
    browser.open(bad, width=1280, dark=False)
    found = findings(browser, axe)
    assert {"critical: image-alt", "serious: color-contrast", "serious: html-has-lang"} <= set(
        found
    )


def test_the_keyboard_reaches_all_that_scrolls(browser: Browser, page: Path) -> None:
    browser.open(page, width=360, dark=False)
    browser.press(TAB)
    first = browser.run(FOCUS)
    assert first["name"] == "Skip to the report"
    assert first["seen"]
    assert first["outline"] >= 2
    browser.press(ENTER)
    assert browser.run("return document.activeElement.id") == "main"
    visited: list[dict[str, Any]] = []
    for _ in range(100):
        browser.press(TAB)
        at = browser.run(FOCUS)
        if at["tag"] == "BODY":
            break
        visited.append(at)
    labels = set(Page(page).tables)
    assert {at["name"] for at in visited if at["tag"] == "DIV"} == labels
    assert all(at["seen"] and at["outline"] >= 2 for at in visited)


# ---- paper

LINES = """
const tables = [...document.querySelectorAll('.wide')];
return tables.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.getAttribute('aria-label'));
"""
PAPER = 703  # pixels: A4 without its margins of 12 mm


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_paper_nothing_is_too_wide_or_dark(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, width=PAPER, dark=dark, media="print")
    seen = browser.run(LOOK)
    assert seen["outside"] == 0
    assert seen["spilt"] == []
    assert browser.run(LINES) == []
    assert seen["ground"] == "rgb(255, 255, 255)"
    assert seen["contrast"] >= 4.5
    html = page.read_text(encoding="utf-8")
    assert all(f' src="{source}"' in html for source in seen["sources"])


def test_printed_pages_cut_nothing(browser: Browser, page: Path, tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    browser.open(page, width=1280, dark=True)
    browser.print_pdf(tmp_path / "page.pdf")
    sheets = pypdf.PdfReader(tmp_path / "page.pdf").pages
    texts = [squeezed(sheet.extract_text()) for sheet in sheets]
    assert 3 <= len(sheets) <= 14
    read = Page(page)
    questions = ["What was trained", "Did safety hold?", "What did it cost?"]
    questions += ["What was held back, and why?", "Can it be relied on?"]
    assert all(squeezed(question) in texts[0] for question in questions)
    assert texts[1].startswith("Figures")
    everything = "".join(texts)
    for label, rows in read.tables.items():
        cells = [squeezed(cell) for row in rows for cell in row if cell.isascii()]
        assert all(cell in everything for cell in cells), label
    for sheet in sheets:
        assert off_the_sheet(sheet) == []


def test_tables_that_fit_a_sheet_are_on_one(browser: Browser, tmp_path: Path) -> None:
    """Tables one after another: some would begin at the foot of a sheet and end on the next."""
    pypdf = pytest.importorskip("pypdf")
    runs, sizes = [], [10, 7, 9, 10, 8, 10, 6, 10, 9]
    for arm, size in enumerate(sizes):
        rows = metrics(coefficient=1.0, active=2, seconds=0.5, steps=2)
        runs.append(write_run(tmp_path / f"run-{arm}", rows))
        write_ledger(runs[-1], [f"r{arm}-{at}." for at in range(size)], held=size)
    file = tmp_path / "many.html"
    file.write_text(html_of(*runs), encoding="utf-8")
    browser.open(file, width=1280, dark=False)
    browser.print_pdf(tmp_path / "many.pdf")
    sheets = [sheet.extract_text() for sheet in pypdf.PdfReader(tmp_path / "many.pdf").pages]
    assert len(sheets) > 4
    for arm, size in enumerate(sizes):
        names = [f"r{arm}-{at}." for at in range(size)]
        holding = {next(n for n, text in enumerate(sheets) if name in text) for name in names}
        assert len(holding) == 1, arm
        assert "highest risk" in sheets[holding.pop()]


def squeezed(text: str) -> str:
    """Without spaces, which differ between a page and its print; ligatures in letters."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def off_the_sheet(sheet: Any) -> list[str]:
    """Texts that begin outside the sheet's margins of 10 mm."""
    off: list[str] = []
    edge, width, height = 28.0, float(sheet.mediabox.width), float(sheet.mediabox.height)

    def look(text: str, cm: list[float], tm: list[float], *_: object) -> None:
        x = tm[4] * cm[0] + tm[5] * cm[2] + cm[4]
        y = tm[4] * cm[1] + tm[5] * cm[3] + cm[5]
        if text.strip() and not (edge < x < width - edge and edge < y < height - edge):
            off.append(text)

    sheet.extract_text(visitor_text=look)
    return off
