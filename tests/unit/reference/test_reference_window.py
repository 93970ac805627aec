"""Claimed: in one process, a window runs the reference on active rows alone and gives each its own.

Judge: plain transformers on each row alone. Exact: orders, counts. Rounds: states (1e-5). On
several ranks: tests/distributed/test_window.py.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from safereg_dist.coefficient import Coefficient
from safereg_dist.config import RegularizerConfig
from safereg_dist.data import collate, filler
from safereg_dist.errors import CheckpointError, DataError
from safereg_dist.models.fingerprint import row_key
from safereg_dist.objective import Objective
from safereg_dist.parallel.comm import Result
from safereg_dist.parallel.single import SingleBackend, single_ranks
from safereg_dist.policy import Policy
from safereg_dist.reference import (
    EngineModel,
    NoReference,
    Packing,
    Reference,
    ReferencePasses,
    ReferenceSchedule,
    ReferenceTrunk,
)
from safereg_dist.reference.store import ReferenceStore, Shard, Table, crc32_of
from safereg_dist.reference.trunk import used_parameters
from safereg_dist.risk.stage import ColumnRisk, RiskStage, WeightedSource
from safereg_dist.step import SafetyRegularizer
from safereg_dist.types import NO_HEAD, Row, head_of

MODEL = tiny_model(num_hidden_layers=2).eval()
LENGTHS = (5, 4, 7, 3, 6, 8)
KL_COEF = [0.0, 0.5, 0.0, 1.0, 0.0, 0.25]
LAST = 5


def rows():
    """Six rows; the last but one has no response token."""
    found = []
    for i, length in enumerate(LENGTHS):
        mask = [0, 0, *[1] * (length - 2)] if i != 4 else [0] * length
        ids = [(11 * i + 5 * t) % 90 + 6 for t in range(length)]
        found.append(
            Row(id=f"r{i}", input_ids=ids, loss_mask=mask, prompt_ends=[2], risk=None,
                prompt_key="")
        )  # fmt: skip
    return found


def states_of(row):
    """[t, H] states that predict the row's response, by plain transformers."""
    with torch.no_grad():
        hidden = MODEL.base_model(torch.tensor([row.input_ids])).last_hidden_state[0]
    return hidden[[t - 1 for t in range(1, len(row.input_ids)) if row.loss_mask[t]]]


def reference(*, store=None, **packing):
    chosen = Packing(**{"rows_per_pass": 2, "max_length": 8, **packing})
    backend = SingleBackend(single_ranks())
    own = EngineModel.of_model(MODEL, backend=backend, offload="none", rows=chosen.rows_per_pass)
    return Reference(own, ranks=backend.ranks, packing=chosen, store=store)


def opened(made, own, kl_coef, *, micro_batches=1, sizes=None):
    """The passes over a window's rows, agreed on, as a step's plan has them."""
    coef, is_sorted = kl_coef if isinstance(kl_coef, Result) else Result(kl_coef), sizes is None
    sizes = sizes or [len(own) // micro_batches] * micro_batches
    schedule = coef.then(lambda b: made.schedule(own, b, sizes=sizes, may_sort=is_sorted))
    return ReferencePasses(
        schedule=schedule.or_else(ReferenceSchedule.of_no_row(sizes, is_sorted=is_sorted)),
        agreement=made.start_agreement(schedule, micro_batches=len(sizes), is_sorted=is_sorted),
    )


def read(made, passes, all_rows):
    """ReferenceStates of each micro-batch, after checking each row's states."""
    found = []
    for index in range(len(passes.schedule.sizes)):
        chosen = passes.schedule.places(index)
        places = passes.schedule.order[chosen.start : chosen.stop]
        batch = collate([all_rows[place] for place in places], pad_id=0)
        states = made.hidden_states(passes, index, batch)
        found.append(states)
        if states.hidden is None:
            continue
        for place, own in zip(places, states.hidden.split(batch.tokens_of_row), strict=True):
            want = states_of(all_rows[place])
            want = want if KL_COEF[place] > 0 else torch.zeros_like(want)
            torch.testing.assert_close(own, want, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("is_kept_together", [True, False])
def test_rows_of_formed_micro_batches_stay_and_share_passes(is_kept_together):
    bytes_of_row = 8 * MODEL.config.hidden_size * 4
    made = reference(keep_bytes=(3 if is_kept_together else 2) * bytes_of_row)
    forwards = []
    trunk = made.model.engine.module
    trunk.register_forward_pre_hook(lambda _, given: forwards.append(given[0].shape[0]))
    passes = opened(made, rows(), KL_COEF, sizes=[1, 3, 2])
    assert passes.schedule.order == [0, 1, 2, 3, 4, 5]
    assert passes.agreement.result() == [0, 2, 1, 0, 2, 1, 3]
    found = read(made, passes, rows())
    assert [states.needs_head for states in found] == [False, True, True]
    assert forwards == [2, 1]
    assert [states.rows_run for states in found] == ([3, 0, 0] if is_kept_together else [0, 2, 1])


@pytest.mark.parametrize("is_kept_together", [True, False])
def test_active_rows_come_first_and_share_passes(is_kept_together):
    size = 2
    bytes_of_one = size * 8 * MODEL.config.hidden_size * 4
    made = reference(keep_bytes=1 << 20 if is_kept_together else bytes_of_one)
    forwards = []
    trunk = made.model.engine.module
    trunk.register_forward_pre_hook(lambda _, given: forwards.append(given[0].shape))
    passes = opened(made, rows(), KL_COEF, micro_batches=3)
    assert passes.schedule.order == [1, 3, 5, 0, 2, 4]
    assert passes.schedule.counts() == [3, 3]
    found = read(made, passes, rows())
    assert [states.needs_head for states in found] == [True, True, False]
    assert [states.rows_run for states in found] == ([3, 0, 0] if is_kept_together else [2, 1, 0])
    assert [states.hidden is None for states in found] == [False, False, True]
    assert passes.waiting == {}
    # Longest first, two a pass, each as wide as its own longest row.
    assert forwards == ([(2, 8), (1, 3)] if is_kept_together else [(2, 4), (1, 8)])


def test_one_micro_batch_keeps_its_order():
    made = reference()
    passes = opened(made, rows(), KL_COEF)
    assert passes.schedule.order == list(range(6))
    (states,) = read(made, passes, rows())
    assert states.needs_head
    assert states.rows_run == 3


def test_rows_without_response_tokens_are_not_active():
    """A coefficient alone runs nothing; neither does a window without risk."""
    made = reference()
    passes = opened(made, rows()[3:5], [0.0, 1.0])
    assert passes.schedule.counts() == [0, 0]
    states = made.hidden_states(passes, 0, collate(rows()[3:5], pad_id=0))
    assert states == (None, False, 0, 0)


def test_an_error_in_place_of_coefficients_is_raised_on_reading():
    made = reference()
    passes = opened(made, rows(), Result(error=DataError("no risk")), micro_batches=2)
    assert passes.schedule.order == list(range(6))
    with pytest.raises(DataError, match="no risk"):
        made.hidden_states(passes, 0, collate(rows()[:3], pad_id=0))


def test_without_a_reference_rows_come_as_they_are():
    """Nothing is agreed on, so an error is this rank's own and is raised at once."""
    made = NoReference()
    passes = opened(made, rows(), KL_COEF, micro_batches=3)
    assert passes.schedule == ReferenceSchedule.of_no_row([2, 2, 2])
    assert passes.agreement is None
    assert made.hidden_states(passes, 0, collate(rows()[:2], pad_id=0)) == (None, False, 0, 0)
    with made.gathered_head(False) as head:
        assert head == NO_HEAD
    with pytest.raises(DataError, match="no risk"):
        opened(made, rows(), Result(error=DataError("no risk")), micro_batches=3)


def test_a_plan_lays_rows_out_in_the_order_of_the_schedule():
    """Each micro-batch has the plan of its own rows; a filler counts for nothing."""
    own = [replace(row, risk=b) for row, b in zip(rows(), KL_COEF, strict=True)]
    own[4] = filler(0)
    ranks = single_ranks()
    config = RegularizerConfig(schedule="linear")
    regularizer = SafetyRegularizer(
        Policy(tiny_model(num_hidden_layers=1)),
        risk=RiskStage([WeightedSource("", ColumnRisk(), 0.5)]),
        coefficient=Coefficient(config, threshold=None, ranks=ranks),
        reference=reference(),
        objective=Objective(config, chunk_tokens=None, head_bytes=None),
        ranks=ranks,
    )
    plan = regularizer.plan(own, step=4, micro_batches=3, in_first_epoch=False)
    assert (plan.step, plan.in_first_epoch) == (4, False)
    assert plan.num_tokens.item() == sum(LENGTHS[i] - 2 for i in (0, 1, 2, 3, 5))
    assert [planned.is_last for planned in plan.micro_batches] == [False, False, True]
    order = [1, 3, 5, 0, 2, 4]
    for index, planned in enumerate(plan.micro_batches):
        places = order[2 * index : 2 * index + 2]
        assert planned.index == index
        assert planned.rows == planned.plan.rows == [own[place] for place in places]
        assert planned.plan.risk.values == [own[place].risk for place in places]
        assert planned.plan.kl_coef == [KL_COEF[place] for place in places]
        assert planned.plan.passes is plan.micro_batches[0].plan.passes
    whole = regularizer.plan(own, step=5)
    (planned,) = whole.micro_batches
    assert planned.rows == own
    assert planned.is_last


def stored(indices, *, spoil=False):
    """A store in memory with some rows' states."""
    own = [rows()[i] for i in indices]
    pieces = [states_of(row) for row in own]
    keys = b"".join(bytes.fromhex(row_key(row.input_ids, row.loss_mask)) for row in own)
    begin = np.cumsum([0, *map(len, pieces)]).astype(np.int64)
    crc = np.array([crc32_of(piece) + spoil for piece in pieces], dtype=np.int64)
    table = Table(np.frombuffer(keys, dtype="S32"), begin, crc)
    return ReferenceStore([Shard(Path("none"), torch.cat(pieces), table)], 32)


def test_stored_rows_are_read_and_the_others_run():
    made = reference(store=stored([5, 0, 1]))
    passes = opened(made, rows(), KL_COEF, micro_batches=3)
    assert passes.schedule.order == [
        3,
        1,
        5,
        0,
        2,
        4,
    ]
    found = read(made, passes, rows())
    assert [states.rows_run for states in found] == [1, 0, 0]
    assert [states.misses for states in found] == [1, 0, 0]
    assert [states.needs_head for states in found] == [True, True, False]


def test_a_store_that_lost_a_row_fails_the_window():
    made = reference(store=stored([5, 1], spoil=True))
    passes = opened(made, rows(), KL_COEF, micro_batches=3)
    with pytest.raises(CheckpointError, match="not those that were written"):
        made.hidden_states(passes, 0, collate(rows()[:2], pad_id=0))


def test_used_parameters_leave_out_embeddings_and_idle_experts():
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=31,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    attention, experts, router, norms = 4 * 8 * 8, 4 * 3 * 8 * 12, 4 * 8, 3 * 8
    model = AutoModelForCausalLM.from_config(config)
    assert used_parameters(model) == attention + experts // 4 + router + norms


def test_states_are_in_the_order_of_the_rows():
    own = [rows()[i] for i in (3, 5, 0, 2)]
    found = reference().response_states(own, passes=3)  # one pass more than there are rows
    for row, states in zip(own, found, strict=True):
        torch.testing.assert_close(states, states_of(row), rtol=1e-5, atol=1e-5)
    assert reference().response_states([], passes=1) == []


def test_the_trunk_is_loaded_once_and_only_when_run():
    loaded = []
    backend = SingleBackend(single_ranks())

    def load():
        loaded.append(1)
        return backend.wrap_reference(ReferenceTrunk(MODEL), offload="none", rows=2)

    own = EngineModel(head_of(MODEL), load, backend=backend)
    made = Reference(own, ranks=backend.ranks, packing=Packing(rows_per_pass=2))
    made.hidden_states(opened(made, rows(), [0.0] * 6), 0, collate(rows(), pad_id=0))
    assert loaded == []
    assert not own.is_loaded
    made.response_states(rows()[:3], passes=2)
    assert loaded == [1]
    assert own.is_loaded


def test_no_head_is_gathered_where_no_rank_needs_it():
    with reference().gathered_head(False) as head:
        assert head == NO_HEAD
    with reference().gathered_head(True) as head:
        assert head.weight is MODEL.get_output_embeddings().weight
