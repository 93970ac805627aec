"""Claimed: safety comes into a script of each stack by ten lines at most, and where no row is risky
the script trains as before.

The plain script is the judge. Losses and weights differ by float32's rounding alone: the fused head
sums over the response's tokens, the plain one over all.
"""

import difflib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.builders import PLAIN_TEMPLATE, random_rows, save_model, tiny_model, write_jsonl

EXAMPLES = Path(__file__).resolve().parents[2] / "launch" / "examples"
RANKS = {"trainer": 1, "trl": 1, "lora": 1, "deepspeed": 2, "fsdp2": 2, "accelerate": 1}
TRAINERS = ("trainer", "trl", "lora")
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
    """Those that a Trainer has saved, of the model or of its adapters."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


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
        result = launch(
            script, model, harmless, out, ranks=RANKS[stack], env={"DS_ACCELERATOR": "cpu"}
        )
        assert result.status == 0, result.output
        found[name] = losses(result.output)
        saved[name] = weights(out)
    assert len(found["plain"]) == 5
    digits = 1e-3 if stack in TRAINERS else 2e-6  # Trainers print four
    assert found["safe"] == pytest.approx(found["plain"], rel=digits)
    assert saved["safe"].keys() == saved["plain"].keys()
    assert bool(saved["plain"]) == (stack in TRAINERS)
    before = weights(model)
    for name, plain in saved["plain"].items():
        change = (plain - before.get(name, torch.zeros(()))).abs().mean()
        assert (saved["safe"][name] - plain).abs().mean() <= 1e-3 * change, name


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
