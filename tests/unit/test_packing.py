"""Claimed: `train.packing` puts the rows of a micro-batch into one line, and changes no result.

Exact: what stands where, against loops. A run: its losses and weights against those of padded rows,
within float32's rounding, for attention in eager torch and in sdpa.
"""

import pytest
import torch
from support.builders import random_rows, save_model, tiny_model, write_jsonl

from safereg_dist import build_run, optimizer_step, start_backend
from safereg_dist.config import config_from_dict
from safereg_dist.data import filler, pack, row_of
from safereg_dist.errors import ConfigError

ROWS = [
    row_of("a", [5, 6, 7, 8], [0, 0, 1, 1], risk=0.9),
    filler(0),
    row_of("b", [9, 4, 3], [1, 0, 1], risk=0.1),
]


def test_rows_stand_one_after_another():
    batch = pack(ROWS)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 0, 9, 4, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert batch.row_begins == (0, 4, 5)
    assert batch.response_index.tolist() == [1, 2, 6]
    assert batch.labels.tolist() == [7, 8, 3]
    assert batch.row_of_token.tolist() == [0, 0, 2]
    assert batch.tokens_of_row == (2, 0, 1)


def losses_and_weights(folder, **train):
    config = config_from_dict(
        {
            "model": str(folder / "model"),
            "reference": {"model": str(folder / "reference")},
            "data": {"train": str(folder / "rows.jsonl")},
            "risk": {"estimator": "column"},
            "optimizer": {"lr": 1e-3},
            "train": {"precision": "fp32", "micro_batch_size": 4, "grad_accum_steps": 2, **train},
            "engine": {"name": "single"},
        }
    )
    run = build_run(config, start_backend(config))
    losses = []
    for step in range(3):
        result = optimizer_step(run, run.sources.rows_of_step(step), step=step, lr=1e-3)
        losses.append(result.totals.sums["loss"])
    return losses, [p.detach().clone() for p in run.model.parameters()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_run_of_packed_rows_is_that_of_padded_ones(attention, tmp_path):
    for name, seed in (("model", 0), ("reference", 5)):
        model = tiny_model(seed=seed)
        model.config._attn_implementation = attention
        save_model(tmp_path / name, model)
    write_jsonl(tmp_path / "rows.jsonl", random_rows(24, seed=4))
    losses, weights = losses_and_weights(tmp_path, packing=True)
    wanted, wanted_weights = losses_and_weights(tmp_path)
    # 1.4e-6 after two updates, measured on a CPU with AVX-512
    assert losses == pytest.approx(wanted, rel=1e-5)
    for own, want in zip(weights, wanted_weights, strict=True):
        torch.testing.assert_close(own, want, rtol=1e-4, atol=1e-5)


def test_a_model_without_positions_is_refused(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4))
    save_model(tmp_path / "model", model)
    save_model(tmp_path / "reference", model)
    write_jsonl(tmp_path / "rows.jsonl", random_rows(8, seed=4))
    with pytest.raises(ConfigError, match=r"train\.packing=true"):
        losses_and_weights(tmp_path, packing=True)
