"""Triton's interpreter without the search that it repeats at every call of a device function.

Before each launch, and again before each call of one jitted function from another, the interpreter
looks through all members of `triton.language` for builtins to replace: most of the time of a small
kernel. Here it looks once and keeps the names, and it leaves out what is replaced already. What is
replaced, by what, and what is put back after a launch stays as Triton has it.
"""

import inspect
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_NEEDED = (
    *("_patch_lang", "_patch_builtin", "_patch_attr", "_get_np_dtype"),
    *("_LangPatchScope", "GridExecutor"),
)


class _Quick:
    """Stands before the functions of the interpreter that replace builtins."""

    def __init__(self) -> None:
        self._names: dict[int, list[str]] = {}
        for place in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):
            self._names[id(place)] = _builtins_of(place)
        self._languages: dict[int, tuple[dict[str, Any], int, frozenset[str]]] = {}
        self._replaced: set[str] = set()
        self._depth = 0
        self._np_dtypes: dict[Any, Any] = {}
        self._patch_lang = interpreter._patch_lang
        self._get_np_dtype = interpreter._get_np_dtype
        self._launch = interpreter.GridExecutor.__call__

    def launch(self, *arguments: Any, **options: Any) -> Any:
        """A launch; at its end the interpreter puts back what it replaced."""
        self._depth += 1
        self._replaced.clear()
        try:
            return self._launch(*arguments, **options)
        finally:
            self._depth -= 1
            self._replaced.clear()

    def patch_lang(self, function: Any) -> Any:
        """The interpreter's own, unless this launch has replaced the same modules already."""
        languages = self._languages_of(function)
        if self._depth == 1 and languages <= self._replaced:
            return interpreter._LangPatchScope()
        scope = self._patch_lang(function)
        self._replaced |= languages
        return scope

    def patch_builtin(self, place: Any, builder: Any, scope: Any) -> None:
        """The interpreter's own, of the names that were builtins before the first launch."""
        if id(place) not in self._names:
            self._names[id(place)] = _builtins_of(place)
        for name in self._names[id(place)]:
            member = getattr(place, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(place, name, member, builder, scope)

    def get_np_dtype(self, kind: Any) -> Any:
        """The interpreter's own, which makes a table at every call."""
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if type(scalar) is not tl.dtype:  # a pointer, which no dictionary takes
            return self._get_np_dtype(kind)
        if scalar not in self._np_dtypes:
            self._np_dtypes[scalar] = self._get_np_dtype(kind)
        return self._np_dtypes[scalar]

    def _languages_of(self, function: Any) -> frozenset[str]:
        """Which modules the interpreter would replace: those in the function's globals."""
        names = function.__globals__
        kept, count, languages = self._languages.get(id(names), (None, 0, frozenset()))
        if kept is not names or count != len(names):  # the interpreter adds to them
            modules = [value for value in names.values() if isinstance(value, ModuleType)]
            languages = frozenset(m.__name__ for m in modules if m in (tl, tl.core))
            self._languages[id(names)] = names, len(names), languages
        return languages


def _builtins_of(place: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]


ORIGINALS: dict[str, Any] = {}
"""What `install` has replaced in the interpreter, and its launch."""


def install() -> None:
    """Once a process, before its first launch; another Triton's interpreter is left as it is."""
    if ORIGINALS or not all(hasattr(interpreter, name) for name in _NEEDED):
        return
    for name in ("_patch_lang", "_patch_builtin", "_get_np_dtype"):
        ORIGINALS[name] = getattr(interpreter, name)
    ORIGINALS["launch"] = interpreter.GridExecutor.__call__
    quick = _Quick()
    interpreter._patch_lang = quick.patch_lang
    interpreter._patch_builtin = quick.patch_builtin
    interpreter._get_np_dtype = quick.get_np_dtype
    interpreter.GridExecutor.__call__ = lambda *given, **options: quick.launch(*given, **options)
