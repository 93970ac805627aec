"""Claimed: a run on several data sets, weighted or streamed, trains each rank on the rows that its
position names, and goes on from a checkpoint with the same bits; a streamed row that cannot be used
ends all ranks with one line; `safereg audit` sees each row of weighted sets once.

Exact: ids and their counts, metrics (but for times), ledger, exported weights.
"""

import json
import shutil
from collections import Counter

import pytest
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.extent import cases
from support.launching import FINETUNE
from support.results import result

from safereg_dist.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
STEPS, PER_STEP = 6, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two sets of 8 and 40 rows with risk, 9 anchors, a model with dropout."""
    folder = tmp_path_factory.mktemp("data")
    save_model(folder / "model", tiny_model(seed=0, num_hidden_layers=2, attention_dropout=0.2))
    for name, size in (("small", 8), ("large", 40), ("anchor", 9)):
        rows = random_rows(size, seed=size)
        write_jsonl(
            folder / f"{name}.jsonl", [{**r, "id": f"{name}-{i}"} for i, r in enumerate(rows)]
        )
    path = folder / "run.yaml"
    path.write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{train: [{folder / 'small.jsonl'}, {folder / 'large.jsonl'}], "
        f"anchor: {folder / 'anchor.jsonl'}, anchor_fraction: 0.25}}\n"
        "risk: {estimator: column, max_held_back: 0.99}\n"
        "optimizer: {lr: 1.0e-3}\n"
        f"train: {{steps: {STEPS}, precision: fp32, micro_batch_size: 2, grad_accum_steps: 2, "
        "save_every: 2, keep_checkpoints: 9}\n"
    )
    return path


def weighted(config):
    small, large = (config.parent / f"{name}.jsonl" for name in ("small", "large"))
    return f"data.train=[{{path: {small}, weight: 1}}, {{path: {large}, weight: 2}}]"


def trained(out):
    """Ids of the training rows of each rank and step."""
    found = {}
    for line in (out / "ledger.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert (entry["estimator"] == "anchor") == entry["id"].startswith("anchor")
        if entry["estimator"] != "anchor":
            found.setdefault((entry["rank"], entry["step"]), []).append(entry["id"])
    return found


def go_on_from_step_2(whole, out):
    """The folder of a run as if it had been killed after its first checkpoint."""
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    for step in (4, 6):
        shutil.rmtree(out / "checkpoint" / f"step-{step:08d}", ignore_errors=True)
    assert len(list((out / "checkpoint").iterdir())) == 1


@pytest.mark.parametrize("kind", cases(["weighted", "both"], ["streamed"]))
def test_runs_train_on_their_rows_and_go_on(config, kind, launch):
    how = [weighted(config)] if kind != "streamed" else []
    if kind != "weighted":
        how += ["data.streaming=true", "data.shuffle_buffer=4"]
    whole = config.parent / kind
    first = launch(FINETUNE, config, *how, f"output_dir={whole}", ranks=2)
    assert first.status == 0, first.output[-4000:]
    seen = trained(whole)
    assert {len(rows) for rows in seen.values()} == {PER_STEP * 3 // 4}
    by_rank = [[row for s in range(STEPS) for row in seen[rank, s]] for rank in range(2)]
    assert not set(by_rank[0]) & set(by_rank[1])
    for rows in by_rank:
        if kind != "streamed":
            share = Counter(row.split("-")[0] for row in rows)
            assert share == {"small": len(rows) // 3, "large": 2 * len(rows) // 3}
        else:
            assert len(set(rows)) == len(rows)  # 24 rows a rank, fewer asked for
    rest = config.parent / f"{kind}-rest"
    go_on_from_step_2(whole, rest)
    second = launch(FINETUNE, config, *how, f"output_dir={rest}", ranks=2)
    assert second.status == 0, second.output[-4000:]
    assert "at step 2" in second.output
    assert result(rest) == result(whole)


@pytest.mark.parametrize("is_checked_before", [False, True])
def test_a_streamed_row_that_cannot_be_used_ends_all_ranks(is_checked_before, config, launch):
    """In its step, or where the gate before training has come across it."""
    out = config.parent / f"bad-{is_checked_before}"
    rows = random_rows(60)
    rows[31] = {"prompt": "w1"}  # of rank 1, in its fourth step
    bad = write_jsonl(config.parent / "bad.jsonl", rows)
    done = launch(
        FINETUNE,
        config,
        *(f"data.train={bad}", "data.streaming=true", "data.shuffle_buffer=1"),
        *("data.anchor=null", "train.save_every=0", f"output_dir={out}"),
        f"risk.max_held_back={0.99 if is_checked_before else 1.0}",
        ranks=2,
        timeout_s=120,
    )
    assert done.status == 2, done.output[-4000:]
    assert f"{bad}:32: expected `messages`" in done.output
    assert "Traceback" not in done.output
    if is_checked_before:
        assert not out.exists()
    else:
        assert (out / "metrics.jsonl").read_text().count("\n") == 2


def test_an_audit_sees_each_row_of_weighted_sets_once(config, capsys):
    out = config.parent / "audit"
    single = [weighted(config), "engine.name=single", "--out", str(out)]
    assert main(["audit", str(config), *single]) == 0
    rows = [json.loads(line)["id"] for line in (out / "rows.jsonl").read_text().splitlines()]
    assert sorted(rows) == sorted(
        [f"small-{i}" for i in range(8)] + [f"large-{i}" for i in range(40)]
    )
    capsys.readouterr()
    assert main(["audit", str(config), "data.streaming=true", *single]) == 2
    assert "set data.streaming=false" in capsys.readouterr().err
