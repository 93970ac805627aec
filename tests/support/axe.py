"""axe-core, which finds what keeps people with assistive technology from reading a page.

Its source is not ours to ship: `npm pack` fetches the pinned release once, into a cache.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from support.browser import Browser

_RELEASE = "axe-core-4.14.1.tgz"
_SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
"""As the npm registry states it (`npm view axe-core@4.14.1 dist.integrity`)."""


def fetch_axe(cache: Path) -> str:
    """The source of axe-core, from the cache or from npm's registry.

    Raises:
        LookupError: it cannot be fetched here; the text says why.
        AssertionError: what came is not the pinned release.
    """
    kept = cache / _RELEASE
    if not kept.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise LookupError("axe-core is fetched with npm, which is not installed")
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            name, version = _RELEASE.removesuffix(".tgz").rsplit("-", 1)
            command = [npm, "pack", f"{name}@{version}", "--silent", "--ignore-scripts"]
            done = subprocess.run(
                command, cwd=aside, capture_output=True, text=True, timeout=120, check=False
            )
            if done.returncode:
                raise LookupError(f"npm cannot fetch axe-core: {done.stderr.strip()[-300:]}")
            Path(aside, _RELEASE).replace(kept)
    found = hashlib.sha512(kept.read_bytes()).digest()
    if base64.b64encode(found).decode() != _SHA512:
        kept.unlink()
        raise AssertionError(f"{_RELEASE} is not the release that is pinned here: fetch it again")
    with tarfile.open(kept) as archive:
        source = archive.extractfile("package/axe.min.js")
        assert source is not None
        return source.read().decode()


def findings(browser: Browser, axe: str) -> dict[str, list[str]]:
    """What axe-core finds in the page that is shown: `impact: rule` to the elements it names."""
    browser.run(axe)
    result: dict[str, Any] = browser.run_async(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document).then(found => done({violations: found.violations,"
        "passes: found.passes.length}), error => done({error: String(error)}));"
    )
    assert "error" not in result, result
    assert result["passes"] > 0  # it has looked
    return {
        f"{rule['impact']}: {rule['id']}": [node["html"] for node in rule["nodes"]]
        for rule in result["violations"]
    }
