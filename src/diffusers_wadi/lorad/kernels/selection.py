"""Which way of computing a rotation a call takes: chosen by device, dtype and size, or forced by the user."""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

__all__ = ["ROTATION_BACKENDS", "backend_for", "get_rotation_backend", "rotation_backend", "set_rotation_backend"]

ROTATION_BACKENDS = ("auto", "plain", "chunked", "triton")
VARIABLE = "WADI_ROTATION_BACKEND"

# Numbers in a weight, below which the plain formula has less to do than the bookkeeping of blocks.
_SMALLEST = 1 << 17
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_active: str | None = None
_triton_failed = False


def set_rotation_backend(backend: str) -> None:
    """Choose how LoRaD computes rotated weights and the gradients of their angles, in this process from now on.

    Every way gives the same numbers up to rounding. The environment variable WADI_ROTATION_BACKEND sets it from outside.

    Args:
        backend: "auto", the default, takes the fastest for the tensors of a call: "chunked" for large weights on a
            CPU, "triton" on CUDA where Triton is installed, else "plain". "plain" is the formula in torch operations, and
            what second derivatives, `torch.compile`, meta tensors and tensor subclasses get in any case. "chunked"
            goes by blocks of rows with little memory. "triton" is one kernel, for float32 factors and weights of
            float32, float16 or bfloat16 on CUDA.

    Raises:
        ValueError: no such backend.
        ImportError: "triton" where it is not installed.
    """
    global _active
    _check(backend)
    _active = backend


def get_rotation_backend() -> str:
    """The backend that was set, "auto" if none was."""
    global _active
    if _active is None:
        backend = os.environ.get(VARIABLE, "auto").lower()
        _check(backend)
        _active = backend
    return _active


@contextmanager
def rotation_backend(backend: str) -> Iterator[None]:
    """`set_rotation_backend` inside a block."""
    global _active
    before = get_rotation_backend()
    set_rotation_backend(backend)
    try:
        yield
    finally:
        _active = before


def backend_for(weight: Tensor, A: Tensor, B: Tensor, *others: Tensor, wide: bool = False) -> str:
    """One of "plain", "chunked" and "triton" for a weight, its factors, and what else is read with them.

    Raises:
        ValueError: the backend that was set cannot compute these tensors.
    """
    if not _plain_tensors(weight, A, B, *others):
        return "plain"
    backend = get_rotation_backend()
    if backend == "triton":
        if wide:  # Triton has no use here: merging is done in float64, and once
            return "chunked"
        if reason := _triton_refusal(weight, A, B):
            raise ValueError(
                f"The rotation backend 'triton' cannot turn this weight: {reason}. "
                "Call set_rotation_backend('auto'), which takes Triton wherever it can."
            )
    if backend != "auto":
        return backend
    if weight.device.type == "cpu":
        return "chunked" if weight.numel() >= _SMALLEST else "plain"
    by_triton = weight.device.type == "cuda" and not wide and not _triton_failed
    return "triton" if by_triton and not _triton_refusal(weight, A, B) else "plain"


def give_up_triton(error: Exception) -> None:
    """Compute without Triton in this process from now on, unless it was asked for by name.

    Raises:
        Exception: `error`, where it was asked for, or where memory was missing.
    """
    global _triton_failed
    if get_rotation_backend() == "triton" or isinstance(error, torch.OutOfMemoryError):
        raise error
    _triton_failed = True
    warnings.warn(
        f"Triton could not compute LoRaD's rotation ({type(error).__name__}: {error}); the plain formula does it from "
        "now on, slower and with more memory. `set_rotation_backend('plain')` silences this.",
        stacklevel=2,
    )


def _check(backend: str) -> None:
    if backend not in ROTATION_BACKENDS:
        raise ValueError(f"There is no rotation backend {backend!r}: choose one of {', '.join(ROTATION_BACKENDS)}.")
    if backend == "triton" and not _has_triton():
        raise ImportError("The rotation backend 'triton' needs Triton: pip install triton (Linux), or choose 'auto'.")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _plain_tensors(*tensors: Tensor) -> bool:
    """Whether buffers may be written: no tracing, no transform, no derivative to record, nothing but numbers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _triton_refusal(weight: Tensor, A: Tensor, B: Tensor) -> str | None:
    """Why Triton cannot turn this weight, None if it can."""
    if not _has_triton():
        return "Triton is not installed"
    device = weight.device
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"it lies on {device}, and Triton needs CUDA"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    for name, tensor in (("weight", weight), ("factor A", A), ("factor B", B)):
        if tensor.dtype not in _TRITON_DTYPES:
            return f"its {name} is {tensor.dtype}, and Triton takes float32, float16 and bfloat16"
    return None
