"""Claimed: the configurations in `launch/configs` and the demo's are valid, and as they say.

Exact. The models they name are not loaded here; the demo's is run by `launch/demo.sh`.
"""

import pytest
import yaml
from support.launching import ROOT

from safereg_dist.config import config_from_dict, config_to_yaml, load_config

CONFIGS = [*(ROOT / "launch" / "configs").glob("*.yaml"), ROOT / "safereg_dist/demo/demo.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_config_loads_and_round_trips(path):
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
    config = load_config(ROOT / "safereg_dist" / "demo" / "demo.yaml")
    assert config.train.micro_batch_size * config.train.grad_accum_steps * 2 == 32
    assert config.regularizer.objective == "convex"
    assert config.regularizer.schedule == "step"
    assert config.regularizer.ceiling == 1.0
    assert config.risk.source == "reference"
    assert config.data.anchor is not None


def test_kubernetes_objects_have_the_fields_of_the_api():
    """What the API's own types do not know, they drop: nothing of ours may be lost."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    kinds = {
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    text = (ROOT / "launch" / "kubernetes" / "trainjob.yaml").read_text()
    objects = list(yaml.safe_load_all(text))
    assert [each["kind"] for each in objects] == list(kinds)
    for each in objects:
        known = kinds[each["kind"]].from_dict(each).to_dict()
        assert leaves(each) <= leaves(known)


def leaves(value, path=()):
    """Every value that is no mapping and no list, with the way to it."""
    if not isinstance(value, (dict, list)):
        return {(path, float(value) if isinstance(value, int) else value)}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {leaf for key, each in items for leaf in leaves(each, (*path, key))}
