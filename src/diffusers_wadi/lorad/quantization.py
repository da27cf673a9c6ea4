"""Bases with quantised weights: LoRaD turns the dequantised weight, and refuses what it cannot read.

Nothing here imports bitsandbytes or torchao: their weights are told by their types.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusers_wadi.lorad.rotation import lorad_linear

__all__ = [
    "dequantized",
    "is_quantized",
    "lorad_quantized_linear",
    "refuse_quantized",
    "refuse_unreadable",
]


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of this layer has to be dequantised before it can be turned."""
    weight = layer.weight
    if type(weight) in (Tensor, nn.Parameter):
        return False
    kind = type(weight).__name__
    if kind == "Params4bit":  # without a state it holds plain numbers: bitsandbytes quantises on the way to a device
        return weight.quant_state is not None
    if kind == "Int8Params":
        return not weight.is_floating_point()
    return type(weight).dequantize is not Tensor.dequantize


def refuse_unreadable(layer: nn.Module, name: str) -> None:
    """Refuse weights that are no floating-point numbers and cannot be dequantised.

    Raises:
        ValueError: with the type that was found.
    """
    weight = layer.weight
    if weight.is_floating_point() or is_quantized(layer):
        return
    raise ValueError(
        f"LoRaD turns floating-point weights, or those of bitsandbytes and torchao, but `{name}` is a "
        f"{type(layer).__name__} with {weight.dtype} weights ({type(weight).__name__}). Load the base without "
        "quantisation, or with one of those two."
    )


def refuse_quantized(layer: nn.Module, name: str) -> None:
    """Refuse a layer, other than a Linear, whose weight is not plain floating-point numbers.

    Raises:
        ValueError: with the type that was found.
    """
    if not layer.weight.is_floating_point() or is_quantized(layer):
        raise ValueError(
            f"LoRaD turns quantised weights of Linear layers only, but `{name}` is a {type(layer).__name__} with "
            f"{type(layer.weight).__name__} weights. Leave it out of `target_modules`, or do not quantise it."
        )


@torch.no_grad()
def dequantized(layer: nn.Module) -> Tensor:
    """The weight (out, in) as plain numbers; for a layer that is not quantised its weight itself.

    Raises:
        ValueError: the library that quantised it has no way back for this type.
    """
    weight = layer.weight
    if not is_quantized(layer):
        return weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        scale = weight.SCB if layer.state.SCB is None else layer.state.SCB  # the first call moves it into the state
        return weight.data.float() * (scale.float() / 127).to(weight.device).unsqueeze(1)
    try:
        return weight.dequantize()
    except NotImplementedError as error:
        raise ValueError(
            f"weights of type {type(weight).__name__} cannot be dequantised, which LoRaD needs. Load the base with "
            "another quantisation (int8 weight-only, say), or without."
        ) from error


def lorad_quantized_linear(x: Tensor, layer: nn.Module, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """`lorad_linear` over a quantised layer; training keeps no dequantised weight, it is made again when needed."""

    def compute(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        cast = None if bias is None else bias.to(x.dtype)
        return lorad_linear(x, dequantized(layer), cast, A, B, dtype=x.dtype)

    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, A, B)):
        return checkpoint(compute, x, A, B, use_reentrant=False)
    return compute(x, A, B)
