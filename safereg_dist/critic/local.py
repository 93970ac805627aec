"""Judges on this machine: a sequence classifier, or a causal guard read at its deciding token.

Conversations that are waiting are judged together, in one worker thread, so a caller who submits
many pays for batches; there is no deadline. Only files on this machine are read, and no code that
comes with a model is run. Collectives: none; every rank holds its own copy of the judge.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from safereg_dist.config.risk import CriticConfig
from safereg_dist.critic.formats import FORMATS, VERSION
from safereg_dist.critic.local_models import CausalGuard, LocalModel, SequenceClassifier
from safereg_dist.critic.verdict import Critic, JudgementFailed, Messages, Verdict, failed_verdict
from safereg_dist.errors import ConfigError, CriticUnavailable, reason_of
from safereg_dist.models.architecture import require_safetensors
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.regions import CRITIC, region
from safereg_dist.screen.progress import bars_of_transformers

_BATCH = 32  # conversations taken at once, and texts in one forward pass
_TOKENS = 1 << 14  # in one forward pass, padding included: bounds its memory


class LocalCritic:
    """A worker thread around a model that scores token sequences in batches."""

    def __init__(self, model: LocalModel, identity: str, fail: str) -> None:
        self.identity = identity
        self._model, self._fail = model, fail
        self._waiting: queue.SimpleQueue[tuple[list[list[int]] | str, Future[Verdict]] | None]
        """Texts of a conversation, or why there are none, and where the verdict goes."""
        self._waiting = queue.SimpleQueue()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="local critic", daemon=True)
        self._thread.start()

    def submit(self, messages: Messages) -> Future[Verdict]:
        """See `Critic.submit`; tokenises before it returns."""
        future: Future[Verdict] = Future()
        # Not in the worker: a template's time is bounded in the main thread only.
        self._waiting.put((self._texts_or_reason(messages), future))
        return future

    def _texts_or_reason(self, messages: Messages) -> list[list[int]] | str:
        try:
            return self._model.texts(messages)
        except JudgementFailed as err:
            return str(err)
        except Exception as err:  # a tokenizer given no text
            return f"the judge cannot read it: {type(err).__name__}"

    def close(self) -> None:
        """Ends the worker after its current batch; cancels pending conversations."""
        self._is_open = False
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            taken = [self._waiting.get()]
            while len(taken) < _BATCH and not self._waiting.empty():
                taken.append(self._waiting.get())
            asked = [entry for entry in taken if entry is not None]
            if self._is_open:
                self._judge([e for e in asked if e[1].set_running_or_notify_cancel()])
            else:
                for _, future in asked:
                    future.cancel()
                    future.set_running_or_notify_cancel()  # tells its callbacks
            if len(asked) < len(taken):
                return

    def _judge(self, asked: list[tuple[list[list[int]] | str, Future[Verdict]]]) -> None:
        """Sets every future; an error fails only the conversations it concerns."""
        texts: list[tuple[int, list[int]]] = []
        reasons: dict[int, str] = {}
        worst: dict[int, float] = {}
        for index, (found, _) in enumerate(asked):
            if isinstance(found, str):
                reasons[index] = found
            else:
                texts += [(index, text) for text in found]
        for batch in _batches(texts):
            try:
                with region(CRITIC):
                    scores = self._model.scores([text for _, text in batch])
            except Exception as err:  # out of memory, a lost device
                reasons |= {i: f"the model failed: {type(err).__name__}" for i, _ in batch}
                continue
            for (index, _), score in zip(batch, scores, strict=True):
                if score is None:
                    reasons[index] = "malformed answer: not a label of the format"
                else:
                    worst[index] = max(score, worst.get(index, 0.0))
        for index, (_, future) in enumerate(asked):
            self._answer(future, worst.get(index), reasons.get(index))

    def _answer(self, future: Future[Verdict], score: float | None, reason: str | None) -> None:
        try:
            if reason is not None or score is None:
                future.set_result(failed_verdict(self._fail, reason or "no score"))
            else:
                future.set_result(Verdict(score))
        except CriticUnavailable as err:
            future.set_exception(err)


def _batches(texts: list[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
    """Batches of texts of similar length whose padded size stays within the bounds."""
    batch: list[tuple[int, list[int]]] = []
    for entry in sorted(texts, key=lambda entry: len(entry[1])):
        if batch and (len(batch) + 1) * len(entry[1]) > _TOKENS:
            yield batch
            batch = []
        batch.append(entry)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def load_local_critic(
    settings: CriticConfig, *, device: torch.device | str | None = None
) -> Critic:
    """The judge in the folder `settings.local`; a guard where `settings.format` is given.

    Raises:
        ConfigError: nothing there that loads, labels that do not say which is harmful, or a format
            that this kind of judge does not have.
    """
    folder = Path(settings.local or "")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.format is None:
        _check_architecture(folder)
        model, tokenizer = _load(AutoModelForSequenceClassification, folder, place)
        judge: LocalModel = SequenceClassifier(model, tokenizer)
        kind = "classifier"
    elif settings.format in FORMATS:
        model, tokenizer = _load(AutoModelForCausalLM, folder, place)
        judge = CausalGuard(model, tokenizer, FORMATS[settings.format]())
        kind = settings.format
    else:
        raise ConfigError(
            f"the format of the judge must be one of {', '.join(sorted(FORMATS))}, or none for a "
            f"sequence classifier, got {settings.format!r}"
        )
    identity = (
        f"local {kind}.{VERSION} {model_fingerprint(model)} {_settings_hash(model, tokenizer)}"
    )
    return LocalCritic(judge, identity, settings.fail)


def _settings_hash(model: Any, tokenizer: Any) -> str:
    """SHA-256 (hex) of what a score depends on besides the weights: labels, template, tokens."""
    config = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        config.pop(name, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else backend.to_str()
    parts = [config, tokenizer.chat_template, tokenizer.all_special_ids, words]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _check_architecture(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"expected a Hugging Face model folder, found no config.json in {folder}: give the "
            "folder that `save_pretrained` wrote"
        )
    names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise ConfigError(
            f"expected a sequence classifier in {folder}, found {', '.join(names) or 'no name'}: "
            f"for a causal guard give its format, one of {', '.join(sorted(FORMATS))}"
        )


def _load(kind: Any, folder: Path, device: torch.device | str) -> tuple[Any, Any]:
    """Model and tokenizer, in the precision of the file, from files on this machine only."""
    require_safetensors(folder)
    options = {"local_files_only": True}
    try:
        with bars_of_transformers(shown=False):
            model, info = kind.from_pretrained(
                folder,
                dtype="auto",
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
                **options,
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as err:  # its files are read by many hands
        reason = reason_of(err)
        raise ConfigError(
            f"the local judge in {folder} does not load: {reason}: give a complete folder that "
            "`save_pretrained` wrote"
        ) from err
    if info["missing_keys"]:
        raise ConfigError(
            f"the files in {folder} lack {len(info['missing_keys'])} weights, among them "
            f"{min(info['missing_keys'])}: copy the folder again, or check `format`"
        )
    if model.config.pad_token_id is None:  # classifiers on decoders find the last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval().requires_grad_(False), tokenizer
