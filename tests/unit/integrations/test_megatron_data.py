"""Claimed: every row that the regulariser finds in an item of a GPT data set has the risk of the
document that it is cut from, and of several the largest.

The oracle is one stream: the documents in the order of `document_index`, one after the other, of
which a sample is the next `sequence_length` tokens. It also has to give the item's own tokens.
Exact.
"""

import pickle
from itertools import product

import numpy as np
import pytest
import torch
from support.indexed import write_indexed
from torch.utils.data import DataLoader

from safereg_dist.data.indexed import IndexedTokens, write_risks
from safereg_dist.data.stream import batch_of_stream
from safereg_dist.errors import DataError
from safereg_dist.integrations.megatron.data import with_risk

pytest.importorskip("megatron.core")

EOD, PAD, LENGTH = 0, 63, 16


class Tokens:
    """What a GPT data set asks of a tokenizer."""

    eod, eos, pad, vocab_size, unique_identifiers = EOD, EOD, PAD, 64, {"tokens": "test"}


def documents(count: int, *, ends: bool, seed: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    found = [draw.integers(1, PAD, draw.integers(0, 40)).tolist() for _ in range(count)]
    return [[*tokens, EOD] if ends else tokens or [1] for tokens in found]


def scored(folder, name: str, *, ends: bool = True, seed: int = 0, count: int = 30):
    """A data set with risks beside it: its prefix, its documents, their risks."""
    own = documents(count, ends=ends, seed=seed)
    prefix = write_indexed(folder / name, own, np.uint16)
    risks = np.random.default_rng(seed + 1).random(count)
    write_risks(IndexedTokens(prefix), risks, {"scorer": "test"}, prefix)
    return prefix, own, risks


def gpt(prefix, *, samples=None, chosen=None, split="train", **options):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    defaults = {"reset_position_ids": True, "reset_attention_mask": False, "eod_mask_loss": False}
    defaults |= {"blend": ([str(prefix)], None), "split": "1,0,0"}
    low = IndexedDataset(str(prefix))
    chosen = np.arange(len(low), dtype=np.int32) if chosen is None else chosen
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        tokenizer=Tokens(),
        create_attention_mask=False,
        **{**defaults, **options},
    )
    return GPTDataset(low, str(prefix), chosen, samples, Split[split], config)


def expected(dataset, index: int, own, risks) -> tuple[list[int], list[tuple[int, float]]]:
    """(tokens of a sample, [(where a row begins, its risk)]) from the stream."""
    order = dataset.document_index.tolist()
    stream = [(token, risks[d]) for d in order for token in own[d]]
    begin = int(dataset.shuffle_index[index]) * LENGTH
    sample = stream[begin : begin + LENGTH]
    rows: list[tuple[int, float]] = []
    for place, (_, risk) in enumerate(sample):
        if place == 0 or (sample[place - 1][0] == EOD and dataset.config.reset_position_ids):
            rows.append((place, risk))
        rows[-1] = (rows[-1][0], max(rows[-1][1], risk))
    return [token for token, _ in sample], rows


def check(dataset, own, risks) -> None:
    wrapped = with_risk(dataset)
    assert len(wrapped) == len(dataset)
    assert wrapped.index_split is dataset.index_split  # what a loader asks of it
    for index in range(len(dataset)):
        item, plain = wrapped[index], dataset[index]
        assert all(torch.equal(item[name], plain[name]) for name in plain)
        tokens, rows = expected(dataset, index, own, risks)
        assert item["tokens"].tolist() == tokens + [0] * (LENGTH - len(tokens))
        batch = batch_of_stream({name: value[None] for name, value in item.items()})
        found = [(b, r.risk) for b, r in zip(batch.row_begins, batch.rows, strict=True)]
        ends = [*[begin for begin, _ in rows[1:]], LENGTH]
        counts = [bool(item["loss_mask"][b:e].any()) for (b, _), e in zip(rows, ends, strict=True)]
        assert found == [row for row, is_trained in zip(rows, counts, strict=True) if is_trained]


@pytest.mark.parametrize(("resets", "ends", "extra"), product([True, False], repeat=3))
def test_rows_have_the_risk_of_their_documents(tmp_path, resets, ends, extra):
    prefix, own, risks = scored(tmp_path, "x", ends=ends)
    options = {"reset_position_ids": resets, "add_extra_token_to_sequence": extra}
    dataset = gpt(prefix, samples=100, **options)  # several epochs, the last by itself
    assert len(dataset.document_index) > 2 * len(own)
    check(dataset, own, risks)


def test_a_part_of_the_documents_and_a_last_line_that_is_filled_up(tmp_path):
    prefix, own, risks = scored(tmp_path, "x")
    options = {"split": "valid", "drop_last_partial_validation_sequence": False}
    dataset = gpt(prefix, chosen=np.arange(3, 14, dtype=np.int32), **options)
    filled = [i for i in range(len(dataset)) if not dataset[i]["loss_mask"].all()]
    assert len(filled) == 1
    check(dataset, own, risks)
    assert not with_risk(dataset)[None]["loss_mask"].any()  # a line that fills a batch up


def test_a_blend_takes_each_sample_from_its_own_set(tmp_path):
    from megatron.core.datasets.blended_dataset import BlendedDataset

    parts = [scored(tmp_path, "a"), scored(tmp_path, "b", seed=5)]
    sets = [gpt(prefix, samples=60) for prefix, _, _ in parts]
    blend = BlendedDataset(sets, [0.3, 0.7], 40, sets[0].config)
    wrapped, seen = with_risk(blend), set()
    for index in range(40):
        item, part = wrapped[index], int(blend.dataset_index[index])
        _, own, risks = parts[part]
        sample = int(blend.dataset_sample_index[index])
        _, rows = expected(sets[part], sample, own, risks)
        assert [item["risk"][begin].item() for begin, _ in rows] == [risk for _, risk in rows]
        seen.add(part)
    assert seen == {0, 1}


def test_a_loader_makes_batches_of_it_in_another_process_too(tmp_path):
    prefix, _, _ = scored(tmp_path, "x")
    wrapped = with_risk(gpt(prefix, samples=20))
    again = pickle.loads(pickle.dumps(wrapped))
    for batch, other in zip(*(DataLoader(d, 4) for d in (wrapped, again)), strict=True):
        assert batch["risk"].shape == batch["tokens"].shape
        assert torch.equal(batch["risk"], other["risk"])
        assert len(batch_of_stream(batch).rows) > len(batch["risk"])


def test_indices_that_are_read_late(tmp_path):
    prefix, own, risks = scored(tmp_path, "x")
    known = {"samples": 40, "path_to_cache": str(tmp_path / "cache")}
    gpt(prefix, **known)
    late = gpt(prefix, defer_npy_index_mmap=True, **known)
    assert late.document_index is None
    wrapped = with_risk(late)
    found = wrapped[7]["risk"]
    _, rows = expected(late, 7, own, risks)
    assert [found[begin].item() for begin, _ in rows] == [risk for _, risk in rows]


def test_risks_that_lie_elsewhere(tmp_path):
    prefix, _, _ = scored(tmp_path, "x")
    moved = tmp_path / "elsewhere"
    for ending in (".risk.npy", ".risk.json"):
        (tmp_path / f"x{ending}").rename(f"{moved}{ending}")
    dataset = gpt(prefix, samples=20)
    with pytest.raises(DataError, match="expected the risk of each sequence"):
        with_risk(dataset)
    assert with_risk(dataset, {str(prefix): moved})[0]["risk"].shape == (LENGTH,)


def test_what_is_no_gpt_data_set(tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset

    class Rearranged(GPTDataset):
        def _query_document_sample_shuffle_indices(self, idx):
            raise NotImplementedError

    other = gpt(scored(tmp_path, "x")[0], samples=20)
    other.__class__ = Rearranged
    for dataset in (other, [1, 2]):
        with pytest.raises(DataError, match="expected a GPTDataset over an IndexedDataset"):
            with_risk(dataset)
    assert with_risk(None) is None  # a rank that builds no data
