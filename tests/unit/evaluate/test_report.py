"""The report: complete, self-contained, safe against hostile names, and calm about missing numbers.

Claimed: the page shows every figure of every arm, loads nothing from elsewhere, escapes all that
comes from data; titles state what the data say; folders that hold nothing are refused. Exact: all
text. Of the figures kind, number and title are checked here, what is drawn in test_report_figures.
"""

import base64
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from support.reports import (
    HOSTILE,
    Page,
    evaluation,
    metrics,
    page_of,
    write_demo,
    write_ledger,
    write_run,
)

from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.evaluate.report import write_report
from safereg_dist.evaluate.report.arms import Arm, number, percent
from safereg_dist.evaluate.report.page import draw_all


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return write_demo(tmp_path / "demo")


def test_demo_page_shows_every_arm_and_stands_alone(demo: Path) -> None:
    path = write_report([demo])
    assert path == demo / "report.html"
    page = Page(path)
    for name in ("base", "sft", "static_low", "static_high", "adaptive_probe"):
        assert any(row[0] == name for row in page.rows), name
    (row,) = (row for row in page.tables["Evaluation, all prompts"] if row[0] == "static_low")
    assert row[1].startswith("90\u00a0%85\u2013100")
    assert [cell.split("\u00a0")[0] for cell in row[2:]] == ["70", "30", "0", "98.8", "97"]

    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "form", "svg"}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 6
    dark = [attrs["srcset"] for tag, attrs in page.tags if tag == "source"]
    assert len(set(sources + dark)) == 12
    for source in sources + dark:
        assert source is not None
        kind, data = source.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        image = ET.fromstring(base64.b64decode(data, validate=True))
        assert image.tag.endswith("svg")
        for element in image.iter():
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")
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
    page = page_of(run)
    begin = page.rows.index(["orders", ""])
    assert page.rows[begin - 1 : begin + 5] == [
        ["arm", "attack success, greedy"],
        ["orders", ""],
        ["run", "25\u00a0%"],
        ["arm", "over-refusal"],
        ["harmless", ""],
        ["run", "5\u00a0%"],
    ]
    assert page.rows.index([HOSTILE, ""]) > begin
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
    page = page_of(run)
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
    keys = ("safety", "first", "risk", "divergence", "loss", "cost")
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
        "P(refuse): base 100 %, sft 1 %, adaptive_probe 98.7 %",
        "adaptive_probe pulls 25 % of all rows toward the reference, with mean coefficient 0.25 "
        "and at most 1.00",
        "adaptive_probe ends 0.1 nats per active token from the reference",
        # 5 / step over steps 37 to 40
        f"adaptive_probe ends at task loss {np.mean([5 / s for s in range(37, 41)]):.3g}; "
        f"sft at {np.mean([5 / s for s in range(37, 41)]):.3g}",
        "A step of adaptive_probe takes 1.20 times one of sft; the reference runs on 25 % of rows",
    ]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    ours = write_run(tmp_path / "a & b <i>", metrics(coefficient=1.0, active=2, seconds=1.0))
    write_ledger(ours, [HOSTILE])
    (ours / "eval.json").write_text(json.dumps({**evaluation(0.1, 0.2, 0.9), "model": HOSTILE}))
    page = page_of(ours)
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
    text = '{"step": 0, "loss": NaN, "task_loss": null, "rows": 4, "step_time_s": 0.5}\n{"step": 1,'
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(text)  # killed while it wrote its second row
    page = Page(write_report([folder]))
    assert page.tables["Training"][1] == ["run", "1", "4", *["\u2013"] * 4]
    assert page.tables["What was trained"][1] == ["run", "\u2013", "\u2013", "1", "4"]
    dashes = ["\u2013"] * 4
    assert page.tables["What it cost"][1] == ["run", "0.5\u00a0s", *dashes]
    assert page.tables["Can it be relied on"][1] == ["run", "none kept", *dashes[1:], "none"]
    assert page.tables["Overhead"][1] == [
        "run",
        "\u2013",
        "0.5",
        "\u2013",
        "0.5",
        "\u2013",
        "\u2013",
    ]
    assert "Not known: no evaluation was found" in page.text
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
    told = [percent(value) for value in (0.0, 100.0, 12.34, 0.0158, 5.5e-7, float("nan"))]
    shares = ["0", "100", "12.3", "0.016", "5.5e-07"]
    assert told == [*(f"{share}\u00a0%" for share in shares), "\u2013"]
    assert np.isnan(number(None))
    assert np.isnan(number(True))
    assert np.isnan(number("3"))
    assert number(3) == 3.0
    columns = {"step": [1.0, 2.0], "rows": [4.0, 4.0], "active_rows": [1.0, np.nan]}
    arm = Arm(name="a", role="ours", metrics={k: np.array(v) for k, v in columns.items()})
    assert arm.share("active_rows", "rows") == 12.5
    assert np.isnan(arm.share("active_rows", "absent"))
    assert np.isnan(arm.median("absent"))
