"""Claimed: what bypasses Megatron's hooks, or cannot run in its layouts, is refused at the start;
the gradient of a head that the fused loss computed is never taken for one that is added already.
Exact.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from safereg_dist.errors import ConfigError
from safereg_dist.factory.prepare import config_of
from safereg_dist.integrations.megatron import MegatronSafety
from safereg_dist.integrations.megatron_checks import REFUSED, check_arguments
from safereg_dist.parallel.megatron import CallRecorder, _Whole, innermost


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
        ({"risk": {"estimator": "probe", "path": "p"}}, "risk.estimator=probe does not run"),
        ({"reference": {"engine": "whole"}}, "belong to other stacks"),
        ({"model": "m"}, "settings hold .model., which the loop or the stack"),
    ],
)
def test_settings_that_do_not_fit(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        MegatronSafety({"risk": {"estimator": "column"}, **settings}, output_dir=tmp_path)


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
