"""Claimed: what stands between a stack's data and the step: the collator and the anchor rows.

Exact: which columns a stack's collator is shown, which rows are found and with what risk, which
places are anchors'; an unreadable row becomes an error that the step raises.
"""

from itertools import pairwise

import pytest
import torch
from support.builders import random_rows, tiny_model, word_tokenizer, write_jsonl
from torch.utils.data import IterableDataset
from transformers import DataCollatorForSeq2Seq
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from safereg_dist import prepare
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.integrations.anchors import with_anchors
from safereg_dist.integrations.collator import KEY, RowCollator

FEATURES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1] * 3, "risk": 0.25},
    {"input_ids": [8, 9], "labels": [-100, 9], "attention_mask": [1] * 2, "risk": 0.75, "id": "b"},
]


def rows_in(batch):
    return [(row.input_ids, row.risk, row.is_anchor) for row in batch[KEY].rows]


# ---- the collator


def test_a_collator_never_sees_our_columns():
    seen = []

    def collator(features):
        seen.extend(features)
        return DataCollatorForSeq2Seq(word_tokenizer())(features)

    batch = RowCollator(collator, needs_positions=False)(FEATURES)
    assert all(set(f) == {"input_ids", "labels", "attention_mask"} for f in seen)
    assert rows_in(batch) == [([5, 6, 7], 0.25, False), ([8, 9], 0.75, False)]
    assert batch[KEY].rows[1].id == "b"
    assert all("risk" in feature for feature in FEATURES)  # the data set's own rows are not changed


@pytest.mark.parametrize("multiple", [None, 8])
def test_padding_free_rows_keep_their_risk(multiple):
    collator = DataCollatorForLanguageModeling(
        pad_token_id=0, padding_free=True, pad_to_multiple_of=multiple
    )
    lone = {"input_ids": [4], "labels": [4], "risk": 0.5}  # without a label it is no row
    batch = RowCollator(collator, needs_positions=True)([*FEATURES[:1], lone, FEATURES[1]])
    assert rows_in(batch) == [([5, 6, 7], 0.25, False), ([8, 9], 0.75, False)]


def test_a_packed_line_and_an_anchor_in_one_batch():
    line = {
        "input_ids": [5, 6, 7, 8],
        "labels": [-100, 6, -100, 8],
        "seq_lengths": [2, 2],
        "risk": [0.1, 0.1, 0.9, 0.9],
    }
    anchor = {"input_ids": [4, 3], "labels": [-100, 3], "seq_lengths": [2], "is_anchor": True}
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = RowCollator(collator, needs_positions=True)([line, anchor])
    assert rows_in(batch) == [([5, 6], 0.1, False), ([7, 8], 0.9, False), ([4, 3], None, True)]


def test_nothing_predicts_the_first_token_of_a_packed_row():
    """A stack's own loss sees what is left of the labels."""
    packed = {
        "input_ids": torch.tensor([[5, 6, 7, 8]]),
        "labels": torch.tensor([[5, 6, 7, 8]]),
        "position_ids": torch.tensor([[0, 1, 0, 1]]),
    }
    collate = RowCollator(lambda _: packed, needs_positions=True)
    batch = collate([{"input_ids": [5, 6, 7, 8], "risk": [0.1, 0.1, 0.9, 0.9]}])
    assert batch["labels"].tolist() == [[-100, 6, -100, 8]]
    assert batch[KEY].num_response_tokens == 2


def test_an_unreadable_row_becomes_an_error_of_the_step():
    collate = RowCollator(DataCollatorForSeq2Seq(word_tokenizer()), needs_positions=False)
    batch = collate([FEATURES[0] | {"risk": 2.0}])
    assert isinstance(batch[KEY].error, DataError)
    model = tiny_model()
    regularizer = prepare(model, {"risk": {"estimator": "column"}}, reference=tiny_model(seed=1))
    good = collate(FEATURES)
    plan = regularizer.open([good[KEY], batch[KEY]], step=0)
    with (
        pytest.raises(DataError, match=r"has risk 2\.0"),
        regularizer.loss_of(plan.micro_batches[0], good[KEY], plan),
    ):
        model(input_ids=good["input_ids"], attention_mask=good["attention_mask"])


def test_packed_rows_without_position_ids_are_refused():
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    batch = RowCollator(collator, needs_positions=True)(FEATURES)
    assert "no position_ids" in str(batch[KEY].error)


# ---- anchors


class Stream(IterableDataset):
    def __iter__(self):
        yield from ({"input_ids": [7, n]} for n in range(40))


@pytest.fixture
def settings(tmp_path):
    path = write_jsonl(tmp_path / "anchors.jsonl", random_rows(5, risk=False, seed=3))
    return {"anchor": str(path), "anchor_fraction": 0.2}


@pytest.mark.parametrize("kind", ["mapped", "streamed"])
def test_share_and_places_of_anchors(settings, kind):
    rows = [{"input_ids": [7, n]} for n in range(40)] if kind == "mapped" else Stream()
    mixed = with_anchors(rows, settings, word_tokenizer(), seed=5)
    again = with_anchors(rows, settings, word_tokenizer(), seed=5)

    def listed(data):
        return [data[i] for i in range(len(data))] if kind == "mapped" else list(data)

    found = listed(mixed)
    assert found == listed(again)
    assert found == listed(mixed)  # a second epoch
    assert [f for f in found if not f.get("is_anchor")] == listed(rows)
    anchors = [place for place, f in enumerate(found) if f.get("is_anchor")]
    assert len(anchors) == 10  # 0.2 of 50
    gaps = [b - a for a, b in pairwise(anchors)]
    assert set(gaps) <= {4, 5, 6}
    first = found[anchors[0]]
    assert set(first) == {"input_ids", "attention_mask", "labels", "id", "is_anchor"}
    other = listed(with_anchors(rows, settings, word_tokenizer(), seed=6))
    assert other != found


def test_places_of_a_data_set_with_a_length(settings):
    mixed = with_anchors([{"n": i} for i in range(4)], settings, word_tokenizer(), seed=0)
    assert len(mixed) == 5
    assert mixed[-1] == mixed[4]
    with pytest.raises(IndexError):
        mixed[5]


def test_anchors_need_a_tokenizer(settings):
    with pytest.raises(ConfigError, match="processing_class"):
        with_anchors([], settings, None, seed=0)
