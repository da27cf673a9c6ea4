"""The mathematics of LoRaD (low-rank rotation of weight direction), tensors in and tensors out.

A weight `W` (out, in) is read as `in / 2` two-vectors per row: the adjacent input columns (0, 1), (2, 3), ... Every
two-vector is turned by its own angle; the angles are a low-rank matrix `Theta = A @ B`. Lengths never change, so the
norm of every row of `W` is kept. Pairing and shapes follow the authors' release, where `A` (out, r) starts at zero.

Rotations in the same plane add their angles. Several adapters at once are therefore one adapter with concatenated
factors, `A = [s1 * A1 | s2 * A2]` and `B = [B1 ; B2]`, and `rotate(., -Theta)` undoes `rotate(., Theta)`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["check_pairs", "lorad_angles", "lorad_linear", "rotate", "rotate_weight", "turned_rows"]


def check_pairs(in_features: int, name: str = "weight") -> None:
    """Refuse an input size that cannot be split into pairs of adjacent columns.

    Raises:
        ValueError: `in_features` is odd.
    """
    if in_features % 2:
        raise ValueError(
            f"LoRaD turns pairs of input columns, so in_features has to be even, but `{name}` has {in_features}. "
            "Leave this layer out of `target_modules`, or name it in `exclude_modules`."
        )


def lorad_angles(A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Angles in radians, `Theta = scale * A @ B`, of shape (out, in/2).

    Computed in float32 (float64 for float64 factors) also under autocast and for half-precision factors: 16-bit angles
    lose most of the small turns that training makes. Angles are not wrapped to (-pi, pi]; sine and cosine need no wrap.

    Args:
        A: (out, r).
        B: (r, in/2).
        scale: strength of the adapter, a factor on the angle. Default 1.0.
    """
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    with _autocast_off(A.device.type):
        theta = A.to(dtype) @ B.to(dtype)
        return theta if scale == 1.0 else theta * scale


def rotate(weight: Tensor, theta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Turn every pair of adjacent columns of `weight` by its angle; angle 0 returns the very same numbers.

    `W'[:, 2j] = W[:, 2j] cos - W[:, 2j+1] sin` and `W'[:, 2j+1] = W[:, 2j] sin + W[:, 2j+1] cos`, with the cosine and
    sine of `theta[:, j]` (the WaDi paper's rotation, as in the authors' release). Differentiable in both arguments.

    Args:
        weight: (out, in). Weights with more axes are for the caller to flatten to two, `weight.flatten(1)`.
        theta: (out, in/2), radians.
        dtype: dtype of the result; the one of `weight` by default. The arithmetic is float32 or wider throughout, the
            cast comes last.

    Raises:
        ValueError: odd in_features, or angles that do not fit the weight.
    """
    check_pairs(weight.shape[-1])
    if theta.shape != (*weight.shape[:-1], weight.shape[-1] // 2):
        raise ValueError(
            f"Angles of shape {tuple(theta.shape)} do not fit a weight of shape {tuple(weight.shape)}: expected one "
            "angle per row and pair of columns, (out, in/2)."
        )
    work = _work_dtype(weight, theta)
    even, odd = weight.to(work).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = theta.to(work).cos(), theta.to(work).sin()
    # Written column by column: on the CPU `torch.stack` along the last axis takes three times as long. In the memory
    # layout of the weight, so that angle 0 gives the very same product with an input too (a Conv1D is transposed).
    turned = torch.empty_like(weight, dtype=work)
    turned[..., 0::2] = torch.addcmul(even * cos, odd, sin, value=-1)
    turned[..., 1::2] = torch.addcmul(odd * cos, even, sin)
    return turned.to(weight.dtype if dtype is None else dtype)


def rotate_weight(weight: Tensor, theta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`rotate` for weights of any shape: the pairs run along all axes but the first, flattened in their order.

    A convolution's weight (out, in/groups, kh, kw) is read as (out, in/groups*kh*kw). Where that is odd, the last
    column has no partner and stays as it is.

    Args:
        weight: (out, ...). theta: (out, n // 2) for n numbers per row. dtype: as in `rotate`.

    Raises:
        ValueError: angles that do not fit the weight.
    """
    rows = weight.flatten(1)
    paired = rows.shape[1] // 2 * 2
    turned = rotate(rows[:, :paired], theta, dtype)
    if paired < rows.shape[1]:
        whole = torch.empty_like(rows, dtype=turned.dtype)  # which keeps the layout, as in `rotate`
        whole[:, :paired], whole[:, paired:] = turned, rows[:, paired:]
        turned = whole
    return turned.reshape(weight.shape)


def turned_rows(rows: Tensor, A: Tensor, B: Tensor, wide: bool = False) -> Tensor:
    """`rotate_weight(rows, A @ B)`, keeping only the three inputs for the backward pass.

    Args:
        rows: (n, in). A: (n, r), the factor of these rows. B: (r, in // 2).
        wide: take the sines and cosines in float64, as merging does, for the very same numbers. Default False.

    Returns:
        (n, in), in the dtype of `rows`.
    """
    if not torch.is_grad_enabled():
        return rotate_weight(rows, _widened(lorad_angles(A, B), wide))
    return _TurnedRows.apply(rows, A, B, wide)


class _TurnedRows(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, A: Tensor, B: Tensor, wide: bool) -> Tensor:
        return rotate_weight(rows, _widened(lorad_angles(A, B), wide))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, A, B = ctx.saved_tensors
        needs_rows, needs_A, needs_B, _ = ctx.needs_input_grad
        d_rows = d_A = d_B = None
        with _autocast_off(grad.device.type):
            theta = lorad_angles(A, B)
            if needs_rows:
                d_rows = rotate_weight(grad.to(theta.dtype), -theta, rows.dtype)
            if needs_A or needs_B:
                turned = rotate_weight(rows, theta, _work_dtype(rows, theta))
                d_A, d_B = factor_gradients(turned, grad, A, B, needs_A, needs_B)
        return d_rows, d_A, d_B, None


def _widened(theta: Tensor, wide: bool) -> Tensor:
    return theta.double() if wide and theta.device.type != "mps" else theta  # mps has no float64


def lorad_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """`F.linear(x, rotate_weight(weight, A @ B), bias)`, keeping at most these inputs for the backward pass.

    The rotated weight and the angles, two matrices of the size of the weight in every layer, are recomputed in the
    backward pass instead of being kept (the authors' release keeps both: 1.4 GB for SD 1.5 in float32).
    Under autocast the matrix products run in the autocast dtype, angles and rotation stay in float32.

    Args:
        x: (..., in). weight: (out, in), of any strides. bias: (out,) or None. A: (out, r). B: (r, in // 2).
        dtype: in which the rotated weight meets `x`, without autocast. Default: that of `weight`.

    Returns:
        (..., out), in the dtype that `F.linear(x, weight, bias)` would have had.
    """
    low = _autocast_dtype(x.device.type)
    if low is None or x.dtype == torch.float64:
        return _apply(x, weight, bias, A, B, dtype or weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _apply(x.to(low), weight, None if bias is None else bias.to(low), A, B, low)


class _LoRaDLinear(torch.autograd.Function):
    """The backward pass is written in differentiable operations of saved inputs, so second derivatives work too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(x, rotate_weight(weight, lorad_angles(A, B), dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, A, B, _ = inputs
        adapts = any(ctx.needs_input_grad[i] for i in (1, 3, 4))
        # A frozen adapter only hands the gradient on to x, and for that x itself is not needed.
        ctx.save_for_backward(x if adapts else None, weight, A, B)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        d_x = d_weight = d_bias = d_A = d_B = None
        with _autocast_off(grad.device.type):
            theta = lorad_angles(A, B)
            rotated = (
                rotate_weight(weight, theta, _work_dtype(weight, theta)) if needs_x or needs_A or needs_B else None
            )
            if needs_x:
                d_x = grad @ rotated.to(grad.dtype)
            if x is not None:
                d_rotated = _flat(grad).T @ _flat(x)  # (out, in)
            if needs_weight:
                d_weight = rotate_weight(d_rotated.to(theta.dtype), -theta, weight.dtype)
            if needs_A or needs_B:
                d_A, d_B = factor_gradients(rotated, d_rotated, A, B, needs_A, needs_B)
            if needs_bias:
                d_bias = _flat(grad).sum(0)
        return d_x, d_weight, d_bias, d_A, d_B, None


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.is_grad_enabled():
        return F.linear(x, rotate_weight(weight, lorad_angles(A, B), dtype), bias)
    return _LoRaDLinear.apply(x, weight, bias, A, B, dtype)


def factor_gradients(
    rotated: Tensor, d_rotated: Tensor, A: Tensor, B: Tensor, needs_A: bool, needs_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B from the rotated weight (out, in) and its gradient; an odd last column has no part in it."""
    paired = 2 * B.shape[1]
    d_theta = _angle_gradient(rotated[:, :paired], d_rotated[:, :paired].to(rotated.dtype))
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    d_theta = d_theta.to(dtype)
    d_A = (d_theta @ B.T.to(dtype)).to(A.dtype) if needs_A else None
    d_B = (A.T.to(dtype) @ d_theta).to(B.dtype) if needs_B else None
    return d_A, d_B


def _angle_gradient(rotated: Tensor, d_rotated: Tensor) -> Tensor:
    """The derivative of a turned pair by its angle is that pair turned by a further 90 degrees; (out, in/2)."""
    even, odd = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    d_even, d_odd = d_rotated.unflatten(-1, (-1, 2)).unbind(-1)
    return d_odd * even - d_even * odd


def _work_dtype(weight: Tensor, theta: Tensor) -> torch.dtype:
    if weight.dtype.itemsize == 1:  # floats of 8 bits take part in no promotion
        return torch.promote_types(theta.dtype, torch.float32)
    return torch.promote_types(torch.promote_types(weight.dtype, theta.dtype), torch.float32)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype in which autocast wants matrix products on this device, None where it is off."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _autocast_off(device_type: str) -> AbstractContextManager:
    # A compiler traces the backward pass outside the surrounding autocast, but may replay it inside: be explicit there.
    replayed = torch.compiler.is_compiling() and torch.amp.is_autocast_available(device_type)
    if replayed or _autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
