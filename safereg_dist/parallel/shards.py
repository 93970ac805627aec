"""Weights between safetensors files and the shards of ranks, without a whole model anywhere."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safereg_dist.errors import ConfigError, reason_of
from safereg_dist.models.adapters import (
    AdapterValues,
    adapter_parameters,
    base_parameters,
    weights_with,
)
from safereg_dist.models.architecture import build_model, read_architecture, require_safetensors
from safereg_dist.models.fingerprint import checksum, digest
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.fused_tensors import fused_tensors
from safereg_dist.screen.progress import progress_bar
from safereg_dist.storage.json_text import parse_json
from safereg_dist.types import head_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SUFFIX = ".safetensors"


def weight_files(folder: Path) -> dict[str, Path]:
    """File of every tensor in a Hugging Face folder, by tensor name.

    Raises:
        ConfigError: the folder has no safetensors weights, or an index that names no files in it.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return {name: folder / file for name, file in _weight_map(index).items()}
    require_safetensors(folder)
    single = folder / SINGLE_FILE
    if not single.is_file():
        raise ConfigError(
            f"expected {SINGLE_FILE} or {INDEX_FILE} in {folder}, found neither: save the model "
            "with save_pretrained (safetensors)"
        )
    return dict.fromkeys(_headers(single), single)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = parse_json(index.read_bytes())["weight_map"]
        if all(Path(file).name == file and file.endswith(_SUFFIX) for file in mapping.values()):
            return mapping
        reason = "other than safetensors files of the folder"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        reason = f"{type(err).__name__} {reason_of(err, 100)}"
    raise ConfigError(
        f"expected `weight_map` in {index}, from tensors to files beside it, got {reason}: save or "
        "download the model again"
    )


def match_names(model: nn.Module, files: dict[str, Path], folder: Path) -> dict[str, list[str]]:
    """Tensor names in the files for every parameter of the model (tied ones once).

    There are several where the parameter is made of them, one after another (`fused_tensors`).

    Raises:
        ConfigError: a parameter has no tensor: loading would leave it at random values.
    """
    prefix = getattr(model, "base_model_prefix", "")
    # A tied weight is listed under its first name only, and may be stored under the other one.
    aliases = _aliases(model)

    def stored(name: str, under: Mapping[str, object]) -> str:
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((c for c in (*candidates, *aliases.get(name, ())) if c in under), "")

    found = {name: stored(name, files) for name, _ in base_parameters(model)}
    names = {name: [tensor] for name, tensor in found.items() if tensor}
    if len(names) < len(found):
        fused = fused_tensors(model, files)
        for name in found.keys() - names.keys():
            names[name] = fused.get(stored(name, fused), [])
    lost = sorted(name for name, tensors in names.items() if not tensors)
    if lost:
        raise ConfigError(
            f"{folder} has no tensor for {len(lost)} parameters, the first is {lost[0]!r}: the "
            "checkpoint does not fit the architecture in its config.json (or needs a weight "
            "conversion on loading that sharded loading does not support)"
        )
    return {name: names[name] for name in found}


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    by_id: dict[int, list[str]] = {}
    for name, parameter in base_parameters(model, remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {names[0]: names[1:] for names in by_id.values()}


class StoredTensor(NamedTuple):
    """A tensor on disk."""

    name: str
    file: Path
    numel: int


class StoredParameter(NamedTuple):
    """Where the values of one parameter of a model lie on disk."""

    tensors: tuple[StoredTensor, ...]
    """Their flattened values, one after another, are the parameter's; one but of fused experts."""
    shape: tuple[int, ...]


def stored_parameters(model: nn.Module, folder: Path) -> dict[str, StoredParameter]:
    """Where every parameter of the model (tied ones once) is stored in a Hugging Face folder.

    Raises:
        ConfigError: a parameter has no tensor, or one of another shape than the model's. (Shapes of
            a sharded model are those of its whole parameters.)
    """
    files = weight_files(folder)
    names = match_names(model, files, folder)
    shapes = tensor_shapes(files)
    found = {}
    for name, parameter in base_parameters(model):
        expected = whole_shape(parameter)
        tensors = names[name]
        stored = StoredParameter(
            tuple(StoredTensor(each, files[each], math.prod(shapes[each])) for each in tensors),
            _stacked_shape([shapes[each] for each in tensors], expected[:1]),
        )
        if stored.shape != expected:
            raise ConfigError(
                f"{folder}: tensor {tensors[0]!r} has shape {stored.shape}, the architecture in "
                f"config.json expects {expected}: the files do not belong together"
            )
        found[name] = stored
    return found


def _stacked_shape(shapes: list[tuple[int, ...]], count: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor, or of `count` equal stacks of matrices; else that of a flat row."""
    if len(shapes) == 1:
        return shapes[0]
    height = len(shapes) // max(1, *count)
    stacks = [shapes[i : i + height] for i in range(0, len(shapes), max(1, height))]
    rows = {sum(shape[0] for shape in stack) for stack in stacks}
    widths = {shape[1:] for shape in shapes}
    if (len(stacks),) != count or len(rows) > 1 or len(widths) > 1:
        return (sum(map(math.prod, shapes)),)
    return (len(stacks), *rows, *widths.pop())


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, also where this rank holds a shard of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3's own shape is empty


class Shard(NamedTuple):
    """This rank's part of a parameter: neighbours in the flattened whole."""

    first: int
    """Flat index of its first element."""
    values: Tensor
    """[n] the elements, a view of the storage; n may be 0."""


ShardOf = Callable[[nn.Parameter], Shard]
"""How an engine finds this rank's part of a parameter."""


@torch.no_grad()
def fill_shards(parameters: list[tuple[nn.Parameter, StoredParameter]], shard_of: ShardOf) -> None:
    """Reads this rank's shard of each parameter from its place on disk, and nothing else."""
    shards = [shard_of(parameter) for parameter, _ in parameters]
    requests = [
        (place, shard.first, shard.first + shard.values.numel())
        for shard, (_, place) in zip(shards, parameters, strict=True)
    ]
    for shard, flat in zip(shards, read_flat_slices(requests), strict=True):
        shard.values.copy_(flat)


def load_shards(model: nn.Module, folder: Path, shard_of: ShardOf) -> None:
    """Reads this rank's shard of every parameter of the model from a Hugging Face folder.

    Raises:
        ConfigError: the weights do not fit the model.
    """
    parameters = dict(base_parameters(model))
    places = stored_parameters(model, folder)
    fill_shards([(parameters[name], place) for name, place in places.items()], shard_of)


def first_not_finite(model: nn.Module, shard_of: ShardOf) -> str | None:
    """Name of a parameter with a non-finite value in its shard, or None. No collectives."""
    named = model.named_parameters()
    return next((name for name, p in named if not shard_of(p).values.isfinite().all()), None)


@torch.no_grad()
def fill_adapters(model: nn.Module, values: AdapterValues, shard_of: ShardOf) -> None:
    """Sets this rank's part of every adapter weight in the model. Collectives: none.

    Raises:
        ConfigError: as `AdapterValues`.
    """
    for adapter in values.adapters:
        for name, parameter in adapter_parameters(model, adapter):
            whole = values(name, whole_shape(parameter), adapter)
            if whole is not None:
                shard = shard_of(parameter)
                own = slice(shard.first, shard.first + shard.values.numel())
                shard.values.copy_(whole.reshape(-1)[own])


def whole_shard(parameter: nn.Parameter) -> Shard:
    """The one shard of a parameter that is whole on this rank."""
    return Shard(0, parameter.detach().view(-1))


def fingerprint(
    model: nn.Module, shard_of: ShardOf, ranks: Ranks, adapters: Sequence[str] = ()
) -> str:
    """Fingerprint from every rank's shards. Collectives: one SUM of 16 bytes a parameter."""
    entries = list(weights_with(model, adapters))
    sums = torch.zeros(len(entries), 2, dtype=torch.int64, device=ranks.device)
    for index, (_, parameter) in enumerate(entries):
        shard = shard_of(parameter)
        # Adapters that an engine has yet to shard are whole on every rank: one counts.
        if shard.values.numel() < math.prod(whole_shape(parameter)) or ranks.is_main:
            sums[index] = checksum(shard.values, shard.first).to(ranks.device)
    sums = ranks.sum_(sums).cpu()
    return digest((name, whole_shape(p), sums[i]) for i, (name, p) in enumerate(entries))


class StoredHead(NamedTuple):
    """Where the language-model head of a Hugging Face folder is stored."""

    weight: StoredParameter
    bias: StoredParameter | None
    softcap: float | None
    scale: float
    """See `types.Head`."""

    @property
    def parameters(self) -> list[StoredParameter]:
        """The weight and, where there is one, the bias."""
        return [place for place in self[:2] if place is not None]


def stored_head(folder: Path) -> StoredHead:
    """Where the head is stored; the embedding's place where the two are tied.

    Raises:
        ConfigError: the folder holds no causal language model, or not all of its weights.
    """
    model = _without_values(folder)
    head = head_of(model)
    stored = stored_parameters(model, folder)
    by_id = {id(parameter): stored[name] for name, parameter in model.named_parameters()}
    bias = None if head.bias is None else by_id[id(head.bias)]
    return StoredHead(by_id[id(head.weight)], bias, head.softcap, head.scale)


def weights_fingerprint(folder: Path, ranks: Ranks) -> str:
    """The value of `Backend.fingerprint` for the model in a folder, computed from its files.

    Each rank reads its share of every tensor, one at a time; no model is built in memory.

    Raises:
        ConfigError: the folder holds no causal language model, or not all of its weights.
    Collectives: one gather of texts, one SUM of 16 bytes a parameter.
    """
    with ranks.together():
        stored = stored_parameters(_without_values(folder), folder)
        shares = [_share_of(place, ranks) for place in stored.values()]
        sums = torch.zeros(len(stored), 2, dtype=torch.int64, device=ranks.device)
        pieces = read_flat_slices(shares)
        bar = progress_bar(
            pieces, desc="fingerprint", total=len(shares), unit=" tensors", shown=ranks.is_main
        )
        for index, flat in enumerate(bar):
            sums[index] = checksum(flat.to(ranks.device), start=shares[index][1])
    sums = ranks.sum_(sums).cpu()
    return digest((name, place.shape, sums[i]) for i, (name, place) in enumerate(stored.items()))


def _share_of(place: StoredParameter, ranks: Ranks) -> tuple[StoredParameter, int, int]:
    """A request for `read_flat_slices`: this rank's slice of the parameter, maybe empty."""
    numel = math.prod(place.shape)
    size = -(-numel // ranks.world_size)
    first = min(ranks.rank * size, numel)
    return place, first, min(first + size, numel)


def _without_values(folder: Path) -> nn.Module:
    """The model of a folder on the meta device: names, shapes and ties, no memory."""
    architecture = read_architecture(folder)
    with torch.device("meta"):
        return build_model(architecture)


def read_flat_slices(requests: list[tuple[StoredParameter, int, int]]) -> Iterator[Tensor]:
    """Yields a 1-D tensor for each request (parameter, first, last) of flat elements.

    Reads only the rows of the files that hold the elements, one request at a time.
    """
    with ExitStack() as stack:
        handles: dict[Path, object] = {}
        for place, first, last in requests:
            parts, start = [], 0
            for name, path, numel in place.tensors:
                begin, end = max(first - start, 0), min(last - start, numel)
                start += numel
                if begin >= end:
                    continue
                if path not in handles:
                    handles[path] = stack.enter_context(safe_open(path, framework="pt"))
                parts.append(_read_flat(handles[path], name, begin, end))
            yield parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)


def _read_flat(handle: object, name: str, first: int, last: int) -> Tensor:
    view = handle.get_slice(name)  # type: ignore[attr-defined]
    shape = view.get_shape()
    if len(shape) == 0:
        return handle.get_tensor(name).reshape(1)[first:last]  # type: ignore[attr-defined]
    width = 1
    for size in shape[1:]:
        width *= size
    row_first, row_last = first // width, -(-last // width)
    rows = view[row_first:row_last].reshape(-1)
    return rows[first - row_first * width : last - row_first * width]


def tensor_shapes(files: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the files, read from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        shapes.update(_headers(path))
    return shapes


def _headers(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except (OSError, ValueError, SafetensorError) as err:
        raise ConfigError(
            f"{path} cannot be read as safetensors ({err}): save or download the model again"
        ) from err


def dtype_of(precision: str) -> torch.dtype:
    """torch dtype of `bf16` or `fp32`."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
