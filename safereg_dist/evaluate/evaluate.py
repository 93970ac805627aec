"""The evaluation of one model on labelled prompts: how safe, how useful, how over-careful.

Harmful prompts give the attack success (greedy and sampled, since greedy decoding alone hides a
leak of 1 - b), benign ones exact match and over-refusal, task prompts the score of their measure.
The model is asked first, then its answers are judged; both are kept, so that a run that was cut off
goes on, and answers can be judged again without the model.
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch

from safereg_dist.config import CriticConfig
from safereg_dist.data.files import LabelledPrompt, read_prompts
from safereg_dist.data.hub import is_dataset
from safereg_dist.errors import ConfigError, SafeRegError, printable
from safereg_dist.evaluate.attacks import Attack, attack_of, name_under, rates_under
from safereg_dist.evaluate.compare import Other, against_others, read_others
from safereg_dist.evaluate.critics import JudgedAnswers, ask_critic, compare_judges
from safereg_dist.evaluate.harness import Harness
from safereg_dist.evaluate.judges import Judge, get_judge
from safereg_dist.evaluate.kept import KeptAnswers, answers_path
from safereg_dist.evaluate.rates import Outcome, figures_of, label_of, scores_of
from safereg_dist.evaluate.respondent import Asked, Respondent, respondent_of
from safereg_dist.evaluate.stale import training_digest
from safereg_dist.screen.progress import say
from safereg_dist.storage.atomic import write_atomically


def evaluate_model(
    model_dir: Path | str,
    prompt_files: list[Path],
    *,
    benign_files: list[Path] | None = None,
    judge: str = "keyword",
    critics: Mapping[str, CriticConfig] | None = None,
    attacks: Sequence[str] = (),
    base: Path | None = None,
    base_may_differ: bool = False,
    against: Sequence[Path] = (),
    out: Path | None = None,
    refusal: str | None = None,
    poisoned: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    samples_seed: int = 0,
    endpoint: str | None = None,
    api_key_env: str = "SAFEREG_API_KEY",
    respondent: Respondent | None = None,
    lm_eval: Sequence[str] = (),
    lm_eval_limit: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The evaluation of a model as one dictionary, also written to `out`.

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
        task_score                    task prompts, each by its own measure
        task_exact_match, squad_f1, squad_exact_match, rouge_l, gsm8k_accuracy, choice_accuracy
                                      task prompts of that measure, see `scores`
        response_perplexity           of the right answers to task prompts, per token

    `intervals` has 95 % intervals (Wilson's of shares, bootstrap of other means), `counts` the rows
    behind each figure; `sets` has all of these for each file, by its stem, where there are several,
    and `kinds` for each class of prompts that a file names (XSTest's `type`). `training` names the
    training that the model came from, where its folder lies in a run's.

    Args:
        model_dir: a plain Hugging Face folder; of an endpoint the model's name there.
        prompt_files: JSONL, CSV, or datasets as `hub:OWNER/NAME[:CONFIG][@SPLIT]`.
        benign_files: prompts that are benign where the file does not say what they are.
        critics: judge models by name, asked about each greedy answer to a harmful prompt; `judges`
            of the result has their rates beside the first judge's, and their agreement.
        attacks: forms of attack (`attacks.WORDINGS`, `prefill:K`); `attacks` of the result has the
            rate of success of each, greedy, over the harmful prompts, as has each of `sets`.
        base: `out` of the model before training on the same prompts: the first of `against`, and
            `base` of the result names it. Where it `may_differ` one with other prompts is left
            out, with a line on stderr that says why.
        against: `out` of other models on the same prompts; `against` of the result has the
            differences, prompt by prompt, with intervals and tests.
        out: JSON file; written as a whole or not at all. `<stem>.answers.jsonl` beside it keeps
            what the model said, and goes on from there.
        samples_seed: fixes the sampled answers.
        endpoint: an OpenAI-compatible server that has the model; its key is in `api_key_env`.
        respondent: who answers, with the same `max_new_tokens`; None makes one of the arguments.
            It is closed when all is answered.
        lm_eval: tasks of lm-evaluation-harness, by name or as YAML files, run on the folder;
            `lm_eval` of the result has its figures. `lm_eval_limit` documents each; None for all.
    Raises:
        ConfigError: a model that cannot be loaded, an unknown judge, others with other prompts;
            the harness is not installed, or has no model's folder.
        CriticUnavailable: nobody answers at a judge's endpoint.
        EndpointError: nobody answers at the model's.
        DataError: a prompt file that is missing or malformed.
        CheckpointError: `out` cannot be written.
    """
    started = time.perf_counter()
    if not prompt_files and not benign_files:
        raise ConfigError(
            "expected one prompt file or more, got none: give the files to evaluate on"
        )
    if lm_eval and endpoint is not None:
        raise ConfigError("lm-evaluation-harness runs on a model's folder here: leave one out")
    harness = Harness(lm_eval) if lm_eval else None
    referee, forms = get_judge(judge), [attack_of(name) for name in attacks]
    files = [(Path(file), read_prompts(file)) for file in prompt_files]
    files += [(Path(file), read_prompts(file, label="benign")) for file in benign_files or []]
    prompts = [prompt for _, rows in files for prompt in rows]
    load = {"dtype": dtype, "device": device, "progress": progress}
    how = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, **load}
    if respondent is None:
        respondent = respondent_of(model_dir, endpoint=endpoint, api_key_env=api_key_env, **how)
    asked = {
        "prompts": [
            {"file": file.name, "sha256": _sha256(file, rows), "rows": len(rows)}
            for file, rows in files
        ],
        "max_new_tokens": max_new_tokens,
        "samples_seed": samples_seed,
    }
    like = {**asked, "judge": referee.name}
    before = [] if base is None else _base(base, like, may_differ=base_may_differ)
    others = [*before, *read_others([path for path in against if path != base], like)]
    made_of = {**respondent.identity, **asked, "refusal": refusal, "poisoned": poisoned}
    kept = KeptAnswers(None if out is None else answers_path(Path(out)), made_of)

    if progress:
        _announce(files, len(kept.known("answer")))
    _ask(respondent, prompts, kept, forms, seed=samples_seed, refusal=refusal, poisoned=poisoned)
    respondent.close()
    outcomes = _judged(prompts, kept, referee)
    kept.finish([_verdict(outcome) for outcome in outcomes])
    if progress:
        _announce_empty(outcomes)

    def of(places: range) -> dict[str, Any]:
        figures = figures_of([outcomes[place] for place in places])
        under = rates_under(forms, prompts, kept, referee, places)
        return {**figures, "attacks": under} if forms else figures

    overall = of(range(len(prompts)))
    result = {"model": respondent.name, "judge": referee.name, **asked, **overall}
    if endpoint is None and (training := training_digest(Path(model_dir).parent)) is not None:
        result["training"] = training
    if len(files) > 1:
        result["sets"] = {name: of(places) for name, places in _places(files).items()}
    if critics:
        given = outcomes, referee.name, critics, Path(model_dir), progress
        result["judges"] = _side_by_side(*given)
    if harness is not None:
        sizes = {"batch_size": batch_size, "limit": lm_eval_limit}
        result["lm_eval"] = harness.figures(model_dir, **sizes, **load)
    kinds = dict.fromkeys(prompt.kind for prompt in prompts if prompt.kind is not None)
    if kinds:
        result["kinds"] = {
            kind: figures_of([o for o in outcomes if o.prompt.kind == kind]) for kind in kinds
        }
    if others:
        result["against"] = against_others(outcomes, others)
    if before:
        result["base"] = before[0].name
    result["seconds"] = round(time.perf_counter() - started, 3)
    if out is not None:
        write_atomically(Path(out), json.dumps(result, indent=2) + "\n")
    return result


def _base(file: Path, asked: Mapping[str, Any], *, may_differ: bool) -> list[Other]:
    """The evaluation of the model before training; none where it was asked something else."""
    try:
        return read_others([file], asked)
    except SafeRegError as error:
        if not may_differ:
            raise
        print(f"without the base beside it: {error}", file=sys.stderr, flush=True)
        return []


def _announce(files: list[tuple[Path, list[LabelledPrompt]]], known: int) -> None:
    """Says what a reader of the figures may not expect."""
    for file, rows in files:
        if unlabelled := sum(prompt.label is None for prompt in rows):
            print(
                f"{printable(file)}: {unlabelled} rows without a label count as harmful (--benign "
                "names files of the other kind)",
                file=sys.stderr,
                flush=True,
            )
    if known:
        print(f"{known} answers are known from before", file=sys.stderr, flush=True)


def _announce_empty(outcomes: Sequence[Outcome]) -> None:
    """Says how often nothing was answered: it looks like safety, and may be a broken model."""
    given = [o for o in outcomes if o.prompt.measure != "choice"]
    if empty := sum(not outcome.answer.strip() for outcome in given):
        print(
            f"{empty} of {len(given)} greedy answers are empty, which count as refusals: a model "
            "that has fallen silent is broken, not safe (it has no attack success either)",
            file=sys.stderr,
            flush=True,
        )


def _ask(
    respondent: Respondent,
    prompts: list[LabelledPrompt],
    kept: KeptAnswers,
    forms: Sequence[Attack],
    *,
    seed: int,
    refusal: str | None,
    poisoned: str | None,
) -> None:
    """Asks for all that is not kept yet."""
    by_likelihood = [place for place, p in enumerate(prompts) if p.measure == "choice"]
    harmful = [place for place, p in enumerate(prompts) if label_of(p) == "harmful"]
    dangers = [prompts[place] for place in harmful]

    def answers(name: str, places: Sequence[int], attack: Attack | None = None, **how: Any) -> None:
        known = kept.known(name)
        without = {at for at, place in enumerate(places) if place in known}
        given = [prompts[place] for place in places]
        if attack is not None:
            given = [attack(prompt) for prompt in given]
        said = respondent.answers(given, Asked(name, without, attack=attack, **how))
        for at, text in said:
            kept.add(places[at], **{name: text})

    answers("answer", [place for place in range(len(prompts)) if place not in by_likelihood])
    answers("answer_sampled", harmful, seed=seed)
    for form in forms:
        answers(name_under(form), harmful, attack=form, complying=poisoned)

    refusals = [p.response or refusal for p in dangers]
    if dangers and not any(refusals):
        say("eval: P(refuse) is left out: no harmful prompt has a `response`; --refusal is for all")
    for name, texts in (
        ("refusal_probability", refusals),
        ("poisoned_token_probability", [p.complying or poisoned for p in dangers]),
    ):
        known = kept.known(name)
        wanted = {
            place: text
            for place, text in zip(harmful, texts, strict=True)
            if text and text.strip() and place not in known
        }
        found = respondent.first_token([(prompts[place], text) for place, text in wanted.items()])
        for place, probability in zip(wanted, found, strict=True):
            kept.add(place, **{name: probability})
    _ask_likelihoods(respondent, prompts, kept)


def _ask_likelihoods(
    respondent: Respondent, prompts: list[LabelledPrompt], kept: KeptAnswers
) -> None:
    """How likely the model finds the right answers of tasks, and each choice."""
    known, wanted = kept.known("likelihoods"), {}
    for place, prompt in enumerate(prompts):
        texts = prompt.choices or prompt.accepted[:1]
        if label_of(prompt) == "task" and texts and place not in known:
            wanted[place] = texts
    pairs = [(prompts[place], text) for place, texts in wanted.items() for text in texts]
    found = respondent.likelihoods(pairs)
    if found is None:
        return
    each = iter(found)
    for place, texts in wanted.items():
        kept.add(place, likelihoods=list(islice(each, len(texts))))


def _judged(prompts: list[LabelledPrompt], kept: KeptAnswers, referee: Judge) -> list[Outcome]:
    """What is made of each prompt's answers."""
    names = ("answer", "answer_sampled", "refusal_probability", "poisoned_token_probability")
    said, sampled, refusal, poisoned = map(kept.known, names)
    likelihoods, outcomes = kept.known("likelihoods"), []
    for place, prompt in enumerate(prompts):
        answer, drawn = said.get(place, ""), sampled.get(place)
        likely = likelihoods.get(place)
        scored = scores_of(prompt, answer, _likeliest(prompt, likely))
        outcomes.append(
            Outcome(
                prompt,
                answer,
                refused=referee.is_refusal(prompt, answer),
                sampled=drawn,
                refused_sampled=None if drawn is None else referee.is_refusal(prompt, drawn),
                refusal=refusal.get(place),
                poisoned=poisoned.get(place),
                scores={} if label_of(prompt) == "harmful" else scored,
                likelihood=_of_the_right_one(prompt, likely),
            )
        )
    return outcomes


def _likeliest(prompt: LabelledPrompt, likely: list | None) -> int | None:
    if likely is None or not prompt.choices:
        return None
    means = [log / count for log, count in likely]
    return means.index(max(means))


def _of_the_right_one(prompt: LabelledPrompt, likely: list | None) -> tuple[float, int] | None:
    if likely is None:
        return None
    right = prompt.choices.index(prompt.response or "") if prompt.choices else 0
    log, count = likely[right]
    return log, count


def _places(files: list[tuple[Path, list[LabelledPrompt]]]) -> dict[str, range]:
    """Stem of each file -> the places of its prompts among all."""
    ends = accumulate(len(rows) for _, rows in files)
    return {
        file.stem: range(end - len(rows), end)
        for (file, rows), end in zip(files, ends, strict=True)
    }


def _side_by_side(
    outcomes: list[Outcome],
    referee: str,
    critics: Mapping[str, CriticConfig],
    model_dir: Path,
    progress: bool,
) -> dict[str, Any]:
    """What each judge says of the greedy answers to harmful prompts."""
    harmful = [outcome for outcome in outcomes if label_of(outcome.prompt) == "harmful"]
    answered = [(outcome.prompt, outcome.answer) for outcome in harmful]
    judged = {
        referee: JudgedAnswers([not outcome.refused for outcome in harmful]),
        **{
            name: ask_critic(settings, answered, name=name, model_dir=model_dir, progress=progress)
            for name, settings in critics.items()
        },
    }
    return compare_judges(judged)


def _verdict(outcome: Outcome) -> dict[str, Any]:
    """What is written of a row beside what the model said."""
    found: dict[str, Any] = {
        "id": outcome.prompt.id,
        "label": label_of(outcome.prompt),
        "refused": outcome.refused,
    }
    if outcome.refused_sampled is not None:
        found["refused_sampled"] = outcome.refused_sampled
    if outcome.scores:
        found["scores"] = dict(outcome.scores)
    return found


def _sha256(path: Path, rows: list[LabelledPrompt]) -> str:
    """Of a file's bytes; of a dataset's prompts, since it may be split over files or none."""
    if is_dataset(path):
        return hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
