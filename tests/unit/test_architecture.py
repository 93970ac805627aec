"""Claimed: imports point downward only, heavy libraries have one door, public names are documented.

Exact: every import statement of the package is read with `ast`, those inside functions too.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import ROOT

PACKAGE = ROOT / "safereg_dist"
KERNELS = ROOT / "kernels" / "safereg_kernels"
KERNEL_TESTS = sorted((ROOT / "kernels" / "tests").rglob("*.py"))
FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])

# Rooms from low to high: a folder or a file at the top of the package. A module may import lower
# rooms, and modules of its own room.
ROOMS = (
    {"errors", "regions", "types"},
    {"config"},
    {"screen", "storage"},
    {"models"},
    {"data", "parallel", "policy"},
    {"coefficient", "critic", "metrics", "objective", "profiling", "reference"},
    {"risk"},
    {"step"},
    {"factory"},
    {"run"},
    {"trainer"},
    {"evaluate", "plan"},
    {"doctor", "experiments", "probe_lab"},
    {"integrations"},
    {"commands"},
    {"cli"},
    {"__main__", "demo"},
)
DOOR = "safereg_dist"
"""The package itself: it loads what it names on first use, so nothing is below it."""
ONE_DOOR = {
    "deepspeed": {"parallel/deepspeed.py"},
    "httpx": {"critic/remote.py", "evaluate/respondent.py"},
    "lm_eval": {"evaluate/harness.py"},
    "megatron": {"parallel/megatron.py", "parallel/megatron_model.py"},
}


def module_name(path: Path) -> str:
    root = PACKAGE.parent if PACKAGE in path.parents or path.parent == PACKAGE else ROOT / "kernels"
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room_of(module: str) -> str:
    """The folder or file at the top of the package that a module is in."""
    top, *inside = module.split(".")
    return inside[0] if inside and top == DOOR else top


def height(room: str) -> int:
    """Of a room; the kernels are below all of them."""
    if room == "safereg_kernels":
        return -1
    found = [level for level, rooms in enumerate(ROOMS) if room in rooms]
    assert found, f"{room} is in no row of ROOMS: say which rooms it may import"
    return found[0]


def imported_modules(path: Path) -> set[str]:
    """Modules of ours that a file imports; a package only where the name is the package's own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
    return found & MODULES.keys()


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
    own = room_of(module_name(path))
    for name in imported_modules(path) if own != DOOR else ():
        other = room_of(name)
        if other not in (own, DOOR):
            assert height(other) < height(own), f"{own} imports {name}, which is not below it"


def test_modules_import_in_no_circle():
    edges = {name: imported_modules(path) - {name, DOOR} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the circle


def test_the_first_page_is_short():
    """The top level of the package holds the method, the trainer, types, errors and the door."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert len(files) <= 10, sorted(files)


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
