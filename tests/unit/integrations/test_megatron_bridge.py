"""Claimed: a forward step of any signature that Megatron-Bridge takes can be wrapped: its loop
still sees whether to bind its state, its calls arrive unchanged, and the step's other stages run
around the schedule although the loop has bound its state to our function.

Megatron-Bridge does not import without CUDA, so this is its published contract, read in
`megatron.bridge.training` (v0.4.2, v0.5.1, v0.6.0, main of August 2026): `forward_step_func_types`,
`utils.train_utils`. The step itself is `bridge` in tests/distributed/test_megatron.py. Exact.
"""

import functools
import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from torch import nn

from safereg_dist.integrations.megatron import MegatronSafety
from safereg_dist.parallel.megatron import _watched

pytest.importorskip("megatron.core")


class GlobalState:
    """Stands for the loop's own."""


SEEN: list[tuple] = []


def given(*values):
    SEEN.append(values)
    return "output", functools.partial(print)


def two(data_iterator, model):
    return given(data_iterator, model)


def three(data_iterator, model, return_schedule_plan=False):
    return given(data_iterator, model, return_schedule_plan)


def three_with_state(global_state, data_iterator, model):
    return given(global_state, data_iterator, model)


def four(state: GlobalState, data_iterator, model, return_schedule_plan: bool = False):
    return given(state, data_iterator, model, return_schedule_plan)


class Functor:
    def __call__(self, anything: "GlobalState", data_iterator, model):
        return given(anything, data_iterator, model)


STEPS = {
    "two": (two, False),
    "three": (three, False),
    "three-with-state": (three_with_state, True),
    "four": (four, True),
    "functor": (Functor(), True),
}


def asks_for_state(step) -> bool:
    """The loop's rule: an annotation that names GlobalState, or the first parameter's name."""
    parameters = inspect.signature(step).parameters
    named = [getattr(p.annotation, "__name__", str(p.annotation)) for p in parameters.values()]
    return any("GlobalState" in n for n in named) or next(iter(parameters)) in (
        "state",
        "global_state",
    )


@pytest.fixture(params=STEPS)
def case(request, tmp_path):
    """(safety, what it made of a step, that bound as the loop does, what is bound)"""
    step, takes_state = STEPS[request.param]
    safety = MegatronSafety({"risk": {"estimator": "column"}}, output_dir=tmp_path)
    wrapped = safety.forward_step(step)
    assert asks_for_state(wrapped) == asks_for_state(step) == takes_state
    assert inspect.signature(wrapped) == inspect.signature(step)
    state = GlobalState()
    bound = functools.partial(wrapped, state) if takes_state else wrapped
    SEEN.clear()
    return safety, bound, (state,) if takes_state else ()


def test_outside_a_training_schedule_calls_pass_through(case):
    _, bound, state = case
    model, iterator = nn.Identity(), iter(())
    assert bound(iterator, model)[0] == "output"
    assert SEEN[0][: len(state) + 2] == (*state, iterator, model)


def test_inside_one_the_chunk_is_found_among_the_arguments(case):
    safety, bound, state = case
    model, iterator, chunks = nn.Identity(), iter(()), []

    @contextmanager
    def micro_batch(chunk):
        chunks.append(chunk)
        yield lambda loss_func: ("reported", loss_func)

    safety._run = SimpleNamespace(is_training=True, micro_batch=micro_batch)
    output, loss_func = bound(iterator, model)
    assert (output, loss_func[0]) == ("output", "reported")
    assert chunks == [model]
    assert SEEN[0][: len(state) + 2] == (*state, iterator, model)


def test_the_other_stages_run_around_the_schedule(case, monkeypatch):
    """As `train_step` calls it, and as `evaluate` does."""
    safety, bound, _ = case
    ran, trained = [], []
    schedule = _watched(lambda **arguments: ran.append(arguments))
    monkeypatch.setattr(safety, "_train", lambda *found: trained.append(found))
    names = ("adjust_tensor_shapes_fn", "p2p_communicator", "pg_collection")
    arguments = {"forward_step_func": bound, "num_microbatches": 2, **dict.fromkeys(names)}
    schedule(**arguments, forward_only=True)
    assert ran == [arguments | {"forward_only": True}]
    assert not trained
    schedule(**arguments, forward_only=False)
    [(_, passed, forward_step)] = trained
    assert passed == arguments | {"forward_only": False}
    assert forward_step is bound  # with its state: it runs on the reference's micro-batches too
