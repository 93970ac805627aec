"""The demo's further arms: the same run with other sources of risk, judged by the world's guard."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safereg_dist.errors import CriticUnavailable

FORMAT = "llama_guard"

ESTIMATOR_ARMS = ("adaptive_column", "adaptive_critic", "adaptive_max")


class ServedGuard(NamedTuple):
    """A running judge server."""

    model: str
    endpoint: str


@contextmanager
def served_guard(guard: Path) -> Iterator[ServedGuard]:
    """The guard behind an endpoint of this machine, for as long as the context lasts.

    Raises:
        CriticUnavailable: the server ended without saying where it listens.
    """
    words = ["serve-critic", "--model", str(guard), "--format", FORMAT, "--port", "0"]
    print(f"$ safereg {shlex.join(words)} &", flush=True)
    command = [sys.executable, "-m", "safereg_dist", *words]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            yield _where_it_listens(server)
        finally:
            server.terminate()


def _where_it_listens(server: subprocess.Popen) -> ServedGuard:
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.match(r"serving (.+) on (http://\S+)", line):
            print(line, end="", flush=True)
            return ServedGuard(*found.groups())
    raise CriticUnavailable(
        "expected `serving MODEL on URL` from `safereg serve-critic`, but it ended with status "
        f"{server.wait()}: see its message above"
    )


def estimator_overrides(served: ServedGuard, *, scored: Path, probe: Path) -> dict[str, list[str]]:
    """What each of `ESTIMATOR_ARMS` changes in the adaptive arm's configuration.

    Args:
        scored: the training rows with the guard's `risk`, from `safereg score`.
    """
    judge = {"endpoint": served.endpoint, "model": served.model, "format": FORMAT, "cache": "none"}
    parts = [
        {"category": "probe", "estimator": "probe", "path": str(probe)},
        {"category": "judge", "estimator": "critic", "critic": judge},
    ]
    return {
        "adaptive_column": [f"data.train={scored}", "risk.estimator=column", "risk.path=null"],
        "adaptive_critic": [
            "risk.estimator=critic",
            "risk.path=null",
            f"risk.critic={json.dumps(judge)}",
        ],
        "adaptive_max": [
            *("risk.estimator=max", "risk.path=null"),
            f"risk.parts={json.dumps(parts)}",  # JSON is YAML
        ],
    }
