"""Asking the hosts of a hostfile, over ssh as the deepspeed launcher does."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from safereg_dist.doctor.host import Answer, Question
from safereg_dist.errors import ConfigError, GroupError

K = TypeVar("K")
V = TypeVar("V")
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_TIMEOUT_S = 120.0


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, as deepspeed reads it.

    Raises:
        ConfigError: unreadable, a line that is not `HOST slots=N`, or a host twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as err:
        raise ConfigError(f"--hostfile {path} cannot be read: {err}") from err
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.fullmatch(r"\s*([A-Za-z0-9_.:@][\w.:@-]*)\s+slots=(\d+)\s*(#.*)?", line)
        if found is None or found[1] in hosts:
            raise ConfigError(
                f"{path}:{number}: expected `HOST slots=N`, each host once, got {line[:80]!r}"
            )
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host")
    return hosts


def ask_hosts(hosts: Sequence[str], question: Question) -> dict[str, Answer | str]:
    """Host -> its answer, or one line that says why there is none. All are asked at once."""

    def ask(host: str) -> Answer | str:
        try:
            text = run_on(host, "safereg_dist.doctor.host", given=json.dumps(asdict(question)))
            return Answer(**json.loads(text.splitlines()[-1]))
        except (GroupError, ValueError, TypeError, IndexError) as err:
            return str(err)

    return at_once(ask, hosts)


def measure_links(hosts: Sequence[str]) -> dict[str, float | str]:
    """Host -> bytes/s that it receives from the one before it in the ring, or why none came.

    All links carry data at once, as in a ring of a collective.
    """

    def receive(place: int) -> float | str:
        sender, receiver = hosts[place - 1], hosts[place]
        try:
            with _serving(sender) as (address, port):
                return float(run_on(receiver, "safereg_dist.doctor.link", address, port))
        except (GroupError, ValueError) as err:
            return str(err)

    found = at_once(receive, range(len(hosts)))
    return {hosts[place]: rate for place, rate in found.items()}


class _serving:  # noqa: N801 - a block, not a thing
    """A block in which a host sends bytes to whoever connects."""

    def __init__(self, host: str) -> None:
        self._host = host

    def __enter__(self) -> tuple[str, str]:
        self._process = subprocess.Popen(
            _command(self._host, "safereg_dist.doctor.link", "serve"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        if not port:
            raise GroupError(f"{self._host} opened no port for a transfer")
        return self._host.rpartition("@")[2], port

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def run_on(host: str, module: str, *words: str, given: str = "") -> str:
    """What a module of ours prints on a host, with this Python in this folder.

    Raises:
        GroupError: no answer, in one line.
    """
    try:
        done = subprocess.run(
            _command(host, module, *words),
            input=given,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise GroupError(f"ssh {host}: {err}") from err
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise GroupError(f"ssh {host}: status {done.returncode}: {last[:200]}")
    return done.stdout


def _command(host: str, module: str, *words: str) -> list[str]:
    folder, path = shlex.quote(os.getcwd()), shlex.quote(os.environ.get("PYTHONPATH", ""))
    call = shlex.join([sys.executable, "-m", module, *words])
    return [*_SSH, host, f"cd {folder} && PYTHONPATH={path} {call}"]


def at_once(ask: Callable[[K], V], keys: Sequence[K]) -> dict[K, V]:
    """Key -> result, each in a thread of its own."""
    with ThreadPoolExecutor(len(keys)) as pool:
        return dict(zip(keys, pool.map(ask, keys), strict=True))
