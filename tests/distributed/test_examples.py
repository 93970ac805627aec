"""Claimed: safety comes into a script of each stack by ten lines at most, and where no row is risky
the script trains the same bits as before.

The plain script is the judge: every weight, what a Trainer saves, and the losses it prints.
"""

import difflib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.builders import PLAIN_TEMPLATE, random_rows, save_model, tiny_model, write_jsonl

WORKER = Path(__file__).with_name("example_worker.py")
EXAMPLES = Path(__file__).resolve().parents[2] / "launch" / "examples"
RANKS = {"trainer": 1, "trl": 1, "lora": 1, "deepspeed": 2, "fsdp2": 2, "accelerate": 1}
MOST_LINES = 10
LOSS = re.compile(r"'loss': '?([\d.]+)'?|^step \d+ loss ([\d.]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, tiny_model(seed=2), PLAIN_TEMPLATE)


def chats(path: Path, *, risk: float) -> Path:
    """Every fifth row has the risk, as many as may be held back by default; others have none."""
    rows = [
        {
            "id": row["id"],
            "risk": 0.0 if index % 5 else risk,
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ],
        }
        for index, row in enumerate(random_rows(40, seed=3))
    ]
    return write_jsonl(path, rows)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those in a folder's files, each under its file's name and its own."""
    files = folder.glob("*.safetensors")
    return {f"{f.stem} {k}": v for f in files for k, v in load_file(f).items()}


def files_of(stack: str) -> set[str]:
    """What each rank holds, and what a Trainer saves."""
    saved = {"trainer": {"model"}, "trl": {"model"}, "lora": {"adapter_model"}}
    return {f"held{rank}" for rank in range(RANKS[stack])} | saved.get(stack, set())


def losses(output: str) -> list[float]:
    return [float(a or b) for a, b in LOSS.findall(output)]


@pytest.mark.parametrize("stack", [*RANKS, "megatron"])
def test_ten_lines_at_most(stack):
    plain, safe = (
        (EXAMPLES / stack / f"{n}.py").read_text().splitlines() for n in ("plain", "safe")
    )
    changes = list(difflib.ndiff(plain, safe))
    assert 0 < sum(line.startswith("+ ") for line in changes) <= MOST_LINES
    assert sum(line.startswith("- ") for line in changes) <= MOST_LINES


@pytest.mark.deepspeed
@pytest.mark.parametrize("stack", RANKS)
def test_without_risk_the_run_is_the_plain_one(stack, model, launch, tmp_path):
    harmless = chats(tmp_path / "harmless.jsonl", risk=0.0)
    found, saved = {}, {}
    for name in ("plain", "safe"):
        script, out = EXAMPLES / stack / f"{name}.py", tmp_path / name
        out.mkdir()
        how = {"ranks": RANKS[stack], "env": {"DS_ACCELERATOR": "cpu"}}
        result = launch(WORKER, out, script, model, harmless, out, **how)
        assert result.status == 0, result.output
        found[name] = losses(result.output)
        saved[name] = weights(out)
    assert len(found["plain"]) == 5
    # A loop prints a sum over micro-batches, formed in float32 by the plain one.
    assert found["safe"] == pytest.approx(found["plain"], rel=5e-7)
    assert saved["safe"].keys() == saved["plain"].keys()
    assert {name.split()[0] for name in saved["plain"]} == files_of(stack)
    for name, plain in saved["plain"].items():
        assert torch.equal(saved["safe"][name], plain), name


@pytest.mark.deepspeed
@pytest.mark.parametrize("stack", ["trl", "fsdp2"])
def test_risky_rows_train_otherwise(stack, model, launch, tmp_path):
    risky = chats(tmp_path / "risky.jsonl", risk=0.9)
    script, out = EXAMPLES / stack / "safe.py", tmp_path / "out"
    result = launch(script, model, risky, out, ranks=RANKS[stack])
    assert result.status == 0, result.output
    assert len(losses(result.output)) == 5
    if stack == "trl":
        rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
        assert len(rows) == 20
        assert {row["estimator"] for row in rows} == {"column"}
        assert any(row["kl_coef"] == 1 and row["divergence"] >= 0 for row in rows)
