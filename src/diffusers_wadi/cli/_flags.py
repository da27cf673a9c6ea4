"""What flags of several commands have in common."""

from __future__ import annotations

import argparse
import ctypes
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def name_list(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def torch_device(name: str | None) -> Any:
    import torch

    available = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return available or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device that torch knows; use cpu, cuda, cuda:1, ...") from error
    if device.type != "cpu" and (available is None or device.type != available.type):
        raise ValueError(
            f"--device {name} is not available here; available: cpu{f', {available}' if available else ''}"
        )
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name}: there are {count} of kind {device.type} here, counted from 0")
    return device


def quiet_libraries() -> None:
    """No progress bars of diffusers and transformers; warnings stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def give_back_freed_memory() -> None:
    """From now on freed blocks of 16 MB and more go back to the system at once.

    glibc else raises that bound to 32 MB as it goes, and a run through a checkpoint of a thousand weights ends up with half
    as much memory again as it uses. A lower bound costs time: 1 MB doubles it. Elsewhere this does nothing.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    try:
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**24)
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        pass
