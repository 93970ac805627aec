"""What a Megatron run must be for the step to work inside it; refused at the start."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from safereg_dist.config import Config
from safereg_dist.errors import ConfigError, ProbeError
from safereg_dist.factory.risk_specs import SourceSpec
from safereg_dist.parallel.megatron import innermost, listed
from safereg_dist.risk.probe import check_model

REFUSED = {
    "mtp_num_layers": "multi-token prediction calls the output layer for heads of its own",
    "use_mup": "the logits are scaled behind the output layer",
    "fp8": "the output layer's input and weight are not plain tensors",
    "defer_embedding_wgrad_compute": "the output layer's weight gradient is computed elsewhere",
    "overlap_moe_expert_parallel_comm": "its schedule calls the layers itself",
    "enable_cuda_graph": "a graph replays one loss for every micro-batch",
    "external_cuda_graph": "a graph replays one loss for every micro-batch",
}
"""Options of a model's configuration that bypass the hooks -> why."""


def check_config(config: Config) -> None:
    """Raises ConfigError for settings that need what a pipeline does not offer."""
    risk = config.risk
    if config.needs_risk and risk.source == "policy" and config.regularizer.granularity != "batch":
        raise ConfigError(
            "risk.source=policy comes one step late in a Megatron layout, so no row's risk can be "
            "its own: set risk.source=reference, or regularizer.granularity=batch"
        )
    if config.regularizer.objective == "token_wise":
        raise ConfigError(
            "regularizer.objective=token_wise weighs a token by both models' log-probabilities of "
            "it, which the output layer's loss in a Megatron layout is not given: choose another "
            "objective, or another stack"
        )
    if config.regularizer.schedule == "budget":
        raise ConfigError(
            "regularizer.schedule=budget acts on a step's divergence before the next step, which a "
            "Megatron layout knows on its last stage alone: choose another schedule"
        )
    if risk.cache not in (None, "none"):
        raise ConfigError(
            f"risk.cache={risk.cache} is keyed by a model's fingerprint, which a Megatron "
            "checkpoint does not have: leave it out"
        )
    if config.reference.engine != "auto":
        raise ConfigError(
            "reference.engine belongs to other stacks: under Megatron the reference has the "
            "policy's layout; leave it out"
        )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError for options of the run that bypass the hooks."""
    for chunk in listed(arguments["model"]):
        model: Any = innermost(chunk)
        config = model.config
        for name, why in REFUSED.items():
            if getattr(config, name, None):
                raise ConfigError(f"{name}={getattr(config, name)} cannot be used: {why}")
        if getattr(config, "cuda_graph_impl", "none") not in ("none", None):
            raise ConfigError(
                f"cuda_graph_impl={config.cuda_graph_impl} cannot be used: a graph replays one "
                "loss for every micro-batch"
            )
        fusion = getattr(config, "cross_entropy_fusion_impl", None)
        if getattr(config, "cross_entropy_loss_fusion", False) and fusion == "linear":
            raise ConfigError(
                "cross_entropy_fusion_impl=linear bypasses the output layer: set it to native"
            )
        if getattr(model, "post_process", False) and not hasattr(model, "output_layer"):
            raise ConfigError(
                f"{type(model).__name__} has no `output_layer`, inside which the loss is computed"
            )


def check_probes(specs: Sequence[SourceSpec], chunks: Sequence[nn.Module], config: Config) -> None:
    """Raises ProbeError for a probe that does not fit the model, or whose model is not known."""
    shape: Any = innermost(chunks[0]).config
    for spec in specs:
        if spec.probe is None:
            continue
        check_model(
            spec.probe,
            fingerprint=spec.probe.fingerprint,
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            force=spec.force,
        )
        if not spec.force:
            raise ProbeError(
                "a Megatron model has no fingerprint to compare the probe's with: make sure that "
                f"the probe was fitted on the Hugging Face form of the {config.risk.source}'s "
                "first weights, and set risk.force=true (of a part: its own)"
            )
