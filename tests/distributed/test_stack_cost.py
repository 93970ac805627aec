"""Claimed: a step costs the same in every stack, FLOPs, bytes and host waits, and what it adds to
a stack's own traffic is the safety path's alone.

Exact, counted below every library, summed over ranks. Named differences: micro-batches that a stack
has formed agree on 2 M + 1 numbers instead of one, and a Trainer's metrics carry one number more.
"""

from pathlib import Path

import pytest
from stack_cases import write_models
from support.launching import Launcher
from support.step_cost import read_cost

from safereg_dist import regions

WORKER = Path(__file__).with_name("stack_worker.py")
RANKS, ACCUMULATION = 2, 2
OWN = {
    "raw-fsdp2": "fsdp2",
    "trainer-fsdp2": "fsdp2",
    "trainer-zero-3": "deepspeed-zero-3",
}
PART = {
    **dict.fromkeys((regions.REFERENCE_TRUNK, regions.REFERENCE_HEAD), "reference"),
    regions.HEAD_CE: "head ce",
    regions.HEAD_DIVERGENCE: "head divergence",
    regions.AGREEMENT: "agreement",
    regions.METRICS: "metrics",
}
"""Our regions; all others are the policy's, whose engine a stack bills as it likes."""


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    launch = Launcher(folder)
    write_models(folder)
    known = {}

    def of(stack, *how):
        if (stack, *how) not in known:
            out = folder / f"{stack}{len(known)}.safetensors"
            options = ["--accumulation", ACCUMULATION, "--steps", 2, "--cost", *how]
            result = launch(WORKER, stack, folder, out, *options, ranks=RANKS)
            assert result.status == 0, result.output
            known[(stack, *how)] = read_cost(out, RANKS)
        return known[(stack, *how)]

    return of


def by_part(counts):
    found = {}
    for name, count in counts.items():
        part = PART.get(name, "policy")
        found[part] = found.get(part, 0) + count
    return found


def of_the_step(waits):
    """Those that every stack has: not of collators, which are on the host, nor of optimizers."""
    ours = ("comm.py", "metrics.py", "checks.py", "step.py", "reference.py", "objective.py")
    return {place: count for place, count in waits.items() if place.split(":")[0] in ours}


@pytest.mark.deepspeed
@pytest.mark.parametrize("stack", OWN)
def test_a_stack_costs_what_our_trainer_costs(stack, cost):
    found, own = cost(stack), cost(OWN[stack])
    assert by_part(found.flops) == by_part(own.flops)
    assert own.flops[regions.REFERENCE_TRUNK] > 0
    bytes_found, bytes_own = by_part(found.bytes), by_part(own.bytes)
    assert bytes_found["reference"] == bytes_own["reference"] > 0
    assert bytes_own["agreement"] == RANKS * 8
    assert bytes_found["agreement"] == RANKS * 8 * (2 * ACCUMULATION + 1)
    # Both ask for a stop and for a log that failed; a stack counts two more things of its own.
    assert 0 <= bytes_found["metrics"] - bytes_own["metrics"] <= 2 * RANKS * RANKS * 8
    assert of_the_step(found.waits) == of_the_step(own.waits)
    assert len(of_the_step(found.waits)) >= 2


@pytest.mark.deepspeed
def test_a_stack_s_own_traffic_stays_as_it_is(cost):
    safe, plain = cost("trainer-zero-3"), cost("trainer-zero-3", "--plain")
    # The Trainer gathers the ranks' numbers of tokens; ours are summed.
    less = RANKS * (RANKS * 8 - 8)
    assert by_part(safe.bytes)["policy"] == by_part(plain.bytes)["policy"] - less
