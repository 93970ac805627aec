"""Claimed: in one process, a window runs the reference on active rows alone and gives each its own.

Judge: plain transformers on each row alone. Exact: orders, counts. Rounds: states (1e-5). On
several ranks: tests/distributed/test_window.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from safereg_dist.data import collate
from safereg_dist.errors import CheckpointError, DataError
from safereg_dist.models.fingerprint import row_key
from safereg_dist.parallel.single import SingleBackend, single_ranks
from safereg_dist.reference import Packing, Reference
from safereg_dist.reference.store import ReferenceStore, Shard, Table, crc32_of
from safereg_dist.reference.trunk import ReferenceTrunk, used_parameters
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
                content_key="")
        )  # fmt: skip
    return found


def states_of(row):
    """[t, H] states that predict the row's response, by plain transformers."""
    with torch.no_grad():
        hidden = MODEL.base_model(torch.tensor([row.input_ids])).last_hidden_state[0]
    return hidden[[t - 1 for t in range(1, len(row.input_ids)) if row.loss_mask[t]]]


def reference(*, store=None, **packing):
    made = Reference.of_model(
        MODEL,
        backend=SingleBackend(single_ranks()),
        offload="none",
        packing=Packing(**{"rows_per_pass": 2, "max_length": 8, **packing}),
    )
    made.store = store
    return made


def read(window, all_rows, size):
    """ReferenceStates of each micro-batch, after checking each row's states."""
    found = []
    for index in range(len(all_rows) // size):
        places = window.order[index * size : (index + 1) * size]
        batch = collate([all_rows[place] for place in places], pad_id=0)
        states = window.states(index, batch)
        found.append(states)
        if states.hidden is None:
            continue
        for place, own in zip(places, states.hidden.split(batch.tokens_of_row), strict=True):
            want = states_of(all_rows[place])
            want = want if KL_COEF[place] > 0 else torch.zeros_like(want)
            torch.testing.assert_close(own, want, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("is_kept_together", [True, False])
def test_active_rows_come_first_and_share_passes(is_kept_together):
    size = 2
    bytes_of_one = size * 8 * MODEL.config.hidden_size * 4
    made = reference(keep_bytes=1 << 20 if is_kept_together else bytes_of_one)
    forwards = []
    made.engine.module.register_forward_pre_hook(lambda _, given: forwards.append(given[0].shape))
    window = made.open(rows(), KL_COEF, micro_batches=3)
    assert window.order == [1, 3, 5, 0, 2, 4]
    found = read(window, rows(), size)
    assert [states.needs_head for states in found] == [True, True, False]
    assert [states.rows_run for states in found] == ([3, 0, 0] if is_kept_together else [2, 1, 0])
    assert [states.hidden is None for states in found] == [False, False, True]
    # Longest first, two a pass, each as wide as its own longest row.
    assert forwards == ([(2, 8), (1, 3)] if is_kept_together else [(2, 4), (1, 8)])


def test_one_micro_batch_keeps_its_order():
    window = reference().open(rows(), KL_COEF)
    assert window.order == list(range(6))
    (states,) = read(window, rows(), 6)
    assert states.needs_head
    assert states.rows_run == 3


def test_rows_without_response_tokens_are_not_active():
    """A coefficient alone runs nothing; neither does a window without risk."""
    window = reference().open(rows()[3:5], [0.0, 1.0])
    batch = collate(rows()[3:5], pad_id=0)
    states = window.states(0, batch)
    assert states == (None, False, 0, 0)


def test_an_error_in_place_of_coefficients_is_raised_on_reading():
    window = reference().open(rows(), DataError("no risk"), micro_batches=2)
    assert window.order == list(range(6))
    with pytest.raises(DataError, match="no risk"):
        window.states(0, collate(rows()[:3], pad_id=0))


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
    window = reference(store=stored([5, 0, 1])).open(rows(), KL_COEF, micro_batches=3)
    assert window.order == [3, 1, 5, 0, 2, 4]  # those that run, those that are stored, the rest
    found = read(window, rows(), 2)
    assert [states.rows_run for states in found] == [1, 0, 0]
    assert [states.misses for states in found] == [1, 0, 0]
    assert [states.needs_head for states in found] == [True, True, False]


def test_a_store_that_lost_a_row_fails_the_window():
    window = reference(store=stored([5, 1], spoil=True)).open(rows(), KL_COEF, micro_batches=3)
    with pytest.raises(CheckpointError, match="not those that were written"):
        window.states(0, collate(rows()[:2], pad_id=0))


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

    made = Reference(
        MODEL.config, head_of(MODEL), load, backend=backend, packing=Packing(rows_per_pass=2)
    )
    made.open(rows(), [0.0] * 6).states(0, collate(rows(), pad_id=0))
    assert loaded == []
    made.response_states(rows()[:3], passes=2)
    assert loaded == [1]


def test_no_head_is_gathered_where_no_rank_needs_it():
    with reference().gathered_head(False) as head:
        assert head == NO_HEAD
    with reference().gathered_head(True) as head:
        assert head.weight is MODEL.get_output_embeddings().weight
