"""The 5x5 kernels: the properties that the published matrix has, from equations written anew as convolutions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_wadi.downstream.scalecrafter._convolutions import widen
from diffusers_wadi.downstream.scalecrafter._dispersion import disperse, dispersion_matrix


def structure_residual(matrix):
    """Sum of squares of conv5(U x; k5) - U conv3(x; k3) over unit inputs and kernels, by torch's own convolutions."""
    inputs = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)
    kernels = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)
    wide = (torch.as_tensor(matrix) @ torch.eye(9, dtype=torch.float64)).T.reshape(9, 1, 5, 5)

    def enlarged(x):
        return F.interpolate(x, (5, 5), mode="bilinear", align_corners=True)

    left = F.conv2d(enlarged(inputs), wide, padding=2)
    right = enlarged(F.conv2d(inputs, kernels, padding=1))
    return float((left - right).square().sum())


def embedded(distance):
    """The matrix that sets the nine taps `distance` apart in a 5x5 kernel and leaves the rest zero."""
    places = [(2 + distance * (r - 1)) * 5 + 2 + distance * (c - 1) for r in range(3) for c in range(3)]
    matrix = np.zeros((25, 9))
    matrix[places, range(9)] = 1
    return matrix


def test_the_matrix_has_the_published_properties():
    matrix = dispersion_matrix()
    assert matrix.shape == (25, 9) and np.linalg.matrix_rank(matrix) == 9
    assert np.linalg.cond(matrix) == pytest.approx(1.637, abs=1e-3)
    assert np.linalg.norm(matrix) == pytest.approx(2.5879, abs=1e-4)
    sums = matrix.sum(0).reshape(3, 3)
    corner, edge = 1.1267, 1.0613
    np.testing.assert_allclose(sums, [[corner, edge, corner], [edge, 1, edge], [corner, edge, corner]], atol=1e-4)
    np.testing.assert_allclose(matrix[:, 4], np.eye(25)[12], atol=1e-12)


def test_the_matrix_is_symmetric():
    grid = dispersion_matrix().reshape(5, 5, 3, 3)
    np.testing.assert_allclose(grid, grid[::-1, :, ::-1, :], atol=1e-12)
    np.testing.assert_allclose(grid, grid.transpose(1, 0, 3, 2), atol=1e-12)


def test_no_embedding_of_the_kernel_keeps_the_structure_as_well():
    assert structure_residual(dispersion_matrix()) == pytest.approx(4.11, abs=0.01)
    assert structure_residual(embedded(2)) == pytest.approx(9.25, abs=0.01)
    assert structure_residual(embedded(1)) == pytest.approx(62.25, abs=0.01)


def test_kernels_are_dispersed_one_by_one():
    kernels = torch.randn(4, 3, 3, 3)
    matrix = torch.as_tensor(dispersion_matrix(), dtype=torch.float32).view(5, 5, 3, 3)
    torch.testing.assert_close(disperse(kernels), torch.einsum("pqrc,oirc->oipq", matrix, kernels))
    assert disperse(kernels.half()).dtype == torch.float16


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("factor", [2, 4])
def test_a_dispersed_convolution_has_the_field_of_the_whole_factor(factor, stride):
    layer = nn.Conv2d(2, 3, 3, stride=stride, padding=1)
    x = torch.randn(1, 2, 24, 24, requires_grad=True)
    expected = F.conv2d(x, disperse(layer.weight), layer.bias, stride, padding=2 * (factor // 2), dilation=factor // 2)
    shape = layer(x).shape
    widen(layer, factor, disperse=True)
    assert torch.equal(layer(x), expected) and layer(x).shape == shape
    layer(x)[0, 0, 12 // stride, 12 // stride].backward()
    rows = torch.nonzero(x.grad[0, 0])[:, 0]
    assert (
        rows.max() - rows.min() + 1 == 2 * factor + 1
    )  # five taps factor/2 apart: as wide as three taps factor apart


def test_a_dispersed_convolution_takes_half_of_an_odd_factor():
    layer, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(1, 2, 24, 18)
    larger = F.interpolate(
        x, (32, 24), mode="bilinear", align_corners=False
    )  # 3 / 2 = 1.5: twice dilated, 4/3 as large
    wide = F.conv2d(larger, disperse(layer.weight), layer.bias, padding=4, dilation=2)
    widen(layer, 3, disperse=True)
    assert torch.equal(layer(x), F.interpolate(wide, (24, 18), mode="bilinear", align_corners=False))
