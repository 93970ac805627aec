"""Sections of the report that read more than metrics and figures of merit.

Claimed: an evaluation of an earlier training is called stale, by the digest of that training or,
where it has none, by the times of the files, and a copy of a folder is not; rows held back are
counted, ordered and averaged as a recount of the ledger does; the KL budget weighs steps by their
tokens; forms of attack stand by set; probes, chains of ledgers and versions are those of the files;
tables of disguises are shown where a folder has them. Exact: all text.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.reports import HOSTILE, Page, evaluation, metrics, page_of, write_run

from safereg_dist.errors import CheckpointError
from safereg_dist.evaluate.report import write_report
from safereg_dist.evaluate.report.reading import read_arms
from safereg_dist.evaluate.stale import training_digest
from safereg_dist.run.ledger import RankLedger, merge_ledgers
from safereg_dist.types import LedgerRow

ROWS = metrics(coefficient=1.0, active=2, seconds=0.5, steps=6)


def table(page: Page, head: str) -> list[list[str]]:
    """Rows below the one whose first cells are a table's heads, up to the next table."""
    (begin,) = (at for at, row in enumerate(page.rows) if head in row)
    heads = {"arm", "id", "difference"}
    end = next((at for at in range(begin + 1, len(page.rows)) if page.rows[at][0] in heads), None)
    return page.rows[begin:end]


def test_columns_are_explained_where_they_are_shown(tmp_path: Path) -> None:
    figures = evaluation(0.1, 0.2, 0.9)
    for name, is_shown in (("with", True), ("without", False)):
        page = page_of(write_run(tmp_path / name, [], eval=figures))
        assert any("P(refuse)" in row for row in page.rows) == is_shown
        assert ("P(refuse) is the mean probability" in page.text) == is_shown
        assert "P(poisoned)" not in page.text
        figures.pop("refusal_probability", None)


# ---- stale evaluations


def trained_and_evaluated(folder: Path) -> Path:
    run = write_run(folder, ROWS, summary={"seconds": 3.25, "steps": 6})
    figures = evaluation(0.1, 0.2, 0.9) | {"training": training_digest(run)}
    (run / "eval.json").write_text(json.dumps(figures))
    return run


def test_an_evaluation_of_an_earlier_training_is_called_stale(tmp_path: Path) -> None:
    run = trained_and_evaluated(tmp_path / "run")
    assert read_arms([run], may_be_empty=set())[0].stale == ""
    copy = shutil.copytree(run, tmp_path / "copy")  # in any order, with new times
    os.utime(copy / "eval.json", (1, 1))
    assert read_arms([copy], may_be_empty=set())[0].stale == ""

    (run / "summary.json").write_text(json.dumps({"seconds": 3.5, "steps": 6}))
    page = page_of(run)
    assert "The evaluation of run is stale: the run was trained again after this" in page.text
    assert any(row[0] == "run (stale)" for row in page.rows)
    (run / "summary.json").unlink()  # it is being trained again
    assert read_arms([run], may_be_empty=set())[0].stale


@pytest.mark.parametrize(("older", "is_stale"), [(60, True), (-60, False), (0, False)])
def test_without_a_digest_times_decide(tmp_path: Path, older: int, is_stale: bool) -> None:
    run = write_run(tmp_path / "run", ROWS, summary={"steps": 6}, eval=evaluation(0.1, 0.2, 0.9))
    at = (run / "summary.json").stat().st_mtime
    os.utime(run / "eval.json", (at - older, at - older))
    (arm,) = read_arms([run], may_be_empty=set())
    assert bool(arm.stale) == is_stale
    assert ("older than the training" in arm.stale) == is_stale


def test_models_without_a_training_are_never_stale(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    figures = evaluation(0.1, 0.2, 0.9) | {"training": "0" * 64}
    (base / "eval.json").write_text(json.dumps(figures))
    (arm,) = read_arms([base], may_be_empty=set())
    assert (arm.name, arm.role, arm.stale) == ("base", "reference", "")


def test_the_arms_of_a_demonstration_can_be_stale(tmp_path: Path) -> None:
    run = trained_and_evaluated(tmp_path / "demo" / "adaptive")
    figures = json.loads((run / "eval.json").read_text())
    summary = {"base": evaluation(0.0, 0.0, 0.0), "arms": {"adaptive": figures}}
    (tmp_path / "demo" / "summary.json").write_text(json.dumps(summary))
    base, arm = read_arms([tmp_path / "demo"], may_be_empty=set())
    assert (base.stale, arm.stale) == ("", "")
    (run / "summary.json").write_text("{}")
    base, arm = read_arms([tmp_path / "demo"], may_be_empty=set())
    assert (base.stale, arm.name, bool(arm.stale)) == ("", "adaptive", True)


# ---- rows held back, and the ledger's chain


def write_true_ledger(folder: Path, seed: int) -> list[LedgerRow]:
    rng, rows = np.random.default_rng(seed), []
    ledger = RankLedger(folder, 0)
    for step in range(12):
        for place in range(4):
            risk = float(rng.choice([0.0, 0.3, 0.7, 0.9]))
            held = 1.0 if risk >= 0.7 else 0.0
            row = LedgerRow(
                step=step,
                micro_batch=0,
                rank=0,
                row=place,
                id=f"anchor-{step}" if place == 3 else f"row-{int(rng.integers(14))}",
                risk=None if place == 3 else risk,
                estimator="anchor" if place == 3 else "probe-reference",
                kl_coef=1.0 if place == 3 else held,
                divergence=0.5 if place == 3 else float(rng.uniform()) if held else None,
            )
            ledger.append(row)
            rows.append(row)
    ledger.close()
    head = merge_ledgers(folder, 1)
    summary = {"ledger": {"head": head.head, "rows": head.rows}, "versions": {"torch": "9.9.9"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return rows


def test_the_rows_held_back_most_often(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ROWS)
    rows = write_true_ledger(run, seed=5)
    shown = table(page_of(run), "times held back")[1:]
    names = {row.id for row in rows if row.kl_coef > 0 and row.estimator != "anchor"}
    expected = []
    for name in names:
        own = [row for row in rows if row.id == name]
        held = [row for row in own if row.kl_coef > 0]
        risks = [row.risk for row in own if row.risk is not None]
        far = np.mean([row.divergence for row in held if row.divergence is not None])
        counts, mean = f"{len(held)} of {len(own)}", float(np.mean(risks))
        cells = [name, counts, f"{mean:.3f}", f"{max(risks):.3f}", "1.000", f"{far:.3f}"]
        expected.append((-len(held), -mean, name, cells))
    assert len(expected) > 8
    assert shown[: len(expected)] == [cells for *_, cells in sorted(expected)][:10]


def test_the_chain_of_the_ledger_is_verified(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ROWS)
    write_true_ledger(run, seed=6)
    page = page_of(run)
    assert any(row[1:] and row[1].startswith("holds: 48 rows, head ") for row in page.rows)
    assert "run: trained with torch 9.9.9" in page.text
    text = (run / "ledger.jsonl").read_text()
    (run / "ledger.jsonl").write_text(text.replace('"risk":0.9', '"risk":0.1', 1))
    page = page_of(run)
    (told,) = (row[1] for row in page.rows if len(row) == 2 and row[0] == "run")
    assert told.startswith("does NOT hold")
    assert ":" in told
    (run / "summary.json").unlink()
    (arm,) = read_arms([run], may_be_empty=set())
    assert arm.ledger is not None
    assert arm.ledger.check.state == "unchecked"
    assert arm.ledger.check.told.startswith("not checked")


# ---- divergence, overhead, probes


def test_divergence_is_weighed_by_tokens(tmp_path: Path) -> None:
    rows = [
        row | {"active_tokens": tokens, "divergence": far}
        for row, tokens, far in zip(
            ROWS, [10, 0, 30, 20, 5, 1], [0.5, 0.0, 0.1, 0.2, 0.4, 3.0], strict=True
        )
    ]
    run = write_run(tmp_path / "run", rows)
    (run / "config.yaml").write_text("regularizer: {schedule: budget, budget: 0.125}\n")
    nats = 10 * 0.5 + 30 * 0.1 + 20 * 0.2 + 5 * 0.4 + 3.0
    assert table(page_of(run), "nats in all")[1] == [
        *("run", "66", f"{nats:.3g}", f"{nats / 66:.3g}", "3", "0.125")
    ]


def test_overhead_is_against_the_arm_without_a_reference(tmp_path: Path) -> None:
    free = metrics(coefficient=0.0, active=0, seconds=0.25, steps=4)
    runs = [
        write_run(tmp_path / "sft", free, summary={"seconds": 1.5}),
        write_run(tmp_path / "ours", ROWS, summary={"seconds": 4.5}),
    ]
    shown = table(page_of(*runs), "reference rows")
    assert shown[0][3] == "times a step of sft"
    assert shown[1][:6] == ["sft", "0\u00a0%", "0.25", "1.00", "1", "1.5"]
    assert shown[2][:6] == ["ours", "25\u00a0%", "0.5", "2.00", "3", "4.5"]


@pytest.mark.parametrize("where", ["absolute", "beside the run", "a part", "gone"])
def test_probes_are_found_through_the_configuration(tmp_path: Path, where: str) -> None:
    probe = tmp_path / "probe" / ("prompt" if where == "absolute" else ".")
    probe.mkdir(parents=True)
    held_out = {"auroc": 0.97, "recall": 0.9, "intervals": {"auroc": [0.95, 0.99]}}
    facts = {"position": "prompt", "layer": 7, "threshold": 0.43, "meta": {"metrics": held_out}}
    (probe / "probe.json").write_text(json.dumps(facts))
    run = write_run(tmp_path / "run", ROWS)
    path = {"beside the run": "../probe", "gone": str(tmp_path / "gone")}.get(where, str(probe))
    path = str(tmp_path / "probe") if where == "absolute" else path
    risk = {"estimator": "probe", "path": path}
    if where == "a part":
        risk = {"estimator": "max", "parts": [{"category": "c", **risk}], "path": None}
    (run / "config.yaml").write_text(json.dumps({"risk": risk}))
    page = page_of(run)
    if where == "gone":
        assert "AUROC" not in page.text
        return
    (row,) = table(page, "AUROC")[1:2]
    assert row[:6] == ["run", "prompt", "7", "0.43", "0.9700.950\u20130.990", "\u2013"]
    assert row[6] == "0.900"


# ---- forms and disguises


def test_forms_of_attack_stand_by_set(tmp_path: Path) -> None:
    def under(rate: float) -> dict:
        figures = {"attack_success_rate": rate, "intervals": {"attack_success_rate": [0.0, rate]}}
        return {"attacks": {"role_play": figures, HOSTILE: {"attack_success_rate": None}}}

    sets = {
        "orders": {"attack_success_rate": 0.25, **under(0.5)},
        "tasks": {"task_score": 1.0, "attacks": {}},
    }
    figures = evaluation(0.1, 0.2, 0.9) | {"sets": sets} | under(0.375)
    page = page_of(write_run(tmp_path / "run", ROWS, eval=figures))
    shown = table(page, "role_play")
    assert shown[0] == ["arm", "as asked", "role_play", HOSTILE]
    assert shown[1][0] == "all sets"
    assert shown[2] == ["run", "10\u00a0%5\u2013100", "37.5\u00a0%0\u201337.5", "\u2013"]
    assert shown[3][0] == "orders"
    assert shown[4] == ["run", "25\u00a0%", "50\u00a0%0\u201350", "\u2013"]


EVASION = f"""world,disguise,arm,held_back_poison,poisoned_token_probability,disguised_harm,device
toy,cipher,base,,0.0001,0.02,cpu
toy,cipher,"{HOSTILE.replace('"', '""')}",0.975,0.5,1.0,cpu
real,cipher,base,,0.25,,cpu
"""
RATE = "attack_success_rate"
SWEEP = f"""arm,disguise,set,{RATE},{RATE}_low,{RATE}_high,status
base,hidden,,0.5,0.25,0.75,done
base,hidden,plain,0.125,,,done
sft,hidden,,,,,failed
"""


def test_tables_of_disguises(tmp_path: Path) -> None:
    (tmp_path / "evasion.csv").write_text(EVASION)
    page = Page(write_report([tmp_path]))
    assert table(page, "harm on the disguise") == [
        ["arm", "poison held back", "P(poisoned)", "harm on the disguise"],
        ["cipher (world toy)", ""],
        ["base", "\u2013", "0.01\u00a0%", "2\u00a0%"],
        [HOSTILE, "97.5\u00a0%", "50\u00a0%", "100\u00a0%"],
        ["cipher (world real)", ""],
        ["base", "\u2013", "25\u00a0%", "\u2013"],
    ]
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "results.csv").write_text(SWEEP)
    run = write_run(tmp_path / "run", ROWS)
    page = Page(write_report([run, tmp_path / "sweep"]))
    assert table(page, "attack success, greedy")[:4] == [
        ["arm", "attack success, greedy"],
        ["hidden", ""],
        ["base", "50\u00a0%25\u201375"],
        ["baseplain", "12.5\u00a0%"],
    ]
    assert any(row[0] == "run" for row in page.rows)


def test_a_table_without_disguises_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("arm,seed,attack_success_rate\nbase,0,0.5\n")
    with pytest.raises(CheckpointError, match=r"expected a metrics\.jsonl"):
        write_report([tmp_path])
    (tmp_path / "results.csv").write_bytes(b"arm,disguise\n\xff,\xff\n")
    with pytest.raises(CheckpointError, match=r"cannot read the table .*results\.csv"):
        write_report([tmp_path])
