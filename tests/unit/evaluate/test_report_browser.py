"""The page in headless Chromium, at a phone's width and a wide screen's, light and dark.

Claimed: the page never scrolls sideways, tables that are too wide scroll in boxes of their own;
text is at least twelve pixels high, contrasts with what is behind it by 4.5 : 1 (WCAG 2), and
spills from no cell; figures that match the page are the ones shown, within it and not so small that
their text has less than nine pixels; the browser complains of nothing. Skipped where there is no
Chromium.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import MISSING, Browser
from support.reports import evaluation, write_demo

from safereg_dist.evaluate.report import write_report

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

WIDTHS = (360, 1280)
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
  ten_points: figures.map(e => ends(e).width / e.naturalWidth * 10 / 72 * 200),
  complete: figures.every(e => e.complete && e.naturalWidth > 0),
  columns: new Set(figures.map(e => Math.round(ends(e).left))).size,
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_demo(tmp_path_factory.mktemp("page") / "demo")
    arm = "adaptive_probe_with_a_name_that_is_very_long_indeed"
    base = folder.parent / "base_of_another"
    base.mkdir()
    (base / "eval.json").write_text(json.dumps(evaluation(0.1, 0.2, 0.0)))
    (folder.parent / arm).mkdir()
    (folder.parent / arm / "eval.json").write_bytes((base / "eval.json").read_bytes())
    return write_report([folder, base, folder.parent / arm], out=folder / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


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
    assert seen["scrolling"] >= 1 if width == 360 else seen["scrolling"] <= 1
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
