"""The objects of a run, wired together."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.coefficient import resolved_threshold
from safereg_dist.config import Config, replace
from safereg_dist.errors import ConfigError
from safereg_dist.factory.agreement import require_same_setup
from safereg_dist.factory.inputs import RowSources, pad_id_of, read_inputs
from safereg_dist.factory.prepare import assemble, policy_of
from safereg_dist.factory.references import (
    BuiltReference,
    LoadedPolicy,
    WeightsFacts,
    adapters_of,
    build_reference,
    require_finite,
)
from safereg_dist.factory.risk import build_risk
from safereg_dist.factory.risk_specs import category_ceilings
from safereg_dist.models.adapters import AdapterValues, add_adapters
from safereg_dist.models.architecture import enable_activation_checkpointing
from safereg_dist.models.stored_adapter import StoredAdapter, read_frozen
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Backend, PolicyEngine
from safereg_dist.reference import NoReference, Reference
from safereg_dist.risk.stage import RiskStage
from safereg_dist.step import SafetyRegularizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that `trainer` drives."""

    config: Config
    ranks: Ranks
    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    sources: RowSources
    model: PreTrainedModel
    regularizer: SafetyRegularizer
    engine: PolicyEngine
    pad_id: int
    fingerprints: dict[str, str]
    """Weight fingerprints at the start, of `policy` (with `lora.frozen`) and `reference`."""


def start_backend(config: Config) -> Backend:
    """The backend named by `engine.name`, with its ranks joined and found to be set up alike.

    Raises:
        GroupError: the group cannot be formed, or configuration, versions or code differ.
    Collectives: rendezvous, gathers of texts.
    """
    backend = _backend_of(config)
    require_same_setup(config, backend.ranks)
    return backend


def _backend_of(config: Config) -> Backend:
    if config.engine.name == "single":
        from safereg_dist.parallel.single import SingleBackend, single_ranks

        return SingleBackend(single_ranks())
    if config.engine.name == "fsdp2":
        from safereg_dist.parallel import fsdp2

        return fsdp2.Fsdp2Backend(fsdp2.start_ranks(config.engine))
    from safereg_dist.parallel.deepspeed import DeepSpeedBackend, ReplicatedBackend, start_ranks

    kind = ReplicatedBackend if config.engine.is_replicated else DeepSpeedBackend
    return kind(start_ranks(config.engine))


def build_run(config: Config, backend: Backend, *, began_with: int | None = None) -> Run:
    """Builds all objects of a run, with models loaded and wrapped.

    Args:
        began_with: ranks of the run at its first step; None = those of now.
    Raises:
        ConfigError, DataError, ProbeError, CriticUnavailable: something that the configuration
            names is missing or does not fit.
    Collectives: those of loading and wrapping; every rank calls it.
    """
    ranks = backend.ranks
    torch.manual_seed(config.train.seed + ranks.rank)  # dropout differs between ranks
    folder, tokenizer, sources, specs = read_inputs(config, ranks, began_with=began_with)
    with ranks.together():
        frozen = [] if config.lora is None else read_frozen(config.lora)

    model = backend.load_model(
        folder,
        precision=config.train.precision,
        offload=config.engine.offload_params,
        hpz_partition_size=config.engine.hpz_partition_size,
        quantize="none" if config.lora is None else config.lora.quantize,
        adapt=None if config.lora is None else partial(adapted, config=config, frozen=frozen),
    )
    with ranks.together():
        _check_tokenizer(tokenizer, model)
        _check_packing(config, model)
        if config.train.activation_checkpointing:
            enable_activation_checkpointing(model)
        require_finite(backend, model, folder)
        wrapped = policy_of(config, model, specs)
    policy = LoadedPolicy(folder, wrapped, backend.fingerprint(model, adapters_of(config)))
    start = policy.fingerprint
    if frozen:
        start = backend.fingerprint(model, [each.name for each in frozen])
    reference = build_reference(
        config,
        backend,
        folder,
        tokenizer=tokenizer,
        content_hashes=sources.content_hashes,
        policy=policy,
    )

    with ranks.together():
        facts = WeightsFacts(start, model.config.get_text_config())
        risk = build_risk(
            config, specs, backend, reference, overrides=sources.overrides, policy=facts
        )
        regularizer = assemble(
            config,
            wrapped,
            specs=specs,
            risk=risk,
            reference=reference.reference,
            ranks=ranks,
        )
    model.train()
    engine = backend.wrap_policy(model, config=_of_ranks_now(config, sources))
    regularizer.bind(engine.run)
    return Run(
        config=config,
        ranks=ranks,
        backend=backend,
        tokenizer=tokenizer,
        sources=sources,
        model=model,
        regularizer=regularizer,
        engine=engine,
        pad_id=pad_id_of(tokenizer),
        fingerprints=_fingerprints(reference, policy=start),
    )


def _of_ranks_now(config: Config, sources: RowSources) -> Config:
    """The configuration with the micro-batches of a rank, which its engine counts."""
    shape = sources.lanes.of_rank
    train = replace(
        config.train,
        grad_accum_steps=shape.micro_batches,
        micro_batch_size=shape.micro_batch_size,
    )
    return replace(config, train=train)


def adapted(
    model: PreTrainedModel, *, config: Config, frozen: Sequence[StoredAdapter]
) -> AdapterValues:
    """Puts the adapters of `lora` into the model; returns their first values.

    Raises:
        ConfigError: as `add_adapters` and `AdapterValues`.
    """
    assert config.lora is not None
    add_adapters(model, config.lora, frozen)
    return AdapterValues(config.lora, seed=config.train.seed, frozen=frozen)


def _fingerprints(reference: BuiltReference, **known: str) -> dict[str, str]:
    return known if reference.facts is None else known | {"reference": reference.facts.fingerprint}


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskContext:
    """The objects that compute the risk of rows, without those that train."""

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
    """(k / L): share of the reference's layers that the deepest probe needs; 1 with `influence`, 0
    without either."""
    reads_answers: bool
    """True where a source runs the reference on whole rows, not on their prompts alone."""
    ceilings: dict[str, float]
    """Category -> its largest coefficient, where one is configured."""


def build_risk_context(
    config: Config, backend: Backend, *, with_reference: bool = False
) -> RiskContext:
    """The data and risk stage of a run; the reference where a source or `with_reference` needs it.

    Raises:
        ConfigError: `data.streaming`, since those who ask for this go through all rows.
        ConfigError, DataError, ProbeError, CriticUnavailable: as `build_run` does.
    Collectives: those of loading; every rank calls it.
    """
    ranks = backend.ranks
    if config.data.streaming:
        raise ConfigError(
            "data.streaming=true reads rows as training needs them, this command goes through all "
            "of them beforehand: set data.streaming=false, or give it a sample of the rows"
        )
    folder, tokenizer, sources, specs = read_inputs(config, ranks)
    reference = BuiltReference(NoReference(), None)
    depths = [spec.probe.layer for spec in specs if spec.probe is not None]
    watches = any(spec.watch is not None for spec in specs)
    if depths or watches or with_reference:
        reference = build_reference(
            config,
            backend,
            folder,
            tokenizer=tokenizer,
            content_hashes=sources.content_hashes,
        )
    num_layers = 1 if reference.facts is None else reference.facts.config.num_hidden_layers
    with ranks.together():
        risk = build_risk(config, specs, backend, reference, overrides=sources.overrides)
    return RiskContext(
        config=config,
        ranks=ranks,
        tokenizer=tokenizer,
        sources=sources,
        reference=reference.reference,
        fingerprints=_fingerprints(reference),
        risk=risk,
        threshold=resolved_threshold(config.regularizer, risk.threshold),
        pad_id=pad_id_of(tokenizer),
        reads_answers=any(
            spec.watch or (spec.probe and spec.probe.position == "response") for spec in specs
        ),
        probed_share=1.0 if watches else max(depths, default=0) / num_layers,
        ceilings=category_ceilings(specs),
    )


def _check_packing(config: Config, model: PreTrainedModel) -> None:
    if config.train.packing and "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"train.packing=true tells rows apart by their positions, which {type(model).__name__} "
            "does not take: set packing=false"
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    vocab = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocab:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {vocab} embeddings: "
            "they do not belong together"
        )
