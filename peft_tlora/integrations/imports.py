"""Changes functions of other packages when they are imported, or at once if they have been."""

import fnmatch
import functools
import importlib.machinery
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

Wrap = Callable[[Any], Any]
_MARK = "_wrapped_by"


def wrap_function(place: str, wrap: Wrap) -> None:
    """Let a function be replaced by what `wrap` makes of it.

    Args:
        place: "module:function" or "module:Class.method"; `*` stands for any part of a name.
        wrap: Makes the new function from the old one, or returns the old one.
    """
    pattern, _, name = place.partition(":")
    _FINDER.wraps.append((pattern, name, wrap))
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for imported, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and fnmatch.fnmatchcase(imported, pattern):
            for old, new in _wrapped(module, name, wrap):
                if "." not in name:
                    _replace(old, new)


class _Finder(MetaPathFinder):
    """Finds modules as the others do, and changes those that are asked for after their execution.

    The loader of a source file belongs to one module; others are left alone.
    """

    def __init__(self) -> None:
        self.wraps: list[tuple[str, str, Wrap]] = []

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        wanted = [w for w in self.wraps if fnmatch.fnmatchcase(fullname, w[0])]
        if not wanted:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            execute: Any = spec.loader.exec_module

            @functools.wraps(execute)
            def exec_module(module: ModuleType) -> None:
                execute(module)
                for _, name, wrap in wanted:
                    _wrapped(module, name, wrap)

            spec.loader.exec_module = exec_module
        return spec


_FINDER = _Finder()


def _mark(wrap: Wrap) -> str:
    return f"{wrap.__module__}.{wrap.__qualname__}"


def _wrapped(module: ModuleType, name: str, wrap: Wrap) -> list[tuple[Any, Any]]:
    """Wrap what a module has under a name, if it is its own; returns the old and the new ones."""
    first, _, method = name.partition(".")
    holders: list[Any] = [module]
    if method:
        holders = [
            value
            for key, value in vars(module).items()
            if isinstance(value, type) and fnmatch.fnmatchcase(key, first)
        ]
    changed = []
    for holder in holders:
        for key, old in list(vars(holder).items()):
            own = callable(old) and getattr(old, "__module__", None) == module.__name__
            if own and fnmatch.fnmatchcase(key, method or first):
                # not on top of what an earlier import of this package has put there
                is_ours = getattr(old, _MARK, None) == _mark(wrap)
                new = wrap(vars(old)["__wrapped__"] if is_ours else old)
                if new is not old:
                    setattr(new, _MARK, _mark(wrap))
                    setattr(holder, key, new)
                    changed.append((old, new))
    return changed


def _replace(old: Any, new: Any) -> None:
    """Replace a function in the modules that have imported it by its name."""
    for module in list(sys.modules.values()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, key, new)
