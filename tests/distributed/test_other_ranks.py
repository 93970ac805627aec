"""Claimed: a run goes on with another number of ranks over the same rows: every row is seen as
often as without the change, the loss and the gradient's norm agree with an uninterrupted run, the
ledger is whole and tells the change, and the checkpoint stays as it was.

Exact: rows of every step, counts, the chain. Rounds: losses, to 1e-5 (sums in another order).
Risks are read from a cache that is spread over the ranks, and the changes lie within epochs.
"""

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.extent import FULL
from support.launching import FINETUNE

from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe
from safereg_dist.run.ledger import verify_ledger

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
ROWS, EPOCHS, STEPS = 20, 3, 5  # of 12 rows, on 2 or 4 ranks at first: epochs end within 1 and 3
STAGE_2 = ("engine.zero_stage=2", "reference.engine=zero3")
CASES = {
    "zero3": ([], (4, 2, 3, 1) if FULL else (4, 2)),
    "zero3-bf16": (["train.precision=bf16"], (2, 3)),
    "zero3-lora": (["lora={rank: 4}"], (2, 1, 3)),
    "zero2": (STAGE_2, (4, 3, 1)),
    "zero1-lora": ([*STAGE_2, "engine.zero_stage=1", "lora={rank: 4}"], (2, 3)),
    "fsdp2": (["engine.name=fsdp2"], (2, 3, 1)),
}
"""Changes of the configuration, and numbers of ranks one after the other."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run whose rows are scored by a probe, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("ranks")
    model = tiny_model(seed=0, num_hidden_layers=2)
    save_model(folder / "model", model)
    write_jsonl(folder / "train.jsonl", random_rows(ROWS, risk=False))
    Probe(
        layer=1,
        pooling="last_prompt_token",
        mean=torch.zeros(32),
        scale=torch.ones(32),
        weight=torch.randn(32, generator=torch.Generator().manual_seed(3)),
        bias=0.1,
        threshold=0.4,
        fingerprint=model_fingerprint(model),
        meta={},
    ).save(folder / "probe")
    path = folder / "run.yaml"
    path.write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{train: {folder / 'train.jsonl'}}}\n"
        f"risk: {{estimator: probe, path: {folder / 'probe'}, max_held_back: 1.0}}\n"
        "regularizer: {schedule: linear}\n"
        "optimizer: {lr: 1.0e-3, weight_decay: 0.1}\n"
        f"train: {{epochs: {EPOCHS}, precision: fp32, save_every: 1, keep_checkpoints: 9}}\n"
        f"output_dir: {folder / 'none'}\n"
    )
    return path


@pytest.mark.parametrize("name", CASES if FULL else ["zero3"])
def test_goes_on_with_other_ranks(config, launch, name):
    changes, order = CASES[name]
    whole, changed = (config.parent / f"{name}-{kind}" for kind in ("whole", "changed"))
    # 12 rows a step on any first number of ranks.
    first = [*changes, f"train.micro_batch_size={12 // order[0]}"]
    run(launch, config, whole, first, ranks=order[0])
    shutil.copytree(whole, changed)
    for step, ranks in enumerate(order[1:], start=1):
        killed_after(changed, step)
        kept = content(changed / "checkpoint" / f"step-{step:08d}")
        output = run(launch, config, changed, first, ranks=ranks)
        assert f"at step {step}, on {ranks} ranks (written by {order[step - 1]})" in output
        assert content(changed / "checkpoint" / f"step-{step:08d}") == kept
        assert not list((changed / "checkpoint").glob(".*"))

    tolerance = 1e-5 if "bf16" not in name else 0.02
    for own, expected in zip(metrics(changed), metrics(whole), strict=True):
        assert own["lr"] == expected["lr"]
        for key in ("loss", "grad_norm", "kl_coef_mean"):
            assert own[key] == pytest.approx(expected[key], abs=tolerance, rel=tolerance), own
    assert rows_of_steps(changed) == rows_of_steps(whole)
    assert set(sum(rows_of_steps(changed), Counter()).values()) == {EPOCHS}
    assert len(sum(rows_of_steps(changed), Counter())) == ROWS

    head = verify_ledger(changed)
    expected = [(step, *pair) for step, pair in enumerate(pairwise(order), start=1)]
    assert list(head.rank_changes) == expected
    assert head.rows == ROWS * EPOCHS + len(order) - 1
    told = json.loads((changed / "summary.json").read_text())["rank_changes"]
    assert [tuple(each.values()) for each in told] == expected


def run(launch, config, out, changes, *, ranks):
    """Trains to the end; what it printed."""
    done = launch(FINETUNE, config, f"output_dir={out}", *changes, ranks=ranks)
    assert done.status == 0, done.output[-4000:]
    return done.output


def killed_after(out: Path, step: int) -> None:
    """Leaves of a run what it had when it had saved this step, and logs that went on."""
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    for saved in (out / "checkpoint").glob("step-*"):
        if int(saved.name[5:]) > step:
            shutil.rmtree(saved)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def metrics(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(STEPS))
    return found


def rows_of_steps(out: Path) -> list[Counter]:
    """How often each row was seen in each step."""
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    return [Counter(r["id"] for r in rows if r["step"] == s and "id" in r) for s in range(STEPS)]
