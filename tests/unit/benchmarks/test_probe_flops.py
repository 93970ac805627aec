"""Claimed: on real steps of a small Llama the policy-side probe costs at most 0.05 % of a step, and
the reference-side one (k / L) * (prompt share) / 3 of it within 10 % in the first epoch and not one
product later, with and without padding.

The judge is the count written out from the dimensions: nothing here is timed, nothing rounds, and
the measured FLOPs of a step must equal it to the last one. Only the formula is approximate.
"""

import pytest
from step_flops import Rows, epoch_costs, llama, start_run, write_run_folder

from safereg_dist.probe_lab.mlp import UNITS

LAYERS, H, VOCAB = 4, 256, 256
SHAPE = llama(LAYERS, H, vocab=VOCAB)
CASES = [
    Rows.equal(0.5, length=32, count=3),
    Rows.ragged(longest=36, count=3, rows_per_batch=3),
    Rows.ragged(longest=36, count=3, rows_per_batch=1),
]


def trunk_flops(layers, lengths, *, is_trained):
    """Products of decoder layers over rows of these padded lengths.

    Per token 4 square projections and 3 of the MLP; per row 2 products of attention over all pairs
    of positions. Backward: twice the projections; attention's 4, and its scores again.
    """
    linear = sum(2 * n * (4 * H * H + 3 * H * SHAPE.intermediate_size) for n in lengths)
    attention = sum(2 * 2 * n * n * H for n in lengths)
    if is_trained:
        linear, attention = 3 * linear, attention + attention * 5 // 2
    return layers * (linear + attention)


def padded(rows, lengths):
    size = rows.rows_per_batch
    groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return [max(group) for group in groups for _ in group]


@pytest.fixture(scope="module", params=CASES, ids=lambda r: f"{r.name}-{r.rows_per_batch}")
def case(request, tmp_path_factory):
    """(rows, folder, cost of an epoch without a probe, its tokens)."""
    folder = tmp_path_factory.mktemp("run")
    write_run_folder(folder, SHAPE, request.param)
    ((cost, tokens),) = epoch_costs(start_run(folder, request.param, side="none"), 1)
    return request.param, folder, cost, tokens


def test_a_step_is_its_products(case):
    rows, _, plain, tokens = case
    lengths = [p + r for p, r in zip(rows.prompts, rows.responses, strict=True)]
    head = 3 * 2 * sum(rows.responses) * H * VOCAB
    assert plain.flops == trunk_flops(LAYERS, padded(rows, lengths), is_trained=True) + head
    assert (tokens.real, tokens.real_prompt) == (sum(lengths), sum(rows.prompts))
    assert tokens.padded == sum(padded(rows, lengths))
    assert tokens.padded_prompt == sum(padded(rows, rows.prompts))


@pytest.mark.parametrize("k", [1, LAYERS])
def test_reference_side_costs_the_formula_once(case, k):
    rows, folder, plain, tokens = case
    run = start_run(folder, rows, side="reference", k=k)
    first, *later = [cost.flops - plain.flops for cost, _ in epoch_costs(run, 3)]
    assert first == trunk_flops(k, padded(rows, rows.prompts), is_trained=False)
    assert later == [0, 0]
    formula = (k / LAYERS) * (tokens.padded_prompt / tokens.padded) / 3
    assert first / plain.flops == pytest.approx(formula, rel=0.1)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize(("k", "pooling"), [(2, "last_prompt_token"), (LAYERS, "mean_prompt")])
def test_policy_side_is_nearly_free(case, k, pooling, kind):
    rows, folder, plain, _ = case
    run = start_run(folder, rows, side="policy", k=k, pooling=pooling, kind=kind)
    ((cost, _),) = epoch_costs(run, 1)
    extra = cost - plain
    assert extra.flops == (2 * len(rows.prompts) * UNITS * H if kind == "mlp" else 0)
    assert 0 < extra.flops + extra.elements <= 0.0005 * plain.flops
