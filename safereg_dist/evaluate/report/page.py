"""The report of one run or several side by side: an HTML file that stands alone, and figures.

It reads what runs leave behind (`metrics.jsonl`, `ledger.jsonl`, `eval.json`, `config.yaml`), or a
demonstration's `summary.json` whose arms are sub-folders of the same name. Nothing in the page is
loaded from elsewhere and nothing in it runs.
"""

import base64
import warnings
from html import escape
from pathlib import Path

from safereg_dist.errors import ConfigError
from safereg_dist.evaluate.report import evaluated, trained
from safereg_dist.evaluate.report.arms import Arm
from safereg_dist.evaluate.report.evasion import evasion_section, read_evasion
from safereg_dist.evaluate.report.frame import DARK, LIGHT, Drawing, Theme, draw, styles_of
from safereg_dist.evaluate.report.reading import read_arms
from safereg_dist.evaluate.report.steps import draw_cost, draw_divergence, draw_loss, draw_risk
from safereg_dist.evaluate.report.tradeoff import draw_first_tokens, draw_law, draw_safety
from safereg_dist.storage.atomic import write_atomically

_MAKERS = (
    *(draw_safety, draw_first_tokens, draw_law),
    *(draw_risk, draw_divergence, draw_loss, draw_cost),
)


def write_report(run_dirs: list[Path], *, out: Path | None = None) -> Path:
    """Writes `report.html` with PNG and SVG figures beside it; returns the path of the HTML file.

    Args:
        run_dirs: run folders, folders with an evaluation alone (a model before training), folders
            of a demonstration (`summary.json` with `base`, `arms`), or folders with a table of
            disguises (`evasion.csv`, or `results.csv` of a sweep with an axis `disguise`).
        out: the HTML file, or a folder for `report.html`; without it the one run folder, or the
            folder that holds the first of several.
    Raises:
        ConfigError: no folder given, or one that does not exist.
        CheckpointError: a folder that holds none of these, or what cannot be read.
    """
    if not run_dirs:
        raise ConfigError(
            "expected one run folder or more, got none: give the folders to report on"
        )
    folders = [Path(folder) for folder in run_dirs]
    tables = {folder: read_evasion(folder) for folder in folders}
    arms = read_arms(folders, may_be_empty={folder for folder, rows in tables.items() if rows})
    if out is None:
        out = folders[0] if len(folders) == 1 else folders[0].parent
    page = Path(out) if Path(out).suffix == ".html" else Path(out) / "report.html"
    drawings = draw_all(arms)
    for drawing in drawings:
        stem = page.with_name(f"{page.stem}-{drawing.key}")
        write_atomically(stem.with_suffix(".png"), drawing.png)
        write_atomically(stem.with_suffix(".svg"), drawing.svg)
    write_atomically(page, _page(arms, drawings, [row for rows in tables.values() for row in rows]))
    return page


def draw_all(arms: list[Arm]) -> list[Drawing]:
    """The figures for which `arms` have data, in the order of the report."""
    with warnings.catch_warnings():
        # A run may be named in a script the font lacks; the HTML shows it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        made = [draw(maker, arms) for maker in _MAKERS]
    return [drawing for drawing in made if drawing is not None]


_CSS = """
:root{color-scheme:light dark;--line:#e0e0e0;--ours:#fff4e6;--bad:#b3261e;LIGHT}
@media(prefers-color-scheme:dark){:root{--line:#3a3f48;--ours:#2b2318;--bad:#ff8a80;DARK}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);
max-width:66rem;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.4rem;line-height:1.25;margin:.2em 0}h2{font-size:1.15rem;margin:2rem 0 .4rem}
h3{font-size:1rem;margin:1.5rem 0 .3rem}
.lead{font-size:1.05rem}.small,figcaption,td small{color:var(--soft);font-size:.85rem}
.small,.lead,figcaption{max-width:44rem}.bad{color:var(--bad)}ul{padding-left:1.2rem}
.wide{overflow-x:auto;max-width:100%}.wide:focus-visible{outline:2px solid var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;
overflow-wrap:break-word}.wide+.wide{margin-top:1.2rem}
th,td{padding:.35rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
thead th{vertical-align:bottom;font-weight:600;font-size:.85rem;white-space:normal;min-width:4.6rem}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--ground)}
.group th{font-weight:600;font-size:.85rem;color:var(--soft);padding-top:.9rem;text-align:left}
td small{display:block}.start{white-space:nowrap}
.ours td{background:var(--ours)}.ours td:first-child{font-weight:600;background:var(--ours)}
.text td,.text th{white-space:normal;text-align:left;overflow-wrap:anywhere}
.text td{min-width:7.5rem}
.text table{width:100%}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));
gap:1rem 2rem;align-items:start}
figure{margin:1rem 0;min-width:0}figure img{width:100%;max-width:31rem;height:auto;display:block}
figure.whole img{max-width:44rem}
@media(max-width:30rem){body{padding:.75rem}td:first-child,th:first-child{max-width:46vw;
white-space:normal}th,td{padding:.35rem .5rem}}
"""


def _css(arms: list[Arm]) -> str:
    return _CSS.replace("LIGHT", _colours(arms, LIGHT)).replace("DARK", _colours(arms, DARK))


def _colours(arms: list[Arm], theme: Theme) -> str:
    """The theme, and the arms' own colours, as variables of CSS."""
    own = enumerate(style.colour for style in styles_of(arms, theme).values())
    dots = "".join(f"--arm{place}:{colour};" for place, colour in own)
    return f"--ground:{theme.ground};--ink:{theme.ink};--soft:{theme.soft};{dots}"


def _page(arms: list[Arm], drawings: list[Drawing], evasion: list[dict[str, str]]) -> str:
    names = ", ".join(arm.name for arm in arms) or "evasion"
    lead = f'<p class="lead">{escape(drawings[0].title)}.</p>' if drawings else ""
    parts = [
        f"<h1>Safety report: {escape(names)}</h1>",
        lead,
        evaluated.evaluation_section(arms) if arms else "",
        f'<div class="figures">{"".join(_figure(drawing) for drawing in drawings)}</div>',
        evaluated.law_section(arms),
        evasion_section(evasion),
        trained.training_section(arms),
        trained.divergence_section(arms),
        trained.overhead_section(arms),
        *(_profile_section(arm) for arm in arms),
        *(trained.held_back_section(arm) for arm in arms),
        trained.probe_section(arms),
        trained.ledger_section(arms),
        trained.provenance_section(arms),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # The browser itself enforces that nothing runs and nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>Safety report: {escape(names)}</title><style>{_css(arms)}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _figure(drawing: Drawing) -> str:
    light, dark = (_data(png) for png in (drawing.png, drawing.dark_png))
    return (
        f'<figure id="{drawing.key}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(drawing.title)}" src="{light}"></picture>'
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _profile_section(arm: Arm) -> str:
    if not arm.profile_png:
        return ""
    return (
        f"<h2>What {escape(arm.name)} cost, part by part</h2>"
        f'<figure class="whole"><img alt="shares of FLOPs, bytes and seconds" '
        f'src="{_data(arm.profile_png)}"><figcaption>Recorded with `profile: true`; numbers '
        "in profile.json.</figcaption></figure>"
    )
