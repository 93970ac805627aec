"""The regulariser for a custom training loop: any model, any engine, any data."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.coefficient import DEFAULT_THRESHOLD, Coefficient
from safereg_dist.config import POLICY_RISK_IS_TOO_LATE, Config, config_from_dict
from safereg_dist.config.messages import unknown_key
from safereg_dist.config.paths import Origin
from safereg_dist.config.section import section_in
from safereg_dist.config.yaml_text import read_yaml
from safereg_dist.errors import ConfigError, reason_of
from safereg_dist.factory.model_folder import resolve_model
from safereg_dist.factory.references import (
    BuiltReference,
    WeightsFacts,
    adapters_of,
    check_same_tokens,
    packing_of,
    reference_backend,
)
from safereg_dist.factory.risk import build_risk, configured_overrides, warn_of_unscored_rows
from safereg_dist.factory.risk_specs import (
    SourceSpec,
    category_ceilings,
    policy_layer,
    read_sources,
)
from safereg_dist.models.architecture import read_architecture
from safereg_dist.objective import Objective
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.distributed import joined_ranks
from safereg_dist.parallel.engine import Backend
from safereg_dist.policy import Policy
from safereg_dist.reference import EngineModel, NoReference, Reference, ReferenceModel
from safereg_dist.reference.adapters_off import AdaptersOff
from safereg_dist.risk.stage import RiskSource, RiskStage, WeightedSource
from safereg_dist.step import SafetyRegularizer

SECTIONS = ("reference", "data", "risk", "regularizer", "train", "signing")
"""The sections that `prepare` reads; of `data` only the anchors' keys and `max_length`, of `train`
precision, rows and the head's keys. `signing` is for the stacks whose checkpoints we write to."""
_TOLD = {
    **dict.fromkeys(("reference", "risk", "regularizer"), True),
    "data": {"anchor", "anchor_fraction", "max_length", "chat_template"},
}
"""What of them the weights depend on."""


def prepare(
    model: PreTrainedModel,
    settings: Path | str | Mapping[str, Any],
    *,
    reference: PreTrainedModel | ReferenceModel | None = None,
    risk: RiskSource | None = None,
    backend: Backend | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
        backend: what runs a reference that is loaded or given as a model; by default as
            `reference.engine` says.
        tokenizer: the stack's own; risk that is found by text (`risk.estimator=lookup`, a critic)
            needs it, and the reference's is compared with it.
    Raises:
        ConfigError, ProbeError, CriticUnavailable: what the settings name is missing or wrong.
        GroupError: a launcher started several processes, which have formed no group yet.
    Collectives: those of the backend; gathers of texts.
    """
    ranks = joined_ranks() if backend is None else backend.ranks
    base: Any = unwrapped(model)
    with ranks.together():
        config = _config_of(base, settings)
        engine = _reference_engine(config, model, reference, ranks)
        if config.reference.adapter is not None and engine != "adapters_off":
            raise ConfigError(
                f"reference.adapter={config.reference.adapter!r} stays on where the reference is "
                f"the model itself, got one of its own (reference.engine={engine}): give one"
            )
    given = [name for name, own in (("reference", reference), ("risk", risk)) if own is not None]
    specs = [] if risk is not None else read_sources(config, ranks, tokenizer)
    with ranks.together():
        policy = policy_of(config, base, specs)
    if backend is None:
        shares = engine == "adapters_off" and _is_under_zero3(base)
        backend = reference_backend("zero3" if shares else engine, ranks)
    if engine == "adapters_off":
        with ranks.together():
            _check_adapters_off(config, risk)
            reference = AdaptersOff(
                model, policy, adapter=config.reference.adapter, gathered=backend.gathered
            )
    own = adapters_of(config)
    facts = WeightsFacts(_fingerprint(base, specs, ranks, own), base.config.get_text_config(), *own)
    built = _reference(config, backend, reference, base, tokenizer)
    if engine == "adapters_off":
        built = built._replace(facts=facts)
    with ranks.together():
        if risk is not None:
            stage = RiskStage([WeightedSource("", risk, DEFAULT_THRESHOLD)])
        else:
            overrides = configured_overrides(config)
            stage = build_risk(
                config,
                specs,
                backend,
                built,
                overrides=overrides,
                policy=facts,
                tokenizer=tokenizer,
            )
            if ranks.is_main:
                warn_of_unscored_rows(overrides, config, stage)
        made = assemble(
            config, policy, specs=specs, risk=stage, reference=built.reference, ranks=ranks
        )
        made.keeps_stack_loss = config.train.stack_loss
        for name in given:
            del made.settings[name]
        return made


def unwrapped(model: Any) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def policy_of(config: Config, model: PreTrainedModel, specs: list[SourceSpec]) -> Policy:
    """The policy around `model`. Raises ConfigError as `Policy` does."""
    return Policy(model, probed_layer=policy_layer(config, specs) if specs else None)


def assemble(
    config: Config,
    policy: Policy | None,
    *,
    specs: list[SourceSpec],
    risk: RiskStage,
    reference: Reference | NoReference,
    ranks: Ranks,
) -> SafetyRegularizer:
    """The stages around the policy, put together. Collectives: none."""
    made = SafetyRegularizer(
        policy,
        risk=risk,
        coefficient=Coefficient(
            config.regularizer,
            threshold=risk.threshold,
            ranks=ranks,
            ceilings=category_ceilings(specs),
        ),
        reference=reference,
        objective=objective_of(config),
        ranks=ranks,
    )
    made.settings = config.model_dump(include=_TOLD)
    return made


def objective_of(config: Config) -> Objective:
    """The loss that the configuration asks for."""
    return Objective(
        config.regularizer,
        chunk_tokens=config.train.chunk_tokens,
        head_bytes=config.train.head_bytes,
    )


def read_settings(settings: Path | str | Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a dict, from a YAML file where they are a path: its own begin at its folder.

    Raises:
        ConfigError: a file that cannot be read, or holds no mapping.
    """
    if isinstance(settings, Mapping):
        return dict(settings)
    try:
        found = read_yaml(settings)
    except OSError as err:
        raise ConfigError(
            f"the settings {settings} cannot be read: {err.strerror}: check the path"
        ) from err
    except (UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(f"the settings {settings} are not YAML: {reason_of(err)}") from err
    if found is None:
        raise ConfigError(
            f"the settings {settings} are empty: expected sections, such as "
            "risk: {estimator: column}"
        )
    if not isinstance(found, dict):
        raise ConfigError(
            f"expected sections in the settings {settings}, got a {type(found).__name__}"
        )
    placed = Origin.of_file(settings).section(Config, found)
    return {key: placed[key] for key in found}


def config_of(settings: Mapping[str, Any], model: str) -> Config:
    """Settings as a configuration; `model` is what is trained.

    Raises:
        ConfigError: a section or key that does not belong here.
    """
    for section in map(str, settings):
        if section in Config.model_fields and section not in SECTIONS:
            raise ConfigError(
                f"settings hold {section!r}, which the loop or the stack that trains says itself: "
                f"leave it out (read here: {', '.join(SECTIONS)})"
            )
        if section not in SECTIONS:
            where = [s for s in SECTIONS if section in _keys_of(s)]
            valid = SECTIONS if not where else [f"{name}.{section}" for name in where]
            raise ConfigError(unknown_key(section, section, valid))
    data = {"train": "-", **(settings.get("data") or {})}
    return config_from_dict({**settings, "model": model, "data": data})


def _keys_of(section: str) -> Iterable[str]:
    kind = section_in(Config.model_fields[section].annotation)
    return () if kind is None else kind.model_fields


def _config_of(model: PreTrainedModel, settings: Path | str | Mapping[str, Any]) -> Config:
    config = config_of(read_settings(settings), model.name_or_path or "-")
    if config.reference.cache is not None or config.reference.balance not in ("auto", "none"):
        raise ConfigError(
            "reference.cache and reference.balance=deal or exchange need the data of a whole run: "
            "use `safereg train`, or leave them out"
        )
    if config.signing is not None:
        raise ConfigError(
            "signing signs checkpoints and the ledger, which a loop of your own writes itself: "
            "leave it out here, and give it to a recorder (Recorder(..., signing=SigningConfig("
            "...)), docs/stacks/loops.md)"
        )
    return config


def _reference_engine(
    config: Config, model: Any, given: PreTrainedModel | ReferenceModel | None, ranks: Ranks
) -> str:
    """What runs the reference: `reference.engine`, with `auto` resolved."""
    settings = config.reference
    if settings.engine != "auto":
        return settings.engine
    if given is None and settings.model is None and hasattr(model, "peft_config"):
        return "adapters_off"
    if _is_under_zero3(unwrapped(model)):
        return "zero3"
    return "fsdp2" if ranks.world_size > 1 and given is None else "whole"


def _check_adapters_off(config: Config, risk: RiskSource | None) -> None:
    reads = config.needs_risk and config.risk.source == "policy"
    if (reads if risk is None else risk.reads_policy) and config.needs_reference:
        raise ConfigError(POLICY_RISK_IS_TOO_LATE)


def _name_of(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__


def _reference(
    config: Config,
    backend: Backend,
    given: PreTrainedModel | ReferenceModel | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> BuiltReference:
    if not config.needs_reference:
        return BuiltReference(NoReference(), None)
    facts = None
    check = partial(check_same_tokens, policy=model.config, data=config.data)
    if given is None:
        folder = resolve_model(config.reference.model or config.model, backend.ranks)
        names = (str(folder), _name_of(model))
        with backend.ranks.together():
            other = tokenizer if str(folder) != model.name_or_path else None
            check(read_architecture(folder), names=names, tokenizer=other)
        given = backend.load_model(
            folder, precision=config.train.precision, offload=config.reference.offload
        )
    elif isinstance(given, PreTrainedModel):
        with backend.ranks.together():
            names = (_name_of(given), _name_of(model))
            check(given.config, names=names, tokenizer=None)
    if isinstance(given, PreTrainedModel):
        facts = WeightsFacts(backend.fingerprint(given), given.config.get_text_config())
        given = EngineModel.of_model(
            given,
            backend=backend,
            offload=config.reference.offload,
            rows=packing_of(config).rows_per_pass,
        )
    return BuiltReference(Reference(given, ranks=backend.ranks, packing=packing_of(config)), facts)


def _fingerprint(
    model: PreTrainedModel, specs: list[SourceSpec], ranks: Ranks, adapters: tuple[str, ...]
) -> str:
    """The fingerprint of the policy's weights, if a probe must be checked against it."""
    if all(spec.probe is None for spec in specs):
        return ""
    engine = "zero3" if _is_under_zero3(model) else "whole"
    return reference_backend(engine, ranks).fingerprint(model, adapters)


def _is_under_zero3(model: PreTrainedModel) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
