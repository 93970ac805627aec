"""Which versions of the libraries, and which code of ours, a run was made with; loads no torch."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

UNKNOWN = "unknown"
"""In place of the version of a package without metadata."""


def versions_of(*names: str) -> dict[str, str]:
    """Package -> its version; `unknown` where its metadata is missing (run from a source tree)."""
    return {name: _version_of(name) for name in names}


def code_digest() -> str:
    """SHA-256 (12 hex digits) of all sources of `safereg_dist` and `safereg_kernels`."""
    import safereg_dist
    import safereg_kernels

    hasher = hashlib.sha256()
    for package in (safereg_dist, safereg_kernels):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            hasher.update(f"{package.__name__}/{path.relative_to(root)}\0".encode())
            hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()[:12]


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return UNKNOWN
