"""The wheel of `safereg-kernels` from kernels/; that of `safereg-dist` is in launch/test_wheel.py.

Exact. Wheels are built from copies, so that nothing is left behind here, without an index.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.wheels import LEFTOVERS, ROOT, build, needs

import safereg_dist


@pytest.fixture
def kernels(tmp_path) -> Path:
    return Path(shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=LEFTOVERS))


def test_kernels_wheel_is_the_kernel_package_and_nothing_else(kernels, tmp_path):
    built = build(kernels, tmp_path / "out")
    wheel = zipfile.ZipFile(built)
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"safereg_kernels", next(top for top in tops if top.endswith(".dist-info"))}
    packed = {name for name in wheel.namelist() if name.startswith("safereg_kernels/")}
    source = ROOT / "kernels" / "safereg_kernels"
    names = {path.name for path in [*source.glob("*.py"), source / "py.typed"]}
    assert packed == {f"safereg_kernels/{name}" for name in names}
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    run = [need for need in needs(built) if "extra ==" not in need]
    assert run == ["torch>=2.11", 'triton>=3.6; platform_system == "Linux"']


def test_editable_kernels_put_nothing_else_on_the_path(kernels, tmp_path):
    """The folder's name is that of Hugging Face's package, and it holds `tests` and `hub.py`."""
    site = tmp_path / "site"
    zipfile.ZipFile(build(kernels, tmp_path / "out", "editable")).extractall(site)
    code = (
        "import site, sys; from importlib.util import find_spec; site.addsitedir(sys.argv[1]);"
        "print([find_spec(n) and find_spec(n).origin for n in"
        " ('safereg_kernels', 'kernels', 'tests', 'hub')])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code, str(site)],
        cwd=tmp_path,
        env={"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    origin = str(kernels / "safereg_kernels" / "__init__.py")
    assert done.stdout.strip() == str([origin, None, None, None]), done.stderr


def test_the_page_of_stability_has_every_public_name():
    page = (ROOT / "docs" / "stability.md").read_text()
    listed = re.search(r"^      (ReferenceModel [^:]*?)\n\n", page, re.MULTILINE)
    assert sorted(listed[1].split()) == sorted({*safereg_dist.__all__} - {"__version__"})
    for module, name in (
        ("trainer", "SafeRegTrainer"),
        ("trainer", "SafeRegMixin"),
        ("trl", "SafeRegSFTTrainer"),
        ("anchors", "with_anchors"),
        ("collator", "RowCollator"),
        ("axolotl", "SafeRegPlugin"),
        ("llamafactory", "main"),
        ("megatron.safety", "MegatronSafety"),
    ):
        source = ROOT / "safereg_dist" / "integrations" / f"{module.replace('.', '/')}.py"
        assert f"`{name}`" in page
        assert re.search(rf"^(class|def) {name}\b", source.read_text(), re.MULTILINE)


def test_one_version():
    """setup.py reads that of the package, and CITATION.cff agrees."""
    assert safereg_dist.__version__ not in (ROOT / "setup.py").read_text()
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited[1].strip("\"'") == safereg_dist.__version__
