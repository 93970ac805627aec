"""Which versions of the libraries a run was made with."""

from importlib.metadata import PackageNotFoundError, version


def versions_of(*names: str) -> dict[str, str]:
    """Package -> its version; `unknown` where its metadata is missing (run from a source tree)."""
    return {name: _version_of(name) for name in names}


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
