"""The frozen reference of a run: loaded whole, or its head beside states that are stored."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.config import Config
from safereg_dist.data import load_tokenizer
from safereg_dist.errors import ConfigError
from safereg_dist.factory.inputs import RowSources, resolve_model
from safereg_dist.parallel.engine import Backend, ReferenceEngine
from safereg_dist.parallel.shards import read_architecture, weights_fingerprint
from safereg_dist.reference import NoReference, Packing, Reference, ReferenceTrunk
from safereg_dist.reference.store import ReferenceStore, StoreIdentity


def build_reference(
    config: Config,
    backend: Backend,
    policy_folder: Path,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    sources: RowSources,
    fingerprints: dict[str, str],
) -> Reference | NoReference:
    """The reference; held against the policy, where there is one."""
    if not config.needs_reference:
        return NoReference()
    ranks, settings = backend.ranks, config.reference
    folder = resolve_model(settings.model or str(policy_folder), ranks)
    with ranks.together():
        architecture = read_architecture(folder)
        if policy is not None:
            _check_same_vocabulary(architecture, policy, folder, policy_folder, tokenizer, config)
    is_same = policy is not None and folder.resolve() == policy_folder.resolve()
    if settings.cache is not None and policy is not None:
        fingerprints["reference"] = (
            fingerprints["policy"] if is_same else weights_fingerprint(folder, ranks)
        )
        return _stored_reference(
            config, backend, folder, architecture, tokenizer, sources, fingerprints
        )
    model = _load_reference(config, backend, folder)
    fingerprints["reference"] = backend.fingerprint(model)
    with ranks.together():
        if is_same and fingerprints["reference"] != fingerprints["policy"]:
            raise ConfigError(
                f"policy and reference were both loaded from {folder}, but their weights differ "
                f"(fingerprints {fingerprints['policy'][:12]} and "
                f"{fingerprints['reference'][:12]}): loading has lost weights; report this"
            )
    return Reference.of_model(
        model, backend=backend, offload=settings.offload, packing=_packing(config)
    )


def _stored_reference(
    config: Config,
    backend: Backend,
    folder: Path,
    architecture: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: RowSources,
    fingerprints: dict[str, str],
) -> Reference:
    """A reference of which the head alone is loaded; its trunk on the first row not in store."""
    ranks, settings = backend.ranks, config.reference
    assert settings.cache is not None
    with ranks.together():
        identity = StoreIdentity.of(
            fingerprints["reference"],
            tokenizer,
            sources.content_hashes,
            precision=config.train.precision,
        )
        store = ReferenceStore.open(Path(settings.cache), identity)

    def load_trunk() -> ReferenceEngine:
        if ranks.is_main:
            print(
                f"safereg: a row is not in reference.cache={settings.cache} (or a probe reads the "
                "reference): loading its trunk",
                file=sys.stderr,
                flush=True,
            )
        model = _load_reference(config, backend, folder)
        found = backend.fingerprint(model)
        with ranks.together():
            if found != fingerprints["reference"]:
                raise ConfigError(
                    f"the weights in {folder} have changed since this run began (fingerprint "
                    f"{found[:12]}, then {fingerprints['reference'][:12]}): put them back"
                )
        trunk = ReferenceTrunk(model)
        return backend.wrap_reference(
            trunk, offload=settings.offload, rows=_packing(config).rows_per_pass
        )

    with _own_randomness(ranks.device):
        head = backend.load_head(folder, precision=config.train.precision)
    return Reference(
        architecture,
        head,
        load_trunk,
        backend=backend,
        packing=_packing(config),
        store=store,
    )


def _load_reference(config: Config, backend: Backend, folder: Path) -> PreTrainedModel:
    # Building a model draws random weights first. Dropout must not hang on whether, and when, that
    # happens: a stored reference is loaded late or never.
    with _own_randomness(backend.ranks.device):
        model = backend.load_model(
            folder, precision=config.train.precision, offload=config.reference.offload
        )
    with backend.ranks.together():
        require_finite(backend, model, folder)
    return model


def _own_randomness(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _packing(config: Config) -> Packing:
    settings = config.reference
    return Packing(
        rows_per_pass=settings.rows_per_pass or config.train.micro_batch_size,
        keep_bytes=settings.keep_bytes,
        max_length=config.data.max_length,
        exchange=settings.balance == "exchange",
    )


def require_finite(backend: Backend, model: PreTrainedModel, folder: Path) -> None:
    """Raises ConfigError where a weight on this rank is not finite. Collectives: none."""
    name = backend.first_not_finite(model)
    if name is not None:
        raise ConfigError(
            f"the weights in {folder} are not finite (in {name}): every state and loss would be "
            "nan; save or download the model again"
        )


def _check_same_vocabulary(
    reference: PreTrainedConfig,
    policy: PreTrainedModel,
    folder: Path,
    policy_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> None:
    sizes = [c.get_text_config().vocab_size for c in (reference, policy.config)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the reference {folder} has vocabulary {sizes[0]}, the policy {policy_folder} "
            f"{sizes[1]}: the divergence compares them token by token, choose a reference with "
            "the same (padded) vocabulary"
        )
    if folder.resolve() == policy_folder.resolve():
        return
    if load_tokenizer(str(folder), config.data).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the tokenizers of the reference {folder} and the policy {policy_folder} give tokens "
            "different numbers: choose a reference with the same tokenizer"
        )
