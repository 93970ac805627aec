"""Claimed: every configuration in `launch/configs` is valid and says what its comments say.

Exact. The models they name are not loaded here; the demo's is run by `launch/demo.sh`.
"""

import pytest
from support.launching import ROOT

from safereg_dist.config import config_from_dict, config_to_yaml, load_config

CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_config_loads_and_round_trips(path):
    import yaml

    config = load_config(path)
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config
    assert config.engine.zero_stage == 3


def test_8b_configs_differ_in_offload_only():
    plain = load_config(ROOT / "launch" / "configs" / "llama-8b-2x8.yaml")
    offload = load_config(ROOT / "launch" / "configs" / "llama-8b-2x8-offload.yaml")
    rows = [c.train.micro_batch_size * c.train.grad_accum_steps * 16 for c in (plain, offload)]
    assert rows == [128, 128]
    assert offload.engine.offload_optimizer == offload.engine.offload_params == "cpu"
    assert offload.reference.offload == "cpu"
    assert (plain.model, plain.data, plain.risk) == (offload.model, offload.data, offload.risk)
    assert plain.regularizer == offload.regularizer


def test_demo_config_is_the_adaptive_arm_with_32_rows_on_two_ranks():
    config = load_config(ROOT / "launch" / "configs" / "demo.yaml")
    assert config.train.micro_batch_size * config.train.grad_accum_steps * 2 == 32
    assert config.regularizer.objective == "convex"
    assert config.regularizer.schedule == "step"
    assert config.regularizer.ceiling == 1.0
    assert config.risk.source == "reference"
    assert config.data.anchor is not None
