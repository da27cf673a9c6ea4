"""3x3 convolutions with a wider field: the kernel is dilated by a factor that need not be whole, or dispersed as well.

The factor goes into the convolution's own `dilation` and `padding`, so the module keeps its class, its forward and its
hooks: offloading, copying, compiling and PEFT's wrappers do not notice. A factor that is not whole adds two hooks that
resize the input and the output. Nothing is ever added to the state dict.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable

import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffusers_wadi.downstream.scalecrafter._dispersion import dispersed_conv
from diffusers_wadi.lorad import LoRaDLayer

KEPT = ("conv_in", "conv_out")  # what reads and writes latents stays as it is
ORIGINAL = "_before_scalecrafter"  # on a convolution: its own (dilation, padding)
WIDENED = "_scalecrafter_factor"  # on what the UNet calls, a convolution or PEFT's wrapper of one
RESIZED = "_scalecrafter_resize"  # on what the UNet calls: (input scale, stride, padding)


def wideable(unet: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every 3x3 convolution but `conv_in` and `conv_out`, as the UNet calls it.

    A convolution with an adapter is PEFT's wrapper under the convolution's own name.
    """
    found: dict[str, nn.Module] = {}
    for name, module in unet.named_modules():
        conv = base_of(module)
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and name not in KEPT and not inside_another:
            found[name] = module
    return found


def spread(names: Iterable[str], values: dict[str, float]) -> dict[str, float]:
    """`values` by the name of a layer or of the block around it -> by layer; the longest name wins.

    Raises:
        ValueError: a name that none of `names` is or lies in.
    """
    names = list(names)
    spread_out: dict[str, float] = {}
    for key in sorted(values, key=len):
        inside = [name for name in names if name == key or name.startswith(f"{key}.")]
        if not inside:
            blocks = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(key, sorted(blocks), n=3, cutoff=0) or sorted(names)[:3]
            raise ValueError(
                f"{key!r} is no 3x3 convolution of this UNet and no block with one; nearest are {', '.join(near)}. "
                "conv_in and conv_out are never widened."
            )
        spread_out |= dict.fromkeys(inside, values[key])
    return {name: spread_out[name] for name in names if name in spread_out}


def widen(module: nn.Module, factor: float, disperse: bool = False) -> None:
    """Give a convolution (or PEFT's wrapper of one) a field `factor` times as wide, of the same output size.

    With D = ceil(factor) and f = D / factor: resize the input by f, convolve with dilation D, resize to the size that
    the unchanged convolution would give (its own size, not the floor of half the input as in the authors' release,
    because a ControlNet's residuals have that size). A dispersed kernel is twice as wide by itself, and takes half
    the factor.
    """
    factor = round(factor / 2 if disperse else factor, 6)
    whole = max(1, math.ceil(factor))
    conv = base_of(module)
    setattr(module, WIDENED, factor)
    if whole != factor:
        setattr(module, RESIZED, (whole / factor, conv.stride, conv.padding))
        module.register_forward_pre_hook(_resize_input)
        module.register_forward_hook(_resize_output)
    if disperse and isinstance(module, LoRaDLayer):
        _refuse_turned(module)
        module.register_forward_pre_hook(_refuse_turned)
    # A LoRA's own 3x3 convolution has to see what the base sees.
    for inner in (m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == conv.kernel_size):
        _dilate(inner, whole, disperse)
        if whole != factor:
            mark_hooked(inner)


def mark_hooked(conv: nn.Conv2d) -> None:
    """Tell `torch.compile` of hooks on or around a convolution, until `restore`.

    It looks at attributes but not at hooks to see whether a graph still fits. So the dilation becomes a list of the same
    numbers, which is another type to the compiler and the same to the convolution.
    """
    if ORIGINAL not in conv.__dict__:
        setattr(conv, ORIGINAL, (conv.dilation, conv.padding))
    conv.dilation = list(conv.dilation)


def _dilate(conv: nn.Conv2d, whole: int, disperse: bool) -> None:
    setattr(conv, ORIGINAL, (conv.dilation, conv.padding))
    reach = 2 * whole if disperse else whole  # how far the outermost taps are from the middle
    conv.dilation = (whole, whole)
    conv.padding = tuple(p + reach - 1 for p in conv.padding)
    if disperse:
        settings = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
        conv._conv_forward = functools.partial(dispersed_conv, **settings)


def restore(unet: nn.Module) -> None:
    """Undo `widen` everywhere, to the bit; whatever adapters came or went in between."""
    for module in unet.modules():
        if ORIGINAL in module.__dict__:
            module.dilation, module.padding = module.__dict__.pop(ORIGINAL)
            module.__dict__.pop("_conv_forward", None)
        module.__dict__.pop(WIDENED, None)
        module.__dict__.pop(RESIZED, None)
        remove_hooks(module, (_resize_input, _resize_output, _refuse_turned))


def is_widened(module: nn.Module) -> bool:
    """Whether `widen` was called on this very module, and not undone."""
    return WIDENED in module.__dict__


def remove_hooks(module: nn.Module, ours: tuple[Callable, ...]) -> None:
    """Take `ours` off a module. By function, not by handle: the handles of a copied module are those of its source."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in ours]:
            del hooks[key]
            for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                flags.pop(key, None)


def _resize_input(module: nn.Module, args: tuple) -> tuple:
    x = args[0]
    scale = getattr(module, RESIZED)[0]
    size = [round(n * scale) for n in x.shape[-2:]]
    return (F.interpolate(x, size, mode="bilinear", align_corners=False), *args[1:])


def _resize_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    scale, stride, padding = getattr(module, RESIZED)
    # scale >= 1, so the size before `_resize_input` can be had back from that after it.
    before = [round(n / scale) for n in args[0].shape[-2:]]
    size = [(n + 2 * p - 3) // s + 1 for n, p, s in zip(before, padding, stride)]
    return F.interpolate(output, size, mode="bilinear", align_corners=False)


def _refuse_turned(module: nn.Module, *_) -> None:
    """A LoRaD that is not fused turns the 3x3 kernel at each call, where the 5x5 one could only be made from the base."""
    if not module.merged and not module.disable_adapters and any(n in module.lorad_A for n in module.active_adapters):
        raise ValueError(
            "dispersed kernels and a LoRaD on the same convolution need the LoRaD fused; call fuse_lorad() first, or "
            "leave dispersed=False"
        )


def base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
