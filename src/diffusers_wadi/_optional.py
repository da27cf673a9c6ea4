"""Packages that only some features need."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say how to get it.

    Args:
        package: module name to import, such as "gradio".
        extra: the extra of this distribution that brings it, such as "demo".

    Returns:
        The imported module.

    Raises:
        ImportError: `package` is not installed; the message holds the pip command. A package that is installed but
            fails on an import of its own raises that error unchanged.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.split(".")[0]:
            raise
        raise ImportError(
            f'{package} is needed here and is not installed: pip install "diffusers-wadi[{extra}]"', name=package
        ) from error
