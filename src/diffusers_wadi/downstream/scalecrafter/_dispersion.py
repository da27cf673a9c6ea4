"""Dispersed convolution: the 5x5 kernel that does on a twice upsampled image what a 3x3 kernel did on the image.

k5 = R k3 with one fixed matrix R (25, 9), the least-squares solution of ScaleCrafter's two conditions, solved here.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 3  # pixels of the input for which the conditions are written; 3 gives the authors' matrix
PIXEL_WEIGHT = 0.05  # of the equations that ask for the same answer on the image itself


@cache
def dispersion_matrix() -> np.ndarray:
    """R, float64 (25, 9), for kernels flattened by rows. Rank 9; the middle tap goes to the middle.

    Least squares over all inputs x of 3x3 pixels, with U the corner-aligned bilinear upsampling by two:
    conv5(U x; k5) = U conv3(x; k3), and, with weight 0.05, conv5(x; k5) = conv3(x; k3).
    """
    wide = 2 * (SIDE - 1) + 1
    line = np.zeros((wide, SIDE))
    for row, place in enumerate(np.linspace(0, SIDE - 1, wide)):
        left = min(int(place), SIDE - 2)
        line[row, left : left + 2] = 1 - (place - left), place - left
    up = np.kron(line, line)
    structure = (
        _by_tap([shift @ up for shift in _shifts(5, wide)]),
        _by_tap([up @ shift for shift in _shifts(3, SIDE)]),
    )
    pixels = _by_tap(_shifts(5, SIDE)), _by_tap(_shifts(3, SIDE))
    left, right = (np.concatenate([a, PIXEL_WEIGHT * b]) for a, b in zip(structure, pixels))
    return np.linalg.lstsq(left, right, rcond=None)[0]


def _shifts(kernel: int, side: int) -> list[np.ndarray]:
    """For each tap the matrix (side^2, side^2) by which a zero-padded "same" convolution reads the image there."""
    reach = kernel // 2
    lines = [np.eye(side, k=offset) for offset in range(-reach, reach + 1)]
    return [np.kron(rows, columns) for rows in lines for columns in lines]


def _by_tap(matrices: list[np.ndarray]) -> np.ndarray:
    """One column per tap; a row for each pair of output and input pixel."""
    return np.stack([matrix.ravel() for matrix in matrices], axis=1)


def disperse(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (out, in, 5, 5), in the dtype of `weight`; computed in float32 at least."""
    work = torch.promote_types(weight.dtype, torch.float32)
    matrix = torch.tensor(dispersion_matrix(), dtype=work, device=weight.device)
    wide = weight.to(work).flatten(2) @ matrix.T
    return wide.unflatten(2, (5, 5)).to(weight.dtype)


def dispersed_conv(x: Tensor, weight: Tensor, bias: Tensor | None, **settings: object) -> Tensor:
    """In the place of a convolution's own `_conv_forward`. The 5x5 kernel is made at each call (nine multiplications per
    tap, against one per tap and pixel for the convolution), so weights that are fused, loaded or offloaded stay right.
    """
    return F.conv2d(x, disperse(weight), bias, **settings)
