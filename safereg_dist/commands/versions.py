"""What is installed: the versions that matter."""

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from safereg_dist import __version__
from safereg_dist.models.versions import UNKNOWN, versions_of

_SHOWN = (
    *("torch", "triton", "deepspeed", "transformers", "accelerate", "trl", "peft"),
    "megatron-core",
)


def versions() -> str:
    """The versions of what matters, one a line, `-` where it is not installed; loads none of it."""
    return "\n".join(f"{name:16}{what}" for name, what in _versions())


def _versions() -> Iterator[tuple[str, str]]:
    yield "safereg", __version__
    yield "safereg-kernels", _version_of("safereg-kernels")
    yield "python", sys.version.split()[0]
    for name in _SHOWN:
        yield name, _version_of(name)
        if name == "torch":
            yield "cuda", _cuda()


def _version_of(name: str) -> str:
    found = versions_of(name)[name]
    return "-" if found == UNKNOWN else found


def _cuda() -> str:
    """The CUDA that torch was built with, read from its file: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "-"
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*= '(.+)'", text, re.MULTILINE)
    return "-" if found is None else found[1]
