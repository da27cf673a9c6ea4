"""The rotation and the gradient of its angles as Triton kernels, for CUDA; imported only where they are to run.

A program has a tile of the weight: it sums its angles over the rank in registers, takes their sines and cosines there,
and reads every number of the weight once. The products are float32 to the last few bits: on NVIDIA three TF32 products
("tf32x3", which keep 21 bits of the factors' 24, on tensor cores), on AMD float32 itself. One TF32 or half-precision
product would lose the small turns that training makes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["angle_gradient", "turn"]

_ROWS, _PAIRS = 64, 64  # of a tile
_WARPS, _STAGES = 4, 3


def turn(rows: Tensor, A: Tensor, B: Tensor, turned: Tensor, inverse: bool = False) -> None:
    """Write `rows` (out, n), turned by `A @ B`, into the first 2 * pairs columns of `turned` (out, n).

    Args:
        A: (out, r). B: (r, pairs), 2 * pairs <= n. inverse: by the opposite angles. Default False.
    """
    sizes, options = _launch(rows, A, B)
    strides = (*rows.stride(), *A.stride(), *B.stride(), *turned.stride())
    with _device_of(rows):
        _turn_kernel[_grid(rows, B)](rows, A, B, turned, *sizes, *strides, INVERSE=inverse, **options)


def angle_gradient(rows: Tensor, d_rotated: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Gradient of the angles (out, pairs), float32, from that of the turned weight; `rows`, `d_rotated`: (out, n)."""
    d_theta = torch.empty(len(rows), B.shape[1], dtype=torch.float32, device=rows.device)
    sizes, options = _launch(rows, A, B)
    strides = (*rows.stride(), *d_rotated.stride(), *A.stride(), *B.stride(), d_theta.stride(0))
    with _device_of(rows):
        _gradient_kernel[_grid(rows, B)](rows, d_rotated, A, B, d_theta, *sizes, *strides, **options)
    return d_theta


def _grid(rows: Tensor, B: Tensor) -> tuple[int, int]:
    return triton.cdiv(len(rows), _ROWS), triton.cdiv(B.shape[1], _PAIRS)


def _launch(rows: Tensor, A: Tensor, B: Tensor) -> tuple[tuple[int, int, int], dict]:
    rank = B.shape[0]
    precision = "tf32x3" if rows.is_cuda and not torch.version.hip else "ieee"
    options = {"ROWS": _ROWS, "PAIRS": _PAIRS, "RANKS": 32 if rank > 16 else 16, "PRECISION": precision}
    return (len(rows), B.shape[1], rank), {**options, "num_warps": _WARPS, "num_stages": _STAGES}


def _device_of(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)  # -1: stay where we are


@triton.jit
def _angles(
    A, B, rows, pairs, out, count, rank, a_row, a_rank, b_rank, b_pair,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    theta = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    for first in range(0, rank, RANKS):
        k = first + tl.arange(0, RANKS)
        a_mask = (rows[:, None] < out) & (k[None, :] < rank)
        b_mask = (k[:, None] < rank) & (pairs[None, :] < count)
        a = tl.load(A + rows[:, None].to(tl.int64) * a_row + k[None, :] * a_rank, mask=a_mask, other=0.0)
        b = tl.load(B + k[:, None].to(tl.int64) * b_rank + pairs[None, :] * b_pair, mask=b_mask, other=0.0)
        theta = tl.dot(a.to(tl.float32), b.to(tl.float32), theta, input_precision=PRECISION)
    return theta


@triton.jit
def _load_pairs(M, rows, columns, mask, row_stride, column_stride, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    # Whole rows of neighbouring numbers are read, and parted in registers.
    numbers = tl.load(M + rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride,
                      mask=mask, other=0.0)  # fmt: skip
    return tl.split(tl.reshape(numbers.to(tl.float32), (ROWS, PAIRS, 2)))


@triton.jit
def _turn_kernel(
    W, A, B, R, out, count, rank, w_row, w_column, a_row, a_rank, b_rank, b_pair, r_row, r_column,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.program_id(1) * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
    theta = _angles(A, B, rows, pairs, out, count, rank, a_row, a_rank, b_rank, b_pair, ROWS, PAIRS, RANKS, PRECISION)
    if INVERSE:
        theta = -theta
    cos, sin = tl.cos(theta), tl.sin(theta)
    mask = (rows[:, None] < out) & (columns[None, :] < 2 * count)
    even, odd = _load_pairs(W, rows, columns, mask, w_row, w_column, ROWS, PAIRS)
    both = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (ROWS, 2 * PAIRS))
    place = R + rows[:, None].to(tl.int64) * r_row + columns[None, :].to(tl.int64) * r_column
    tl.store(place, both.to(R.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_kernel(
    W, G, A, B, D, out, count, rank,
    w_row, w_column, g_row, g_column, a_row, a_rank, b_rank, b_pair, d_row,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.program_id(1) * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
    theta = _angles(A, B, rows, pairs, out, count, rank, a_row, a_rank, b_rank, b_pair, ROWS, PAIRS, RANKS, PRECISION)
    cos, sin = tl.cos(theta), tl.sin(theta)
    mask = (rows[:, None] < out) & (columns[None, :] < 2 * count)
    even, odd = _load_pairs(W, rows, columns, mask, w_row, w_column, ROWS, PAIRS)
    d_even, d_odd = _load_pairs(G, rows, columns, mask, g_row, g_column, ROWS, PAIRS)
    d_theta = d_odd * (even * cos - odd * sin) - d_even * (odd * cos + even * sin)
    place = D + rows[:, None].to(tl.int64) * d_row + pairs[None, :]
    tl.store(place, d_theta, mask=(rows[:, None] < out) & (pairs[None, :] < count))
