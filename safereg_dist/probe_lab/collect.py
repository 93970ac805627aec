"""Hidden states of a model at its prompts, before it answers."""

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.errors import ConfigError, DataError
from safereg_dist.evaluate.generate import render_prompts
from safereg_dist.prompts import LabelledPrompt
from safereg_dist.risk.probe import pool_prompt


@torch.inference_mode()
def collect_hidden_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[LabelledPrompt],
    *,
    pooling: str,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
) -> Tensor:
    """[layers + 1, rows, H] float32 pooled states of every layer, rows in the order given.

    Prompts are rendered with the chat template up to where the answer begins. The whole result
    lives in host memory: 4 bytes x layers x rows x H. Collectives: none.

    Args:
        max_length: most tokens of a prompt; None = the positions the model has.
    Raises:
        ConfigError: the tokenizer has no chat template, or a batch size below 1.
        DataError: no prompts, or one longer than `max_length`.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
    if not prompts:
        raise DataError("expected prompts to read hidden states at, found none: give at least one")
    rendered = render_prompts(tokenizer, prompts)
    _check_lengths(prompts, rendered, max_length or _positions(model))
    by_length = sorted(range(len(rendered)), key=lambda i: len(rendered[i]))
    pooled = torch.empty(0)
    for begin in tqdm(
        range(0, len(rendered), batch_size), desc="hidden states", disable=not progress
    ):
        chosen = by_length[begin : begin + batch_size]
        states = _pooled_batch(model, [rendered[i] for i in chosen], pooling)
        if begin == 0:
            pooled = torch.empty(states.shape[0], len(rendered), states.shape[2])
        pooled[:, chosen] = states
    return pooled


def _positions(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _check_lengths(
    prompts: list[LabelledPrompt], rendered: list[list[int]], limit: int | None
) -> None:
    longest = max(range(len(rendered)), key=lambda i: len(rendered[i]))
    if limit is not None and len(rendered[longest]) > limit:
        raise DataError(
            f"prompt {prompts[longest].id!r} has {len(rendered[longest])} tokens, the limit is "
            f"{limit}: shorten or remove it"
        )


def _pooled_batch(model: PreTrainedModel, rows: list[list[int]], pooling: str) -> Tensor:
    """[layers + 1, rows, H] float32 of right-padded rows, on the host."""
    ends = torch.tensor([len(row) for row in rows])
    input_ids = torch.zeros(len(rows), int(ends.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
    mask = (torch.arange(input_ids.shape[1]) < ends[:, None]).to(torch.int64)
    device = model.device
    output = model.base_model(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        output_hidden_states=True,
        use_cache=False,
    )
    layers = [
        pool_prompt(h, ends.to(device), pooling=pooling, attention_mask=mask.to(device))
        for h in output.hidden_states
    ]
    return torch.stack(layers).float().cpu()
