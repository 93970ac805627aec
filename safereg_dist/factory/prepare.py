"""The regulariser for a custom training loop: any model, any engine, any data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from safereg_dist.coefficient import DEFAULT_THRESHOLD, Coefficient
from safereg_dist.config import Config, config_from_dict
from safereg_dist.errors import ConfigError
from safereg_dist.factory.model_folder import resolve_model
from safereg_dist.factory.references import BuiltReference, WeightsFacts, packing_of
from safereg_dist.factory.risk import (
    SourceSpec,
    build_risk,
    category_ceilings,
    configured_overrides,
    policy_layer,
    read_sources,
)
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.objective import Objective
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.distributed import current_ranks
from safereg_dist.parallel.engine import Backend
from safereg_dist.parallel.single import SingleBackend
from safereg_dist.policy import Policy
from safereg_dist.reference import EngineModel, NoReference, Reference, ReferenceModel
from safereg_dist.risk.stage import RiskSource, RiskStage, WeightedSource
from safereg_dist.step import SafetyRegularizer

SECTIONS = ("reference", "risk", "regularizer", "train")
"""The sections that `prepare` reads; of `train` only precision, rows and the head's keys."""


def prepare(
    model: PreTrainedModel,
    settings: Path | str | Mapping[str, Any],
    *,
    reference: PreTrainedModel | ReferenceModel | None = None,
    risk: RiskSource | None = None,
    backend: Backend | None = None,
) -> SafetyRegularizer:
    """Makes the regulariser of `model`; call it before an engine wraps the model.

    It changes the model in one place: inside `SafetyRegularizer.loss_of` the model's own head
    returns the loss in place of logits. The hooks of the engine stay as they are.

    >>> import copy
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from safereg_dist import collate, prepare, row_of
    >>> shape = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
    ...                     num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(shape)
    >>> settings = {"risk": {"estimator": "column"}, "train": {"precision": "fp32"}}
    >>> regularizer = prepare(model, settings, reference=copy.deepcopy(model))
    >>> rows = [row_of("risky", [1, 9, 8, 7, 2], [0, 0, 1, 1, 1], risk=0.9),
    ...         row_of("harmless", [1, 5, 6, 2], [0, 0, 1, 1], risk=0.1)]
    >>> step = regularizer.plan(rows, step=0, micro_batches=2)
    >>> for planned in step.micro_batches:
    ...     batch = collate(planned.rows, pad_id=0)
    ...     with regularizer.loss_of(planned, batch, step):
    ...         loss = model(input_ids=batch.input_ids, use_cache=False).logits
    ...     loss.backward()
    >>> totals = regularizer.close(step)
    >>> [(row.id, row.risk, row.kl_coef) for row in totals.ledger_rows]
    [('risky', 0.9, 1.0), ('harmless', 0.1, 0.0)]
    >>> totals.sums["rows"], totals.sums["active_rows"], totals.sums["reference_rows"]
    (2.0, 1.0, 1.0)

    Args:
        settings: the sections `reference`, `risk` and `regularizer` of a configuration, and of
            `train` precision, rows of a micro-batch and memory of the head; a YAML file or a
            mapping. Every key has its default.
        reference: a frozen model in place of the one that `reference.model` names; else that is
            loaded here, by default from the folder that `model` came from.
        risk: a source of risk in place of the one that `risk` names.
        backend: what runs a reference that is loaded or given as a model; whole on every rank's
            device where this is None.
    Raises:
        ConfigError, ProbeError, CriticUnavailable: what the settings name is missing or wrong.
    Collectives: those of the backend; gathers of texts.
    """
    config = _config_of(model, settings)
    if backend is None:
        backend = SingleBackend(current_ranks())
    ranks = backend.ranks
    built = _reference(config, backend, reference)
    specs = [] if risk is not None else read_sources(config, ranks)
    with ranks.together():
        facts = WeightsFacts(_fingerprint(model, specs), model.config.get_text_config())
        if risk is not None:
            stage = RiskStage([WeightedSource("", risk, DEFAULT_THRESHOLD)])
        else:
            overrides = configured_overrides(config)
            stage = build_risk(config, specs, backend, built, overrides=overrides, policy=facts)
        return assemble(
            config, model, specs=specs, risk=stage, reference=built.reference, ranks=ranks
        )


def assemble(
    config: Config,
    model: PreTrainedModel,
    *,
    specs: list[SourceSpec],
    risk: RiskStage,
    reference: Reference | NoReference,
    ranks: Ranks,
) -> SafetyRegularizer:
    """The stages around `model`, put together. Collectives: none.

    Raises:
        ConfigError: as `Policy`.
    """
    return SafetyRegularizer(
        Policy(model, probed_layer=policy_layer(config, specs) if specs else None),
        risk=risk,
        coefficient=Coefficient(
            config.regularizer,
            threshold=risk.threshold,
            ranks=ranks,
            ceilings=category_ceilings(specs),
        ),
        reference=reference,
        objective=Objective(
            config.regularizer,
            chunk_tokens=config.train.chunk_tokens,
            head_bytes=config.train.head_bytes,
        ),
        ranks=ranks,
    )


def _config_of(model: PreTrainedModel, settings: Path | str | Mapping[str, Any]) -> Config:
    given = settings
    if isinstance(given, Path | str):
        try:
            given = yaml.safe_load(Path(given).read_text("utf-8")) or {}
        except (OSError, yaml.YAMLError) as err:
            raise ConfigError(f"settings {settings} cannot be read: {err}") from err
    unknown = set(given) - set(SECTIONS)
    if unknown:
        raise ConfigError(
            f"settings hold {', '.join(sorted(map(str, unknown)))}: only {', '.join(SECTIONS)} say "
            "how to regularise; data, engine and optimizer are the loop's own"
        )
    config = config_from_dict({**given, "model": model.name_or_path or "-", "data": {"train": "-"}})
    if config.reference.cache is not None or config.reference.balance not in ("auto", "none"):
        raise ConfigError(
            "reference.cache and reference.balance=deal or exchange need the data of a whole run: "
            "use `safereg train`, or leave them out"
        )
    return config


def _reference(
    config: Config, backend: Backend, given: PreTrainedModel | ReferenceModel | None
) -> BuiltReference:
    if not config.needs_reference:
        return BuiltReference(NoReference(), None)
    facts = None
    if given is None:
        folder = resolve_model(config.reference.model or config.model, backend.ranks)
        given = backend.load_model(
            folder, precision=config.train.precision, offload=config.reference.offload
        )
    if isinstance(given, PreTrainedModel):
        facts = WeightsFacts(backend.fingerprint(given), given.config.get_text_config())
        given = EngineModel.of_model(
            given,
            backend=backend,
            offload=config.reference.offload,
            rows=packing_of(config).rows_per_pass,
        )
    return BuiltReference(Reference(given, ranks=backend.ranks, packing=packing_of(config)), facts)


def _fingerprint(model: PreTrainedModel, specs: list[SourceSpec]) -> str:
    """The fingerprint of the policy's weights, if a probe must be checked against it."""
    return model_fingerprint(model) if any(spec.probe is not None for spec in specs) else ""
