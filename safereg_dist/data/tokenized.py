"""Rows of a data file, tokenised once and cached."""

import fcntl
import hashlib
import hmac
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from safereg_dist.config import DataConfig
from safereg_dist.data.chat_template import failures_named, limited_time, rendered
from safereg_dist.data.files import read_rows
from safereg_dist.data.formats import Conversation, conversation_of
from safereg_dist.errors import ConfigError, DataError, reason_of
from safereg_dist.models.fingerprint import prompt_key
from safereg_dist.screen.progress import progress_bar
from safereg_dist.storage.seal import cache_folder, keyed, user_key
from safereg_dist.types import Row

_GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")

_FORMAT = "6"  # part of the cache key: raise it when the tokenised form changes

_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("int8")),
        "prompt_ends": datasets.List(datasets.Value("int32")),
        "risk": datasets.Value("float64"),
        "prompt_key": datasets.Value("string"),
        "messages_json": datasets.Value("large_string"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedDataset:
    """Tokenised rows of a data file, or of several, memory-mapped."""

    table: datasets.Dataset
    overlong: int
    """Rows longer than `data.max_length` (dropped or truncated, as configured)."""
    dropped: int
    """Rows left out: overlong ones, or ones whose response did not survive truncation."""
    content_hash: str
    """SHA-256 (hex) of the data files and of everything that their tokens depend on."""

    def __len__(self) -> int:
        return len(self.table)

    def prompts(self) -> dict[str, str]:
        """Text of every row by its id, without the assistant's turns."""
        found = {}
        for name, messages in zip(self.table["id"], self.table["messages_json"], strict=True):
            said = (m["content"] for m in json.loads(messages) if m["role"] != "assistant")
            found[name] = "\n".join(said)
        return found

    def row(self, index: int, *, is_anchor: bool = False) -> Row:
        """Row `index`, read from the memory map."""
        stored = self.table[index]
        if math.isnan(stored["risk"]):  # the table stores a missing risk as nan
            stored["risk"] = None
        return Row(**stored, is_anchor=is_anchor)


def read_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer as it is.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as err:  # its files are read by many hands
        raise ConfigError(
            f"no tokenizer could be loaded from {model} ({reason_of(err)}): save one there, with "
            "save_pretrained of transformers, or check the name"
        ) from err


def load_tokenizer(model: str, config: DataConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a chat template and a padding token.

    Raises:
        ConfigError: no tokenizer, no chat template, or no token that can pad.
    """
    tokenizer = read_tokenizer(model)
    if config.chat_template is not None:
        path = Path(config.chat_template)
        if not path.is_file():
            raise ConfigError(f"expected a Jinja file at data.chat_template={path}, found none")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(
                f"data.chat_template={path} cannot be read: {reason_of(err)}"
            ) from err
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer of {model} has no chat template: set data.chat_template to a Jinja file"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer of {model} has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_rows(
    path: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, progress: bool
) -> TokenizedDataset:
    """The rows of a JSONL or CSV file or a Hugging Face dataset id, tokenised once and cached.

    The cache is in $SAFEREG_CACHE (default ~/.cache/safereg), keyed by the content of the file and
    everything that its tokens depend on; a new entry is written aside and renamed. An entry whose
    seal does not hold is made again, and that is said.

    Raises:
        DataError: a row that cannot be used; the message names file and line.
        ConfigError: there is no key to seal with (`seal.user_key`).
    """
    key = _cache_key(path, tokenizer, config)
    root = cache_folder() / "rows"
    folder = root / key
    counts = _believed_counts(folder)
    if counts is None:
        if folder.exists():
            print(
                f"safereg: the tokenised rows of {path} in {folder} do not carry the seal of this "
                "user's key (changed, damaged, or written by another user or an earlier version): "
                "they are made again",
                file=sys.stderr,
                flush=True,
            )
        try:
            _fill_cache(folder, path, tokenizer, config, progress=progress)
        except OSError as err:
            raise DataError(
                f"the tokenised rows of {path} could not be written below {root} "
                f"({reason_of(err)}): free disk space, or set SAFEREG_CACHE to a folder that can "
                "be written"
            ) from err
        counts = _believed_counts(folder)
    if counts is None:
        raise DataError(
            f"the tokenised rows in {folder} have changed as soon as they were written: another "
            "program writes there, or the disk loses data; set SAFEREG_CACHE to another folder"
        )
    if counts["kept"] == 0:
        raise DataError(
            f"{path} has no usable row ({counts['dropped']} dropped, {counts['overlong']} longer "
            f"than data.max_length={config.max_length}): raise data.max_length or check the file"
        )
    table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    return TokenizedDataset(
        table=table, overlong=counts["overlong"], dropped=counts["dropped"], content_hash=key
    )


def joined(stores: Mapping[str, TokenizedDataset]) -> TokenizedDataset:
    """The rows of several data sets, by path, one after the other; of one, itself.

    Raises:
        DataError: an id occurs in two of them: ledger and `risk.override` name rows by it.
    """
    if len(stores) == 1:
        return next(iter(stores.values()))
    first: dict[str, str] = {}
    for path, store in stores.items():
        for name in store.table["id"]:
            if first.setdefault(name, path) != path:
                raise DataError(
                    f"id {name!r} occurs in {first[name]} and in {path}: ids must be unique over "
                    "all of data.train; give the rows an `id`, or rename a file (rows without one "
                    "are named after their file)"
                )
    every = list(stores.values())
    return TokenizedDataset(
        table=datasets.concatenate_datasets([store.table for store in every]),
        overlong=sum(store.overlong for store in every),
        dropped=sum(store.dropped for store in every),
        content_hash=hashlib.sha256("".join(s.content_hash for s in every).encode()).hexdigest(),
    )


def _fill_cache(
    folder: Path,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    progress: bool,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Nodes may share the cache and process ids may coincide, so the name is unique.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
    try:
        counts = _write_rows(path, tokenizer, config, partial, progress=progress)
        sealed = {**counts, "seal": _entry_seal(partial, folder.name, counts).hex()}
        (partial / "counts.json").write_text(json.dumps(sealed), encoding="utf-8")
        with _alone_in(folder.parent):
            if _believed_counts(folder) is None:  # else another run was faster
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process of all that use the folder; a lock ends with the process that holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: then two must not mend at once
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _believed_counts(folder: Path) -> dict[str, int] | None:
    """The counts of an entry, after all its bytes were read; None unless its seal holds.

    Costs one SHA-256 of the rows (1 GB/s on a core), as the data file itself does for the key.
    """
    try:
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        found = bytes.fromhex(counts.pop("seal"))
        seal = _entry_seal(folder, folder.name, counts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return counts if hmac.compare_digest(found, seal) else None


def _entry_seal(folder: Path, key: str, counts: dict[str, int]) -> bytes:
    """The seal of an entry in `folder`: over its name `key`, its counts and all its rows."""
    with (folder / "rows.arrow").open("rb") as file:
        rows = hashlib.file_digest(file, "sha256").digest()
    return keyed(user_key(), key.encode(), json.dumps(counts, sort_keys=True).encode(), rows)


def _cache_key(path: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    hasher = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    parts = [
        _FORMAT,
        Path(path).name,  # rows without an id are named after the file
        config.max_length,
        config.overlong,
        tokenizer.chat_template,
        tokenizer.all_special_ids,
        vocabulary,
    ]
    hasher.update(json.dumps(parts).encode())
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
    else:
        hasher.update(path.encode())
    return hasher.hexdigest()


def source_rows(path: str, *, streaming: bool = False) -> Iterator[tuple[str, dict]]:
    """Yields (place, row) of a file or a Hugging Face dataset id, in order.

    A file is read line by line; a data set is downloaded whole unless `streaming`.

    Raises:
        DataError: neither of them, or a line that is no row.
    """
    if Path(path).suffix in (".jsonl", ".json", ".csv") or Path(path).exists():
        yield from read_rows(path)
        return
    try:
        table = datasets.load_dataset(path, split="train", streaming=streaming)
    except (OSError, ValueError) as err:  # a data set that is not found is an OSError
        raise DataError(
            f"{path} is neither a file nor a Hugging Face dataset that loads ({reason_of(err)}): "
            "check the path"
        ) from err
    for index, row in enumerate(table):
        yield f"{path}[{index}]", dict(row)  # type: ignore[call-overload]


def _write_rows(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    folder: Path,
    *,
    progress: bool,
) -> dict[str, int]:
    """Writes `rows.arrow`; how many rows were kept, too long, and left out."""
    kept = overlong = dropped = 0
    seen: set[str] = set()
    bar = progress_bar(desc=f"tokenise {Path(path).name}", unit=" rows", shown=progress)
    with bar, ArrowWriter(path=str(folder / "rows.arrow"), features=_FEATURES) as writer:
        for index, (where, raw) in enumerate(source_rows(path)):
            row = tokenize_row(raw, where, tokenizer, default_id=f"{Path(path).stem}-{index}")
            if row.id in seen:
                raise DataError(f"{where}: id {row.id!r} occurs twice: ids must be unique")
            seen.add(row.id)
            if len(row.input_ids) > config.max_length:
                overlong += 1
                row = shorten(row, where, config)
            bar.update()
            if row is None:
                dropped += 1
                continue
            kept += 1
            stored = {name: getattr(row, name) for name in _FEATURES}
            writer.write({**stored, "risk": math.nan if row.risk is None else row.risk})
        writer.finalize()
    return {"kept": kept, "overlong": overlong, "dropped": dropped}


def shorten(row: Row, where: str, config: DataConfig) -> Row | None:
    """A row that is too long, cut to `data.max_length`; None where `data.overlong` leaves it out.

    Raises:
        DataError: `data.overlong` is `error`.
    """
    if config.overlong == "error":
        raise DataError(
            f"{where}: {len(row.input_ids)} tokens, more than data.max_length={config.max_length}: "
            "raise it, or set data.overlong=drop or truncate"
        )
    if config.overlong == "drop":
        return None
    limit = config.max_length
    if not any(row.loss_mask[:limit]):
        return None  # nothing of the response is left
    prompt_ends = [end for end in row.prompt_ends if end < limit]
    return replace(
        row,
        input_ids=row.input_ids[:limit],
        loss_mask=row.loss_mask[:limit],
        prompt_ends=prompt_ends,
        prompt_key=prompt_key(row.input_ids, prompt_ends),  # the risk of what is left
    )


def tokenize_row(
    raw: dict, where: str, tokenizer: PreTrainedTokenizerBase, *, default_id: str
) -> Row:
    """One raw row as tokens, with the loss on the assistant's turns, end-of-turn token included.

    The turns are those that `formats.FORMATS` reads and that the row does not take out.

    Raises:
        DataError: no conversation (see `formats.conversation_of`), a risk outside [0, 1], or one
            that the chat template refuses or leaves tools out of; the message begins with `where`.
    """
    conversation = conversation_of(raw, where)
    _check_tools(conversation, where, tokenizer)
    with failures_named(where):
        input_ids, loss_mask = _mask_by_template(conversation, where, tokenizer)
        if not any(loss_mask):
            input_ids, loss_mask = _mask_by_prefix(conversation, where, tokenizer)
    loss_mask[:1] = [0]  # nothing comes before the first token to predict it from
    prompt_ends = [t for t in range(1, len(loss_mask)) if loss_mask[t] and not loss_mask[t - 1]]
    if not prompt_ends:
        raise DataError(f"{where}: the response is empty or has no prompt before it")
    return Row(
        id=default_id if raw.get("id") in (None, "") else str(raw["id"]),
        input_ids=input_ids,
        loss_mask=loss_mask,
        prompt_ends=prompt_ends,
        risk=_risk(raw, where),
        prompt_key=prompt_key(input_ids, prompt_ends),
        messages_json=json.dumps(conversation.as_text()),
    )


def _check_tools(
    conversation: Conversation, where: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises DataError where the template would leave out what the row has of tools, unasked."""
    template = _template(conversation, tokenizer)
    calls = any("tool_calls" in message for message in conversation.messages)
    for name, is_used in {"tools": conversation.tools, "tool_calls": calls}.items():
        if is_used and isinstance(template, str) and not re.search(rf"\b{name}\b", template):
            raise DataError(
                f"{where}: the row has `{name}`, which the chat template does not write: set "
                "data.chat_template to one that does, or remove them"
            )


def _template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The template for this conversation; a tokenizer may have one for tools beside its default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        name = "tool_use" if conversation.tools and "tool_use" in templates else "default"
        return templates.get(name)
    return templates


def _risk(raw: dict, where: str) -> float | None:
    value = raw.get("risk")
    if value is None:
        return None
    try:
        risk = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        risk = math.nan
    if not 0 <= risk <= 1:
        raise DataError(f"{where}: risk must be a number in [0, 1], got {value!r}")
    return risk


def _mask_by_template(
    conversation: Conversation, where: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokens and mask from the template's generation block; an all-zero mask where it has none."""
    template = _template(conversation, tokenizer)
    if not isinstance(template, str) or not _GENERATION_BLOCK.search(template):
        return [], []
    rendered(tokenizer, conversation.messages, where, tools=conversation.tools)  # within bounds
    with limited_time():
        encoded: Any = tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,  # type: ignore[arg-type]
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    mask = [int(m) for m in encoded["assistant_masks"]]
    return list(encoded["input_ids"]), _without_untrained(mask, conversation, where)


def _without_untrained(mask: list[int], conversation: Conversation, where: str) -> list[int]:
    """The mask without the runs of ones of those assistant turns that are not trained."""
    roles = [message["role"] for message in conversation.messages]
    wanted = [
        is_trained
        for role, is_trained in zip(roles, conversation.is_trained, strict=True)
        if role == "assistant"
    ]
    if all(wanted) or not any(mask):
        return mask
    run = list(accumulate(int(now > before) for before, now in pairwise([0, *mask])))
    if run[-1] != len(wanted):
        raise DataError(
            f"{where}: the template's generation blocks mark {run[-1]} stretches of "
            f"{len(wanted)} assistant turns, so `train` or `weight` of one cannot be followed: "
            "remove them, or put one generation block around each turn (data.chat_template)"
        )
    return [int(m and wanted[turn - 1]) for m, turn in zip(mask, run, strict=True)]


def _mask_by_prefix(
    conversation: Conversation, where: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokens and mask found turn by turn: what a turn adds after the generation prompt."""
    full = _render(conversation, where, tokenizer)
    mask = [0] * len(full)
    for turn, is_trained in enumerate(conversation.is_trained):
        if not is_trained:
            continue
        before = _render(conversation, where, tokenizer, turns=turn, generation=True)
        after = _render(conversation, where, tokenizer, turns=turn + 1)
        if after[: len(before)] != before or full[: len(after)] != after:
            raise DataError(
                f"{where}: the chat template changes earlier tokens when turn {turn} is added, so "
                "the response cannot be found: add a generation block to the template "
                "(data.chat_template)"
            )
        end = _end_of_turn(after, len(before), tokenizer)
        mask[len(before) : end] = [1] * (end - len(before))
    return full, mask


def _end_of_turn(tokens: list[int], begin: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """One past the turn's last special token; template text after it is not part of the answer."""
    unknown: Any = tokenizer.unk_token_id  # stands for a word
    special = set(tokenizer.all_special_ids) - {unknown}
    last = max((t for t in range(begin, len(tokens)) if tokens[t] in special), default=None)
    return len(tokens) if last is None else last + 1


def _render(
    conversation: Conversation,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    turns: int | None = None,
    generation: bool = False,
) -> list[int]:
    # As a batch of one: a single conversation must not be empty, the prefix of a first turn is.
    batch: Any = [conversation.messages[:turns]]
    how = {"tools": conversation.tools, "add_generation_prompt": generation}
    [text] = rendered(tokenizer, batch, where, **how)
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])
