"""The model card's section: what Hugging Face's own parser reads of it, and what it may not tell.

Claimed: front matter and figures are read back by huggingface_hub as they were measured; the
section takes the place of an older one and leaves the rest of a card as it was; names from data are
shown as text; no folder of the machine, no id of a row and no reviewer's word is told; an altered
ledger and a stale evaluation are called so. Exact: all of it.
"""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from support.reports import HOSTILE, evaluation, metrics, write_run

from safereg_dist.cli import main
from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.evaluate.report import write_model_card
from safereg_dist.run.ledger import RankLedger, merge_ledgers
from safereg_dist.types import LedgerRow

ROWS = metrics(coefficient=1.0, active=2, seconds=0.5, steps=6)


def finished_run(folder: Path) -> Path:
    """A run with a base beside it, an override whose reason names a person, and an evaluation."""
    base = {"attack_success_rate": {"difference": 0.05, "interval": [-0.02, 0.125], "p": 0.25}}
    figures = evaluation(0.1, 0.2, 0.9) | {"against": {"base": {"differences": base}}}
    run = write_run(folder / "run", ROWS, eval=figures)
    write_run(folder / "base", [], eval=evaluation(0.05, 0.1, 0.0))
    (folder / "rows.jsonl").write_text('{"id": "row-0", "prompt": "p", "response": "r"}\n')
    config = {
        "model": "someone/a-model",
        "data": {"train": str(folder / "rows.jsonl"), "anchor": None},
        "risk": {"estimator": "probe", "path": str(folder / "probe")},
        "regularizer": {"objective": "convex", "schedule": "step", "divergence": "kl_forward"},
        "train": {"steps": 6},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    ledger = RankLedger(run, 0)
    place = {"micro_batch": 0, "rank": 0, "kl_coef": 1.0, "divergence": 0.5}
    for at, (source, note) in enumerate([("override", "hold: asked Ms Smith"), ("probe", None)]):
        ledger.append(
            LedgerRow(
                step=0, row=at, id=f"row-{at}", risk=1.0 - at, estimator=source, note=note, **place
            )
        )
    ledger.close()
    head = merge_ledgers(run, 1)
    summary = {
        "threshold": 0.5,
        "fingerprints": {"policy": "ab" * 32},
        "rows": {"train": {"kept": 2, "digest": "cd" * 32}},
        "ledger": {"head": head.head, "rows": head.rows},
        "versions": {"torch": "9.9.9"},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "eval.json").write_text(json.dumps(figures))  # after the training
    return run


def card_of(*runs: Path) -> str:
    file = runs[0].parent / "card.md"
    write_model_card(list(runs), file)
    return file.read_text(encoding="utf-8")


def test_hugging_face_reads_what_was_measured(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    run = finished_run(tmp_path)
    file = tmp_path / "README.md"
    assert main(["report", str(tmp_path / "base"), str(run), "--model-card", str(file)]) == 0
    card = hub.ModelCard.load(file)
    assert card.data.base_model == "someone/a-model"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["safereg"]
    assert card.data.model_name == "run"
    known = evaluation(0.1, 0.2, 0.9)
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["attack_success_rate"] == known["attack_success_rate"]
    assert measured["attack_success_rate_sampled"] == known["attack_success_rate_sampled"]
    assert all(measured[key] == pytest.approx(known[key], rel=1e-12) for key in measured)
    assert {result.dataset_name for result in card.data.eval_results} == {"held-out.jsonl"}


def test_the_section_says_what_the_run_was(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    text = card_of(tmp_path / "base", run)
    digest = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    head = json.loads((run / "summary.json").read_text())["ledger"]["head"]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| method | convex, step |" in rows
    assert "| risk from | probe, from 0.5 |" in rows
    assert "| base model | someone/a-model |" in rows
    assert "| last step | 6 of 6 |" in rows
    data = f"rows.jsonl (sha256 {digest}); 2 rows kept; digest when it was trained {'cd' * 32}"
    assert f"| train data | {data} |" in rows
    (success,) = (row for row in rows if row.startswith("| attack success, greedy"))
    assert success.replace("\u00a0", " ") == (
        "| attack success, greedy | 5 % (0\u2013100) | 10 % (5\u2013100) | "
        "+5.0 % (-2.0 to +12.5, p 0.250) |"
    )
    assert "1 of 2 training sequences" in text
    assert "| review: hold | 1 | 1 |" in rows
    assert head in text
    assert "The chain alone has no key" in text
    assert "attack success up to 12.5" in text
    assert "little to keep" not in text
    for private in (str(tmp_path), "row-0", "Smith"):
        assert private not in text


def test_an_older_section_is_replaced_and_the_rest_is_kept(tmp_path: Path) -> None:
    run, file = finished_run(tmp_path), tmp_path / "card.md"
    own = "---\nlicense: mit  # ours\ntags: [mine]\n---\n# My model\n\nWords.\n"
    file.write_text(own)
    write_model_card([run], file)
    first = file.read_text()
    assert first.startswith("---\nlicense: mit  # ours\ntags: [mine]\n")
    assert first.count("tags:") == 1
    assert yaml.safe_load(first.split("---\n")[1])["base_model"] == "someone/a-model"
    assert "# My model\n\nWords.\n" in first
    file.write_text(first + "\nMore words.\n")
    (run / "ledger.jsonl").write_text("{}\n")
    write_model_card([run], file)
    second = file.read_text()
    assert second.endswith("\nMore words.\n")
    assert second.count("## Safety of this fine-tuning") == 1
    assert "it did NOT hold" in second
    assert "it did NOT hold" not in first
    write_model_card([run], file)
    assert file.read_text() == second


def test_names_are_text(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["train"] = f"{tmp_path}/{HOSTILE}|[x](y)\n# big"
    config["regularizer"]["objective"] = HOSTILE
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = card_of(run)
    body = text.split("---\n", 2)[2]
    shown = "\\<script\\>alert(1)\\</script\\>"  # a slash needs no escape
    assert shown in body
    assert "<script" not in body.replace("\\<script", "")
    assert "\\|\\[x\\](y) \\# big" in body
    assert "\u202e" not in body
    for line in body.splitlines():
        assert not line.startswith("# big")
    yaml.safe_load(text.split("---\n")[1])


def test_a_stale_evaluation_is_in_no_front_matter(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    figures = json.loads((run / "eval.json").read_text()) | {"training": "0" * 64}
    (run / "eval.json").write_text(json.dumps(figures))
    text = card_of(run)
    assert "model-index" not in text
    assert "The evaluation is not of these weights" in text


def test_a_run_alone_makes_no_claim(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alone", ROWS)
    text = card_of(run)
    assert "whether the model is safe is not known" in text
    assert "No source of risk was used" in text
    assert "The run kept none, or has not ended." in text
    assert "model-index" not in text


def test_a_card_in_a_run_is_of_that_run(tmp_path: Path) -> None:
    ours = finished_run(tmp_path)
    (other := write_run(tmp_path / "other", ROWS)).joinpath("config.yaml").write_text(
        yaml.safe_dump({"regularizer": {"objective": "none"}})
    )
    arms = [tmp_path / "base", ours, other]
    for file, name in ((other / "model" / "README.md", "other"), (ours / "card.md", "run"),
                       (tmp_path / "card.md", "run")):  # fmt: skip
        assert write_model_card(arms, file) == name
        assert ("| method | plain fine-tuning |" in file.read_text()) == (name == "other")
    with pytest.raises(ConfigError, match=r"found evaluations alone in \S*base: give"):
        write_model_card(arms, tmp_path / "base" / "card.md")


def test_what_is_no_run_or_no_card_is_refused(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", [], eval=evaluation(0.05, 0.1, 0.0))
    with pytest.raises(ConfigError, match="found evaluations alone"):
        write_model_card([base], tmp_path / "card.md")
    run = write_run(tmp_path / "alone", ROWS)
    for text, message in (("---\n[1\n---\n", "cannot read the model card"),
                          ("---\n- 1\n---\n", "expected keys in the front matter")):  # fmt: skip
        (tmp_path / "card.md").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            write_model_card([run], tmp_path / "card.md")
        assert (tmp_path / "card.md").read_text() == text
