"""Run a function once a module has been imported, without importing it now."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_import(name: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` when module ``name`` has been imported: at once if it already is.

    Parameters
    ----------
    name : str
        Full name of the module.
    callback : callable
        Takes nothing; called once, after the module's code has run and before the import returns.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Watcher(name, callback))


class _Watcher(MetaPathFinder):
    """Finds one module through the other finders, and makes its loader call back."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self._name = name
        self._callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        # Taken out first: the search below asks all finders again.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_call(module: ModuleType) -> None:
            load(module)
            self._callback()

        # On this loader object only; it belongs to this one spec.
        spec.loader.exec_module = load_and_call  # type: ignore[method-assign]
        return spec
