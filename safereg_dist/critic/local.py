"""Judges on this machine: a sequence classifier, or a causal guard read at its deciding token.

Conversations that are waiting are judged together, in one worker thread, so a caller who submits
many pays for batches. Only files on this machine are read, and no code that comes with a model is
run. A conversation that is longer than the model is a failed judgement: cut text may hide the harm.
Collectives: none; every rank holds its own copy of the judge.
"""

import json
import queue
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from safereg_dist.config.risk import CriticConfig
from safereg_dist.critic.answers import named_label
from safereg_dist.critic.conversation import alternating, prompt_and_response, up_to_each_answer
from safereg_dist.critic.critic import (
    Critic,
    JudgementFailed,
    Messages,
    Verdict,
    failed_verdict,
)
from safereg_dist.critic.formats import FORMATS, VERSION, Format
from safereg_dist.errors import ConfigError, CriticUnavailable
from safereg_dist.fingerprint import model_fingerprint

_BATCH = 32  # texts in one forward pass
_BLANK_TOKENS = 2  # how many tokens of white space a guard may say before its label

# Names of the harmful label, as classifiers call it; spaces stand for `_` and `-` too.
_HARMFUL = {"harmful", "unsafe", "toxic", "hate", "hate speech", "jailbreak", "injection"}


class _Model(Protocol):
    """What the worker needs of either kind of judge."""

    def texts(self, messages: Messages) -> list[list[int]]:
        """Token ids of what is judged of a conversation, one list for each answer in it."""
        ...

    def scores(self, batch: list[list[int]]) -> list[float | None]:
        """Risks in [0, 1]; None where the model gives no verdict."""
        ...


class LocalCritic:
    """A worker thread around a model that scores token sequences in batches."""

    def __init__(self, model: _Model, identity: str, fail: str) -> None:
        self.identity = identity
        self._model, self._fail = model, fail
        self._waiting: queue.SimpleQueue[tuple[Messages, Future[Verdict]] | None]
        self._waiting = queue.SimpleQueue()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="local critic", daemon=True)
        self._thread.start()

    def submit(self, messages: Messages) -> Future[Verdict]:
        """See `Critic.submit`."""
        future: Future[Verdict] = Future()
        self._waiting.put((messages, future))
        return future

    def close(self) -> None:
        """Ends the worker after the batch it is at; what is waiting is cancelled."""
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

    def _judge(self, asked: list[tuple[Messages, Future[Verdict]]]) -> None:
        """Sets every future: a model or a template that raises fails what it was given."""
        parts: list[tuple[int, list[int]]] = []
        reasons: dict[int, str] = {}
        for index, (messages, _) in enumerate(asked):
            try:
                parts += [(index, text) for text in self._model.texts(messages)]
            except JudgementFailed as err:
                reasons[index] = str(err)
        worst: dict[int, float] = {}
        try:
            for start in range(0, len(parts), _BATCH):
                some = parts[start : start + _BATCH]
                scores = self._model.scores([text for _, text in some])
                for (index, _), score in zip(some, scores, strict=True):
                    if score is None:
                        reasons[index] = "malformed answer: not a label of the format"
                    else:
                        worst[index] = max(score, worst.get(index, 0.0))
        except Exception as err:  # out of memory, a lost device: nobody may wait for ever
            reasons = dict.fromkeys(range(len(asked)), f"the model failed: {type(err).__name__}")
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


class SequenceClassifier:
    """A Hugging Face sequence classifier: the probability of its harmful label.

    Raises:
        ConfigError: no label, or not exactly one side of the labels, says that it is harmful.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._harmful = _harmful_labels(model.config.id2label or {})
        self._is_multi = (
            model.config.num_labels == 1
            or model.config.problem_type == "multi_label_classification"
        )

    def texts(self, messages: Messages) -> list[list[int]]:
        """Prompt and answer: by the chat template where there is one, else as a pair of texts."""
        return [self._encode(part) for part in up_to_each_answer(messages)]

    def _encode(self, messages: Messages) -> list[int]:
        if self._tokenizer.chat_template:
            ids = _rendered(self._tokenizer, alternating(messages), generation=False)
        else:
            prompt, response = prompt_and_response(messages)
            ids = list(self._tokenizer(prompt, response)["input_ids"])  # type: ignore[arg-type]
        return _fitting(ids, self._model, self._tokenizer)

    @torch.inference_mode()
    def scores(self, batch: list[list[int]]) -> list[float | None]:
        """P(harmful): softmax over all labels, or where labels are independent the largest."""
        inputs = _padded(batch, self._tokenizer, self._model.device)
        logits = self._model(**inputs).logits.float()
        chosen = torch.tensor(self._harmful, device=logits.device)
        if self._is_multi:
            risks = logits.sigmoid()[:, chosen].amax(-1)
        else:
            risks = logits.softmax(-1)[:, chosen].sum(-1)
        return [min(1.0, risk) if risk == risk else None for risk in risks.tolist()]


class CausalGuard:
    """A causal guard: the expected value of its label, from the deciding token's probabilities.

    Raises:
        ConfigError: the format's first token does not decide, or the tokenizer begins two labels
            with the same token.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: Format
    ) -> None:
        self._model, self._tokenizer, self._form = model, tokenizer, form
        if form.local_prefix is None:
            able = sorted(n for n, f in FORMATS.items() if f.local_prefix is not None)
            raise ConfigError(
                f"the format {form.name} needs a whole generated answer, so it needs an endpoint: "
                f"serve the model (vLLM, launch/serve_critic.py), or use one of {', '.join(able)}"
            )
        self._prefix = _encode(tokenizer, form.local_prefix)
        self._tokens = _label_tokens(tokenizer, form.labels)
        self._values = torch.tensor([form.labels[label] for label, _ in self._tokens])

    def texts(self, messages: Messages) -> list[list[int]]:
        """The format's questions, rendered by the chat template where they are chat turns."""
        texts = []
        for question in self._form.questions(messages):
            if isinstance(question.input, str):
                ids = list(self._tokenizer(question.input)["input_ids"])  # type: ignore[arg-type]
            else:
                ids = _rendered(self._tokenizer, question.input, generation=True)
            texts.append(_fitting(ids + self._prefix, self._model, self._tokenizer))
        return texts

    def scores(self, batch: list[list[int]]) -> list[float | None]:
        """sum_l p_l value_l / sum_l p_l over the labels; None where the greedy token is none."""
        texts = [list(text) for text in batch]
        scores: list[float | None] = [None] * len(batch)
        pending: Sequence[int] = range(len(batch))
        for _ in range(_BLANK_TOKENS + 1):
            some = [texts[i] for i in pending]
            greedy, risks = self._next(some)
            blank = []
            for place, i in enumerate(pending):
                if any(greedy[place] in ids for _, ids in self._tokens):
                    scores[i] = risks[place]
                elif not str(self._tokenizer.decode([greedy[place]])).strip():
                    texts[i].append(greedy[place])
                    blank.append(i)
            pending = blank
            if not pending:
                break
        return scores

    @torch.inference_mode()
    def _next(self, texts: list[list[int]]) -> tuple[list[int], list[float]]:
        """The likeliest next token of each text, and the risk that the labels' tokens give."""
        inputs = _padded(texts, self._tokenizer, self._model.device)
        hidden = self._model(**inputs).logits
        last = torch.tensor([len(text) - 1 for text in texts], device=hidden.device)
        logits = hidden[torch.arange(len(texts), device=hidden.device), last].float()
        by_label = torch.stack([logits[:, ids].logsumexp(-1) for _, ids in self._tokens], dim=-1)
        risks = by_label.softmax(-1) @ self._values.to(logits.device)
        return logits.argmax(-1).tolist(), risks.clamp(0.0, 1.0).tolist()


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
        judge: _Model = SequenceClassifier(model, tokenizer)
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
    identity = f"local {kind}.{VERSION} {model_fingerprint(model)}"
    return LocalCritic(judge, identity, settings.fail)


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
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, info = kind.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as err:
        reason = " ".join(str(err).split())[:300]
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


def _harmful_labels(id2label: Mapping[Any, str]) -> list[int]:
    """Which outputs of a classifier mean harm, by their names."""
    names = {int(i): re.sub(r"[\s_-]+", " ", str(n)).lower() for i, n in id2label.items()}
    harmful = [i for i, name in names.items() if name in _HARMFUL]
    if not harmful or 1 < len(names) == len(harmful):
        raise ConfigError(
            f"expected labels that say which one is harmful, such as safe and unsafe, got "
            f"{sorted(id2label.values())}: set `id2label` in the classifier's config.json"
        )
    return sorted(harmful)


def _label_tokens(
    tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, float]
) -> list[tuple[str, list[int]]]:
    """Label -> ids of the tokens that begin it, with and without a space before it."""
    found = []
    for label in labels:
        firsts = {_encode(tokenizer, text)[0] for text in (label, f" {label}")}
        known = [i for i in firsts if named_label(str(tokenizer.decode([i])), labels) == label]
        found.append((label, sorted(known)))
    if not all(ids for _, ids in found):
        raise ConfigError(
            f"the judge's tokenizer does not begin each of the labels {', '.join(labels)} with a "
            "token of its own: it is no judge of this format, serve it behind an endpoint"
        )
    return found


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generation: bool
) -> list[int]:
    try:
        ids: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation, tokenize=True, return_dict=False
        )
    except Exception as err:  # templates raise whatever their author chose
        raise JudgementFailed("the judge's chat template refuses the conversation") from err
    return list(ids)


def _fitting(
    ids: list[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    limit = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    room = min(limit, tokenizer.model_max_length) - _BLANK_TOKENS
    if len(ids) > room:
        raise JudgementFailed(f"{len(ids)} tokens, the judge takes {room}")
    return ids


def _padded(
    batch: list[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, Tensor]:
    """Right-padded ids and mask; a causal model never looks at what is to the right."""
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    width = max(map(len, batch))
    ids = [text + [pad] * (width - len(text)) for text in batch]
    mask = [[1] * len(text) + [0] * (width - len(text)) for text in batch]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
