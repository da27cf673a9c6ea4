"""In which dtype angles, rotations and products are computed, autocast or not."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["angle_dtype", "autocast_dtype", "autocast_off", "work_dtype"]


def angle_dtype(A: Tensor, B: Tensor) -> torch.dtype:
    """Of the angles A @ B: float32, or float64 for factors in it."""
    return torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)


def work_dtype(weight: torch.dtype, angles: torch.dtype) -> torch.dtype:
    """In which a weight is turned by angles of these dtypes: float32 or wider."""
    if weight.itemsize == 1:  # floats of 8 bits take part in no promotion
        return torch.promote_types(angles, torch.float32)
    return torch.promote_types(torch.promote_types(weight, angles), torch.float32)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype in which autocast wants matrix products on this device, None where it is off."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_off(device_type: str) -> AbstractContextManager:
    """A context in which products keep the dtype of their factors."""
    # A compiler traces the backward pass outside the surrounding autocast, but may replay it inside: be explicit there.
    replayed = torch.compiler.is_compiling() and torch.amp.is_autocast_available(device_type)
    if replayed or autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
