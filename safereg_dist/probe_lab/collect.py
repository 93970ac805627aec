"""Hidden states of a model at its prompts before it answers, or over answers given to it.

One forward gives all layers; each batch is pooled at once and streamed to disk, so that memory
holds one batch and one shard, whatever the number of rows. Every rank holds the whole model and
takes its own shards; nothing crosses ranks but the files.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.probe_lab.rows import ProbedRow, tokenize_examples
from safereg_dist.probe_lab.store import StateStore
from safereg_dist.risk.probe import POOLINGS_OF, pool_spans
from safereg_dist.screen.progress import progress_bar

BATCHES_PER_SHARD = 8


def collect_states(
    model: PreTrainedModel,
    rows: Sequence[ProbedRow],
    store: StateStore,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> None:
    """Writes this rank's shards of the states of all layers; those that exist are kept.

    Rows go in order of length, longest first, so that what does not fit fails at once. Shard s
    belongs to rank s % world_size. Collectives: none; put a barrier before anyone reads.

    Raises:
        DataError: a state is not finite.
        CheckpointError: a shard cannot be written.
    """
    manifest = store.manifest
    order = by_length(rows)
    size = manifest.rows_per_shard
    mine = range(rank, manifest.num_shards, world_size)
    missing = [shard for shard in mine if not store.has_shard(shard)]
    layers = range(1, manifest.num_layers + 1)
    chosen_of = {shard: order[shard * size : (shard + 1) * size] for shard in mine}
    total, done = (
        sum(len(chosen_of[shard]) for shard in mine if shard not in left)
        for left in ((), set(missing))
    )
    with progress_bar(
        total=total, initial=done, desc="hidden states", unit="row", shown=progress
    ) as bar:
        for shard in missing:
            chosen = chosen_of[shard]
            states: dict[str, Tensor] = {}
            for begin in range(0, len(chosen), batch_size):
                batch = [rows[i] for i in chosen[begin : begin + batch_size]]
                pooled = pooled_batch(model, batch, poolings=manifest.poolings, layers=layers)
                for name, part in pooled.items():
                    if name not in states:
                        states[name] = part.new_empty(len(layers), len(chosen), part.shape[2])
                    states[name][:, begin : begin + len(batch)] = part
                bar.update(len(batch))
            store.write_shard(shard, chosen, states)


def by_length(rows: Sequence[ProbedRow]) -> list[int]:
    """Indices of the rows, longest first."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))


def pooled_batches(
    model: PreTrainedModel,
    rows: Sequence[ProbedRow],
    *,
    pooling: str,
    layers: Sequence[int],
    batch_size: int,
    progress: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (indices of a batch's rows, [layers, n, H] their states on the host)."""
    order = by_length(rows)
    for begin in progress_bar(
        range(0, len(rows), batch_size), desc="hidden states", shown=progress
    ):
        chosen = order[begin : begin + batch_size]
        batch = [rows[i] for i in chosen]
        yield chosen, pooled_batch(model, batch, poolings=(pooling,), layers=layers)[pooling]


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

    For few rows: the whole result lives in host memory, 4 bytes x layers x rows x H; see
    `collect_states`. Collectives: none.

    Args:
        pooling: also says whether the prompt is read, or the answer of each row.
        max_length: most tokens of a row; None = the positions the model has.
    Raises:
        ConfigError: the tokenizer has no chat template, or a batch size below 1.
        DataError: no prompts, one longer than `max_length`, or a state that is not finite.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
    if not prompts:
        raise DataError("expected prompts to read hidden states at, found none: give at least one")
    position = next(position for position, names in POOLINGS_OF.items() if pooling in names)
    limit = max_length or positions_of(model.config)
    rows = tokenize_examples(tokenizer, prompts, position, max_length=limit)
    layers = range(model.config.get_text_config().num_hidden_layers + 1)
    result = torch.empty(0)
    for chosen, states in pooled_batches(
        model, rows, pooling=pooling, layers=layers, batch_size=batch_size, progress=progress
    ):
        if result.numel() == 0:
            result = torch.empty(len(layers), len(rows), states.shape[2])
        result[:, chosen] = states.float()
    return result


def positions_of(config) -> int | None:
    """Most tokens that a model of this configuration takes; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@torch.inference_mode()
def pooled_batch(
    model: PreTrainedModel,
    rows: Sequence[ProbedRow],
    *,
    poolings: Sequence[str],
    layers: Sequence[int],
) -> dict[str, Tensor]:
    """By pooling, [layers, n, H] on the host: last tokens in the model's precision, means float32.

    Raises:
        DataError: a state is not finite; the message names row and layer.
    """
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    input_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(torch.int64)
    device = model.device
    hidden = model.base_model(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    spans = {
        "rows": torch.arange(len(rows), device=device),
        "first": torch.tensor([row.first for row in rows]).to(device),
        "last": torch.tensor([row.last for row in rows]).to(device),
    }
    pooled = {
        name: torch.stack([pool_spans(hidden[k], **spans, pooling=name) for k in layers]).cpu()
        for name in poolings
    }
    for states in pooled.values():
        _check_finite(states, rows, layers)
    return pooled


def _check_finite(states: Tensor, rows: Sequence[ProbedRow], layers: Sequence[int]) -> None:
    broken = (~states.isfinite()).any(-1).nonzero()
    if len(broken):
        layer, row = broken[0].tolist()
        raise DataError(
            f"the hidden states of prompt {rows[row].id!r} at layer {layers[layer]} are not finite "
            f"({len({r for _, r in broken.tolist()})} such rows in the batch): check the model's "
            "weights, load it in bfloat16 or float32 instead of float16, or remove the row"
        )
