"""What changed between two weights: the paper's measures (WaDi, Eq. 13-17 and Fig. 2), tensors in and numbers out.

A weight is read as a set of vectors. The paper writes it as (in, out) and takes its columns: in PyTorch's layout, (out, in),
those are the rows of the tensor, one vector of `in` numbers for each output unit. That is convention "column" here, the
paper's. Convention "row" is the other reading: one vector of `out` numbers for each input. Weights with more axes are
flattened to (out, everything else), for pairs and spectra too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Convention", "recombine", "rotation_left", "squared_norm", "singular_value_energies", "vector_changes"]

Convention = Literal["column", "row"]
_BLOCK = 2**20  # numbers that are widened to float64 at a time: 8 MB


def check_convention(convention: str) -> None:
    """Raises ValueError for anything but "column" and "row"."""
    if convention not in get_args(Convention):
        raise ValueError(
            f"`convention` is 'column' (a vector per output unit, the paper's) or 'row' (per input), got {convention!r}"
        )


def vector_changes(base: Tensor, tuned: Tensor, convention: Convention = "column") -> tuple[Tensor, Tensor]:
    """Norm and direction change of every vector (the terms of Eq. 13 and 15).

    With norms `n` and directions `v = w / n`: `|n1 - n0| / n0`, and `||v1 - v0||`, from 0 to 2. Vectors that are zero in
    one of the two have no direction and are left out. The means of the two are the paper's Delta-norm and Delta-dir.

    Args:
        base, tuned: (out, ...), of one shape. Computed in float64.
        convention: what the vectors are, see above. Default "column".

    Returns:
        Two float64 tensors on the CPU, (vectors,).
    """
    check_convention(convention)
    axis = 1 if convention == "column" else 0
    first, second, apart = _squared_lengths(base, tuned, axis)
    kept = (first > 0) & (second > 0)
    first, second, apart = first[kept].sqrt(), second[kept].sqrt(), apart[kept]
    # ||v1 - v0||^2 n0 n1 = ||w1 - w0||^2 - (n1 - n0)^2, which keeps the digits that 2 - 2 cos loses for small angles.
    direction = ((apart - (second - first).square()).clamp(min=0) / (first * second)).sqrt()
    return ((second - first).abs() / first).cpu(), direction.cpu()


def rotation_left(base: Tensor, tuned: Tensor) -> float:
    """Squared norm of what no rotation in LoRaD's planes (adjacent pairs of columns) can change.

    The best turn of a pair from `p0` to `p1` leaves the difference of their lengths, so this is `sum (|p1| - |p0|)^2`,
    and the share of the change that is a rotation is one less this over `squared_norm(tuned - base)`. A last column
    without a partner counts in full. For a small random change the share is 1/2: of the two directions in a plane
    one is along the circle.

    Args:
        base, tuned: (out, ...), of one shape.
    """
    left = 0.0
    for first, second in _blocks(base, tuned):
        paired = first.shape[1] // 2 * 2
        lengths = [w[:, :paired].unflatten(1, (-1, 2)) for w in (first, second)]
        lengths = [torch.hypot(w[..., 0], w[..., 1]) for w in lengths]
        left += (lengths[1] - lengths[0]).square().sum().item()
        left += (second[:, paired:] - first[:, paired:]).square().sum().item()
    return left


def squared_norm(tensor: Tensor) -> float:
    """Sum of squares of a tensor of any shape, in float64."""
    rows = tensor if tensor.ndim > 1 else tensor.reshape(1, -1)
    return sum(block.square().sum().item() for (block,) in _blocks(rows))


def singular_value_energies(matrix: Tensor) -> Tensor:
    """Shares of the squared singular values in their sum, the largest first.

    By the eigenvalues of the smaller Gram matrix in float64, which is exact to about 1e-15 of the largest.

    Args:
        matrix: (out, ...), flattened to (out, n).

    Returns:
        float64 on the CPU, (min(out, n),), of sum 1; all zero for a matrix of zeros.
    """
    rows = matrix.flatten(1)
    tall = rows.shape[0] > rows.shape[1]
    gram = rows.new_zeros((min(rows.shape),) * 2, dtype=torch.float64)
    for (block,) in _blocks(rows if tall else rows.T):
        gram.addmm_(block.T, block)
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    total = values.sum()
    return (values / total if total > 0 else values).cpu()


def recombine(norms: Tensor, directions: Tensor, convention: Convention = "column") -> Tensor:
    """The weight with the norms of one and the directions of another (Fig. 2c).

    Vectors without a direction stay zero.

    Args:
        norms, directions: (out, ...), of one shape.
        convention: as in `vector_changes`.

    Returns:
        float32, of their shape.
    """
    check_convention(convention)
    axis = 1 if convention == "column" else 0
    wanted, own, _ = _squared_lengths(norms, directions, axis)
    scale = torch.where(own > 0, (wanted / own.clamp(min=torch.finfo(own.dtype).tiny)).sqrt(), 0)
    scaled = directions.flatten(1).float() * scale.unsqueeze(axis).to(torch.float32)
    return scaled.reshape(directions.shape)


def _squared_lengths(base: Tensor, tuned: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared norms of the vectors along `axis` of (out, n): of the first, the second and their difference."""
    sums = [
        torch.stack([x.square().sum(axis) for x in (first, second, second - first)])
        for first, second in _blocks(base, tuned)
    ]
    return tuple(torch.cat(sums, dim=1) if axis == 1 else torch.stack(sums).sum(0))


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of (out, n), a few at a time, in float64: a whole convolution would take hundreds of megabytes each."""
    rows = [tensor.flatten(1) for tensor in tensors]
    step = max(1, _BLOCK // max(1, rows[0].shape[1]))
    for start in range(0, rows[0].shape[0], step):
        yield tuple(matrix[start : start + step].double() for matrix in rows)
