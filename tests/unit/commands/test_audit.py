"""Claimed: `safereg audit` counts what training would do with the rows, training refuses to start
where too many would be held back and leaves no trace then, and a reviewer's decisions are honoured
and entered in the ledger.

The judge counts over the data file. Exact.
"""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import beta
from support.builders import random_rows, save_model, tiny_model, write_jsonl

from safereg_dist.cli import main
from safereg_dist.config import load_config
from safereg_dist.data import filler
from safereg_dist.errors import ConfigError
from safereg_dist.evaluate.audit import AuditFacts, write_audit, write_part
from safereg_dist.parallel.single import single_ranks
from safereg_dist.risk.stage import ColumnRisk, RiskStage, WeightedSource
from safereg_dist.run.gate import RowRisk, is_held_back, refuse_too_many_held_back
from safereg_dist.run.ledger import verify_ledger

WORDS_SAFE, WORDS_RISKY = "w1 w2 w3 w4 w5", "w50 w51 w52 w53 w54"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("audit") / "model", tiny_model())


def rows_like(model_free_risks, words=WORDS_SAFE):
    raws = random_rows(len(model_free_risks), seed=4, risk=False)
    return [
        {**raw, "prompt": f"{words} {raw['prompt']}", "risk": risk}
        for raw, risk in zip(raws, model_free_risks, strict=True)
    ]


def config(folder, model, rows, **extra):
    write_jsonl(folder / "train.jsonl", rows)
    risk = {"estimator": "column", **extra.pop("risk", {})}
    text = {
        "model": str(model),
        "data": {"train": str(folder / "train.jsonl"), **extra.pop("data", {})},
        "risk": risk,
        "train": {"steps": 2, "precision": "fp32", "micro_batch_size": 4},
        "engine": {"name": "single"},
        "output_dir": str(folder / "out"),
        **extra,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(text))  # JSON is YAML
    return path


def audit(folder, path, *arguments):
    figures = folder / "figures.json"
    assert main(["audit", str(path), *arguments, "--json", str(figures)]) == 0
    written = json.loads((folder / "out.audit" / "audit.json").read_text())
    assert json.loads(figures.read_text()) == written
    return written


def test_counts_are_those_of_the_data(tmp_path, model, capsys):
    risks = [0.0, 0.1, 0.46, 0.5, 0.52, 0.9, 1.0, 0.2, 0.3, 0.35, 0.05]
    rows = rows_like(risks)
    report = audit(tmp_path, config(tmp_path, model, rows))
    held = [r for r in risks if r >= 0.5]
    assert (report["rows"], report["held_back"]) == (len(risks), len(held))
    assert report["held_by_source"] == {"column": len(held)}
    assert list(report["rows_by_risk"].values()) == np.histogram(risks, 10, (0, 1))[0].tolist()
    near = [r for r in risks if abs(r - 0.5) <= 0.05]
    assert report["near_threshold"] == len(near)
    assert [row["risk"] for row in report["nearest_threshold"]] == sorted(
        near, key=lambda r: abs(r - 0.5)
    )
    assert report["predicted_refusal_factor"] == 1.0
    assert not report["training_would_start"]
    lines = [
        json.loads(line)
        for line in (tmp_path / "out.audit" / "rows.jsonl").read_text().splitlines()
    ]
    assert [line["risk"] for line in lines] == sorted(risks, reverse=True)
    tokens = {line["id"]: line["tokens"] for line in lines}
    active = sum(tokens[row["id"]] for row in rows if row["risk"] >= 0.5)
    assert report["reference_flops_share"] == pytest.approx(active / sum(tokens.values()) / 3)
    assert (tmp_path / "out.audit" / "audit.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr()
    assert "w1 w2" not in printed.out
    assert "just below the threshold, from 0.25 to 0.5: 3 rows (27.3%); in eighths" in printed.out
    assert "calibrat" not in printed.out  # nor what there is of probes alone
    assert "the probe" not in printed.out
    assert "audit: computes the risk of 11 rows\n" in printed.err
    assert printed.err.endswith(f"now: safereg audit {tmp_path / 'run.yaml'} --show-text\n")


def test_a_failed_row_is_held_back_and_counts_in_full(tmp_path):
    """A failed signal (nan) is a full risk at the gate, in the counts and in the forecast."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: m\ndata: {{train: t}}\noutput_dir: {tmp_path / 'run'}\n"
        "risk: {estimator: column}\nregularizer: {schedule: linear, ceiling: 0.8}\n"
    )
    risks = {"failed": math.nan, "risky": 0.75, "safe": 0.25, "none": None}
    assert {name: is_held_back(risk, 0.5) for name, risk in risks.items()} == {
        "failed": True,
        "risky": True,
        "safe": False,
        "none": False,
    }
    rows = [RowRisk(name, risk, {}, "probe", None, 4, 10) for name, risk in risks.items()]
    facts = AuditFacts(
        config=load_config(path),
        threshold=0.5,
        prompts=dict.fromkeys(risks, "w1"),
        probed_share=0.0,
        ceilings={},
    )
    write_part(tmp_path, 0, rows, 0.5)
    report = write_audit(tmp_path, 1, facts)
    assert (report["failed"], report["held_back"]) == (1, 2)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(line["id"], line["risk"]) for line in lines[:2]] == [
        ("failed", "failed"),
        ("risky", 0.75),
    ]
    expected = np.histogram([1.0, 0.75, 0.25, 0.0], 10, (0, 1))[0].tolist()
    assert list(report["rows_by_risk"].values()) == expected
    assert report["predicted_refusal_factor"] == pytest.approx(0.8 * (1.0 + 0.75) / 2)


def test_a_wrong_key_is_said_before_torch_is_loaded(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: {train: t}\nrist: {}\n")
    code = "import sys; from safereg_dist.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    words = [sys.executable, "-c", code, "audit", str(tmp_path / "run.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("safereg: unknown key 'rist': did you mean 'risk'?")
    assert "torch" not in done.stdout.split()


def test_text_is_shown_only_on_demand(tmp_path, model, capsys):
    path = config(tmp_path, model, rows_like([0.49, 0.51, *[0.0] * 9]))
    audit(tmp_path, path, "--show-text")
    assert "w1 w2" in capsys.readouterr().out
    assert not any(b"w1 w2" in f.read_bytes() for f in (tmp_path / "out.audit").iterdir())


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        ({"ceiling": 0.9}, 0.9),
        ({"schedule": "linear"}, (0.6 + 0.8) / 2),
        ({"objective": "additive", "ceiling": 4.0}, 4 / 5),
        ({"divergence": "kl_reverse"}, None),
    ],
)
def test_the_mixture_law(tmp_path, model, rule, factor):
    path = config(tmp_path, model, rows_like([0.6, 0.8, *[0.0] * 9]), regularizer=rule)
    found = audit(tmp_path, path)["predicted_refusal_factor"]
    assert found == factor if factor is None else found == pytest.approx(factor)


def test_the_mixture_law_knows_the_ceilings_of_categories(tmp_path, model):
    parts = [
        {"category": "low", "estimator": "column", "threshold": 0.5, "ceiling": 0.3},
        {"category": "high", "estimator": "column", "threshold": 0.75, "ceiling": 0.7},
    ]
    rows = rows_like([0.6, 0.8, *[0.0] * 9])
    risk = {"estimator": "max", "parts": parts}
    report = audit(tmp_path, config(tmp_path, model, rows, risk=risk))
    assert report["held_back"] == 2
    assert report["predicted_refusal_factor"] == pytest.approx((0.3 + 0.7) / 2)


def test_held_rows_that_read_like_free_ones_are_listed(tmp_path, model):
    risky, safe = rows_like([0.9] * 15, WORDS_RISKY), rows_like([0.1] * 15, WORDS_SAFE)
    odd = [{**safe[0], "id": "odd", "risk": 0.95}]
    rows = [{**row, "id": f"{kind}-{i}"} for kind, part in (("risky", risky), ("safe", safe))
            for i, row in enumerate(part)] + odd  # fmt: skip
    report = audit(tmp_path, config(tmp_path, model, rows, risk={"max_held_back": 1.0}))
    assert [row["id"] for row in report["for_review"]] == ["odd"]
    assert report["training_would_start"]


def test_prompts_without_a_word(tmp_path, model):
    rows = [{**row, "prompt": "? !"} for row in rows_like([0.9] * 3 + [0.1] * 12)]
    report = audit(tmp_path, config(tmp_path, model, rows))
    assert (report["held_back"], report["for_review"]) == (3, [])


# The gate


def test_training_refuses_and_leaves_no_trace(tmp_path, model, capsys):
    path = config(tmp_path, model, rows_like([0.9] * 6 + [0.1] * 14))
    assert main(["train", str(path)]) == 2
    text = capsys.readouterr().err
    for part in ("6 of 20 rows (30.0%)", "20.0%", "safereg audit", "data.declared_poison",
                 "risk.max_held_back=0.3", "risk.override"):  # fmt: skip
        assert part in text
    assert not (tmp_path / "out").exists()
    assert main(["train", str(path), "--dry-run"]) == 2
    assert main(["train", str(path), "data.declared_poison=0.1"]) == 0


def gate(held, rows, *, is_sample):
    """The gate of a run of which so many rows of so many looked at have a risk of 0.9."""
    row = dataclasses.replace(filler(0), id="r")
    risky, free = (dataclasses.replace(row, risk=risk) for risk in (0.9, 0.1))
    stream = SimpleNamespace(
        rows_within=lambda positions: rows,
        first_rows=lambda count: iter([risky] * held + [free] * (count - held)),
    )
    run = SimpleNamespace(
        ranks=single_ranks(),
        config=SimpleNamespace(
            needs_risk=True,
            risk=SimpleNamespace(
                max_held_back=0.15, max_hidden=0.02, estimator="probe", source="reference"
            ),
            regularizer=SimpleNamespace(schedule="step"),
            data=SimpleNamespace(declared_poison=0.05),
            train=SimpleNamespace(micro_batch_size=8),
        ),
        sources=SimpleNamespace(
            stream=stream,
            total_steps=4,
            rows_per_step=8,
            train=range(rows + is_sample),
            filler=filler(0),
        ),
        regularizer=SimpleNamespace(
            risk=RiskStage([WeightedSource("", ColumnRisk(), 0.5)]),
            coefficient=SimpleNamespace(threshold=0.5),
        ),
    )
    refuse_too_many_held_back(run)


def test_the_sample_bound_is_clopper_pearson():
    """20 % is refused from a sample only where 20 % is hardly possible."""
    for held, rows in ((9, 30), (10, 30), (11, 30), (60, 256), (64, 256), (256, 256)):
        low = beta.ppf(0.05, held, rows - held + 1)
        if low > 0.2:
            with pytest.raises(ConfigError, match=f"{held} of {rows} rows looked at"):
                gate(held, rows, is_sample=True)
        else:
            gate(held, rows, is_sample=True)
    with pytest.raises(ConfigError, match="7 of 30 rows"):
        gate(7, 30, is_sample=False)
    gate(6, 30, is_sample=False)
    gate(0, 0, is_sample=True)


# Overrides


def test_reviewed_rows_are_honoured_and_entered(tmp_path, model, capsys):
    rows = rows_like([0.9, 0.9, *[0.1] * 6])
    decisions = [
        {"id": rows[0]["id"], "action": "allow", "reason": "a quotation"},
        {"id": rows[5]["id"], "action": "hold", "reason": "seen by hand"},
    ]
    write_jsonl(tmp_path / "override.jsonl", decisions)
    path = config(
        tmp_path,
        model,
        rows,
        risk={"override": str(tmp_path / "override.jsonl"), "max_held_back": 0.3},
    )
    report = audit(tmp_path, path)
    assert (report["held_back"], report["overridden"]) == (2, 2)
    assert report["held_by_source"] == {"override": 1, "column": 1}
    assert f"now: safereg train {path}\n" in capsys.readouterr().err
    # Settings of a Trainer name neither model nor rows: its own script trains.
    given = ["model=" + str(model), "data.train=" + str(tmp_path / "train.jsonl")]
    assert main(["audit", str(path), *given]) == 0
    assert "now:" not in capsys.readouterr().err
    assert main(["train", str(path), "train.epochs=1", "train.steps=null"]) == 0
    out = tmp_path / "out"
    prompts = f"--prompts HELD_OUT.jsonl --out {out / 'eval.json'}"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"now: safereg eval --model {out / 'model'} {prompts}"
    assert main(["report", str(out), "--json", "-"]) == 0
    figures, told = capsys.readouterr()
    assert json.loads(figures) == {"report": str(out / "report.html"), "runs": [str(out)]}
    assert told.endswith(f"now: safereg ledger verify {out}\n")
    verify_ledger(tmp_path / "out")
    lines = (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()
    ledger = {entry["id"]: entry for entry in map(json.loads, lines)}
    assert len(ledger) == len(rows)
    allowed, held = ledger[rows[0]["id"]], ledger[rows[5]["id"]]
    assert (allowed["risk"], allowed["kl_coef"], allowed["estimator"]) == (0.0, 0.0, "override")
    assert allowed["note"] == "allow: a quotation"
    assert (held["risk"], held["kl_coef"], held["note"]) == (1.0, 1.0, "hold: seen by hand")
    assert ledger[rows[1]["id"]]["kl_coef"] == 1.0
    assert "note" not in ledger[rows[1]["id"]]


def test_decisions_on_rows_that_are_not_there_are_told(tmp_path, model, capsys):
    rows = rows_like([0.1] * 5)
    decisions = [
        {"id": name, "action": "hold", "reason": "seen"} for name in (rows[0]["id"], "train-77")
    ]
    write_jsonl(tmp_path / "override.jsonl", decisions)
    report = audit(
        tmp_path,
        config(tmp_path, model, rows, risk={"override": str(tmp_path / "override.jsonl")}),
    )
    assert report["overridden"] == 1
    said = capsys.readouterr().err
    assert "1 ids in risk.override" in said
    assert "'train-77'" in said


def test_an_objective_without_risk_has_nothing_to_audit(tmp_path, model, capsys):
    path = config(tmp_path, model, rows_like([0.1] * 5))
    assert main(["audit", str(path), "regularizer.objective=none"]) == 2
    assert "nothing to audit" in capsys.readouterr().err
