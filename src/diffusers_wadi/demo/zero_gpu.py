"""ZeroGPU of Hugging Face Spaces: a GPU that is lent for the time of a request. Elsewhere nothing happens."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any


def spaces_package() -> Any:
    """The package `spaces`, or None where it is not installed. To be called before anything asks for a GPU."""
    try:
        import spaces
    except ImportError:
        return None
    return spaces if hasattr(spaces, "GPU") else None  # not a folder of this name


def on_gpu(function: Callable, seconds: int) -> Callable:
    """`function` with a GPU of ZeroGPU for at most `seconds`, where the package `spaces` is installed; else itself."""
    spaces = spaces_package()
    return function if spaces is None else functools.wraps(function)(spaces.GPU(duration=seconds)(function))


def is_zero_gpu() -> bool:
    """Whether this is a Space on ZeroGPU, where every request is run by a process of its own, forked from this one."""
    return bool(os.environ.get("SPACES_ZERO_GPU"))


def default_device() -> str:
    """The GPU if there is one, or will be one during requests; else "cpu"."""
    if is_zero_gpu():
        return "cuda"
    import torch

    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
