"""Claimed: what bypasses Megatron's hooks, or cannot run in its layouts, is refused at the start;
the gradient of a head that the fused loss computed is never taken for one that is added already.
Exact.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from safereg_dist.data.collation import row_of
from safereg_dist.data.stream import batch_of_stream
from safereg_dist.errors import CheckpointError, ConfigError, ProbeError
from safereg_dist.factory.prepare import config_of
from safereg_dist.integrations.megatron import MegatronSafety
from safereg_dist.integrations.megatron.checks import (
    REFUSED,
    check_arguments,
    check_config,
    check_probes,
)
from safereg_dist.integrations.megatron.probes import Span, spans_of
from safereg_dist.integrations.megatron.stored import StoredStates
from safereg_dist.parallel.megatron import innermost
from safereg_dist.parallel.megatron_model import CallRecorder, _Whole
from safereg_dist.risk.probe import Probe, pool_share
from safereg_dist.risk.probe_risk import LaggedProbeRisk


class Chunk(nn.Module):
    """A last stage with a configuration."""

    def __init__(self, **options):
        super().__init__()
        self.decoder = nn.Identity()
        self.config = SimpleNamespace(**options)
        self.post_process = True
        self.output_layer = nn.Linear(2, 2)


def check(**options):
    check_arguments({"model": Chunk(**options)})


def test_a_plain_configuration_passes():
    check()
    check(cuda_graph_impl="none", cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_bypass_the_hooks(name):
    with pytest.raises(ConfigError, match=f"{name}=1 cannot be used"):
        check(**{name: 1})


def test_a_constraint_on_tokens_is_refused():
    config = config_of({"regularizer": {"objective": "token_wise"}}, "m")
    with pytest.raises(ConfigError, match="objective=token_wise"):
        check_config(config)


def test_graphs_and_the_linear_fusion():
    with pytest.raises(ConfigError, match="cuda_graph_impl=local"):
        check(cuda_graph_impl="local")
    with pytest.raises(ConfigError, match="cross_entropy_fusion_impl=linear"):
        check(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="linear")


def test_a_last_stage_without_an_output_layer():
    chunk = Chunk()
    del chunk.output_layer
    with pytest.raises(ConfigError, match="no `output_layer`"):
        check_arguments({"model": [chunk]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"risk": {"estimator": "probe", "path": "p", "source": "policy"}},
            "risk.source=policy comes one step late",
        ),
        (
            {"risk": {"estimator": "probe", "path": "p", "cache": "x.sqlite"}},
            "risk.cache=x.sqlite is keyed by a model's fingerprint",
        ),
        ({"reference": {"engine": "whole"}}, "belongs to other stacks"),
        ({"model": "m"}, "settings hold .model., which the loop or the stack"),
    ],
)
def test_settings_that_do_not_fit(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        MegatronSafety({"risk": {"estimator": "column"}, **settings}, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "force", "message"),
    [
        ({}, False, "a Megatron model has no fingerprint"),
        ({"layer": 5}, True, "the model has 4 features|has 4 and layers 1 to 4"),
        ({"mean": torch.zeros(3)}, True, "reads 3 features of layer 2, the model has 4"),
    ],
)
def test_probes_that_do_not_fit(change, force, message):
    probe = Probe(
        **{
            "layer": 2,
            "pooling": "mean_prompt",
            "mean": torch.zeros(4),
            "scale": torch.ones(4),
            "weight": torch.ones(4),
            "bias": 0.0,
            "threshold": 0.5,
            "fingerprint": "-",
            **change,
        }
    )
    spec = SimpleNamespace(probe=probe, force=force)
    config = config_of({"risk": {"estimator": "column"}}, "-")
    with pytest.raises(ProbeError, match=message):
        check_probes([spec], [Chunk(hidden_size=4, num_layers=4)], config)


def test_a_share_of_the_sequence_is_pooled_by_itself():
    """Shares of any split of the positions add up to the pooled states, whatever lies between."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 12, 5, generator=draw)
    rows, first, last = (torch.tensor(x) for x in ([0, 1, 1], [0, 2, 7], [3, 9, 7]))
    hidden[0, 11] = float("nan")  # padding
    for pooling in ("mean_prompt", "last_prompt_token"):
        spans = {"rows": rows, "first": first, "last": last, "pooling": pooling}
        whole = [
            hidden[r, f : t + 1].double().mean(0) if pooling == "mean_prompt" else hidden[r, t]
            for r, f, t in zip(*(x.tolist() for x in (rows, first, last)), strict=True)
        ]
        pieces = torch.randperm(12, generator=draw).chunk(3)
        found = sum(pool_share(hidden[:, piece], piece, **spans) for piece in pieces)
        torch.testing.assert_close(found.double(), torch.stack(whole).double(), rtol=0, atol=1e-6)


def test_spans_end_where_a_line_or_a_document_ends():
    """Two documents in a line; of the second the last label is no token of the line."""
    item = {
        "tokens": torch.arange(8)[None],
        "labels": torch.arange(1, 9)[None],
        "loss_mask": torch.tensor([[0, 1, 0, 0, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
    }
    batch = batch_of_stream(item)
    for position, spans in {
        "prompt": [Span(0, 0, 0, 1), Span(0, 0, 3, 4)],
        "response": [Span(0, 0, 2, 2), Span(0, 0, 5, 7)],
    }.items():
        probe = SimpleNamespace(position=position)
        assert spans_of(probe, [batch], [0, 1]) == ([0, 1], spans)
    assert spans_of(SimpleNamespace(position="prompt"), [batch, batch], [3]) == (
        [3],
        [Span(1, 0, 3, 4)],
    )


def test_a_lagged_risk_is_that_of_the_step_before(tmp_path):
    source = LaggedProbeRisk(SimpleNamespace(identity="p"))
    rows = [row_of("a", [1, 2], [0, 1]), row_of("b", [1, 2], [0, 1], is_anchor=True)]
    assert source(rows, in_first_epoch=True) == [1.0, None]
    source.learn([0.25, None, math.nan])  # a failed risk is 1
    assert source(rows, in_first_epoch=True) == [0.625, None]
    source.learn([None])
    source.save_state(tmp_path / "state")
    again = LaggedProbeRisk(SimpleNamespace(identity="p"))
    again.load_state(tmp_path / "state")
    assert again(rows, in_first_epoch=False) == [0.625, None]
    with pytest.raises(CheckpointError, match="risks of another probe"):
        LaggedProbeRisk(SimpleNamespace(identity="q")).load_state(tmp_path / "state")


def test_states_of_something_else(tmp_path):
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    layout = SimpleNamespace(tp_group=group, cp_group=group, tp_rank=0, is_owner=True)
    store = StoredStates(tmp_path, layout, identity="a", is_spread=False)
    key, states = bytes([7] * 32), torch.arange(6.0).view(3, 2)
    store.write(key, states)
    assert not store.holds(key)  # the owner's comes last
    store.flush()
    assert store.holds(key)
    again = StoredStates(tmp_path, layout, identity="a", is_spread=False)
    assert torch.equal(again.read(key), states)
    with pytest.raises(CheckpointError, match="expected the reference's states of a line"):
        again.read(bytes(32))
    [path] = tmp_path.rglob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # in a state
    with pytest.raises(CheckpointError, match="got another SHA-256 than was written"):
        again.read(key)
    save_file({"states": states}, path)  # of version 0.1
    assert torch.equal(again.read(key), states)
    for change in ({"identity": "b"}, {"is_spread": True}):
        with pytest.raises(ConfigError, match="expected states of"):
            StoredStates(tmp_path, layout, **{"identity": "a", "is_spread": False, **change})


def test_settings_are_those_of_other_stacks():
    assert config_of({"risk": {"estimator": "column"}}, "-").needs_reference


def test_a_mark_of_gradient_fusion_is_taken_back():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad_added_to_main_grad = True  # as the layer's own backward of another micro-batch left
    seen = []
    weight.register_post_accumulate_grad_hook(lambda w: seen.append(w.grad_added_to_main_grad))
    _Whole.apply(weight).sum().backward()
    assert seen == [False]
    assert torch.equal(weight.grad, torch.ones(2, 2))


def test_a_call_is_told_and_not_made():
    inner = nn.Linear(2, 2)
    outer = nn.Module()
    outer.module = inner
    assert innermost(outer) is inner
    recorder = CallRecorder(inner)
    states = torch.ones(1, 2)
    args, kwargs = recorder.call_in(lambda: inner(states))
    assert args[0] is states
    assert kwargs == {}
    assert torch.equal(inner(states), nn.functional.linear(states, inner.weight, inner.bias))
    with pytest.raises(RuntimeError, match="without calling its model"):
        recorder.call_in(lambda: None)
