"""LoRaD on convolutions (the paper's "Linear + Conv"): pairs along the flattened (in/groups, kernel) axis of the weight.

In row-major order the partners of a 3x3 kernel are neighbouring taps, and some pairs reach over to the next channel.
Where that axis is odd (an odd number of channels with a 3x3 kernel), its last tap has no partner and stays as it is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_wadi.lorad.kernels.precision import autocast_dtype, autocast_off
from diffusers_wadi.lorad.layer import TurnedWeightLayer
from diffusers_wadi.lorad.rotation import factor_gradients, turn_weight
from diffusers_wadi.lorad.targets import CONVOLUTIONS

__all__ = ["LoRaDConv1d", "LoRaDConv2d", "LoRaDConv3d", "lorad_conv"]

Settings = tuple  # stride, padding, dilation, groups: what torch.convolution takes, one number per spatial axis


def lorad_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A convolution with the rotated weight, keeping at most `x`, `weight`, `A` and `B` for the backward pass.

    Args:
        x: (batch, in, *size). weight: (out, in/groups, *kernel). bias: (out,) or None.
        A: (out, r). B: (r, n // 2) for n = in/groups times the size of the kernel.
        stride, padding, dilation: one number per spatial axis; the padding is with zeros. groups: default 1.
        dtype: in which the rotated weight meets `x`, without autocast. Default: that of `weight`.

    Returns:
        (batch, out, *size), in the dtype that the plain convolution would have had.
    """
    settings = (tuple(stride), tuple(padding), tuple(dilation), groups)
    low = autocast_dtype(x.device.type)
    if low is None or x.dtype == torch.float64:
        return _apply(x, weight, bias, A, B, settings, dtype or weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _apply(x.to(low), weight, None if bias is None else bias.to(low), A, B, settings, low)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, settings: Settings, dtype: Any):
    if not torch.is_grad_enabled():
        return _convolve(x, turn_weight(weight, A, B, dtype), bias, settings)
    return _LoRaDConv.apply(x, weight, bias, A, B, settings, dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    stride, padding, dilation, groups = settings
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)


class _LoRaDConv(torch.autograd.Function):
    """As `_LoRaDLinear` in rotation.py: the rotated weight is made again in the backward pass."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, settings: Settings, dtype: Any):
        return _convolve(x, turn_weight(weight, A, B, dtype), bias, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, A, B, ctx.settings, _ = inputs
        adapts = any(ctx.needs_input_grad[i] for i in (1, 3, 4))
        ctx.shape = x.shape  # a frozen adapter only hands the gradient on, for which x itself is not needed
        ctx.save_for_backward(x if adapts else None, weight, A, B)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        d_x = d_weight = d_bias = d_A = d_B = None
        with autocast_off(grad.device.type):
            # One at a time: the turned weight is gone before its gradient is made. Of the operands that a gradient does
            # not depend on, only the shapes are asked for.
            if needs_x:
                source, turned = grad.new_empty(1).expand(ctx.shape), turn_weight(weight, A, B, grad.dtype)
                d_x = _backward(grad, source, turned, ctx.settings, (True, False, False))[0]
                del turned
            if x is not None or needs_bias:
                shaped = grad.new_empty(1).expand(weight.shape)
                source = grad.new_empty(1).expand(ctx.shape) if x is None else x
                needs = (False, x is not None, needs_bias)
                _, d_rotated, d_bias = _backward(grad, source, shaped, ctx.settings, needs)
            if needs_weight:
                d_weight = turn_weight(d_rotated, A, B, weight.dtype, inverse=True)
            if needs_A or needs_B:
                d_A, d_B = factor_gradients(weight, d_rotated, A, B, needs_A, needs_B)
        return d_x, d_weight, d_bias, d_A, d_B, None, None


def _backward(grad: Tensor, x: Tensor, weight: Tensor, settings: Settings, needs: tuple[bool, bool, bool]) -> tuple:
    stride, padding, dilation, groups = settings
    none = (0,) * len(stride)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, none, groups, needs
    )


class _LoRaDConvNd(TurnedWeightLayer):
    """A convolution with LoRaD adapters: stride, padding of every kind, dilation and groups as the base has them.

    (batch, in, *size) or (in, *size) -> the same with out channels.
    """

    adapts = CONVOLUTIONS

    def _turned(self, x: Tensor, A: Tensor, B: Tensor, bias: bool = True) -> Tensor:
        inner = self.get_base_layer()
        axes = len(inner.stride)
        batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
        batched, padding = _padded(batched, inner)
        weight, dtype = inner.weight, None if inner.weight.dtype.itemsize > 1 else x.dtype
        bias = inner.bias if bias else None
        bias = bias if dtype is None or bias is None else bias.to(dtype)
        y = lorad_conv(batched, weight, bias, A, B, inner.stride, padding, inner.dilation, inner.groups, dtype)
        return y if x.dim() == axes + 2 else y.squeeze(0)

    def _times(self, x: Tensor, rotated: Tensor, bias: Tensor | None) -> Tensor:
        inner = self.get_base_layer()
        axes = len(inner.stride)
        batched, padding = _padded(x if x.dim() == axes + 2 else x.unsqueeze(0), inner)
        settings = (tuple(inner.stride), tuple(padding), tuple(inner.dilation), inner.groups)
        y = _convolve(batched, rotated, bias, settings)
        return y if x.dim() == axes + 2 else y.squeeze(0)

    def _plain(self, x: Tensor) -> Tensor:
        inner = self.get_base_layer()
        return inner._conv_forward(x, inner.weight, None)


def _padded(x: Tensor, conv: nn.Module) -> tuple[Tensor, tuple[int, ...]]:
    """`x` with the padding that a convolution cannot do itself, and the zeros that it can."""
    axes = len(conv.stride)
    if conv.padding_mode != "zeros":
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0,) * axes
    if conv.padding == "valid":
        return x, (0,) * axes
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        if any(n % 2 for n in total):
            return F.pad(x, conv._reversed_padding_repeated_twice), (0,) * axes
        return x, tuple(n // 2 for n in total)
    return x, conv.padding


class LoRaDConv1d(_LoRaDConvNd):
    """`nn.Conv1d` with LoRaD adapters."""


class LoRaDConv2d(_LoRaDConvNd):
    """`nn.Conv2d` with LoRaD adapters."""


class LoRaDConv3d(_LoRaDConvNd):
    """`nn.Conv3d` with LoRaD adapters."""
