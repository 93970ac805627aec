"""The configuration: what a run is, as frozen models with one sentence under each field.

`load_config` reads YAML, whose paths begin at its folder, applies `key.sub=value` overrides, fills
a preset, and refuses what it does not know. Everything else in the package receives these objects
and never looks at a raw dict.
"""

from safereg_dist.config.data import DataConfig, DataSet
from safereg_dist.config.loading import (
    config_from_dict,
    config_to_yaml,
    load_config,
    load_run_config,
    placed_override,
    replace,
    section_from_dict,
)
from safereg_dist.config.risk import CriticConfig, InfluenceConfig, RiskConfig, RiskPart
from safereg_dist.config.sections import (
    POLICY_RISK_IS_TOO_LATE,
    PRESETS,
    TRAINED_ADAPTER,
    Config,
    EngineConfig,
    EvalConfig,
    LisaConfig,
    LoraConfig,
    OptimizerConfig,
    ReferenceConfig,
    RegularizerConfig,
    SigningConfig,
    TrainConfig,
)
from safereg_dist.config.tracking import AlertsConfig, Band, TrackingConfig

__all__ = [
    "POLICY_RISK_IS_TOO_LATE",
    "PRESETS",
    "TRAINED_ADAPTER",
    "AlertsConfig",
    "Band",
    "Config",
    "CriticConfig",
    "DataConfig",
    "DataSet",
    "EngineConfig",
    "EvalConfig",
    "InfluenceConfig",
    "LisaConfig",
    "LoraConfig",
    "OptimizerConfig",
    "ReferenceConfig",
    "RegularizerConfig",
    "RiskConfig",
    "RiskPart",
    "SigningConfig",
    "TrackingConfig",
    "TrainConfig",
    "config_from_dict",
    "config_to_yaml",
    "load_config",
    "load_run_config",
    "placed_override",
    "replace",
    "section_from_dict",
]
