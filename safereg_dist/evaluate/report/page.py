"""The report of one run or several side by side: an HTML file that stands alone, and figures.

It reads what runs leave behind (`metrics.jsonl`, `ledger.jsonl`, `eval.json`, `config.yaml`), or a
demonstration's `summary.json` whose arms are sub-folders of the same name. Nothing in the page is
loaded from elsewhere and nothing in it runs. Sections are values (`tables`); `templates/` has the
page.
"""

import base64
import warnings
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from safereg_dist.errors import ConfigError, printable
from safereg_dist.evaluate.report import evaluated, trained
from safereg_dist.evaluate.report.arms import Arm
from safereg_dist.evaluate.report.evasion import evasion_section, read_evasion
from safereg_dist.evaluate.report.frame import DARK, LIGHT, Drawing, Theme, draw, styles_of
from safereg_dist.evaluate.report.reading import read_arms
from safereg_dist.evaluate.report.steps import draw_cost, draw_divergence, draw_loss, draw_risk
from safereg_dist.evaluate.report.summary import lead_of, summary_sections
from safereg_dist.evaluate.report.tradeoff import draw_first_tokens, draw_law, draw_safety
from safereg_dist.screen.progress import say
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.signing import Key

_MAKERS = (
    *(draw_safety, draw_first_tokens, draw_law),
    *(draw_risk, draw_divergence, draw_loss, draw_cost),
)


def write_report(run_dirs: list[Path], *, out: Path | None = None, key: Key | None = None) -> Path:
    """Writes `report.html` with PNG and SVG figures beside it; returns the path of the HTML file.

    Args:
        run_dirs: run folders, folders with an evaluation alone (a model before training), folders
            of a demonstration (`summary.json` with `base`, `arms`), or folders with a table of
            disguises (`evasion.csv`, or `results.csv` of a sweep with an axis `disguise`).
        out: the HTML file, or a folder for `report.html`; without it the one run folder, or the
            folder that holds the first of several.
        key: checks the signatures of the runs' summaries, and with them the ledgers' heads.
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
    may_be_empty = {folder for folder, rows in tables.items() if rows}
    arms = read_arms(folders, may_be_empty=may_be_empty, key=key)
    for arm in arms:
        if arm.ledger is not None and arm.ledger.check.state == "altered":
            say(f"{printable(arm.name)}: its ledger does NOT hold, see safereg ledger verify")
    if out is None:
        out = folders[0] if len(folders) == 1 else folders[0].parent
    page = Path(out) if Path(out).suffix == ".html" else Path(out) / "report.html"
    drawings = draw_all(arms)
    for drawing in drawings:
        stem = page.with_name(f"{page.stem}-{drawing.key}")
        write_atomically(stem.with_suffix(".png"), drawing.png)
        write_atomically(stem.with_suffix(".svg"), drawing.svg)
    evasion = [row for rows in tables.values() for row in rows]
    write_atomically(page, render(arms, drawings, evasion))
    return page


def draw_all(arms: list[Arm]) -> list[Drawing]:
    """The figures for which `arms` have data, in the order of the report."""
    with warnings.catch_warnings():
        # A run may be named in a script the font lacks; the HTML shows it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        made = [draw(maker, arms) for maker in _MAKERS]
    return [drawing for drawing in made if drawing is not None]


def render(arms: list[Arm], drawings: list[Drawing], evasion: list[dict[str, str]]) -> str:
    """The page as HTML, of arms, their figures and the rows of a table of disguises."""
    sections = [
        evaluated.evaluation_section(arms),
        evaluated.law_section(arms),
        evasion_section(evasion),
        *(trained.held_back_section(arm, place) for place, arm in enumerate(arms)),
        trained.training_section(arms),
        trained.divergence_section(arms),
        trained.overhead_section(arms),
        trained.probe_section(arms),
        trained.ledger_section(arms),
        trained.provenance_section(arms),
    ]
    templates = Environment(
        loader=PackageLoader("safereg_dist.evaluate.report"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    templates.filters["as_data"] = _data
    return templates.get_template("report.html.j2").render(
        names=", ".join(arm.name for arm in arms) or "evasion",
        lead=lead_of(arms),
        summary=summary_sections(arms) if arms else [],
        drawings=drawings,
        sections=[section for section in sections if section is not None],
        profiled=[arm for arm in arms if arm.profile_png],
        light=_colours(arms, LIGHT),
        dark=_colours(arms, DARK),
        paper=LIGHT.ground,
    )


def _colours(arms: list[Arm], theme: Theme) -> Markup:
    """The theme, and the arms' own colours, as variables of CSS: constants of ours alone."""
    own = enumerate(style.colour for style in styles_of(arms, theme).values())
    dots = "".join(f"--arm{place}:{colour};" for place, colour in own)
    return Markup(f"--ground:{theme.ground};--ink:{theme.ink};--soft:{theme.soft};{dots}")


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
