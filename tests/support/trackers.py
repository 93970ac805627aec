"""What trackers have written, read back."""

import json
import struct
from pathlib import Path
from typing import Any


def wandb_records(path: Path) -> list[Any]:
    """The records of a .wandb file, parsed by W&B's own classes.

    They stand in LevelDB's log format behind a header of 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in _log_entries(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The rows of the history of a .wandb file; the step is `_step`."""
    return [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def _log_entries(data: bytes):
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""
