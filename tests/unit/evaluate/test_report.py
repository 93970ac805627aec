"""The report: complete, self-contained, safe against hostile names, and calm about missing numbers.

Claimed: the page shows every figure of every arm, loads nothing from elsewhere, escapes all that
comes from data, and renders in a real browser; titles state what the data say; folders that hold
nothing are refused. Exact: all text. Of the figures only kind, number and title are checked.
"""

import base64
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.evaluate.figures import Arm, draw_all, number, percent
from safereg_dist.evaluate.report import write_report

HOSTILE = "<script>alert(1)</script>\"'&\u202e$\\frac{x$"
CHROMIUM = "/usr/bin/chromium"
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking "
    "--disable-component-update --disable-sync --no-first-run"
).split()


def evaluation(success: float, sampled: float, task: float | None) -> dict:
    return {
        "model": "runs/x/model",
        "judge": "keyword",
        "prompts": [{"file": "held-out.jsonl", "sha256": "0123456789abcdef" * 4, "rows": 9}],
        "attack_success_rate": success,
        "attack_success_rate_sampled": sampled,
        "refusal_probability": 1 - sampled,
        "benign_exact_match": 0.98765,
        "over_refusal_rate": 0.0,
        "task_exact_match": task,
        "intervals": {"attack_success_rate": [max(0.0, success - 0.05), 1.0], "task": None},
        "seconds": 1.5,
    }


def metrics(*, coefficient: float, active: int, seconds: float, steps: int = 40) -> list[dict]:
    return [
        {
            "step": step,
            "loss": 4.0 / step,
            "task_loss": 5.0 / step,
            "divergence": 0.1 if active else 0.0,
            "kl_coef_mean": coefficient * active / 8,
            "kl_coef_max": coefficient,
            "risk_mean": 0.2 if 0 < active < 8 else None,
            "risk_max": 0.9 if 0 < active < 8 else None,
            "rows": 8,
            "active_rows": active,
            "reference_rows": active,
            "tokens_per_s": 100 / seconds,
            "step_time_s": seconds,
            "peak_memory_bytes": 3 * 2**30,
        }
        for step in range(1, steps + 1)
    ]


def write_run(folder: Path, rows: list[dict], **more: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in more.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def write_ledger(folder: Path, names: list[str]) -> None:
    rows = [
        {
            "step": 1,
            "id": name,
            "risk": 1 - at / 100,
            "estimator": "probe",
            "kl_coef": 1.0 if at == 0 else 0.0,
            "divergence": 0.25,
        }
        for at, name in enumerate(names)
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A demonstration's folder: base and four arms, one of which has lost its own folder."""
    folder = tmp_path / "demo"
    write_run(folder / "sft", metrics(coefficient=0.0, active=0, seconds=0.5))
    write_run(folder / "static_high", metrics(coefficient=0.9, active=8, seconds=0.7))
    ours = write_run(folder / "adaptive_probe", metrics(coefficient=1.0, active=2, seconds=0.6))
    write_ledger(ours, [HOSTILE, "train-1", "train-2"])
    arms = {
        "sft": evaluation(1.0, 0.99, 1.0),
        "static_low": evaluation(0.9, 0.7, 0.97),
        "static_high": evaluation(0.0, 0.1, 0.0),
        "adaptive_probe": evaluation(0.004, 0.013, 0.99),
    }
    summary = {"base": evaluation(0.0, 0.0, 0.0), "arms": arms, "seconds": 99}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.in_cell = False
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

        self.in_cell = self.in_cell or tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def test_demo_page_shows_every_arm_and_stands_alone(demo: Path) -> None:
    path = write_report([demo])
    assert path == demo / "report.html"
    page = Page(path)
    for name in ("base", "sft", "static_low", "static_high", "adaptive_probe"):
        assert any(row[0] == name for row in page.rows), name
    (row,) = (row for row in page.rows if row[0] == "static_low" and len(row) == 7)
    assert row[1].startswith("90\u00a0%85.0\u2013100.0")
    assert [cell.split("\u00a0")[0] for cell in row[2:]] == ["70", "30", "0", "98.8", "97"]

    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "form"}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 4
    for source in sources:
        assert source is not None
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    attributes = " ".join(
        f"{key}={value}" for _, attrs in page.tags for key, value in attrs.items()
    )
    assert not re.search(r"https?://|\bon\w+=", attributes)
    assert "url(" not in path.read_text(encoding="utf-8")


def test_sets_and_classes_have_tables_of_their_own(tmp_path: Path) -> None:
    rows = metrics(coefficient=1.0, active=2, seconds=0.6, steps=2)
    sets = {
        "orders": {"attack_success_rate": 0.25, "over_refusal_rate": None},
        "harmless": {"attack_success_rate": None, "over_refusal_rate": 0.05},
        "nothing": {"attack_success_rate": None},
        "junk": 3,
    }
    ours = evaluation(0.1, 0.2, 0.9) | {"sets": sets, "kinds": {HOSTILE: sets["orders"]}}
    run = write_run(tmp_path / "run", rows)
    (run / "eval.json").write_text(json.dumps(ours))
    page = Page(write_report([run]))
    (at,) = (i for i, row in enumerate(page.rows) if "orders: attack success, greedy" in row)
    heads = ["arm", "orders: attack success, greedy", "harmless: over-refusal"]
    assert page.rows[at : at + 2] == [heads, ["run", "25\u00a0%", "5\u00a0%"]]
    assert [f"{HOSTILE}: attack success, greedy"] in [row[1:] for row in page.rows]
    assert "By class of prompts" in page.text


def test_differences_prompt_by_prompt(tmp_path: Path) -> None:
    rows = metrics(coefficient=1.0, active=2, seconds=0.6, steps=2)
    tested = {"rows": 40, "difference": 0.025, "interval": [-0.01, 0.06], "p": 0.5}
    differences = {
        "attack_success_rate": tested,
        "task_score": {**tested, "difference": -0.5, "p": None},
        "over_refusal_rate": "junk",
    }
    others = {HOSTILE: {"differences": differences}, "junk": 3}
    run = write_run(tmp_path / "run", rows)
    (run / "eval.json").write_text(json.dumps(evaluation(0.1, 0.2, 0.9) | {"against": others}))
    page = Page(write_report([run]))
    found = [row for row in page.rows if row[0].startswith("run \u2212")]
    assert found == [
        [
            f"run \u2212 {HOSTILE}",
            "+2.5\u00a0%-1.0 to +6.0, p 0.500",
            "\u2013",
            "\u2013",
            "-50.0\u00a0%-1.0 to +6.0",
        ],
        ["run \u2212 junk", *["\u2013"] * 4],
    ]


def test_figures_lie_beside_the_page(demo: Path) -> None:
    write_report([demo], out=demo / "out" / "compare.html")
    names = {path.name for path in (demo / "out").iterdir()}
    keys = ("safety", "risk", "loss", "cost")
    figures = {f"compare-{key}.{kind}" for key in keys for kind in ("png", "svg")}
    assert names == {"compare.html"} | figures
    for key in keys:
        root = ET.fromstring((demo / "out" / f"compare-{key}.svg").read_text(encoding="utf-8"))
        assert root.tag.endswith("svg")
    before = (demo / "out" / "compare-safety.svg").read_bytes()
    write_report([demo], out=demo / "out" / "compare.html")
    assert (demo / "out" / "compare-safety.svg").read_bytes() == before


def test_titles_say_what_the_data_say(demo: Path) -> None:
    page = Page(write_report([demo]))
    titles = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert [(title or "").replace("\u00a0", " ") for title in titles] == [
        "adaptive_probe: attack success 0.4 % (sampled 1.3 %) at 99 % task exact match; "
        "sft: 100 % at 100 %",
        "adaptive_probe pulls 25 % of all rows toward the reference, with mean coefficient 0.25 "
        "and at most 1.00",
        # 5 / step over steps 37 to 40
        f"adaptive_probe ends at task loss {np.mean([5 / s for s in range(37, 41)]):.3g} "
        f"(sft: {np.mean([5 / s for s in range(37, 41)]):.3g}) and divergence 0.1 nats per token",
        "A step of adaptive_probe takes 1.20 times one of sft; the reference runs on 25 % of rows",
    ]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    ours = write_run(tmp_path / "a & b <i>", metrics(coefficient=1.0, active=2, seconds=1.0))
    write_ledger(ours, [HOSTILE])
    (ours / "eval.json").write_text(json.dumps({**evaluation(0.1, 0.2, 0.9), "model": HOSTILE}))
    page = Page(write_report([ours]))
    assert HOSTILE in page.text
    assert "a & b <i>" in page.text
    assert not {tag for tag, _ in page.tags} & {"script", "i"}


def test_runs_are_compared_under_distinct_names(tmp_path: Path) -> None:
    rows = metrics(coefficient=0.0, active=0, seconds=0.5)
    first = write_run(tmp_path / "one" / "run", rows, eval=evaluation(1.0, 1.0, None))
    second = write_run(tmp_path / "two" / "run", metrics(coefficient=1.0, active=3, seconds=1.0))
    for folder, objective in ((first, "none"), (second, "convex")):
        (folder / "config.yaml").write_text(f"regularizer: {{objective: {objective}}}\n")
    path = write_report([first, second])
    assert path == tmp_path / "one" / "report.html"
    page = Page(path)
    assert {row[0] for row in page.rows} >= {"run", "run (2)"}
    # Roles come from the configuration: the second is ours, and twice as slow.
    assert any("takes 2.00 times" in (attrs.get("alt") or "") for _, attrs in page.tags)


def test_missing_numbers_become_dashes(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": NaN, "task_loss": null, "rows": 4, "step_time_s": 0.5}\n{"step": 2,'
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(text)  # killed while it wrote its second row
    page = Page(write_report([folder]))
    (row,) = (row for row in page.rows if row[0] == "run")
    assert row == [
        "run",
        "1",
        "4",
        "\u2013",
        "\u2013",
        "\u2013",
        "\u2013",
        "0.5",
        "\u2013",
        "\u2013",
    ]
    assert "No evaluation was found" in page.text
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == [
        "A step of run takes 0.5 s"
    ]


@pytest.mark.parametrize("junk", [{"arms": 3}, {"arms": {"x": None}}, {"arms": {"../..": {}}}, {}])
def test_a_summary_may_hold_anything(tmp_path: Path, junk: dict) -> None:
    rows = metrics(coefficient=1.0, active=2, seconds=1.0, steps=1)
    folder = write_run(tmp_path / "run", rows, summary=junk)
    assert write_report([folder]).is_file()


def test_folders_without_anything_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one run folder or more"):
        write_report([])
    with pytest.raises(ConfigError, match="found none at"):
        write_report([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"expected a metrics\.jsonl"):
        write_report([tmp_path / "empty"])
    (tmp_path / "empty" / "summary.json").write_text('{"base": null, "arms": {"sft": {}}}')
    with pytest.raises(CheckpointError, match=r"expected a metrics\.jsonl"):
        write_report([tmp_path / "empty"])
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"expected a metrics\.jsonl"):
        write_report([tmp_path / "empty"])
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1}\nx\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2 is not JSON"):
        write_report([tmp_path / "empty"])
    write_run(tmp_path / "bad", [{"step": 1}])
    (tmp_path / "bad" / "eval.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"eval\.json is not JSON"):
        write_report([tmp_path / "bad"])
    assert not list(tmp_path.rglob("*.html"))


def test_many_arms_and_one_point_each_can_be_drawn() -> None:
    arms = [
        Arm(
            name=f"arm number {at} with \u4e2d\u6587 and $ and a long tail",
            role="baseline" if at % 2 else "ours",
            metrics={"step": np.array([1.0]), "task_loss": np.array([0.5 + at])},
            evaluation={"attack_success_rate": 0.5, "task_exact_match": 0.5},
        )
        for at in range(12)
    ]
    drawings = draw_all(arms)
    assert [drawing.key for drawing in drawings] == ["safety", "loss"]
    assert all(drawing.png.startswith(b"\x89PNG") for drawing in drawings)
    assert draw_all([]) == []


def test_numbers_and_shares() -> None:
    assert [percent(value) for value in (0.0, 100.0, 12.34, float("nan"))] == [
        "0\u00a0%",
        "100\u00a0%",
        "12.3\u00a0%",
        "\u2013",
    ]
    assert np.isnan(number(None))
    assert np.isnan(number(True))
    assert np.isnan(number("3"))
    assert number(3) == 3.0
    columns = {"step": [1.0, 2.0], "rows": [4.0, 4.0], "active_rows": [1.0, np.nan]}
    arm = Arm(name="a", role="ours", metrics={k: np.array(v) for k, v in columns.items()})
    assert arm.share("active_rows", "rows") == 12.5
    assert np.isnan(arm.share("active_rows", "absent"))
    assert np.isnan(arm.median("absent"))


@pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason="needs chromium")
def test_a_browser_renders_the_page(demo: Path, tmp_path: Path) -> None:
    page = write_report([demo])
    shot = tmp_path / "shot.png"
    options = [*QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=600,1600"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--screenshot={shot}", "--enable-logging=stderr", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 30_000  # a blank page of this size has about 5 kB
    assert "Content Security Policy" not in done.stderr
    dom = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in dom
    assert "<script" not in dom
