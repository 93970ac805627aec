"""Claimed: a probe of any kind and calibration computes its equation, in float32 whatever autocast
says, and goes through its files unchanged; files that were changed, or say something else than a
probe, are refused, and so are folders of format 1 until somebody seals them; no pickle is ever
read; spans are pooled right in padded and in packed rows.

The judges are NumPy in float64, `numpy.interp`, and separate unpadded rows of plain transformers.
Exact: files, identities, refusals. Rounds: float32 sums (1e-5), whole forwards (1e-4).
"""

import hashlib
import json
import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import oracles
from support.builders import tiny_model

from safereg_dist.cli import main
from safereg_dist.errors import ProbeError
from safereg_dist.risk.probe import (
    POOLINGS,
    RESPONSE_POOLINGS,
    Probe,
    load_probes,
    pool_spans,
    rescale,
)
from safereg_dist.storage.seal import seal_of

H, UNITS = 19, 5


def make_probe(kind="linear", *, knots=False, position="prompt", seed=0, **changes):
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw)

    values = {
        "layer": 2,
        "pooling": "mean_prompt" if position == "prompt" else "mean_response",
        "position": position,
        "kind": kind,
        "mean": randn(H),
        "scale": torch.rand(H, generator=draw) + 0.5,
        "weight": randn(UNITS if kind == "mlp" else H) / 2,
        "bias": -0.25,
        "threshold": 0.375,
        "fingerprint": "f" * 64,
    }
    if kind == "mlp":
        values |= {"hidden_weight": randn(UNITS, H) / 3, "hidden_bias": randn(UNITS) / 2}
    if knots:
        values |= {
            "knots_x": torch.tensor([-1.5, -0.5, 0.25, 2.0]),
            "knots_y": torch.tensor([0.125, 0.25, 0.25, 0.875]),
        }
    return Probe(**{**values, **changes})


KINDS = [("linear", False), ("direction", True), ("mlp", False), ("mlp", True), ("linear", True)]


def expected(probe, pooled):
    """The equation of the module's docstring, in float64 NumPy."""
    t = {name: tensor.double().numpy() for name, tensor in probe.tensors.items()}
    z = (pooled.double().numpy() - t["mean"]) / t["scale"]
    if probe.kind == "mlp":
        z = np.maximum(z @ t["hidden_weight"].T + t["hidden_bias"], 0)
    logit = z @ t["weight"] + probe.bias
    if "knots_x" in t:
        return np.interp(logit, t["knots_x"], t["knots_y"])
    return 1 / (1 + np.exp(-logit))


@pytest.mark.parametrize(("kind", "knots"), KINDS)
def test_probability_is_the_equation(kind, knots):
    probe = make_probe(kind, knots=knots)
    pooled = 2 * torch.randn(200, H, generator=torch.Generator().manual_seed(9))
    got = probe.probability(pooled)
    np.testing.assert_allclose(got.double().numpy(), expected(probe, pooled), atol=2e-6)
    assert got.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(probe.probability(pooled), got)
    low = pooled.bfloat16()
    np.testing.assert_allclose(
        probe.probability(low).double().numpy(), expected(probe, low.float()), atol=2e-6
    )
    assert probe.probability(pooled[:0]).shape == (0,)


@pytest.mark.parametrize(("kind", "knots"), KINDS)
def test_a_state_that_is_not_finite_gives_nan(kind, knots):
    pooled = torch.zeros(3, H)
    pooled[1, 4] = math.nan
    assert make_probe(kind, knots=knots).probability(pooled).isnan().tolist() == [
        False,
        True,
        False,
    ]


def test_knots_at_their_ends_and_alone():
    probe = make_probe(weight=torch.zeros(H), bias=7.0, knots=True)
    assert probe.probability(torch.zeros(1, H)).item() == 0.875
    assert replace(probe, bias=-9.0).probability(torch.zeros(1, H)).item() == 0.125
    alone = replace(probe, knots_x=torch.tensor([1.0]), knots_y=torch.tensor([0.5]))
    assert alone.probability(torch.randn(4, H)).tolist() == [0.5] * 4


# Files


@pytest.mark.parametrize(("kind", "knots"), KINDS)
@pytest.mark.parametrize("position", ["prompt", "response"])
def test_every_kind_goes_through_its_files(tmp_path, kind, knots, position):
    probe = make_probe(kind, knots=knots, position=position, meta={"model": "m", "n": [1, None]})
    probe.save(tmp_path)
    loaded = Probe.load(tmp_path)
    assert loaded.identity == probe.identity
    for name in ("layer", "pooling", "position", "kind", "bias", "threshold", "meta"):
        assert getattr(loaded, name) == getattr(probe, name), name
    assert loaded.tensors.keys() == probe.tensors.keys()
    for name, tensor in probe.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor), name
    pooled = torch.randn(7, H)
    assert torch.equal(loaded.probability(pooled), probe.probability(pooled))
    assert torch.equal(
        loaded.to(torch.device("cpu")).probability(pooled), probe.probability(pooled)
    )


def test_identity_knows_everything_a_probability_depends_on():
    probe = make_probe("mlp", knots=True)
    others = [
        replace(probe, layer=1),
        replace(probe, pooling="last_prompt_token"),
        replace(probe, position="response"),
        replace(probe, kind="linear"),
        replace(probe, bias=0.0),
        replace(probe, fingerprint="0" * 64),
        replace(probe, knots_x=None, knots_y=None),
        *(replace(probe, **{name: tensor + 0.25}) for name, tensor in probe.tensors.items()),
    ]
    assert len({p.identity for p in [probe, *others]}) == 1 + len(others)
    assert replace(probe, threshold=0.9, meta={"a": 1}).identity == probe.identity


def write_format_1(folder):
    """A folder as format 1 had it, written by hand: no kind, no position, no hash of tensors."""
    probe = make_probe()
    tensors = {name: probe.tensors[name] for name in ("mean", "scale", "weight")}
    save_file({**tensors, "bias": torch.tensor([probe.bias])}, folder / "probe.safetensors")
    facts = {
        "format": 1,
        "layer": 2,
        "pooling": "mean_prompt",
        "threshold": 0.375,
        "fingerprint": "f" * 64,
        "hidden_size": H,
        "meta": {"seed": 0},
    }
    (folder / "probe.json").write_text(json.dumps(facts))
    return probe


def test_folders_of_format_1_load_once_they_are_sealed(tmp_path, capsys):
    probe = write_format_1(tmp_path)
    with pytest.raises(ProbeError, match=r"no seal is on it.*`safereg probe seal") as caught:
        Probe.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert main(["probe", "seal", str(tmp_path)]) == 0
    assert "layer 2, mean_prompt, threshold 0.375" in capsys.readouterr().out
    loaded = Probe.load(tmp_path)
    assert (loaded.kind, loaded.position) == ("linear", "prompt")
    assert loaded.identity == probe.identity


def edit(folder, *, facts=None, **tensors):
    """Changes files as one who knows the format would: with the digests of what they hold now."""
    path = folder / "probe.safetensors"
    kept = {k: v for k, v in {**load_file(path), **tensors}.items() if v is not None}
    save_file(kept, path)
    stored = {**json.loads((folder / "probe.json").read_text()), **(facts or {})}
    stored["tensors_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    del stored["seal"]
    stored["seal"] = seal_of(json.dumps(stored, sort_keys=True).encode())
    (folder / "probe.json").write_text(json.dumps(stored, indent=1))


TAMPERED = {
    "hidden layer of another width": {"hidden_weight": torch.zeros(UNITS, H - 1)},
    "hidden layer of other units": {"hidden_weight": torch.zeros(UNITS + 1, H)},
    "no hidden bias": {"hidden_bias": None},
    "no hidden layer": {"hidden_bias": None, "hidden_weight": None},
    "hidden bias nan": {"hidden_bias": torch.full((UNITS,), math.nan)},
    "linear with a hidden layer": {"facts": {"kind": "linear"}},
    "unknown kind": {"facts": {"kind": "forest"}},
    "kind of another type": {"facts": {"kind": ["mlp"]}},
    "unknown position": {"facts": {"position": "middle"}},
    "position of another type": {"facts": {"position": ["prompt"]}},
    "pooling of the other position": {"facts": {"pooling": "mean_response"}},
    "one row of knots": {"knots_y": None},
    "knots of two lengths": {"knots_y": torch.tensor([0.1, 0.2])},
    "no knots": {"knots_x": torch.zeros(0), "knots_y": torch.zeros(0)},
    "knots that fall": {"knots_y": torch.tensor([0.5, 0.4, 0.6, 0.7])},
    "knots out of order": {"knots_x": torch.tensor([0.0, 2.0, 1.0, 3.0])},
    "knots above 1": {"knots_y": torch.tensor([0.1, 0.2, 0.3, 1.5])},
    "knots of two axes": {"knots_x": torch.zeros(4, 1)},
    "a tensor too many": {"threshold": torch.zeros(1)},
    "a tensor without a meaning": {"weights": torch.zeros(1)},
    "a later format": {"facts": {"format": 3}},
    "format as text": {"facts": {"format": "2"}},
}


@pytest.mark.parametrize("name", TAMPERED)
def test_files_that_are_no_probe_are_refused(tmp_path, name):
    make_probe("mlp", knots=True).save(tmp_path)
    edit(tmp_path)
    Probe.load(tmp_path)
    edit(tmp_path, **TAMPERED[name])
    with pytest.raises(ProbeError) as caught:
        Probe.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "fit it again" in str(caught.value)


FACTS = {
    "threshold": 1.0,
    "layer": 1,
    "pooling": "last_prompt_token",
    "fingerprint": "0" * 64,
    "position": "response",
    "kind": "mlp",
    "hidden_size": 2 * H,
    "tensors_sha256": None,
    "meta": {"metrics": {"recall": 1.0}},
    "format": 1,
    "seal": None,
}


@pytest.mark.parametrize("name", FACTS)
def test_a_fact_that_was_changed_by_hand_is_refused_in_one_line(tmp_path, name):
    make_probe(meta={"metrics": {"recall": 0.5}}).save(tmp_path)
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: FACTS[name]}))
    with pytest.raises(ProbeError, match="cannot be believed") as caught:
        Probe.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert f"`safereg probe seal {tmp_path}`" in str(caught.value)


def test_the_layout_of_the_file_is_free(tmp_path):
    probe = make_probe()
    probe.save(tmp_path)
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert Probe.load(tmp_path).identity == probe.identity


def test_a_forged_probe_is_refused_where_a_key_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEREG_CACHE_KEY", "a secret of the whole team")
    make_probe().save(tmp_path)
    Probe.load(tmp_path)
    monkeypatch.delenv("SAFEREG_CACHE_KEY")  # the forger does not have it
    edit(tmp_path, facts={"threshold": 1.0})
    assert Probe.load(tmp_path).threshold == 1.0
    monkeypatch.setenv("SAFEREG_CACHE_KEY", "a secret of the whole team")
    with pytest.raises(ProbeError, match="not sealed with the key in SAFEREG_CACHE_KEY"):
        Probe.load(tmp_path)


def test_no_flip_in_a_probe_is_believed(tmp_path):
    """300 flipped bits, cuts and doubled pieces over both files: refused, or nothing changed."""
    probe = make_probe("mlp", knots=True, meta={"model": "m"})
    probe.save(tmp_path)
    pristine = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    draw, refused = random.Random(0), []
    for trial in range(300):
        path = draw.choice(list(pristine))
        spoilt = bytearray(pristine[path])
        at = draw.randrange(len(spoilt))
        if trial % 3 == 0:
            spoilt[at] ^= 1 << draw.randrange(8)
        elif trial % 3 == 1:
            del spoilt[at:]
        else:
            spoilt[at:at] = spoilt[: draw.randrange(1, 50)]
        path.write_bytes(spoilt)
        try:
            found = Probe.load(tmp_path)
        except ProbeError as err:
            refused.append(str(err))
        else:
            same = (found.identity, found.threshold, found.meta)
            assert same == (probe.identity, probe.threshold, probe.meta)
        path.write_bytes(pristine[path])
    assert len(refused) > 280
    assert not any("\n" in said for said in refused)


class Explosive:
    """Would leave a mark if it were ever unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("name", ["probe.safetensors", "probe.json"])
def test_a_pickle_is_never_read(tmp_path, name):
    make_probe().save(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Explosive(tmp_path / "mark")))
    with pytest.raises(ProbeError):
        Probe.load(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_one_folder_may_hold_two_probes(tmp_path):
    prompt, response = make_probe(), make_probe("mlp", position="response")
    prompt.save(tmp_path / "one")
    assert [p.identity for p in load_probes(tmp_path / "one")] == [prompt.identity]
    prompt.save(tmp_path / "two" / "prompt")
    response.save(tmp_path / "two" / "response")
    assert [p.position for p in load_probes(tmp_path / "two")] == ["prompt", "response"]
    with pytest.raises(ProbeError, match="safereg probe fit"):
        load_probes(tmp_path / "none")


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 0.125, 0.5, 0.98, 1.0])
def test_rescaled_risk_sets_in_at_a_half(threshold):
    risks = sorted({*np.linspace(0, 1, 33).tolist(), threshold, math.nextafter(threshold, 0.0)})
    scaled = [rescale(r, threshold) for r in risks if 0 <= r <= 1]
    assert scaled == sorted(scaled)
    assert all(0 <= s <= 1 for s in scaled)
    assert [s >= 0.5 for s in scaled] == [r >= threshold for r in risks if 0 <= r <= 1]
    assert rescale(threshold, threshold) == (0.5 if threshold < 1 else 1.0)


# Spans


@pytest.mark.parametrize("pooling", [*POOLINGS, *RESPONSE_POOLINGS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spans_against_a_loop(pooling, dtype):
    hidden = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    hidden[0, :2] = math.nan  # padding on the left
    hidden[2, 9:] = math.inf  # padding on the right
    spans = [(0, 2, 2), (0, 2, 10), (1, 0, 3), (1, 4, 4), (1, 5, 10), (2, 0, 8), (0, 3, 7)]
    rows, first, last = (torch.tensor(part) for part in zip(*spans, strict=True))
    got = pool_spans(hidden, rows=rows, first=first, last=last, pooling=pooling)
    for place, (row, begin, end) in enumerate(spans):
        real = hidden[row, begin : end + 1].double().numpy()
        truth = oracles.pooled(real, pooling)
        np.testing.assert_allclose(got[place].double().numpy(), truth, rtol=1e-5, atol=1e-6)
    empty = torch.zeros(0, dtype=torch.int64)
    none = pool_spans(hidden, rows=empty, first=empty, last=empty, pooling=pooling)
    assert none.shape == (0, 10 if pooling.startswith("both") else 5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pooling", [*POOLINGS, *RESPONSE_POOLINGS])
def test_packed_sequences_are_as_separate_rows(attention, pooling):
    """Three conversations in one row, told apart by position ids that start again."""
    model = tiny_model(seed=2, attn_implementation=attention).eval()
    assert model.config._attn_implementation == attention
    draw = torch.Generator().manual_seed(3)
    pieces = [torch.randint(6, 90, (length,), generator=draw) for length in (5, 9, 3)]
    packed = torch.cat(pieces)[None]
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])[None]
    with torch.no_grad():
        hidden = model(
            packed, position_ids=positions, output_hidden_states=True, use_cache=False
        ).hidden_states
        alone = [model(piece[None], output_hidden_states=True).hidden_states for piece in pieces]
    # Of each conversation its whole prompt, and a later part of it.
    spans = [(0, 3), (2, 4), (5, 8), (9, 13), (14, 15), (14, 16)]
    owner = [0, 0, 1, 1, 2, 2]
    begin = [0, 5, 14]
    first, last = (torch.tensor(part) for part in zip(*spans, strict=True))
    for layer in (1, 2, 3):
        got = pool_spans(
            hidden[layer], rows=torch.zeros(6).long(), first=first, last=last, pooling=pooling
        )
        for place, (low, high) in enumerate(spans):
            real = alone[owner[place]][layer][0]
            real = real[low - begin[owner[place]] : high - begin[owner[place]] + 1]
            truth = torch.from_numpy(oracles.pooled(real, pooling)).float()
            torch.testing.assert_close(got[place].float(), truth, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # and the test could fail: without position ids the pieces see each other
        mixed = model(packed, output_hidden_states=True, use_cache=False).hidden_states[2]
    assert (mixed[0, 14:] - alone[2][2][0]).abs().max() > 1e-2
