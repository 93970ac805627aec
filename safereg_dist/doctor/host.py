"""What one host sees of a run that is planned. Over ssh: `python -m safereg_dist.doctor.host`.

It loads no torch: a question is answered in a second. A question and its answer are JSON.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from safereg_dist.models.versions import code_digest, versions_of

PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "safetensors", "datasets", "peft")
SAMPLE_BYTES = 64 << 20
"""Written and synced to learn how long a save takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What to look at."""

    folder: str
    """Where the run's folder is or will be made: an existing folder."""
    nonce: str = ""
    """Name of a file that the asking host has put there."""
    peers: list[str] = field(default_factory=list)
    """Names of all hosts."""
    paths: list[str] = field(default_factory=list)
    """Files and folders that every rank reads."""
    endpoints: list[str] = field(default_factory=list)
    """URLs that every rank asks."""
    port: int = 0
    """Must be free; 0 = not asked."""
    staging: str | None = None
    """Where checkpoints wait to be copied; empty = the temporary folder, None = nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What there is."""

    host: str
    python: str
    versions: dict[str, str]
    code: str
    """Digest of the sources of both packages, as they are imported here."""
    own_address: str
    """What the host's own name resolves to, or why it does not."""
    unknown_peers: dict[str, str]
    """Names of others that do not resolve, or to a loopback address, and what came instead."""
    sees_nonce: bool
    missing: list[str]
    unreachable: dict[str, str]
    port_error: str
    free_bytes: int
    write_bytes_per_s: float
    """0 where nothing can be written."""
    gpu: str
    """Name of the first one, as the driver says it; empty without."""
    staging: str
    """Where checkpoints wait to be copied, or the nearest folder above it; empty = nowhere."""
    staging_free_bytes: int


def answer(question: Question) -> Answer:
    """Looks. Writes `SAMPLE_BYTES` into the folder for a moment."""
    folder = Path(question.folder)
    staging = None
    if question.staging is not None:
        staging = nearest_folder(Path(question.staging or tempfile.gettempdir()).absolute())
    host = socket.gethostname()
    return Answer(
        host=host,
        python=sys.version.split()[0],
        versions=versions_of(*PACKAGES),
        code=code_digest(),
        own_address=_address(host),
        unknown_peers={
            peer: found
            for peer in question.peers
            if peer != host and not leads_elsewhere(found := _address(peer))
        },
        sees_nonce=bool(question.nonce) and (folder / question.nonce).is_file(),
        missing=[lack for path in question.paths if (lack := _lack(Path(path)))],
        unreachable={url: why for url in question.endpoints if (why := _unreachable(url))},
        port_error=_port_error(question.port),
        free_bytes=_free_bytes(folder),
        write_bytes_per_s=_write_rate(folder),
        gpu=_gpu(),
        staging=str(staging or ""),
        staging_free_bytes=_free_bytes(staging) if staging else 0,
    )


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.is_dir())


def _address(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError as err:
        return f"unknown ({err.strerror or err})"


def leads_elsewhere(address: str) -> bool:
    """Whether it is an address, and none that every host takes for its own."""
    return address[:1].isdigit() and not address.startswith("127.")


def _unreachable(url: str) -> str:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5.0).close()
    except OSError as err:
        return str(err)
    return ""


def _port_error(port: int) -> str:
    if not port:
        return ""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store
        try:
            probe.bind(("", port))
        except OSError as err:
            return err.strerror or str(err)
    return ""


def _free_bytes(folder: Path) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _write_rate(folder: Path) -> float:
    path = folder / f".doctor.{socket.gethostname()}.{os.getpid()}"
    block = os.urandom(1 << 20)  # a file system that compresses must not look fast
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(SAMPLE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return SAMPLE_BYTES / (time.perf_counter() - began)
    except OSError:
        return 0.0
    finally:
        path.unlink(missing_ok=True)


def _gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def _lack(path: Path) -> str:
    """What is not there of an input; empty where it is whole."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return str(path)
    is_model = (path / "config.json").is_file()
    has_weights = any(path.glob("*.safetensors"))
    return f"{path}/*.safetensors" if is_model and not has_weights else ""


if __name__ == "__main__":
    print(json.dumps(asdict(answer(Question(**json.load(sys.stdin))))))
