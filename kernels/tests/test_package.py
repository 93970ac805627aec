"""The package as such: what it needs, what it says of itself, and the layout for the kernel hub.

Exact. The hub's loader is stood in for by what it does: it loads the folder under a name of its
own, beside other versions, from a place that is not on the path.
"""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1]
HUB_OPS = """\
import torch

ops = torch.ops._safereg_kernels_{tag}


def add_op_namespace_prefix(name):
    return "_safereg_kernels_{tag}::" + name
"""


def project() -> dict:
    return tomllib.loads((KERNELS / "pyproject.toml").read_text())["project"]


@pytest.fixture
def hub():
    """The module `kernels/hub.py`."""
    spec = importlib.util.spec_from_file_location("safereg_hub", KERNELS / "hub.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_installed_is_what_lies_here():
    try:
        installed = importlib.metadata.distribution("safereg-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("used from its folder, not installed")
    assert installed.version == project()["version"]
    needs = {re.split(r"[^\w-]", need)[0] for need in project()["dependencies"]}
    assert needs == {"torch", "triton"}
    spec = importlib.util.find_spec("safereg_kernels")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").is_file()


def test_the_changelog_begins_with_this_version():
    text = (KERNELS / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+)", text, re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == project()["version"]


def test_build_toml_fits_the_package():
    build = tomllib.loads((KERNELS / "build.toml").read_text())
    general = build["general"]
    assert general["name"] == project()["name"]
    assert general["name"].replace("-", "_") == "safereg_kernels"
    assert general["license"].lower() == project()["license"].lower()
    assert (general["edition"], "torch-noarch" in build) == (5, True)


def test_the_readmes_first_example_runs():
    text = (KERNELS / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    names: dict = {}
    exec(example.group(1), names)
    assert names["hidden"].grad.shape == names["hidden"].shape


def test_only_the_imports_and_operator_names_change(hub):
    source = 'from safereg_kernels import b\n\nA = "safereg_kernels::a"\n'
    source += "def f():\n    from safereg_kernels.c.d import e\n"
    source += "    return torch.ops.safereg_kernels.a\n"
    assert hub.relative(source, "x.py") == (
        "from ._ops import add_op_namespace_prefix, ops\nfrom . import b\n\n"
        'A = add_op_namespace_prefix("a")\n'
        "def f():\n    from .c.d import e\n    return ops.a\n"
    )
    assert hub.relative("import math\n", "x.py") == "import math\n"
    with pytest.raises(ValueError, match=r"x\.py says `import safereg_kernels`"):
        hub.relative("import safereg_kernels.c\n", "x.py")


def test_hub_layout_loads_twice_in_one_process(hub, tmp_path):
    folder = tmp_path / "hub"
    hub.write_layout(folder)
    modules = folder / "torch-ext" / "safereg_kernels"
    for path in modules.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) safereg_kernels", text, re.MULTILINE), path.name
        compile(text, path.name, "exec")
    with pytest.raises(FileExistsError, match="not empty"):
        hub.write_layout(folder)
    # Two copies, as two versions would be; names of the operators must not clash.
    code = f"""
import importlib.util, shutil, sys
from pathlib import Path
import torch

sys.modules["safereg_kernels"] = None  # an absolute import would fail
losses = []
for tag in ("one", "two"):
    folder = Path({str(tmp_path)!r}) / tag
    shutil.copytree({str(modules)!r}, folder)
    (folder / "_ops.py").write_text({HUB_OPS!r}.format(tag=tag))
    name = "hub_" + tag
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    hidden = torch.arange(12.0).view(3, 4).requires_grad_()
    head = torch.eye(5, 4)
    loss, _, _ = module.linear_ce_kl(hidden, head, torch.tensor([0, 1, 2]))
    loss.backward()
    assert hasattr(getattr(torch.ops, "_safereg_kernels_" + tag), "linear_ce_kl")
    losses.append(loss.item())
logits = torch.arange(12.0).view(3, 4) @ head.T
truth = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction="sum")
assert not hasattr(torch.ops.safereg_kernels, "linear_ce_kl")
assert losses[0] == losses[1] and abs(losses[0] - truth.item()) < 1e-5, (losses, truth)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
