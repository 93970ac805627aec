"""Other libraries' checkpoint files are pickles: read here, and here only, without running code.

`torch.load(weights_only=True)` builds tensors, plain values and the classes of the list below, and
calls nothing else. The list is what the checkpoints of deepspeed 0.19 (ZeRO 1, 2 and 3) and of
torch.distributed.checkpoint hold, none of which does anything when it is built.
"""

import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from safereg_dist.errors import CheckpointError, reason_of

_OF_DEEPSPEED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
_METADATA = "torch.distributed.checkpoint.metadata"
_OF_METADATA = frozenset(
    {
        *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
        *((_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties")),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16")),
        *(("torch", name) for name in ("int64", "int32", "int16", "int8", "uint8", "bool")),
        *(("pathlib", name) for name in ("PosixPath", "Path")),
    }
)
_load = torch.load


def load_tensors(file: Any, **options: Any) -> Any:
    """What `torch.save` wrote to a file; never anything but tensors, values and listed classes.

    `options` are those of `torch.load`.

    Raises:
        CheckpointError: the file asks for another class or function, or cannot be read.
    """
    # deepspeed's are there where deepspeed is: without it nothing needs them.
    listed: list[Any] = [
        getattr(sys.modules[m], name) for m, name in _OF_DEEPSPEED if m in sys.modules
    ]
    listed.append((_enum_member, "builtins.getattr"))
    try:
        with torch.serialization.safe_globals(listed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol: it is read, or refused here
            return _load(file, **{**options, "weights_only": True})
    except Exception as err:  # a pickle that is cut or changed raises whatever it likes
        raise _refused(file, err) from err


@contextmanager
def only_tensors() -> Iterator[None]:
    """A block in which `torch.load` is `load_tensors`, in other libraries' code too."""
    torch.load = load_tensors
    try:
        yield
    finally:
        torch.load = _load


class MetadataReader(FileSystemReader):
    """torch.distributed.checkpoint's reader of files, whose metadata holds listed classes only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of a checkpoint.

        Raises:
            CheckpointError: it asks for another class or function, or cannot be read.
        """
        metadata = read_metadata(Path(self.path) / ".metadata")
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` of a checkpoint of torch.distributed.checkpoint.

    Raises:
        CheckpointError: it asks for another class or function, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            found = _MetadataUnpickler(file).load()
    except Exception as err:  # as above
        raise _refused(path, err) from err
    if not isinstance(found, Metadata) or found.storage_meta is None:
        raise _refused(path, ValueError(f"{type(found).__name__} in place of Metadata"))
    return found


def check_file(path: Path) -> None:
    """Reads a pickled file as loading it would, but without the tensors' values.

    Files of other kinds are not looked at.

    Raises:
        CheckpointError: as `load_tensors`.
    """
    if path.suffix == ".pt":
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # else a plain pickle, which cannot be mapped
        load_tensors(path, map_location="meta", mmap=is_zip)
    elif path.name == ".metadata":
        read_metadata(path)


def _enum_member(listed: Any, name: str) -> Any:
    """In place of `getattr`, by which Python before 3.11.4 pickles the member of an enumeration."""
    if not (isinstance(listed, type) and issubclass(listed, Enum)):
        raise pickle.UnpicklingError("GLOBAL builtins.getattr is not allowed here")
    return listed[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) not in _OF_METADATA:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return super().find_class(module, name)


def _refused(file: Any, err: Exception) -> CheckpointError:
    asked = re.search(r"(?:GLOBAL|class) ([\w.]{1,100})", str(err))
    if asked:
        reason = f"it asks for {asked[1]}; nothing of it was run"
    else:
        said = str(err).rpartition("WeightsUnpickler error:")[2].strip()
        reason = reason_of(ValueError(said), 100) or type(err).__name__
    where = file if isinstance(file, str | Path) else "a part of the checkpoint"
    return CheckpointError(
        f"expected tensors and plain values in {where}, got: {reason}: do not use this file"
    )
