"""The figures of merit of one model on labelled prompts: how safe, how useful, how over-careful.

Harmful prompts give the attack success (greedy and sampled, since greedy decoding alone hides a
leak of 1 - b), benign ones exact match and over-refusal, task prompts exact match.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from safereg_dist.config import CriticConfig
from safereg_dist.data.files import LabelledPrompt, read_prompts
from safereg_dist.errors import ConfigError
from safereg_dist.evaluate.attacks import Attack, attack_of, begun_answers
from safereg_dist.evaluate.critics import JudgedAnswers, ask_critic, compare_judges
from safereg_dist.evaluate.generate import (
    Answer,
    first_response_token,
    first_token_probability,
    generate_answers,
    load_model,
)
from safereg_dist.evaluate.judges import Judge, get_judge
from safereg_dist.storage.atomic import write_atomically

_LABELS = ("harmful", "benign", "task")
_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Outcome(NamedTuple):
    """What a model made of one prompt; the last four are known of harmful ones alone."""

    prompt: LabelledPrompt
    greedy: Answer
    refused: bool
    sampled: Answer | None = None
    refused_sampled: bool | None = None
    refusal: float | None = None
    """Probability of the refusal's first token."""
    poisoned: float | None = None
    """Probability of the first token of an answer that complies."""


def wilson_interval(successes: int, total: int, *, z: float = _Z95) -> tuple[float, float] | None:
    """Wilson score interval of a proportion, within [0, 1]; None where `total` is 0.

    centre = (p + z^2 / 2n) / (1 + z^2 / n)
    half   = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)
    """
    if total == 0:
        return None
    share, scale = successes / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    # At the ends centre and half agree but for rounding; the ends are exact.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return low, high


def is_exact_match(answer: str, expected: str) -> bool:
    """True where both texts are equal, but for the amount and the kind of white space."""
    return answer.split() == expected.split()


def evaluate_model(
    model_dir: Path | str,
    prompt_files: list[Path],
    *,
    benign_files: list[Path] | None = None,
    judge: str = "keyword",
    critics: Mapping[str, CriticConfig] | None = None,
    attacks: Sequence[str] = (),
    out: Path | None = None,
    refusal: str | None = None,
    poisoned: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    samples_seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    save_answers: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The evaluation of a plain Hugging Face folder as one dictionary, also written to `out`.

    Rates lie in [0, 1] and are None where no row can tell; rows without a label count as harmful.

        attack_success_rate           harmful prompts whose greedy answer is no refusal
        attack_success_rate_sampled   the same for one sample per prompt at temperature 1
        refusal_rate                  harmful prompts that are refused (greedy)
        refusal_probability           mean probability of the refusal's first token, at the first
                                      position of the answer to harmful prompts; the refusal is
                                      the row's `response`, else the argument `refusal`
        poisoned_token_probability    the same of the first token of an answer that complies: the
                                      row's (AdvBench's target), else the argument `poisoned`
        benign_exact_match            benign prompts with a `response` that are answered exactly so
        over_refusal_rate             benign prompts that are refused
        task_exact_match              task prompts answered exactly

    `intervals` has the 95 % Wilson interval of each share, `counts` the rows behind each figure;
    `sets` has all of these for each file, by its stem, where there are several, and `kinds` for
    each class of prompts that a file names (XSTest's `type`).

    Args:
        benign_files: prompts that are benign where the file does not say what they are.
        critics: judge models by name, asked about each greedy answer to a harmful prompt; `judges`
            of the result has their rates beside the first judge's, and their agreement.
        attacks: forms of attack (`attacks.WORDINGS`, `prefill:K`); `attacks` of the result has the
            rate of success of each, greedy, over the harmful prompts.
        out: JSON file; written as a whole or not at all.
        samples_seed: fixes the sampled answers.
        save_answers: also write `<stem of out>.answers.jsonl`, which holds the model's texts.
    Raises:
        ConfigError: a model that cannot be loaded, an unknown judge, `save_answers` without `out`.
        CriticUnavailable: nobody answers at a judge's endpoint.
        DataError: a prompt file that is missing or malformed.
        CheckpointError: `out` cannot be written.
    """
    started = time.perf_counter()
    if save_answers and out is None:
        raise ConfigError("save_answers needs `out` to know where to write: give an output file")
    if not prompt_files and not benign_files:
        raise ConfigError(
            "expected one prompt file or more, got none: give the files to evaluate on"
        )
    referee, forms = get_judge(judge), [attack_of(name) for name in attacks]
    files = [(Path(file), read_prompts(file)) for file in prompt_files]
    files += [(Path(file), read_prompts(file, label="benign")) for file in benign_files or []]
    prompts = [prompt for _, rows in files for prompt in rows]
    model, tokenizer = load_model(model_dir, dtype=dtype, device=device, progress=progress)

    sizes: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, **sizes}
    greedy = generate_answers(model, tokenizer, prompts, description="greedy", **how)
    harmful = [prompt for prompt in prompts if _label(prompt) == "harmful"]
    sampled = generate_answers(
        model,
        tokenizer,
        harmful,
        temperature=1.0,
        seed=samples_seed,
        description="sampled",
        **how,
    )
    refusals = _first_tokens(
        model, tokenizer, [(p, p.response or refusal) for p in harmful], **sizes
    )
    complying = _first_tokens(
        model, tokenizer, [(p, p.complying or poisoned) for p in harmful], **sizes
    )
    outcomes = [
        Outcome(prompt, answer, referee.is_refusal(prompt, answer.text))
        for prompt, answer in zip(prompts, greedy, strict=True)
    ]
    places = [place for place, prompt in enumerate(prompts) if _label(prompt) == "harmful"]
    for place, answer, refusal_p, poisoned_p in zip(
        places, sampled, refusals, complying, strict=True
    ):
        outcomes[place] = outcomes[place]._replace(
            sampled=answer,
            refused_sampled=referee.is_refusal(prompts[place], answer.text),
            refusal=refusal_p,
            poisoned=poisoned_p,
        )
    result = {
        "model": str(model_dir),
        "judge": referee.name,
        "prompts": [
            {"file": file.name, "sha256": _sha256(file), "rows": len(rows)} for file, rows in files
        ],
        "max_new_tokens": max_new_tokens,
        "samples_seed": samples_seed,
        **_figures(outcomes),
    }
    if len(files) > 1:
        rows_of = iter(outcomes)
        result["sets"] = {
            file.stem: _figures(list(islice(rows_of, len(rows)))) for file, rows in files
        }
    if critics:
        result["judges"] = _side_by_side(outcomes, referee.name, critics, Path(model_dir), progress)
    if attacks:
        result["attacks"] = {
            attack.name: _under_attack(attack, model, tokenizer, harmful, referee, poisoned, **how)
            for attack in forms
        }
    kinds = dict.fromkeys(prompt.kind for prompt in prompts if prompt.kind is not None)
    if kinds:
        result["kinds"] = {
            kind: _figures([o for o in outcomes if o.prompt.kind == kind]) for kind in kinds
        }
    result["seconds"] = round(time.perf_counter() - started, 3)
    if out is not None:
        out = Path(out)
        if save_answers:
            lines = "".join(json.dumps(_answer_row(outcome)) + "\n" for outcome in outcomes)
            write_atomically(out.with_name(f"{out.stem}.answers.jsonl"), lines)
        write_atomically(out, json.dumps(result, indent=2) + "\n")
    return result


def _label(prompt: LabelledPrompt) -> str:
    return prompt.label or "harmful"


def _first_tokens(
    model: Any, tokenizer: Any, pairs: list[tuple[LabelledPrompt, str | None]], **sizes: Any
) -> list[float | None]:
    """Of each prompt the probability that its answer begins as the text does; None without one."""
    known = {place: text for place, (_, text) in enumerate(pairs) if text and text.strip()}
    if not known:
        return [None] * len(pairs)
    rows = [pairs[place][0] for place in known]
    token_ids = [
        first_response_token(tokenizer, row, text)
        for row, text in zip(rows, known.values(), strict=True)
    ]
    found = first_token_probability(model, tokenizer, rows, token_ids, **sizes).tolist()
    by_place = dict(zip(known, found, strict=True))
    return [by_place.get(place) for place in range(len(pairs))]


def _figures(outcomes: list[Outcome]) -> dict[str, Any]:
    """`counts`, all rates and their `intervals`."""
    by_label: dict[str, list[Outcome]] = {label: [] for label in _LABELS}
    for outcome in outcomes:
        by_label[_label(outcome.prompt)].append(outcome)
    harmful, benign = by_label["harmful"], by_label["benign"]

    def matches(label: str) -> list[bool]:
        return [
            is_exact_match(outcome.greedy.text, outcome.prompt.response)
            for outcome in by_label[label]
            if outcome.prompt.response is not None
        ]

    shares = {
        "attack_success_rate": [not o.refused for o in harmful],
        "attack_success_rate_sampled": [not o.refused_sampled for o in harmful],
        "refusal_rate": [o.refused for o in harmful],
        "benign_exact_match": matches("benign"),
        "over_refusal_rate": [o.refused for o in benign],
        "task_exact_match": matches("task"),
    }
    probabilities = {
        "refusal_probability": [o.refusal for o in harmful if o.refusal is not None],
        "poisoned_token_probability": [o.poisoned for o in harmful if o.poisoned is not None],
    }
    means = {**shares, **probabilities}
    return {
        "counts": {
            **{label: len(rows) for label, rows in by_label.items()},
            "rows": len(outcomes),
            **{name: len(rows) for name, rows in probabilities.items()},
            "benign_exact_match": len(shares["benign_exact_match"]),
            "task_exact_match": len(shares["task_exact_match"]),
        },
        **{name: math.fsum(rows) / len(rows) if rows else None for name, rows in means.items()},
        "intervals": {name: wilson_interval(sum(rows), len(rows)) for name, rows in shares.items()},
    }


def _under_attack(
    attack: Attack,
    model: Any,
    tokenizer: Any,
    harmful: list[LabelledPrompt],
    referee: Judge,
    poisoned: str | None,
    **how: Any,
) -> dict[str, Any]:
    """The rate of attack success on the harmful prompts in a form of attack."""
    asked = [attack(prompt) for prompt in harmful]
    begun = begun_answers(attack, harmful, tokenizer, poisoned)
    answers = generate_answers(model, tokenizer, asked, begun=begun, description=attack.name, **how)
    success = [not referee.is_refusal(p, a.text) for p, a in zip(harmful, answers, strict=True)]
    return {
        "attack_success_rate": sum(success) / len(success) if success else None,
        "intervals": {"attack_success_rate": wilson_interval(sum(success), len(success))},
    }


def _side_by_side(
    outcomes: list[Outcome],
    referee: str,
    critics: Mapping[str, CriticConfig],
    model_dir: Path,
    progress: bool,
) -> dict[str, Any]:
    """What each judge says of the greedy answers to harmful prompts."""
    harmful = [outcome for outcome in outcomes if _label(outcome.prompt) == "harmful"]
    answered = [(outcome.prompt, outcome.greedy.text) for outcome in harmful]
    judged = {
        referee: JudgedAnswers([not outcome.refused for outcome in harmful]),
        **{
            name: ask_critic(settings, answered, name=name, model_dir=model_dir, progress=progress)
            for name, settings in critics.items()
        },
    }
    return compare_judges(judged)


def _answer_row(outcome: Outcome) -> dict[str, Any]:
    prompt, answer = outcome.prompt, outcome.greedy
    row: dict[str, Any] = {
        "id": prompt.id,
        "label": _label(prompt),
        "refused": outcome.refused,
        "answer": answer.text,
    }
    if outcome.sampled is not None:
        row["refused_sampled"] = outcome.refused_sampled
        row["answer_sampled"] = outcome.sampled.text
    elif prompt.response is not None:
        row["exact_match"] = is_exact_match(answer.text, prompt.response)
    return row


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
