"""Claimed: a probe pools what a plain loop would, under padding on either side and for several
turns a row; its files are whole or refused; it refuses another model; and read from the policy's
forward, from the reference's shortened one, or from plain transformers it gives the same risk.

The judges are NumPy loops and the `hidden_states` of plain transformers. Exact: files, refusals,
pooling of the last token. Rounds: means and whole forwards in float32 (1e-5).
"""

import copy
import hashlib
import json
import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import oracles
from support.builders import FAMILIES, random_rows, save_model, tiny_model, word_tokenizer

from safereg_dist.data import collate, filler, row_of, tokenize_row
from safereg_dist.errors import CheckpointError, DataError, ProbeError
from safereg_dist.models.architecture import decoder_layers, enable_activation_checkpointing
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.single import SingleBackend, single_ranks
from safereg_dist.policy import Policy
from safereg_dist.reference import EngineModel, Packing, Reference
from safereg_dist.risk.cached import scorer_name
from safereg_dist.risk.probe import POOLINGS, Probe, check_model, pool_prompt
from safereg_dist.risk.probe_risk import (
    KnownRisks,
    PolicyProbeRisk,
    ReferenceProbeRisk,
)
from safereg_dist.risk.stage import ProbedStates
from safereg_dist.storage.score_cache import ScoreCache
from safereg_dist.storage.seal import seal_of

ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), dp_group=None)
H = 32


def make_probe(seed=0, size=H, **changes):
    torch.manual_seed(seed)
    values = {
        "layer": 2,
        "pooling": "last_prompt_token",
        "mean": torch.randn(size),
        "scale": torch.rand(size) + 0.5,
        "weight": torch.randn(size) / 4,
        "bias": 0.125,
        "threshold": 0.375,
        "fingerprint": "f" * 64,
        "meta": {"seed": 3, "layers": [{"layer": 1, "auroc": 0.5}]},
    }
    return Probe(**{**values, **changes})


# Pooling


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_against_a_loop(pooling, side, dtype):
    generator = torch.Generator().manual_seed(1)
    lengths, width = [7, 1, 4, 11], 11
    hidden = torch.randn(4, width, 5, generator=generator).to(dtype)
    mask = torch.zeros(4, width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(width - length, width)] = 1
    rows, ends = [0, 0, 1, 2, 3, 3, 3], [2, 6, 1, 4, 1, 5, 11]
    got = pool_prompt(
        hidden,
        torch.tensor(ends),
        pooling=pooling,
        attention_mask=mask,
        row_index=torch.tensor(rows),
    )
    for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
        real = [hidden[row, s].double().numpy() for s in range(width) if mask[row, s]][:end]
        expected = oracles.pooled(real, pooling)
        np.testing.assert_allclose(got[place].double().numpy(), expected, rtol=1e-5, atol=1e-6)
    one_each = pool_prompt(hidden, torch.tensor([6, 1, 4, 1]), pooling=pooling, attention_mask=mask)
    assert torch.equal(one_each, got[torch.tensor([1, 2, 3, 4])])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_may_hold_anything(pooling):
    hidden = torch.randn(2, 6, 3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    ends = torch.tensor([2, 3])
    clean = pool_prompt(hidden, ends, pooling=pooling, attention_mask=mask)
    for value in (math.nan, math.inf, 1e30):
        dirty = torch.where(mask[..., None].bool(), hidden, torch.tensor(value))
        assert torch.equal(pool_prompt(dirty, ends, pooling=pooling, attention_mask=mask), clean)


def test_probability_is_the_equation():
    probe = make_probe()
    pooled = torch.randn(6, H)
    mean, scale, weight = (getattr(probe, n).double().numpy() for n in ("mean", "scale", "weight"))
    expected = 1 / (1 + np.exp(-(((pooled.double().numpy() - mean) / scale) @ weight + 0.125)))
    np.testing.assert_allclose(probe.probability(pooled).numpy(), expected, rtol=1e-5)
    assert probe.probability(pooled.bfloat16()).dtype == torch.float32


# Files


def test_save_and_load(tmp_path):
    probe = make_probe()
    probe.save(tmp_path / "new" / "probe")
    loaded = Probe.load(tmp_path / "new" / "probe")
    for name in ("layer", "pooling", "bias", "threshold", "fingerprint", "meta"):
        assert getattr(loaded, name) == getattr(probe, name), name
    for name in ("mean", "scale", "weight"):
        assert torch.equal(getattr(loaded, name), getattr(probe, name))
    assert sorted(os.listdir(tmp_path / "new" / "probe")) == ["probe.json", "probe.safetensors"]
    make_probe(seed=1).save(tmp_path / "new" / "probe")  # over an older one
    assert torch.equal(Probe.load(tmp_path / "new" / "probe").mean, make_probe(seed=1).mean)


def edit_facts(folder, **changes):
    path = folder / "probe.json"
    facts = {**json.loads(path.read_text()), **changes, "seal": ...}
    facts = {k: v for k, v in facts.items() if v is not ...}
    seal = seal_of(json.dumps(facts, sort_keys=True).encode())  # as one would who knows the format
    path.write_text(json.dumps(facts | {"seal": seal}))


def edit_tensors(folder, **changes):
    path = folder / "probe.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not ...}, path)
    # As one who knows the format would: only what the values say can give it away.
    edit_facts(folder, tensors_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def flip_a_bit(folder):
    path = folder / "probe.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


TAMPERED = {
    "one bit": flip_a_bit,
    "no json": lambda f: (f / "probe.json").unlink(),
    "no tensors": lambda f: (f / "probe.safetensors").unlink(),
    "torn json": lambda f: (f / "probe.json").write_text('{"format": 1, '),
    "json of another kind": lambda f: (f / "probe.json").write_text("[1]"),
    "json that is no text": lambda f: (f / "probe.json").write_bytes(b"\xff"),
    "torn tensors": lambda f: (f / "probe.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
    "empty tensors": lambda f: (f / "probe.safetensors").write_bytes(b""),
    "other format": lambda f: edit_facts(f, format=3),
    "no format": lambda f: edit_facts(f, format=...),
    "no layer": lambda f: edit_facts(f, layer=...),
    "layer of text": lambda f: edit_facts(f, layer="first"),
    "no hidden size": lambda f: edit_facts(f, hidden_size=...),
    "other hidden size": lambda f: edit_facts(f, hidden_size=31),
    "unknown pooling": lambda f: edit_facts(f, pooling="max"),
    "pooling of another type": lambda f: edit_facts(f, pooling=["mean_prompt"]),
    "threshold above 1": lambda f: edit_facts(f, threshold=1.5),
    "threshold nan": lambda f: edit_facts(f, threshold=math.nan),
    "fingerprint of another type": lambda f: edit_facts(f, fingerprint=3),
    "meta of another type": lambda f: edit_facts(f, meta=[]),
    "no weight": lambda f: edit_tensors(f, weight=...),
    "no bias": lambda f: edit_tensors(f, bias=...),
    "two biases": lambda f: edit_tensors(f, bias=torch.zeros(2)),
    "short weight": lambda f: edit_tensors(f, weight=torch.zeros(31)),
    "weight of two axes": lambda f: edit_tensors(f, weight=torch.zeros(H, 1)),
    "scale 0": lambda f: edit_tensors(f, scale=torch.zeros(H)),
    "scale nan": lambda f: edit_tensors(f, scale=torch.full((H,), math.nan)),
    "weight nan": lambda f: edit_tensors(f, weight=torch.full((H,), math.nan)),
    "bias inf": lambda f: edit_tensors(f, bias=torch.tensor([math.inf])),
    "mean of integers": lambda f: edit_tensors(f, mean=torch.zeros(H, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_files_that_are_not_a_probe(name, tmp_path):
    make_probe().save(tmp_path)
    Probe.load(tmp_path)
    TAMPERED[name](tmp_path)
    with pytest.raises(ProbeError) as caught:
        Probe.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(ProbeError, match="safereg probe fit"):
        Probe.load(tmp_path / "none")


def test_another_model_is_refused():
    probe = make_probe()
    fits = {"fingerprint": "f" * 64, "hidden_size": H, "num_layers": 3, "force": False}
    check_model(probe, **fits)
    with pytest.raises(ProbeError, match=r"fingerprint.*risk\.force=true"):
        check_model(probe, **{**fits, "fingerprint": "0" * 64})
    check_model(probe, **{**fits, "fingerprint": "0" * 64, "force": True})
    for wrong in ({"hidden_size": 64}, {"num_layers": 1}):
        for force in (False, True):
            with pytest.raises(ProbeError, match="features of layer 2"):
                check_model(probe, **{**fits, **wrong, "force": force})


# Risk of rows


def conversation(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


ROWS = [
    *random_rows(4, seed=3, risk=False),
    conversation("w1 w2", "w3", "w4 w5 w6 w7", "w8 w9", "w10", "w11"),
    conversation("w12", "w13 w14 w15 w16", "w17", "w18"),
]


def batch_of(raws, *, anchors=(), tokenizer=None):
    tokenizer = tokenizer or word_tokenizer()
    rows = [tokenize_row(raw, "", tokenizer, default_id=f"r{i}") for i, raw in enumerate(raws)]
    from dataclasses import replace

    rows = [replace(row, is_anchor=i in anchors) for i, row in enumerate(rows)]
    return collate([*rows, filler(0)], pad_id=0)


def reference_of(model, backend, rows_per_pass):
    """A reference of its own of a model that is loaded."""
    own = EngineModel.of_model(model, backend=backend, offload="none", rows=rows_per_pass)
    return Reference(own, ranks=backend.ranks, packing=Packing(rows_per_pass=rows_per_pass))


def probed_in_a_forward(policy, batch):
    """(last hidden states, the probed layer's) of one forward of the policy over a batch."""
    kept = []

    def loss(hidden, probed):
        kept.append((hidden, probed))
        return hidden.float().sum()

    with policy.ending_in(loss):
        output = policy.model(input_ids=batch.input_ids, use_cache=False)
    ((hidden, probed),) = kept
    assert torch.equal(output.logits, hidden.float().sum())
    return hidden, ProbedStates(probed, batch.row_begins)


def ask(source, batch, states=None, *, in_first_epoch=True):
    """The source's risk of a batch's rows, with the policy's states where they are given."""
    probed = None if states is None else ProbedStates(states, batch.row_begins)
    return source(batch.rows, probed, in_first_epoch=in_first_epoch)


def expected_risk(model, batch, probe):
    """Largest probability over turns, each prompt run alone and unpadded by plain transformers."""
    risks = []
    for row in batch.rows:
        values = []
        for end in row.prompt_ends:
            with torch.no_grad():
                states = model(
                    torch.tensor([row.input_ids[:end]]), output_hidden_states=True
                ).hidden_states[probe.layer][0]
            pooled = torch.from_numpy(oracles.pooled(states.double(), probe.pooling))
            values.append(float(probe.probability(pooled[None])[0]))
        risks.append(max(values) if values and not row.is_anchor else None)
    return risks


def close(got, expected):
    assert [r is None for r in got] == [r is None for r in expected]
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            assert a == pytest.approx(b, abs=1e-5)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    """(plain model, its twin as the backend loads it, backend) of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    plain = tiny_model(request.param, seed=4).eval()
    save_model(folder, plain)
    backend = SingleBackend(single_ranks())
    return plain, folder, backend


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_states_of_a_prefix_are_hidden_states(loaded, layer):
    plain, folder, backend = loaded
    model = backend.load_model(folder, precision="fp32", offload="none")
    reference = reference_of(model, backend, 2)
    batch = batch_of(ROWS)
    lengths = torch.tensor([len(row.input_ids) for row in batch.rows])
    real = torch.arange(batch.input_ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        expected = plain(
            batch.input_ids, attention_mask=real.long(), output_hidden_states=True
        ).hidden_states
    for k in (layer, 1, layer):  # an earlier stop changes nothing of a later one
        states = reference.prompt_states(batch.input_ids, k)
        torch.testing.assert_close(states[real], expected[k][real], rtol=1e-5, atol=1e-5)
    whole = reference.model.hidden_states(batch.input_ids)
    torch.testing.assert_close(whole[real], expected[3][real], rtol=1e-5, atol=1e-5)
    assert model_fingerprint(model) == model_fingerprint(plain)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_policy_and_reference_give_the_same_risk(loaded, layer, pooling):
    plain, folder, backend = loaded
    size = 2 * H if pooling == "both_prompt" else H
    probe = make_probe(layer=layer, pooling=pooling, size=size)
    batch = batch_of(ROWS, anchors=(1,))
    expected = expected_risk(plain, batch, probe)
    assert expected[1] is None
    assert expected[-1] is None
    policy = Policy(
        backend.load_model(folder, precision="fp32", offload="none").eval(), probed_layer=layer
    )
    _, probed = probed_in_a_forward(policy, batch)
    assert not probed.hidden.requires_grad
    close(PolicyProbeRisk(probe)(batch.rows, probed, in_first_epoch=True), expected)
    for rows_per_pass in (1, 2, 8):
        model = backend.load_model(folder, precision="fp32", offload="none")
        reference = reference_of(model, backend, rows_per_pass)
        estimator = ReferenceProbeRisk(
            probe, reference, ranks=backend.ranks, rows_per_pass=rows_per_pass
        )
        close(ask(estimator, batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probed_states_under_activation_checkpointing(loaded, dtype):
    """Recomputed layers change nothing of what the probe reads, and it reads each layer once."""
    plain, folder, backend = loaded
    batch, probe = batch_of(ROWS), make_probe(layer=2)
    model = backend.load_model(folder, precision="fp32", offload="none").to(dtype).train()
    enable_activation_checkpointing(model)
    policy = Policy(model, probed_layer=2)
    fired = []
    decoder_layers(model)[1][1].register_forward_hook(lambda *_: fired.append(1))
    hidden, probed = probed_in_a_forward(policy, batch)
    hidden.float().sum().backward()
    assert len(fired) == 1
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    got = PolicyProbeRisk(probe)(batch.rows, probed, in_first_epoch=True)
    # In bfloat16 the judge runs the same model in bfloat16, on each prompt alone.
    expected = expected_risk(copy.deepcopy(plain).to(dtype), batch, probe)
    for mine, other in zip(got, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine == pytest.approx(other, abs=1e-5 if dtype == torch.float32 else 0.05)


class CountingTrunk:
    """A reference whose state at a token hangs on all tokens up to it; it notes its calls."""

    def __init__(self):
        self.table = torch.randn(200, H, generator=torch.Generator().manual_seed(0))
        self.shapes = []

    def prompt_states(self, input_ids, num_layers):
        self.shapes.append((*input_ids.shape, num_layers))
        return self.table[input_ids.cumsum(1) % 200]

    def risk(self, probe, tokens):
        """Risk of one prompt of the last-token probe."""
        return float(probe.probability(self.table[sum(tokens) % 200][None])[0])


def test_the_riskiest_turn_counts():
    trunk, probe = CountingTrunk(), make_probe()
    batch = batch_of(ROWS)
    estimator = ReferenceProbeRisk(probe, trunk, ranks=ALONE, rows_per_pass=3)
    got = ask(estimator, batch)
    several = 0
    for row, risk in zip(batch.rows[:-1], got[:-1], strict=True):
        turns = [trunk.risk(probe, row.input_ids[:end]) for end in row.prompt_ends]
        assert risk == pytest.approx(max(turns), abs=1e-6)
        several += len(turns) > 1
    assert several == 2


def test_a_row_without_a_prompt_is_refused_by_name():
    whole = row_of("conversation-3", [5, 6, 7], [1, 1, 1])
    estimator = ReferenceProbeRisk(make_probe(), CountingTrunk(), ranks=ALONE, rows_per_pass=4)
    with pytest.raises(DataError, match=r"'conversation-3' has no prompt.*assistant_only_loss"):
        estimator([whole], in_first_epoch=True)


def test_each_content_is_scored_once_over_its_prompt_only():
    trunk = CountingTrunk()
    same = {"prompt": "w1 w2", "response": "w3 w4 w5 w6 w7 w8"}
    batch = batch_of([same, {**same, "response": "w9"}, {"prompt": "w3", "response": "w1"}])
    estimator = ReferenceProbeRisk(make_probe(), trunk, ranks=ALONE, rows_per_pass=4)
    first = ask(estimator, batch)
    assert trunk.shapes == [(2, batch.rows[0].prompt_ends[-1], 2)]
    assert first[0] == first[1] != first[2]
    assert ask(estimator, batch) == first
    assert len(trunk.shapes) == 1
    assert len(estimator.cache) == 2


def test_an_answer_does_not_inherit_the_risk_of_another_one():
    """Read over the answer, rows with the same prompt have risks of their own, cached apart."""
    trunk, probe = CountingTrunk(), make_probe(position="response", pooling="last_response_token")
    same = {"prompt": "w1 w2", "response": "w3 w4"}
    batch = batch_of([same, {**same, "response": "w9 w8"}, same])
    expected = [trunk.risk(probe, row.input_ids) for row in batch.rows[:3]]
    assert expected[0] == expected[2] != expected[1]
    estimator = ReferenceProbeRisk(probe, trunk, ranks=ALONE, rows_per_pass=4)
    for _ in range(2):  # computed, and from the cache
        assert ask(estimator, batch) == [*map(pytest.approx, expected), None]


def test_nothing_runs_for_anchors_and_fillers():
    trunk = CountingTrunk()
    estimator = ReferenceProbeRisk(make_probe(), trunk, ranks=ALONE, rows_per_pass=4)
    batch = batch_of(ROWS[:2], anchors=(0, 1))
    assert ask(estimator, batch) == [None, None, None]
    assert trunk.shapes == []
    assert ask(PolicyProbeRisk(make_probe()), batch, torch.zeros(3, 20, H)) == [None, None, None]


def test_a_state_that_is_not_finite_is_a_failed_risk():
    batch = batch_of(ROWS[4:])
    row = batch.rows[0]  # of which only the second turn is lost
    states = torch.zeros(*batch.input_ids.shape, H)
    states[0, row.prompt_ends[1] - 1] = math.nan
    got = ask(PolicyProbeRisk(make_probe()), batch, states)
    assert math.isnan(got[0])
    assert not math.isnan(got[1])


# The cache of risks


def estimator_for(probe):
    return ReferenceProbeRisk(probe, CountingTrunk(), ranks=ALONE, rows_per_pass=2)


def test_the_risk_cache_goes_through_a_file(tmp_path):
    before = estimator_for(make_probe())
    risks = ask(before, batch_of(ROWS))
    before.cache["ab" * 32] = math.nan
    before.save_state(tmp_path / "risk.safetensors")
    after = estimator_for(make_probe())
    after.load_state(tmp_path / "risk.safetensors")
    assert list(after.cache) == list(before.cache)
    assert math.isnan(after.cache.pop("ab" * 32))
    before.cache.pop("ab" * 32)
    assert after.cache == before.cache
    assert ask(after, batch_of(ROWS)) == risks


@pytest.mark.parametrize("other", ["probe", "reference", "precision"])
def test_risks_on_disk_are_those_of_one_probe_reference_and_precision(other, tmp_path):
    probe, cache = make_probe(), ScoreCache(tmp_path / "scores.sqlite")
    batch = batch_of(ROWS)

    def risks(trunk, probe, reference, precision):
        known = KnownRisks(cache, scorer_name(probe, reference, precision))
        source = ReferenceProbeRisk(probe, trunk, ranks=ALONE, rows_per_pass=2, known=known)
        return ask(source, batch)

    trunk, second = CountingTrunk(), CountingTrunk()
    first = risks(trunk, probe, "f" * 64, "fp32")
    assert risks(second, probe, "f" * 64, "fp32") == first
    assert second.shapes == []  # all of them were on the disk
    asked = {"probe": probe, "reference": "f" * 64, "precision": "fp32"}
    asked |= {
        "probe": {"probe": make_probe(seed=1)},
        "reference": {"reference": "0" * 64},
        "precision": {"precision": "bf16"},
    }[other]
    if other != "probe":
        second.table = second.table.bfloat16().float()
    close(
        risks(second, *asked.values()),
        ask(ReferenceProbeRisk(asked["probe"], second, ranks=ALONE, rows_per_pass=2), batch),
    )
    assert second.shapes
    cache.close()


def test_an_empty_risk_cache(tmp_path):
    before = estimator_for(make_probe())
    before.save_state(tmp_path / "risk.safetensors")
    after = estimator_for(make_probe())
    after.load_state(tmp_path / "risk.safetensors")
    assert after.cache == {}


def test_the_risk_cache_of_another_model_is_refused(tmp_path):
    before = estimator_for(make_probe())
    ask(before, batch_of(ROWS))
    before.save_state(tmp_path / "risk.safetensors")
    for other in (make_probe(fingerprint="0" * 64), make_probe(seed=1), make_probe(layer=1)):
        with pytest.raises(CheckpointError, match="remove the checkpoint or restore the probe"):
            estimator_for(other).load_state(tmp_path / "risk.safetensors")


def test_a_risk_cache_that_cannot_be_read(tmp_path):
    path = tmp_path / "risk.safetensors"
    with pytest.raises(CheckpointError):
        estimator_for(make_probe()).load_state(path)
    path.write_bytes(b"torn")
    with pytest.raises(CheckpointError):
        estimator_for(make_probe()).load_state(path)
