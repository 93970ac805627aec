"""Probes and the model whose states they read, checked to belong together."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from safereg_dist.evaluate.generate import load_model
from safereg_dist.models.architecture import read_architecture
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe, check_model, load_probes


def load_probes_for(probe_dir: Path, model_dir: Path) -> tuple[list[Probe], PreTrainedConfig]:
    """The probes of a folder, and the model's text configuration; no weights are read.

    Raises:
        ProbeError: no probe there, or one of another hidden size or of a layer that is not there.
        ConfigError: there is no model.
    """
    probes = load_probes(probe_dir)
    config = read_architecture(Path(model_dir)).get_text_config()
    for probe in probes:
        _check(probe, config, fingerprint="", force=True)
    return probes, config


def load_model_of(
    probes: Sequence[Probe],
    model_dir: Path,
    *,
    force: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, str]:
    """The model in the precision it is stored in, and the fingerprint of its weights.

    Raises:
        ProbeError: a probe was fitted on other weights, and `force` is not set.
        ConfigError: the model does not load.
    """
    model, _ = load_model(model_dir, device=device, progress=progress)
    fingerprint = model_fingerprint(model)
    for probe in probes:
        _check(probe, model.config.get_text_config(), fingerprint=fingerprint, force=force)
    return model, fingerprint


def _check(probe: Probe, config: PreTrainedConfig, *, fingerprint: str, force: bool) -> None:
    check_model(
        probe,
        fingerprint=fingerprint,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        force=force,
    )
