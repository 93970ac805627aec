"""The same run in every stack, on real ranks and real libraries, against float64.

`benchmarks/bench_stacks.py` makes the table of all runs; here each stack runs once, a few steps.
"""

from pathlib import Path

import pytest
from stack_cases import FROZEN, RUNS, compared, expected, write_expected, write_models
from support.extent import FULL

WORKER = Path(__file__).with_name("stack_worker.py")
STEPS = 3 if FULL else 2
# One run of each stack, on as few ranks as it has; accumulation alternates.
STACKS = list(dict.fromkeys(run.stack for run in RUNS))
EACH = {
    run.stack: run
    for run in sorted(RUNS, key=lambda run: -run.ranks)
    if run.accumulation == (4 if STACKS.index(run.stack) % 2 else 1)
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacks")
    write_models(folder)
    cases = {
        "full": {},
        "lora": {"lora": True},
        "frozen": {"lora": True, "on_aligned": True},
        "packed": {"repeats": True},
    }
    for name, how in cases.items():
        write_expected(folder, expected(folder, steps=STEPS, **how), name)
    return folder


@pytest.mark.deepspeed
@pytest.mark.parametrize("run", EACH.values(), ids=lambda run: run.stack)
def test_a_stack_equals_the_equations(run, models, launch, tmp_path):
    check(run, run.oracle, models, launch, tmp_path)


@pytest.mark.deepspeed
@pytest.mark.parametrize("run", FROZEN, ids=lambda run: run.stack)
def test_a_new_adapter_on_a_frozen_one(run, models, launch, tmp_path):
    check(run, "frozen", models, launch, tmp_path)


def check(run, oracle, models, launch, tmp_path):
    out = tmp_path / "out.safetensors"
    how = ["--accumulation", run.accumulation, "--steps", STEPS]
    result = launch(WORKER, run.stack, models, out, *how, ranks=run.ranks)
    assert result.status == 0, result.output
    errors = compared(out, models / f"{oracle}.safetensors")
    assert not errors.missing
    assert errors.first_loss < 1e-5
    assert errors.gradient < 1e-4
    assert errors.last_loss < 1e-4
