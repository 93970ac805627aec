"""A lock of a run folder: one run writes to it, on whatever host that runs.

The lock is a file `run.lock.N`, made by an exclusive create, which is atomic on local disks and on
every shared file system. The kernel's own locks are not used: some shared file systems keep them
for each host alone, without a word.

Whether the holder lives is decided in two ways. Where its process would be visible (same boot, same
process namespace), by its id and start time. Elsewhere by its heartbeat: it renews the file's time
every `BEAT_S`; whoever finds the lock watches for `STALE_S`, by its own clock, for a change.

A dead holder's lock is not removed and made again, since two who do so at once may remove each
other's. It is outbid: N + 1 is made exclusively, so that one of them wins, who then removes N. Who
sees any lock beside its own that it has not found dead withdraws.
"""

import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from safereg_dist.errors import CheckpointError
from safereg_dist.storage.json_text import parse_json

BEAT_S = 5.0
STALE_S = 60.0
"""A disk that stalls for a while must not look like a death; only other hosts ever wait for it."""
_LOCK = re.compile(r"run\.lock\.(\d+)")
_LOOK_S = 0.5  # between two looks at another host's lock


def is_lock(path: Path) -> bool:
    """Whether this is the name of a lock file."""
    return _LOCK.fullmatch(path.name) is not None


class Holder(NamedTuple):
    """Who holds the lock of a folder, as far as can be seen from here."""

    name: str
    """Host, process and since when."""
    is_alive: bool
    """By its process where that would be visible, else by its heartbeat."""
    silent_s: float
    """Seconds since its last heartbeat, by the clock of this machine."""


def holder_of(folder: Path) -> Holder | None:
    """Who holds the lock of a folder; None where nobody does. Writes nothing, and does not wait."""
    found = None
    with suppress(OSError):
        for path in sorted(filter(is_lock, folder.iterdir())):
            identity = _holder_of(path.read_text("utf-8", "replace"))
            silent_s = max(0.0, time.time() - path.stat().st_mtime)
            is_here = identity.get("place") == _place()
            is_alive = _runs(identity) if is_here else silent_s <= STALE_S
            if found is None or is_alive:
                found = Holder(_named(identity).removeprefix("another run: "), is_alive, silent_s)
    return found


class RunLock:
    """The lock of one folder, for this process; see the module's text.

    Collectives: none; in a run rank 0 holds it.
    """

    def __init__(self, folder: Path, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self._folder = folder
        self._beat_s = beat_s
        self._stale_s = stale_s
        self._made_folder = False
        self._seen: dict[str, tuple[Any, float]] = {}
        """Of other locks, by name: what was seen of it, and since when it has not changed."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.file: Path | None = None
        """The lock file, while it is held."""
        self.text = ""
        """What it holds: no other lock ever holds the same."""

    @property
    def name(self) -> str:
        """The lock file's; empty while it is not held."""
        return "" if self.file is None else self.file.name

    def take(self) -> bool:
        """True once the lock is held; False if it is not known yet whether another holder lives.

        Call it again then: it returns within a second.

        Raises:
            CheckpointError: another run holds it, or the folder cannot be written.
        """
        try:
            self._made_folder |= not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # a run that gave up has just removed the folder
                others = self._locks()
                if all([self._is_dead(path) for path in others]):
                    return self._outbid(others)
            time.sleep(_LOOK_S)
            return False
        except OSError as err:
            raise CheckpointError(
                f"output_dir {self._folder} cannot be written: {err.strerror or err}: choose "
                "another, or give it back its permissions and free space"
            ) from err

    def release(self) -> None:
        """Gives the lock up; a folder that was made for it and is still empty goes, too."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            if self.file is not None and self._is_own():
                self.file.unlink()
            if self._made_folder:
                self._folder.rmdir()
        self.file = None

    def _locks(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if is_lock(path)]

    def _outbid(self, dead: list[Path]) -> bool:
        """Makes a lock above all dead ones; False if another run was faster, or came between."""
        number = 1 + max((int(path.name.rsplit(".", 1)[1]) for path in dead), default=0)
        file = self._folder / f"run.lock.{number}"
        text = json.dumps(_own_identity())
        try:
            with file.open("x", encoding="utf-8") as sink:
                sink.write(text)
        except FileExistsError:
            return False
        if set(self._locks()) - {file, *dead}:
            file.unlink()
            time.sleep(secrets.randbelow(100) / 1000)  # who withdraws at once should not meet again
            return False
        for path in dead:
            path.unlink(missing_ok=True)
        self.file, self.text = file, text
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        return True

    def _is_dead(self, path: Path) -> bool:
        """True if the holder is gone, False if it is not known yet.

        Raises:
            CheckpointError: it lives.
        """
        try:
            # Opening it asks a file server anew; a mere stat may be answered from a cache.
            with path.open(encoding="utf-8", errors="replace") as file:
                seen = (file.read(), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return False  # released just now
        holder = _holder_of(seen[0])
        if holder.get("place") == _place():
            if not _runs(holder):
                return True
            raise self._in_use(holder)
        now = time.monotonic()
        before, since = self._seen.setdefault(path.name, (seen, now))
        if before == seen:
            if since == now:
                print(
                    f"safereg: {path} is the lock of {_named(holder)}: waiting for up to "
                    f"{self._stale_s:.0f} s to see whether it still runs",
                    file=sys.stderr,
                    flush=True,
                )
            return now - since > self._stale_s
        if holder:
            raise self._in_use(holder)
        self._seen[path.name] = (seen, now)  # it was empty: its holder is about to write it
        return False

    def _in_use(self, holder: Mapping[str, Any]) -> CheckpointError:
        return CheckpointError(
            f"output_dir {self._folder} is in use by {_named(holder)}: wait for its end, stop it, "
            "or choose another output_dir"
        )

    def _beat(self) -> None:
        assert self.file is not None
        while not self._stop.wait(self._beat_s):
            try:
                if self._is_own():
                    os.utime(self.file)
                    continue
            except FileNotFoundError:
                pass
            except OSError:
                continue  # a disk or server that stalls: it may come back
            # This process was stopped for so long that another run took over. It must not write.
            print(
                f"safereg: the lock of {self._folder} was taken over while this process did not "
                "run for a while: another run writes there now, this one ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def _is_own(self) -> bool:
        assert self.file is not None
        return self.file.read_bytes() == self.text.encode()


def _own_identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "place": _place(),
        "started": _start_time(os.getpid()),
        "nonce": secrets.token_hex(16),
    }


def _holder_of(text: str) -> dict[str, Any]:
    """The identity in a lock; empty where it is not written yet, or not by us."""
    with suppress(ValueError):
        found = parse_json(text)
        if isinstance(found, dict):
            return found
    return {}


def _named(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "another run"
    named = (ascii(holder.get(key))[:100].strip("'") for key in ("host", "pid", "since"))
    return "another run: host {}, pid {}, since {}".format(*named)


def _place() -> str:
    """Where process ids mean the same: this boot of this machine, and this namespace of ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(16)  # not known: the heartbeat decides


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty if it is gone or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _runs(holder: Mapping[str, Any]) -> bool:
    """Whether the process of a lock of this place runs; another one may have its id by now."""
    pid = holder.get("pid")
    return isinstance(pid, int) and holder.get("started") == _start_time(pid) != ""
