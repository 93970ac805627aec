"""Answers of a causal language model to chat prompts: batched, left-padded, in input order.

Decoding depends on the model and the arguments alone: what the checkpoint's `generation_config`
says of top-k, penalties or temperature is put aside for the call; its end-of-turn tokens are kept.
Sampling inverts the cumulative distribution at uniform numbers drawn beforehand, one per row and
token, so `seed` fixes a sample whatever the batch size, and no global random state is touched.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.data.rendering import render_prompts
from safereg_dist.errors import ConfigError, DataError, reason_of
from safereg_dist.models.architecture import read_settings, require_safetensors
from safereg_dist.screen.progress import bars_of_transformers, progress_bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A model's answer to one prompt."""

    text: str
    """Decoded without special tokens, stripped at both ends."""
    num_tokens: int
    """Tokens generated, without the end-of-turn token."""
    finished: bool
    """True where the model ended its turn; False where `max_new_tokens` cut it."""


def load_model(
    model_dir: Path | str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder, or of a hub id that is already downloaded.

    Args:
        dtype: None keeps the precision the weights are stored in.
        device: None takes the first GPU where there is one, else the CPU.
    Raises:
        ConfigError: nothing there, not loadable, or weights missing from the files (the loader
            would otherwise fill them with random numbers).
    """
    path = Path(model_dir)
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{path} holds an adapter, not a model: merge it, "
            "model.merge_and_unload().save_pretrained(FOLDER), with the tokenizer beside it, and "
            "give that folder"
        )
    if path.name == "model" and not path.exists() and (path.parent / "config.yaml").is_file():
        raise ConfigError(
            f"expected a model in {path}, found none: the run in {path.parent} has not ended, and "
            "writes model/ at its end: wait, or start it again with the same command"
        )
    if path.exists() and not (path / "config.json").is_file():
        raise ConfigError(
            f"expected a Hugging Face model folder, found no config.json in {path}: give the "
            "folder that `save_pretrained` wrote (of a run: its model/ folder)"
        )
    require_safetensors(path)
    # Files on this machine only: a misspelt path must not turn into a download.
    options = {"local_files_only": True}
    try:
        read_settings(model_dir, **options)
        with bars_of_transformers(shown=progress):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model_dir,
                dtype=dtype or "auto",
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, **options)
    except Exception as err:  # its files are read by many hands
        reason = reason_of(err)
        raise ConfigError(
            f"cannot load model and tokenizer from {model_dir}: {reason}: give a complete folder "
            "that `from_pretrained` loads"
        ) from err
    model, info = loaded
    if info["missing_keys"]:
        raise ConfigError(
            f"the files in {model_dir} lack {len(info['missing_keys'])} weights, among them "
            f"{min(info['missing_keys'])}: the folder is incomplete, save or copy it again"
        )
    ends = model.generation_config.eos_token_id
    if not all(isinstance(end, int | None) for end in (ends if isinstance(ends, list) else [ends])):
        raise ConfigError(
            f"expected eos_token_id in {model_dir}/generation_config.json as a whole number or a "
            f"list of them, got {ends!r}: correct it"
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[LabelledPrompt],
    **how: Any,
) -> list[Answer]:
    """The model's answer to each prompt, in the order of `prompts`; `how` as in `stream_answers`.

    Raises:
        ConfigError, DataError: see `stream_answers`.
    """
    found = dict(stream_answers(model, tokenizer, prompts, **how))
    return [found[row] for row in range(len(prompts))]


def stream_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[LabelledPrompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    begun: list[list[int]] | None = None,
    without: Collection[int] = (),
    progress: bool = True,
    description: str = "answers",
) -> Iterator[tuple[int, Answer]]:
    """(row, the model's answer to its prompt), each as soon as its batch is done.

    Args:
        begun: tokens that each answer begins with; the result is what the model goes on with.
        temperature: 0 decodes greedily; else the logits are divided by it and sampled in full
            (no top-k, no top-p).
        seed: fixes the samples; row i of the same list gets the same answer at any batch size, up
            to the rounding of the logits.
        without: rows that are left out.
    Raises:
        ConfigError: no chat template, a size below 1, a negative temperature.
        DataError: a prompt and its answer do not fit into the model's positions.
    """
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0:
        raise ConfigError(
            "expected max_new_tokens >= 1, batch_size >= 1 and temperature >= 0, got "
            f"{max_new_tokens}, {batch_size} and {temperature}: change the arguments"
        )
    ids = render_prompts(tokenizer, prompts)
    if begun is not None:
        ids = [asked + begin for asked, begin in zip(ids, begun, strict=True)]
    _check_positions(model, prompts, ids, max_new_tokens)
    uniforms = _uniforms(len(prompts), max_new_tokens, seed) if temperature > 0 else None
    wanted = [row for row in range(len(ids)) if row not in without]
    with _plain_decoding(model, tokenizer, max_new_tokens) as end_tokens:
        for rows in _batches(ids, batch_size, wanted, progress=progress, description=description):
            inputs = _padded([ids[row] for row in rows], model, tokenizer, "left")
            width = inputs["input_ids"].shape[1]
            processors = LogitsProcessorList()
            if uniforms is not None:
                processors.append(_InverseSampling(uniforms[rows], temperature, width))
            tokens = model.generate(**inputs, logits_processor=processors)[:, width:].tolist()
            for row, generated in zip(rows, tokens, strict=True):
                yield row, _answer(generated, end_tokens, tokenizer)


def first_token_probability(
    model: Any,
    tokenizer: Any,
    prompts: list[LabelledPrompt],
    token_ids: list[int],
    *,
    batch_size: int,
    progress: bool = True,
    description: str = "first token",
) -> Tensor:
    """Probability of token_ids[i] as the first token of the answer to prompts[i]; float32 [rows].

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    ids = render_prompts(tokenizer, prompts)
    _check_positions(model, prompts, ids, 1)
    result = torch.zeros(len(prompts), dtype=torch.float32)
    with _plain_decoding(model, tokenizer, 1):
        everyone = range(len(ids))
        for rows in _batches(ids, batch_size, everyone, progress=progress, description=description):
            inputs = _padded([ids[row] for row in rows], model, tokenizer, "left")
            # One step of `generate` and not `forward`: it derives the position ids of left-padded
            # rows the way each architecture needs them.
            step = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
            probabilities = step.logits[0].float().softmax(dim=-1).cpu()
            wanted = torch.tensor([token_ids[row] for row in rows]).unsqueeze(1)
            result[rows] = probabilities.gather(1, wanted).squeeze(1)
    return result


def response_log_likelihood(
    model: Any,
    tokenizer: Any,
    prompts: list[LabelledPrompt],
    responses: list[str],
    *,
    batch_size: int,
    progress: bool = True,
    description: str = "likelihood",
) -> list[tuple[float, int]]:
    """(sum of log p over the tokens of responses[i] as the answer to prompts[i], their number).

    The response's text is tokenised by itself; its end of turn is not counted.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: a response has no token, or does not fit into the model's positions.
    """
    asked = render_prompts(tokenizer, prompts)
    said = [tokenizer(text.strip(), add_special_tokens=False)["input_ids"] for text in responses]
    for prompt, tokens in zip(prompts, said, strict=True):
        if not tokens:
            raise DataError(f"a response to prompt {prompt.id!r} is empty: give its text")
    ids = [question + answer for question, answer in zip(asked, said, strict=True)]
    _check_positions(model, prompts, ids, 0)
    found: dict[int, tuple[float, int]] = {}
    everyone = range(len(ids))
    with _plain_decoding(model, tokenizer, 1):
        for rows in _batches(ids, batch_size, everyone, progress=progress, description=description):
            inputs = _padded([ids[row] for row in rows], model, tokenizer, "right")
            logits = model(**inputs, use_cache=False).logits
            for place, row in enumerate(rows):
                begin, end = len(asked[row]), len(ids[row])
                scores = logits[place, begin - 1 : end - 1].float().log_softmax(-1)
                tokens = torch.tensor(said[row], device=scores.device)[:, None]
                found[row] = (float(scores.gather(1, tokens).double().sum()), end - begin)
    return [found[row] for row in everyone]


class _InverseSampling(LogitsProcessor):
    """Leaves only the token where the cumulative distribution passes the row's uniform number."""

    def __init__(self, uniforms: Tensor, temperature: float, prompt_width: int) -> None:
        self.uniforms = uniforms  # [rows, max_new_tokens] float64 in [0, 1)
        self.temperature = temperature
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = self.uniforms[:, input_ids.shape[1] - self.prompt_width]
        cumulative = (scores.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        target = column.to(scores.device).unsqueeze(1) * cumulative[:, -1:]
        # right=True: the first entry strictly above, hence never a token of probability zero
        token = torch.searchsorted(cumulative, target, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _uniforms(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64)


@contextmanager
def _plain_decoding(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[set[int]]:
    """Yields the end-of-turn ids; inside, `model` is in eval mode and decodes greedily."""
    was_training, stored = model.training, model.generation_config
    ends = stored.eos_token_id
    end_tokens = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    end_tokens.discard(None)
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(end_tokens) or None,
        pad_token_id=_pad_id(tokenizer),
    )
    model.eval()
    try:
        with torch.no_grad():
            yield end_tokens
    finally:
        model.generation_config = stored
        model.train(was_training)


def _pad_id(tokenizer: Any) -> int:
    """Any id will do, since padding is masked; 0 where the tokenizer names none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0


def _padded(
    rows: list[list[int]], model: Any, tokenizer: Any, side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """Rows and their mask, padded: left to go on, right where positions must count from 0."""
    options = {"batch_first": True, "padding_side": side}
    tokens = [torch.tensor(row) for row in rows]
    input_ids = pad_sequence(tokens, padding_value=_pad_id(tokenizer), **options)
    mask = pad_sequence([torch.ones_like(row) for row in tokens], **options)
    return {
        "input_ids": input_ids.to(model.device),
        "attention_mask": mask.to(model.device),
    }


def _batches(
    ids: list[list[int]],
    batch_size: int,
    wanted: Iterable[int],
    *,
    progress: bool,
    description: str,
) -> Iterator[list[int]]:
    """Row numbers in batches of like length, longest first: what does not fit fails at once."""
    order = sorted(wanted, key=lambda row: -len(ids[row]))
    with progress_bar(total=len(order), desc=description, unit="prompt", shown=progress) as bar:
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            yield rows
            bar.update(len(rows))


def _check_positions(
    model: Any, prompts: list[LabelledPrompt], ids: list[list[int]], max_new_tokens: int
) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, row in zip(prompts, ids, strict=True):
        if limit is not None and len(row) + max_new_tokens > limit:
            raise DataError(
                f"prompt {prompt.id!r} has {len(row)} tokens, with {max_new_tokens} new ones it "
                f"exceeds the model's {limit} positions: shorten it or lower max_new_tokens"
            )


def _answer(generated: list[int], end_tokens: set[int], tokenizer: Any) -> Answer:
    end = next((at for at, token in enumerate(generated) if token in end_tokens), None)
    text = tokenizer.decode(
        generated[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return Answer(
        text=text.strip(),
        num_tokens=len(generated) if end is None else end,
        finished=end is not None,
    )
