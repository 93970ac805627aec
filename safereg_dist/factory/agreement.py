"""Ranks that start alike: one configuration, one version of everything, the same files and rows.

Hosts that differ would train to the end, each a part of another model. So before any weight is
loaded each rank states facts by name, and the first one that differs from rank 0's is named with
its host.

A file is compared by what the file system says of it (size, inode, times of last change to the
nanosecond). Where all ranks see one and the same file, on one host or on a shared disk, there is
nothing to compare. Copies are hashed in full, since a flipped byte shows in no sample: the ranks
that see the same copy share its blocks among them.
"""

import hashlib
import json
import os
import platform
import socket
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo
from transformers import PreTrainedTokenizerBase

from safereg_dist.config import Config
from safereg_dist.config.section import Section, place_in
from safereg_dist.errors import GroupError
from safereg_dist.models.fingerprint import tokenizer_fingerprint
from safereg_dist.models.versions import code_digest, versions_of
from safereg_dist.parallel.comm import Ranks
from safereg_dist.storage.digests import hashed

BLOCK_BYTES = 256 << 20
"""Of a copied file that one rank hashes at a time."""
_PACKAGES = ("safereg_dist", "torch", "transformers", "deepspeed", "triton", "datasets", "peft")
_SWITCHES = ("SAFEREG_KERNELS", "TRITON_INTERPRET")
"""Environment variables that choose other arithmetic."""
_READ = (".json", ".jsonl", ".csv", ".safetensors", ".model", ".jinja", ".txt")
"""Endings of the files that are read in a folder that the configuration names."""
_STORE_INDEX = "index.json"
"""Of a stored reference: it holds a digest of everything else there, checked on reading."""
_SHOWN = 3
"""Differences, and hosts, that a message names."""


def require_same_setup(config: Config, ranks: Ranks) -> None:
    """Returns where all ranks have the same configuration, versions and code.

    Every key counts, those of saving and logging too: on them hangs which collectives run. Of a
    file the name counts, not the folder: `require_same_inputs` compares what it holds.

    Raises:
        GroupError: they differ; the message names hosts and keys.
    Collectives: one gather of texts.
    """
    if ranks.dp_group is None:
        return
    facts = {
        key: _shortened(Path(value).name if _is_absolute(value, field) else value)
        for key, field, value in _keys(config)
        if key != "output_dir"
    }
    facts |= {f"version of {name}": found for name, found in versions_of(*_PACKAGES).items()}
    facts |= {"version of python": platform.python_version()}
    facts |= {f"variable {name}": os.environ.get(name, "none") for name in _SWITCHES}
    facts["code of safereg"] = code_digest()
    _require_same(facts, ranks, remedy="give all hosts the same configuration and environment")


def require_same_inputs(
    config: Config,
    ranks: Ranks,
    *,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, tuple[str, Sequence[Path]]],
) -> None:
    """Returns where all ranks see the same files: weights, data, probes, adapters, stored states.

    Args:
        model: the folder of the model.
        rows: name -> content hash and files of tokenised rows.
    Raises:
        GroupError: they differ; the message names hosts and files.
    Collectives: two gathers of texts; three where hosts have copies of their own.
    """
    if ranks.dp_group is None:
        return
    with ranks.together():
        files = named_files(config)
        files |= _files_in("model", model)
        for name, (_, paths) in rows.items():
            files |= {f"tokenised rows of {name} ({i})": path for i, path in enumerate(paths)}
        facts = {name: content[:12] for name, (content, _) in rows.items()}
        facts["tokenizer"] = tokenizer_fingerprint(tokenizer)[:12]
    facts |= _file_facts(files, ranks)
    _require_same(
        facts,
        ranks,
        remedy="copy the files anew from one host, or put them on a shared file system (tokenised "
        "rows: remove `rows` in $SAFEREG_CACHE)",
    )


def named_files(config: Config) -> dict[str, Path]:
    """The files that values of the configuration name, and those in folders that they name."""
    found: dict[str, Path] = {}
    for key, field, value in _keys(config):
        if isinstance(value, str) and value and not _is_choice(field) and key != "output_dir":
            path = Path(value)
            if path.is_file():
                found[key] = path
            elif key == "reference.cache":
                found[key] = path / _STORE_INDEX
            elif path.is_dir():
                found |= _files_in(key, path)
    return found


def named_hosts(hosts: Mapping[int, str]) -> str:
    """Ranks with their hosts, for a message: `node2 (ranks 2-3) and node3 (rank 4)`."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank, host in sorted(hosts.items()):
        by_host[host].append(rank)
    shown = [f"{host} ({_ranks(ranks)})" for host, ranks in list(by_host.items())[:_SHOWN]]
    left = len(by_host) - len(shown)
    return " and ".join([*shown, *([f"{left} more hosts"] if left else [])])


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 2-3, 6`."""
    runs = groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])
    spans = [[rank for _, rank in run] for _, run in runs]
    texts = [str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"


def _require_same(facts: dict[str, str], ranks: Ranks, *, remedy: str) -> None:
    """Raises GroupError on all ranks where some rank's facts are not those of rank 0."""
    own = json.dumps([socket.gethostname(), facts])
    everyone = [json.loads(text) for text in ranks.gather_texts(own)]
    first_host, first = everyone[0]
    by_difference: dict[tuple[str, ...], dict[int, str]] = defaultdict(dict)
    for rank, (host, theirs) in enumerate(everyone):
        names = sorted(n for n in first.keys() | theirs.keys() if first.get(n) != theirs.get(n))
        if names:
            by_difference[tuple(names)][rank] = host
    if not by_difference:
        return
    names, hosts = next(iter(by_difference.items()))
    theirs = everyone[next(iter(hosts))][1]
    shown = [
        f"{name} ({theirs.get(name, 'none')}, there {first.get(name, 'none')})"
        for name in names[:_SHOWN]
    ]
    left = len(names) - len(shown)
    what = ", ".join([*shown, *([f"{left} more"] if left else [])])
    raise GroupError(
        f"{named_hosts(hosts)} differs from {first_host} (rank 0) in {what}: expected all hosts to "
        f"start alike; {remedy}"
    )


# ---- configuration and code


def _keys(
    value: Any, prefix: str = "", field: FieldInfo | None = None
) -> Iterator[tuple[str, FieldInfo | None, Any]]:
    """(dotted key, its field, value) of everything in a configuration."""
    if isinstance(value, Section):
        for name, own in type(value).model_fields.items():
            yield from _keys(getattr(value, name), f"{prefix}.{name}", own)
    elif isinstance(value, tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in items:
            yield from _keys(each, f"{prefix}.{name}", field)
    else:
        yield prefix.lstrip("."), field, value


def _is_absolute(value: Any, field: FieldInfo | None) -> bool:
    """Whether it is an absolute path, of a key that names one."""
    return field is not None and place_in(field) is not None and str(value).startswith("/")


def _is_choice(field: FieldInfo | None) -> bool:
    """Whether a key's value is one of a few words."""
    kind = None if field is None else field.annotation
    return any(get_origin(each) is Literal for each in (kind, *get_args(kind)))


def _shortened(value: Any) -> str:
    text = str(value)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return text if len(text) <= 60 else f"{text[:40]}... sha256 {digest}"


# ---- files


class _Identity(NamedTuple):
    """What makes a file the same file; its device has another number on every host."""

    size: int
    inode: int
    changed_ns: int
    """No program can set it, unlike the time of modification."""
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "_Identity":
        found = path.stat()
        return cls(found.st_size, found.st_ino, found.st_ctime_ns, found.st_mtime_ns)


def _files_in(key: str, folder: Path) -> dict[str, Path]:
    paths = (path for path in sorted(folder.iterdir()) if path.suffix in _READ and path.is_file())
    return {f"{key}/{path.name}": path for path in paths}


def _file_facts(files: dict[str, Path], ranks: Ranks) -> dict[str, str]:
    """A fact on each of this rank's files: what it is where all ranks see it, else what is in it.

    Collectives: one gather of texts, a second one where there are copies.
    """
    with ranks.together():
        own = {name: _Identity.of(path) for name, path in files.items() if path.is_file()}
    everyone = [
        {name: _Identity(*values) for name, values in json.loads(text).items()}
        for text in ranks.gather_texts(json.dumps(own))
    ]
    facts = {name: f"{identity.size} bytes" for name, identity in own.items()}
    holders: dict[str, dict[_Identity, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, theirs in enumerate(everyone):
        for name, identity in theirs.items():
            holders[name][identity].append(rank)
    copies = {
        name: by_identity
        for name, by_identity in sorted(holders.items())
        if len(by_identity) > 1 and len({identity.size for identity in by_identity}) == 1
    }
    if not copies:
        return facts
    _announce(copies, ranks)
    with ranks.together():
        hashed = {
            name: _hash_share(files[name], own[name].size, by_identity[own[name]], ranks.rank)
            for name, by_identity in copies.items()
            if name in own
        }
    shares = [json.loads(text) for text in ranks.gather_texts(json.dumps(hashed))]
    for name in hashed:
        blocks: dict[int, str] = {}
        for rank in copies[name][own[name]]:
            blocks |= {int(block): value for block, value in shares[rank][name].items()}
        digest = hashlib.sha256("".join(v for _, v in sorted(blocks.items())).encode())
        facts[name] += f", digest {digest.hexdigest()[:12]}"
    return facts


def _announce(copies: Mapping[str, Mapping[_Identity, object]], ranks: Ranks) -> None:
    total = sum(next(iter(by_identity)).size for by_identity in copies.values())
    if ranks.is_main and total > 4 * BLOCK_BYTES:
        print(
            f"safereg: hosts have files of their own: comparing {total / 1e9:.1f} GB",
            file=sys.stderr,
            flush=True,
        )


def _hash_share(path: Path, size: int, sharers: Sequence[int], rank: int) -> dict[int, str]:
    """SHA-256 (hex) of every n-th block of a file, by its number, where n ranks share it."""
    found = {}
    with path.open("rb") as file:
        for block in range(sharers.index(rank), max(1, -(-size // BLOCK_BYTES)), len(sharers)):
            file.seek(block * BLOCK_BYTES)
            found[block] = hashed(file, BLOCK_BYTES)[0].hexdigest()
    return found
