"""One widened convolution: what it computes, how far it sees, and that undoing leaves nothing behind."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_wadi.downstream.scalecrafter._convolutions import ORIGINAL, RESIZED, WIDENED, restore, widen


def conv(stride=1, channels=(3, 5), dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Conv2d(*channels, 3, stride=stride, padding=1).to(dtype)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_a_whole_factor_is_a_dilation(factor, stride):
    layer, x = conv(stride), torch.randn(2, 3, 15, 12)
    expected = F.conv2d(x, layer.weight, layer.bias, stride, padding=factor, dilation=factor)
    shape = layer(x).shape
    widen(layer, factor)
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == shape


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("factor", [1.25, 1.5, 2.5, 2.7])
@pytest.mark.parametrize("size", [(18, 18), (25, 16), (9, 13)])
def test_a_fraction_resizes_around_the_dilation(factor, stride, size):
    layer, x = conv(stride), torch.randn(1, 3, *size)
    whole = math.ceil(factor)
    larger = F.interpolate(x, [round(n * whole / factor) for n in size], mode="bilinear", align_corners=False)
    wide = F.conv2d(larger, layer.weight, layer.bias, stride, padding=whole, dilation=whole)
    native = layer(x).shape[-2:]  # not the floor of half the size: a ControlNet's residuals have this one
    widen(layer, factor)
    assert torch.equal(layer(x), F.interpolate(wide, native, mode="bilinear", align_corners=False))


@pytest.mark.parametrize("factor", [1.01, 1.25, 1.5, 1.75, 1.99, 2.5, 3.3, 6.1])
def test_the_output_has_the_unchanged_size_at_every_input_size(factor):
    for stride in (1, 2):
        plain, wide = conv(stride, (1, 1)), conv(stride, (1, 1))
        widen(wide, factor)
        for size in (*range(3, 40), 64, 97, 160):
            x = torch.zeros(1, 1, size, 3)
            assert wide(x).shape == plain(x).shape, size


@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
def test_the_field_grows_and_keeps_nine_taps(dilation):
    layer = conv(channels=(1, 1))
    widen(layer, dilation)
    x = torch.zeros(1, 1, 21, 21, requires_grad=True)
    layer(x)[0, 0, 10, 10].backward()
    rows, columns = torch.nonzero(x.grad[0, 0], as_tuple=True)
    assert len(rows) == 9
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 2 * dilation + 1


@pytest.mark.parametrize("factor", [2, 2.5, 3, 4])
def test_a_constant_stays_what_it_was_inside(factor):
    layer, x = conv(dtype=torch.float64), torch.full((1, 3, 40, 40), 0.7, dtype=torch.float64)
    before = layer(x)[..., 20, 20]
    widen(layer, factor)
    torch.testing.assert_close(layer(x)[..., 20, 20], before, atol=1e-6, rtol=0)


def test_dilation_does_on_an_enlarged_image_what_the_kernel_did_before():
    layer, x = conv(), torch.randn(1, 3, 9, 9)
    before = layer(x)
    enlarged = F.interpolate(x, (17, 17), mode="bilinear", align_corners=True)
    widen(layer, 2)
    torch.testing.assert_close(layer(enlarged)[..., ::2, ::2], before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor, disperse", [(2, False), (2.5, False), (3, True), (4, True)])
def test_restoring_leaves_nothing_behind(factor, disperse):
    layer, x = conv(), torch.randn(1, 3, 12, 12)
    expected, attributes = layer(x), set(layer.__dict__)
    weights = copy.deepcopy(layer.state_dict())
    widen(layer, factor, disperse)
    assert not torch.equal(layer(x), expected)
    assert layer.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in layer.state_dict().items())
    restore(layer)
    assert torch.equal(layer(x), expected)
    assert set(layer.__dict__) == attributes
    assert (layer.dilation, layer.padding) == ((1, 1), (1, 1))
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_a_copy_is_widened_and_restored_by_itself():
    layer, x = conv(), torch.randn(1, 3, 12, 12)
    expected = layer(x)
    widen(layer, 2.5)
    twin = copy.deepcopy(layer)
    wide = layer(x)
    assert torch.equal(twin(x), wide)
    restore(twin)
    assert torch.equal(twin(x), expected)
    assert not {ORIGINAL, RESIZED, WIDENED} & set(twin.__dict__)
    assert torch.equal(layer(x), wide)
