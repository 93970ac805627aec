"""The objects of a run, wired together."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.coefficient import Coefficient
from safereg_dist.config import Config
from safereg_dist.errors import ConfigError
from safereg_dist.factory.inputs import RowSources, read_inputs
from safereg_dist.factory.references import build_reference, require_finite
from safereg_dist.factory.risk import build_risk, category_ceilings, policy_layer
from safereg_dist.objective import Objective
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Backend, PolicyEngine
from safereg_dist.policy import Policy, enable_activation_checkpointing
from safereg_dist.reference import NoReference, Reference
from safereg_dist.risk.combine import RiskStage
from safereg_dist.step import RegularizedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that `train` drives."""

    config: Config
    ranks: Ranks
    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    sources: RowSources
    model: PreTrainedModel
    step: RegularizedStep
    engine: PolicyEngine
    pad_id: int
    fingerprints: dict[str, str]
    """Weight fingerprints at the start, of `policy` and `reference`."""


def start_backend(config: Config) -> Backend:
    """The backend that `engine.name` asks for, with its ranks joined. Collectives: rendezvous."""
    if config.engine.name == "single":
        from safereg_dist.parallel.single import SingleBackend, single_ranks

        return SingleBackend(single_ranks())
    from safereg_dist.parallel.deepspeed import DeepSpeedBackend, start_ranks

    return DeepSpeedBackend(start_ranks(config.engine))


def build_run(config: Config, backend: Backend) -> Run:
    """All objects of a run, models loaded and wrapped.

    Raises:
        ConfigError, DataError, ProbeError, CriticUnavailable: what the configuration names is
            missing or does not fit.
    Collectives: those of loading and wrapping; every rank calls it.
    """
    ranks = backend.ranks
    torch.manual_seed(config.train.seed + ranks.rank)  # dropout differs between ranks
    policy_folder, tokenizer, sources, signals = read_inputs(config, ranks)

    precision = config.train.precision
    model = backend.load_model(
        policy_folder,
        precision=precision,
        offload=config.engine.offload_params,
        hpz_partition_size=config.engine.hpz_partition_size,
    )
    with ranks.together():
        _check_tokenizer(tokenizer, model)
        if config.train.activation_checkpointing:
            enable_activation_checkpointing(model)
        require_finite(backend, model, policy_folder)
    fingerprints = {"policy": backend.fingerprint(model)}
    reference = build_reference(
        config, backend, policy_folder, model, tokenizer, sources, fingerprints
    )

    with ranks.together():
        risk = build_risk(config, signals, backend, reference, model, fingerprints)
        policy = Policy(model, probed_layer=policy_layer(config, signals))
        step = RegularizedStep(
            policy,
            risk=risk,
            coefficient=Coefficient(
                config.regularizer,
                threshold=risk.threshold,
                ranks=ranks,
                ceilings=category_ceilings(signals),
            ),
            reference=reference,
            objective=Objective(
                config.regularizer,
                chunk_tokens=config.train.chunk_tokens,
                head_bytes=config.train.head_bytes,
            ),
        )
    step.train()
    engine = backend.wrap_policy(step, config=config)
    return Run(
        config=config,
        ranks=ranks,
        backend=backend,
        tokenizer=tokenizer,
        sources=sources,
        model=model,
        step=step,
        engine=engine,
        pad_id=_pad_id(tokenizer),
        fingerprints=fingerprints,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskContext:
    """What is needed to know the risk of rows, without anything that trains."""

    config: Config
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase
    sources: RowSources
    reference: Reference | NoReference
    fingerprints: dict[str, str]
    """The weight fingerprint of `reference`, where there is one."""
    risk: RiskStage
    threshold: float
    pad_id: int
    probed_share: float
    """(k / L): layers that the deepest probe reads, of the reference's; 0 without a probe."""
    ceilings: dict[str, float]
    """The largest coefficient of each category that has one of its own."""


def build_risk_context(
    config: Config, backend: Backend, *, with_reference: bool = False
) -> RiskContext:
    """The data and the risk stage of a run; a reference where a probe reads it or it is asked for.

    Raises:
        ConfigError, DataError, ProbeError, CriticUnavailable: as `build_run` does.
    Collectives: those of loading; every rank calls it.
    """
    ranks = backend.ranks
    folder, tokenizer, sources, signals = read_inputs(config, ranks)
    fingerprints: dict[str, str] = {}
    reference: Reference | NoReference = NoReference()
    depths = [signal.probe.layer for signal in signals if signal.probe is not None]
    num_layers = 1
    if depths or with_reference:
        reference = build_reference(config, backend, folder, None, tokenizer, sources, fingerprints)
    if isinstance(reference, Reference):
        num_layers = reference.config.num_hidden_layers
    with ranks.together():
        risk = build_risk(config, signals, backend, reference, None, fingerprints)
    own = config.regularizer.threshold
    return RiskContext(
        config=config,
        ranks=ranks,
        tokenizer=tokenizer,
        sources=sources,
        reference=reference,
        fingerprints=fingerprints,
        risk=risk,
        threshold=risk.threshold if own is None else own,
        pad_id=_pad_id(tokenizer),
        probed_share=max(depths, default=0) / num_layers,
        ceilings=category_ceilings(signals),
    )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)  # `load_tokenizer` has seen to it
    return pad_id


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    vocab = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocab:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {vocab} embeddings: "
            "they do not belong together"
        )
