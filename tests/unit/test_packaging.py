"""Two wheels: `safereg-kernels` from kernels/, and `safereg_dist`, which needs it and lacks it.

Exact. Wheels are built from copies, so that nothing is left behind here, without an index.
"""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFTOVERS = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__", "results")


def build(project: Path, out: Path, kind: str = "wheel") -> zipfile.ZipFile:
    """What the project's build backend makes, in `out`."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta as b; b.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


def needs(wheel: zipfile.ZipFile) -> list[str]:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist", [])


@pytest.fixture
def kernels(tmp_path) -> Path:
    return Path(shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=LEFTOVERS))


def test_kernels_wheel_is_the_kernel_package_and_nothing_else(kernels, tmp_path):
    wheel = build(kernels, tmp_path / "out")
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"safereg_kernels", next(top for top in tops if top.endswith(".dist-info"))}
    packed = {name for name in wheel.namelist() if name.startswith("safereg_kernels/")}
    source = ROOT / "kernels" / "safereg_kernels"
    names = {path.name for path in [*source.glob("*.py"), source / "py.typed"]}
    assert packed == {f"safereg_kernels/{name}" for name in names}
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    run = [need for need in needs(wheel) if "extra ==" not in need]
    assert run == ["torch>=2.11", 'triton>=3.6; platform_system == "Linux"']


def test_root_wheel_has_no_kernels_but_needs_them(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, project / name)
    for name in ("safereg_dist", "kernels"):
        shutil.copytree(ROOT / name, project / name, ignore=LEFTOVERS)
    wheel = build(project, tmp_path / "out")
    assert "safereg_dist/step.py" in wheel.namelist()
    assert not [name for name in wheel.namelist() if "kernels" in name]
    assert "safereg-kernels>=0.2" in needs(wheel)


def test_editable_kernels_put_nothing_else_on_the_path(kernels, tmp_path):
    """The folder's name is that of Hugging Face's package, and it holds `tests` and `hub.py`."""
    site = tmp_path / "site"
    build(kernels, tmp_path / "out", "editable").extractall(site)
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
