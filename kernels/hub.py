"""Lays this package out for Hugging Face's kernel-builder: python kernels/hub.py FOLDER

    FOLDER/build.toml, LICENSE, README.md          copies
    FOLDER/flake.nix                               what the builder is started with
    FOLDER/torch-ext/safereg_kernels/*.py          the modules, importing one another relatively

The hub loads a kernel under a name of its own, so that two versions can live in one process; hence
the only two changes: `from safereg_kernels.x import y` becomes `from .x import y`, and operators,
"safereg_kernels::x" and torch.ops.safereg_kernels, get the namespace of the builder's `_ops.py`.
"""

import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "safereg_kernels"
_FLAKE = """\
{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
_FROM_MODULE = re.compile(rf"^(\s*)from {PACKAGE}\.(\S+) import ", re.MULTILINE)
_FROM_PACKAGE = re.compile(rf"^(\s*)from {PACKAGE} import ", re.MULTILINE)
_WHOLE = re.compile(rf"^\s*import {PACKAGE}\b", re.MULTILINE)
_NEW_OPERATOR = re.compile(rf'"{PACKAGE}::(\w+)"')
_OPERATORS = re.compile(rf"\btorch\.ops\.{PACKAGE}\b")
_FIRST_IMPORT = re.compile(r"^(?:from|import) ", re.MULTILINE)


def relative(source: str, name: str) -> str:
    """The text of a module (file `name`) that no longer knows what its package is called."""
    if _WHOLE.search(source):
        raise ValueError(f"{name} says `import {PACKAGE}`: write `from {PACKAGE}.x import y`")
    source = _FROM_MODULE.sub(r"\1from .\2 import ", source)
    source = _FROM_PACKAGE.sub(r"\1from . import ", source)
    source, num_new = _NEW_OPERATOR.subn(r'add_op_namespace_prefix("\1")', source)
    source, num_used = _OPERATORS.subn("ops", source)
    names = ["add_op_namespace_prefix"] * bool(num_new) + ["ops"] * bool(num_used)
    if names:
        line = f"from ._ops import {', '.join(names)}\n"
        source = _FIRST_IMPORT.sub(lambda found: line + found.group(), source, count=1)
    return source


def write_layout(folder: Path) -> None:
    """Writes all files; FileExistsError where the folder has any."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder")
    modules = folder / "torch-ext" / PACKAGE
    modules.mkdir(parents=True)
    for name in ("build.toml", "LICENSE", "README.md"):
        shutil.copyfile(HERE / name, folder / name)
    (folder / "flake.nix").write_text(_FLAKE, encoding="utf-8")
    for path in sorted((HERE / PACKAGE).glob("*.py")):
        text = relative(path.read_text(encoding="utf-8"), path.name)
        (modules / path.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    write_layout(Path(sys.argv[1]))
