"""Claimed: imports point downward only, heavy libraries have one door, public names are documented.

Exact: every import statement of the package is read with `ast`, those inside functions too.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

PACKAGE = ROOT / "safereg_dist"
KERNELS = ROOT / "kernels" / "safereg_kernels"
KERNEL_TESTS = sorted((ROOT / "kernels" / "tests").rglob("*.py"))
FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])

# Layer of a module, by the longest prefix that matches. A module may import lower layers only; and
# modules of its own layer only where they share a package (`parallel/`, `risk/`, ...).
LAYERS = {
    "safereg_kernels": 0,
    "safereg_dist": 0,
    "safereg_dist.errors": 1,
    "safereg_dist.types": 1,
    "safereg_dist.regions": 1,
    "safereg_dist.config": 2,
    "safereg_dist.data.files": 2,
    "safereg_dist.models.fingerprint": 2,
    "safereg_dist.models.architecture": 2,
    "safereg_dist.storage.score_cache": 2,
    "safereg_dist.parallel": 3,
    "safereg_dist.critic": 3,
    "safereg_dist.plan": 3,
    "safereg_dist.data": 4,
    "safereg_dist.policy": 4,
    "safereg_dist.risk": 4,
    "safereg_dist.coefficient": 4,
    "safereg_dist.reference": 4,
    "safereg_dist.objective": 4,
    "safereg_dist.run.ledger": 4,
    "safereg_dist.step": 5,
    "safereg_dist.run.metrics": 5,
    "safereg_dist.run.export": 5,
    "safereg_dist.factory.risk": 5,
    "safereg_dist.run.log": 6,
    "safereg_dist.profiling": 6,
    "safereg_dist.factory": 6,
    "safereg_dist.run.checkpoint": 6,
    "safereg_dist.run.gate": 7,
    "safereg_dist.trainer": 8,
    "safereg_dist.evaluate": 8,
    "safereg_dist.commands.anchor": 9,
    "safereg_dist.probe_lab": 9,
    "safereg_dist.commands.score": 10,
    "safereg_dist.commands.audit": 9,
    "safereg_dist.commands.reference": 9,
    "safereg_dist.integrations": 9,
    "safereg_dist.launcher": 10,
    "safereg_dist.cli": 11,
    "safereg_dist.__main__": 12,
    "safereg_dist.demo": 12,
}
ONE_DOOR = {
    "deepspeed": {"parallel/deepspeed.py"},
    "httpx": {"critic/remote.py"},
    "megatron": set(),
}


def module_name(path: Path) -> str:
    root = PACKAGE.parent if PACKAGE in path.parents or path.parent == PACKAGE else ROOT / "kernels"
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_key(module: str) -> str:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in LAYERS:
            return ".".join(parts[:end])
    raise AssertionError(f"{module} has no layer: add it to LAYERS")


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    own = layer_key(module_name(path))
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        if not name.startswith(("safereg_dist", "safereg_kernels")):
            continue
        other = layer_key(name)
        if other in (own, "safereg_dist"):
            continue
        assert LAYERS[other] < LAYERS[own], f"{own} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_have_one_door(path):
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        top = name.split(".")[0]
        if top in ONE_DOOR and PACKAGE in path.parents:
            allowed = ONE_DOOR[top]
            assert str(path.relative_to(PACKAGE)) in allowed, f"{path} imports {top}"
        if KERNELS in path.parents:
            known = sys.stdlib_module_names | {"torch", "triton", "safereg_kernels"}
            assert top in known, f"the kernel package imports {top}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree, clean=False) is not None, f"{path} has no docstring"
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), f"{path} has an empty docstring"
    bodies = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    for body in bodies:
        for node in body.body:
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if isinstance(node, kinds) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} is undocumented"


@pytest.mark.parametrize("path", KERNEL_TESTS, ids=lambda p: p.name)
def test_kernel_tests_run_where_the_kernels_are_alone(path):
    """What they need beyond (transformers, accelerate) they ask for with `pytest.importorskip`."""
    known = sys.stdlib_module_names | {"torch", "triton", "numpy", "pytest", "hypothesis"}
    known |= {"safereg_kernels"} | {other.stem for other in KERNEL_TESTS}
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        assert name.split(".")[0] in known, f"{path.name} imports {name}"


def test_package_door_is_light():
    code = "import sys, safereg_dist; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_hugging_face_kernels_stays_importable_from_the_root(tmp_path):
    """Our source root is called `kernels/`: it must not shadow the package of that name.

    A stand-in of the same name is installed in a folder that comes after the project's root on the
    path, as site-packages does; a regular package wins over a folder without `__init__.py`.
    """
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("def get_kernel(name):\n    return name\n")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.append({str(tmp_path)!r});"
        "from kernels import get_kernel; print(get_kernel('ok'));"
        "import safereg_kernels; print(safereg_kernels.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.split() == ["ok", "safereg_kernels"], done.stderr
