"""What a local judge computes: token sequences in, risks out, in one forward pass for a batch.

A conversation that is longer than the model is a failed judgement: cut text may hide the harm.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.critic.answers import named_label
from safereg_dist.critic.conversation import alternating, prompt_and_response, up_to_each_answer
from safereg_dist.critic.formats import FORMATS, Format
from safereg_dist.critic.verdict import JudgementFailed, Messages
from safereg_dist.data.chat_template import rendered
from safereg_dist.errors import ConfigError, DataError

_BLANK_TOKENS = 2  # how many tokens of white space a guard may say before its label

# Names of the harmful label, as classifiers call it; spaces stand for `_` and `-` too.
_HARMFUL = {"harmful", "unsafe", "toxic", "hate", "hate speech", "jailbreak", "injection"}


class LocalModel(Protocol):
    """What the worker needs of either kind of judge."""

    def texts(self, messages: Messages) -> list[list[int]]:
        """Token ids of what is judged of a conversation, one list for each answer in it.

        Raises:
            JudgementFailed: it is too long, or the judge's template refuses it or takes too long.
        """
        ...

    def scores(self, batch: list[list[int]]) -> list[float | None]:
        """Risks in [0, 1]; None where the model gives no verdict."""
        ...


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
                f"serve the model (vLLM, safereg serve-critic), or use one of {', '.join(able)}"
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
        device = inputs["input_ids"].device
        # Logits where texts end, and nowhere else: all of them would be gigabytes.
        ends, place = torch.tensor([len(text) - 1 for text in texts]).unique(return_inverse=True)
        found = self._model(**inputs, logits_to_keep=ends.to(device)).logits
        logits = found[torch.arange(len(texts), device=device), place.to(device)].float()
        by_label = torch.stack([logits[:, ids].logsumexp(-1) for _, ids in self._tokens], dim=-1)
        risks = by_label.softmax(-1) @ self._values.to(logits.device)
        return logits.argmax(-1).tolist(), risks.clamp(0.0, 1.0).tolist()


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
        text = rendered(tokenizer, list(messages), "judge", add_generation_prompt=generation)
    except DataError as err:
        kind = type(err.__cause__ or err).__name__  # its text may hold the data
        raise JudgementFailed(
            f"the judge's chat template refuses the conversation ({kind})"
        ) from err
    return _encode(tokenizer, text)


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
