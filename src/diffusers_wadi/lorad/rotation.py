"""The mathematics of LoRaD (low-rank rotation of weight direction), tensors in and tensors out.

A weight `W` (out, in) is read as `in / 2` two-vectors per row: the adjacent input columns (0, 1), (2, 3), ... Every
two-vector is turned by its own angle; the angles are a low-rank matrix `Theta = A @ B`. Lengths never change, so the
norm of every row of `W` is kept. Pairing and shapes follow the authors' release, where `A` (out, r) starts at zero.

Rotations in the same plane add their angles. Several adapters at once are therefore one adapter with concatenated
factors, `A = [s1 * A1 | s2 * A2]` and `B = [B1 ; B2]`, and `rotate(., -Theta)` undoes `rotate(., Theta)`.

`rotate` is the formula, on angles that exist. Layers call `turn_weight` and `factor_gradients`, which take the factors
and compute the same by the means that suit device and size, see `set_rotation_backend`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_wadi.lorad.kernels.chunked import gradients_by_blocks, turn_by_blocks
from diffusers_wadi.lorad.kernels.precision import angle_dtype, autocast_dtype, autocast_off, work_dtype
from diffusers_wadi.lorad.kernels.selection import (
    backend_for,
    get_rotation_backend,
    give_up_triton,
    rotation_backend,
    set_rotation_backend,
)

__all__ = [
    "check_pairs",
    "factor_gradients",
    "get_rotation_backend",
    "lorad_angles",
    "lorad_linear",
    "rotate",
    "rotate_weight",
    "rotation_backend",
    "set_rotation_backend",
    "turn_weight",
    "turned_rows",
]


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
    dtype = angle_dtype(A, B)
    with autocast_off(A.device.type):
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
    work = work_dtype(weight.dtype, theta.dtype)
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


def turn_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    dtype: torch.dtype | None = None,
    wide: bool = False,
    inverse: bool = False,
) -> Tensor:
    """`rotate_weight(weight, A @ B)` by the fastest means for device and size: the angles need not exist whole.

    Differentiable by the plain formula where a gradient is to be recorded; `turned_rows` keeps less for it.

    Args:
        weight: (out, ...), n numbers per row. A: (out, r). B: (r, n // 2).
        dtype: of the result, default that of `weight`; the cast comes last.
        wide: take the sines and cosines in float64, as merging does. Default False.
        inverse: turn by the opposite angles. Default False.

    Returns:
        In the shape of `weight` and the memory layout of `weight.flatten(1)`.

    Raises:
        ValueError: factors that do not fit the weight, or a backend was set that cannot turn it.
    """
    wide = wide and weight.device.type != "mps"  # which has no float64
    rows = weight.flatten(1)
    _check_fit(rows, A, B)
    backend = backend_for(weight, A, B, wide=wide)
    if backend == "plain":
        return _turn_plainly(weight, A, B, dtype, wide, inverse)
    turned = torch.empty_like(rows, dtype=weight.dtype if dtype is None else dtype)
    with autocast_off(weight.device.type):
        if backend == "chunked":
            turn_by_blocks(rows, A, B, turned, wide, inverse)
        else:
            try:
                _triton().turn(rows, A, B, turned, inverse)
            except Exception as error:
                give_up_triton(error)
                return _turn_plainly(weight, A, B, dtype, wide, inverse)
    if rows.shape[1] % 2:
        turned[:, -1] = rows[:, -1]
    return turned.reshape(weight.shape)


def factor_gradients(
    weight: Tensor,
    d_rotated: Tensor,
    A: Tensor,
    B: Tensor,
    needs_A: bool = True,
    needs_B: bool = True,
    rotated: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B, in their dtypes, from that of the turned weight, which is made again piece by piece.

    The derivative of a turned pair by its angle is that pair turned by a further 90 degrees.

    Args:
        weight, d_rotated: (out, ...), n numbers per row; an odd last one has no part in it. A: (out, r). B: (r, n // 2).
        needs_A, needs_B: what to compute; None stands for the rest. Default True.
        rotated: the turned weight, where it is at hand, for the plain formula to use. Default None.
    """
    rows, d_rows = weight.flatten(1), d_rotated.flatten(1)
    _check_fit(rows, A, B)
    with autocast_off(weight.device.type):
        backend = backend_for(weight, A, B, d_rotated)
        if backend == "chunked":
            return gradients_by_blocks(rows, d_rows, A, B, needs_A, needs_B)
        d_theta = _angle_gradient(rows, d_rows, A, B, backend, None if rotated is None else rotated.flatten(1))
        d_A = (d_theta @ B.T.to(d_theta.dtype)).to(A.dtype) if needs_A else None
        d_B = (A.T.to(d_theta.dtype) @ d_theta).to(B.dtype) if needs_B else None
    return d_A, d_B


def _turn_plainly(
    weight: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype | None, wide: bool, inverse: bool
) -> Tensor:
    theta = lorad_angles(A, B)
    theta = theta.double() if wide else theta
    return rotate_weight(weight, -theta if inverse else theta, dtype)


def _angle_gradient(
    rows: Tensor, d_rows: Tensor, A: Tensor, B: Tensor, backend: str, rotated: Tensor | None
) -> Tensor:
    """(out, in/2), in the dtype of the angles."""
    if backend == "triton":
        try:
            return _triton().angle_gradient(rows, d_rows, A, B)
        except Exception as error:
            give_up_triton(error)
    paired, angles = 2 * B.shape[1], angle_dtype(A, B)
    work = work_dtype(rows.dtype, angles)
    if rotated is None or rotated.dtype != work:
        rotated = rotate(rows[:, :paired], lorad_angles(A, B), work)
    even, odd = rotated[:, :paired].unflatten(-1, (-1, 2)).unbind(-1)
    d_even, d_odd = d_rows[:, :paired].to(work).unflatten(-1, (-1, 2)).unbind(-1)
    return (d_odd * even - d_even * odd).to(angles)


def _triton() -> Any:
    from diffusers_wadi.lorad.kernels import triton_kernels

    return triton_kernels


def _check_fit(rows: Tensor, A: Tensor, B: Tensor) -> None:
    if A.shape[0] != rows.shape[0] or A.shape[1] != B.shape[0] or B.shape[1] != rows.shape[1] // 2:
        raise ValueError(
            f"Factors of shapes {tuple(A.shape)} and {tuple(B.shape)} do not fit a weight of {rows.shape[0]} rows of "
            f"{rows.shape[1]} numbers: expected A (out, r) and B (r, in/2)."
        )


def turned_rows(rows: Tensor, A: Tensor, B: Tensor, wide: bool = False) -> Tensor:
    """`turn_weight(rows, A, B)`, keeping only the three inputs for the backward pass.

    Args:
        rows: (n, in). A: (n, r), the factor of these rows. B: (r, in // 2).
        wide: take the sines and cosines in float64, as merging does, for the very same numbers. Default False.

    Returns:
        (n, in), in the dtype of `rows`.
    """
    if not torch.is_grad_enabled():
        return turn_weight(rows, A, B, wide=wide)
    return _TurnedRows.apply(rows, A, B, wide)


class _TurnedRows(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, A: Tensor, B: Tensor, wide: bool) -> Tensor:
        return turn_weight(rows, A, B, wide=wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, A, B = ctx.saved_tensors
        needs_rows, needs_A, needs_B, _ = ctx.needs_input_grad
        d_rows = d_A = d_B = None
        with autocast_off(grad.device.type):
            if needs_rows:
                d_rows = turn_weight(grad, A, B, rows.dtype, inverse=True)
            if needs_A or needs_B:
                d_A, d_B = factor_gradients(rows, grad, A, B, needs_A, needs_B)
        return d_rows, d_A, d_B, None


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
    low = autocast_dtype(x.device.type)
    if low is None or x.dtype == torch.float64:
        return _apply(x, weight, bias, A, B, dtype or weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _apply(x.to(low), weight, None if bias is None else bias.to(low), A, B, low)


class _LoRaDLinear(torch.autograd.Function):
    """The backward pass is written in differentiable operations of saved inputs, so second derivatives work too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(x, turn_weight(weight, A, B, dtype), bias)

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
        d_x = d_weight = d_bias = d_A = d_B = rotated = None
        with autocast_off(grad.device.type):
            if needs_x:
                rotated = turn_weight(weight, A, B, grad.dtype)
                d_x = grad @ rotated
                if backend_for(weight, A, B) != "plain":
                    rotated = None  # gone before its gradient is made: one matrix of this size at a time
            if x is not None:
                d_rotated = _flat(grad).T @ _flat(x)  # (out, in)
            if needs_weight:
                d_weight = turn_weight(d_rotated, A, B, weight.dtype, inverse=True)
            if needs_A or needs_B:
                d_A, d_B = factor_gradients(weight, d_rotated, A, B, needs_A, needs_B, rotated)
            if needs_bias:
                d_bias = _flat(grad).sum(0)
        return d_x, d_weight, d_bias, d_A, d_B, None


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.is_grad_enabled():
        return F.linear(x, turn_weight(weight, A, B, dtype), bias)
    return _LoRaDLinear.apply(x, weight, bias, A, B, dtype)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
