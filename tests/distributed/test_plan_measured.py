"""Claimed: bytes of a step and parameter memory of a plan are those of real runs, within 5 %.

Measured: training steps under DeepSpeed on 1, 2 and 4 ranks (gloo), the collectives
counted at torch's functions, the shards read from deepspeed. Exact: memory, up to deepspeed's
padding. Rounds: bytes, since the plan leaves out the scalars of norms and metrics. One rank moves
nothing, planned and measured. With adapters on models larger than deepspeed's reuse distance the
planned bytes are an upper bound (`Case.least`).
"""

import json

import pytest
from plan_cases import CASES, MICRO_BATCH, STEPS, cases_on
from support.builders import save_model, tiny_model, write_jsonl
from support.launching import ROOT, Launcher

from safereg_dist.plan.memory import memory
from safereg_dist.plan.shape import read_shape
from safereg_dist.plan.traffic import traffic

WORKER = ROOT / "tests" / "distributed" / "plan_worker.py"
TOLERANCE = 0.05
NUM_ROWS = 32
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 176}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, data files by risky share, and a configuration on disk."""
    base = tmp_path_factory.mktemp("plan")
    save_model(base / "model", tiny_model(**SIZES))
    for share in {case.risky for case in CASES}:
        risky = round(NUM_ROWS * share)
        rows = [
            {"id": f"r{i}", "prompt": "w1 w2", "response": "w3", "risk": float(i < risky)}
            for i in range(NUM_ROWS)
        ]
        write_jsonl(base / f"rows-{share}.jsonl", rows)
    (base / "base.yaml").write_text(
        f"model: {base / 'model'}\n"
        "data: {train: rows-0.0.jsonl}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        f"train: {{steps: {STEPS}, micro_batch_size: {MICRO_BATCH}}}\n"
        f"output_dir: {base / 'out'}\n"
    )
    return base


@pytest.fixture(scope="module", params=[1, 2, 4])
def world_size(request, folder):
    """A number of ranks, on which all cases have run."""
    done = Launcher(folder)(WORKER, folder, ranks=request.param)
    assert done.status == 0, done.output
    return request.param


def measured(folder, case, world_size):
    """What each rank wrote."""
    if world_size % case.hpz:
        pytest.skip(f"{world_size} ranks have no groups of {case.hpz}")
    if case not in cases_on(world_size):
        pytest.skip("run on two ranks, and in the full mode on others")
    return [
        json.loads((folder / f"{case.name}.{world_size}.rank{rank}.json").read_text())
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_of_a_step(folder, world_size, case):
    ranks = measured(folder, case, world_size)
    plan = traffic(read_shape(folder / "model"), case.settings(world_size))
    planned = sum(moved.total for moved in plan.values())
    for rank in ranks:
        if world_size == 1:
            assert planned == rank["bytes"] == 0
        else:
            assert case.least * planned <= rank["bytes"] <= (1 + TOLERANCE) * planned


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameter_memory(folder, world_size, case):
    ranks = measured(folder, case, world_size)
    resting = memory(read_shape(folder / "model"), case.settings(world_size)).resting
    for rank in ranks:
        found = {name: size for name, size in rank["held"].items() if size}
        assert set(found) == set(resting)
        for name, size in found.items():
            assert resting[name] == pytest.approx(size, rel=TOLERANCE), name
