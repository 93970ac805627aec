"""Claimed: a model changed after training is what the equations say, tensor by tensor.

Judge: float64 NumPy, from the papers' equations. Exact: both ends of an interpolation, which layers
are projected, everything that is no weight of a projected layer. Rounds: float32 products.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import save_model, tiny_model
from transformers import AutoModelForCausalLM

from safereg_dist.errors import ConfigError
from safereg_dist.experiments.after_training import (
    REPORT,
    After,
    SafeLora,
    change_model,
    interpolate,
    linear_weights,
)


@pytest.fixture
def folders(tmp_path):
    """Models before alignment, before and after training, the last one in three files."""
    for index, name in enumerate(("unaligned", "base", "tuned")):
        model = tiny_model(seed=index, num_hidden_layers=2)
        shards = {"max_shard_size": "40KB"} if name == "tuned" else {}
        save_model(tmp_path / name, model)
        if shards:
            (tmp_path / name / "model.safetensors").unlink()
            model.save_pretrained(tmp_path / name, **shards)
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    return tmp_path


def weights(folder):
    """Every tensor of a folder in float64."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {name: t.double().numpy() for name, t in load_file(file).items()}
    return found


def truth(base, tuned, unaligned):
    """(C dW, cosine) with C formed as it is defined, [out, out]."""
    v, change = base - unaligned, tuned - base
    c = v @ v.T / np.sqrt((v**2).sum())
    kept = c @ change
    cosine = (kept * change).sum() / np.sqrt((kept**2).sum() * (change**2).sum())
    return kept, cosine


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.5])
def test_interpolation(folders, alpha):
    interpolate(folders / "base", folders / "tuned", folders / "out", alpha=alpha)
    before, after, got = (weights(folders / name) for name in ("base", "tuned", "out"))
    assert got.keys() == before.keys()
    for name, values in got.items():
        want = before[name] + alpha * (after[name] - before[name])
        if alpha in (0.0, 1.0):
            np.testing.assert_array_equal(values, want)
        np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-7)
    AutoModelForCausalLM.from_pretrained(folders / "out")
    assert (folders / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("by", ["threshold", "layers"])
def test_the_projection_is_the_equation(folders, by):
    before, after, unaligned = (weights(folders / n) for n in ("base", "tuned", "unaligned"))
    linear = linear_weights(folders / "tuned")
    assert len(linear) == 2 * 7
    assert not [name for name in linear if "lm_head" in name or "embed" in name]
    want = {name: truth(before[name], after[name], unaligned[name]) for name in linear}
    order = sorted(linear, key=lambda name: want[name][1])
    low = order[:5]
    middle = (want[order[4]][1] + want[order[5]][1]) / 2
    how = {"threshold": middle} if by == "threshold" else {"layers": 5}
    settings = SafeLora(unaligned=str(folders / "unaligned"), **how)
    change_model(After(safe_lora=settings), folders / "base", folders / "tuned", folders / "out")

    got = weights(folders / "out")
    for name, values in got.items():
        if name in low:
            np.testing.assert_allclose(
                values, before[name] + want[name][0], rtol=1e-4, atol=1e-5, err_msg=name
            )
        else:
            np.testing.assert_array_equal(values, after[name])
    report = json.loads((folders / "out" / REPORT).read_text())
    assert report["projected"] == sorted(low)
    for name, cosine in report["cosines"].items():
        assert cosine == pytest.approx(want[name][1], abs=1e-5)
    AutoModelForCausalLM.from_pretrained(folders / "out")


def test_a_layer_without_a_cosine_stays(folders):
    """Neither a layer that training left alone, nor one that alignment did."""
    tensors = [load_file(folders / name / "model.safetensors") for name in ("base", "unaligned")]
    same, unmoved = linear_weights(folders / "tuned")[:2]
    tensors[1][same] = tensors[0][same].clone()
    save_file(tensors[1], folders / "unaligned" / "model.safetensors", metadata={"format": "pt"})
    for file in (folders / "tuned").glob("*.safetensors"):
        own = load_file(file)
        if unmoved in own:
            own[unmoved] = tensors[0][unmoved].clone()
            save_file(own, file, metadata={"format": "pt"})
    settings = SafeLora(unaligned=str(folders / "unaligned"), threshold=1.0)
    change_model(After(safe_lora=settings), folders / "base", folders / "tuned", folders / "out")
    report = json.loads((folders / "out" / REPORT).read_text())
    assert set(linear_weights(folders / "tuned")) - set(report["projected"]) == {same, unmoved}
    after, got = weights(folders / "tuned"), weights(folders / "out")
    for name in (same, unmoved):
        np.testing.assert_array_equal(got[name], after[name])


def test_the_dtype_is_that_of_the_trained_model(folders):
    tiny_model(seed=2, num_hidden_layers=2).bfloat16().save_pretrained(folders / "half")
    interpolate(folders / "base", folders / "half", folders / "out", alpha=0.25)
    before, after = weights(folders / "base"), weights(folders / "half")
    for name, tensor in load_file(folders / "out" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        exact = torch.from_numpy(before[name] + 0.25 * (after[name] - before[name]))
        assert (tensor.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize(
    ("other", "says"),
    [({"num_hidden_layers": 1}, "differ"), ({"intermediate_size": 40}, "shape|as \\(")],
)
def test_models_that_differ_are_refused(folders, other, says):
    save_model(folders / "other", tiny_model(**{"num_hidden_layers": 2, **other}))
    with pytest.raises(ConfigError, match=says):
        interpolate(folders / "other", folders / "tuned", folders / "out", alpha=0.5)
    settings = SafeLora(unaligned=str(folders / "other"), layers=1)
    with pytest.raises(ConfigError, match=says):
        change_model(
            After(safe_lora=settings), folders / "base", folders / "tuned", folders / "out"
        )
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SafeLora(unaligned="u"), "threshold or a number"),
        (lambda: SafeLora(unaligned="u", threshold=0.1, layers=2), "threshold or a number"),
        (lambda: After(), "one of them"),
        (
            lambda: After(interpolate=0.5, safe_lora=SafeLora(unaligned="u", layers=2)),
            "one of them",
        ),
    ],
)
def test_what_is_no_change(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
