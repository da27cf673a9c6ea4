"""Run a function as soon as some other package has been imported, without importing it ourselves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _AfterImport(MetaPathFinder):
    """Lets the other finders find `name` and runs `callback` once after the module has executed."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name, self.callback = name, callback

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def execute_then_call(module: ModuleType) -> None:
            execute(module)
            # Only now: asking whether a package exists also calls find_spec, and must not use up the hook.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.callback()

        loader.exec_module = execute_then_call


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call `callback()` now if the module `name` is loaded, else right after its first import.

    Args:
        name: full module name, such as "peft".
        callback: takes nothing; an exception in it fails that import, so that a broken registration is seen.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        callback()
    else:
        sys.meta_path.insert(0, _AfterImport(name, callback))
