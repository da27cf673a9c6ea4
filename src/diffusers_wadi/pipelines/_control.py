"""What a ControlNet asks of one step: conditions, scales and settings that would silently do nothing are refused.

diffusers keeps the ControlNet at step i of n if start <= i / n and (i + 1) / n <= end, so that at one step any other start
or end switches it off altogether, while it is still paid for. It resizes a condition image that does not fit, clips 16-bit
ones to white, drops alpha, and leaves arrays of 0 to 255 as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image

EXACT_MODES = ("RGB", "L", "1", "P")  # PIL's conversion to RGB keeps what these show
SAME_FAMILY = ("cross_attention_dim", "block_out_channels")


def nets_of(controlnet: Any) -> list[ControlNetModel]:
    """The ControlNets of a pipeline's component, of a list, or the one that it is; compiled ones as they were.

    Raises:
        TypeError: something that the stock pipeline cannot use.
    """
    controlnet = getattr(controlnet, "_orig_mod", controlnet)
    if isinstance(controlnet, MultiControlNetModel):
        nets = list(controlnet.nets)
    else:
        nets = list(controlnet) if isinstance(controlnet, (list, tuple)) else [controlnet]
    for net in nets:
        if not isinstance(getattr(net, "_orig_mod", net), ControlNetModel):
            raise TypeError(
                f"controlnet is {net!r:.80}, expected a diffusers.ControlNetModel or a list of them; load one with "
                "ControlNetModel.from_pretrained"
            )
    return [getattr(net, "_orig_mod", net) for net in nets]


def refuse_other_family(unet: UNet2DConditionModel, nets: Sequence[ControlNetModel]) -> None:
    """Refuse ControlNets of another Stable Diffusion family than the UNet.

    Raises:
        ValueError: names the setting that differs.
    """
    for number, net in enumerate(nets):
        for name in SAME_FAMILY:
            own, wanted = (_plain(model.config[name]) for model in (net, unet))
            if own != wanted:
                raise ValueError(
                    f"ControlNet {number} has {name}={own} and the UNet {wanted}: they are of different families. Use a "
                    "ControlNet made for this base (Stable Diffusion 1.5 reads texts of width 768, 2.1 of 1024)."
                )


def real_scale(scale: Any, nets: Sequence[ControlNetModel]) -> Any:
    """`controlnet_conditioning_scale` with whole numbers as floats, which the stock pipeline insists on.

    Raises:
        ValueError: not finite, or not one for each ControlNet, where the stock pipeline leaves the last nets out.
    """
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale]
    if all(isinstance(number, Real) for number in scales):
        scales = [float(number) for number in scales]
        if not all(math.isfinite(number) for number in scales):
            raise ValueError(f"controlnet_conditioning_scale={scale} is not finite; try 0.5 to 1.5")
    if not isinstance(scale, (list, tuple)):
        return scales[0]
    if len(scales) != len(nets):
        raise ValueError(
            f"controlnet_conditioning_scale has {len(scales)} numbers for {len(nets)} ControlNets; give one for each, or a "
            "single number for all"
        )
    return scales if len(nets) > 1 else scales[0]


def refuse_what_is_void_at_one_step(start: Any, end: Any, guess_mode: bool, guidance_scale: float) -> None:
    """Refuse settings that mean something only over several steps, or only with guidance.

    Raises:
        ValueError: with the reason and the remedy.
    """
    for name, value, neutral in (("control_guidance_start", start, 0.0), ("control_guidance_end", end, 1.0)):
        if any(number != neutral for number in (value if isinstance(value, (list, tuple)) else [value])):
            raise ValueError(
                f"{name}={value}: the only step is both the first and the last one, so that this switches the ControlNet "
                f"off altogether. Leave it at {neutral} and choose controlnet_conditioning_scale for a weaker control."
            )
    if guess_mode and guidance_scale <= 1:
        raise ValueError(
            f"guess_mode needs guidance_scale above 1 and it is {guidance_scale}: there is no unconditional half to spare "
            "from the ControlNet, and only its shallow layers would be weakened, to a tenth. Leave guess_mode out; for a "
            "weaker control lower controlnet_conditioning_scale."
        )


def refuse_unfit_conditions(
    image: Any, height: int | None, width: int | None, latents: torch.Tensor | None, unit: int, channels: Sequence[int]
) -> None:
    """Refuse condition images that would be resized, misread, or fail half-way.

    Args:
        image: as the pipeline takes it: a condition, a list of them, or for several nets a list of such lists.
        height, width: of the image to draw in pixels, None for the condition's.
        latents: given start noise, None for none.
        unit: pixels per latent, to a multiple of which sizes must be.
        channels: that each net reads.

    Raises:
        ValueError: names size, mode or range, and the remedy.
    """
    if image is None:
        raise ValueError("image= is missing: the condition. Without one use WaDiPipeline.from_pipe(pipe).")
    whole = 1 if len(channels) == 1 else 2  # lists around a condition that is not itself a batch
    conditions = list(_flat(image))
    for number, (condition, depth) in enumerate(conditions):
        if depth < whole and getattr(condition, "ndim", 4) != 4:
            raise ValueError(
                f"condition image {number} has {condition.ndim} dimensions and would be read as a batch of "
                f"{len(condition)}; give image[None], or PIL images"
            )
    sizes = [_size_of(condition, number, set(channels)) for number, (condition, _) in enumerate(conditions)]
    for number, size in enumerate(sizes):
        wanted = (width or size[0], height or size[1])
        if size != wanted or size != sizes[0]:
            asked = f"the first is {_by(sizes[0])}" if size == wanted else f"the image is to be {_by(wanted)}"
            raise ValueError(
                f"condition image {number} is {_by(size)} (width x height) and {asked}. Resize it, lines and masks with "
                "Image.NEAREST, or leave height and width out."
            )
        if size[0] % unit or size[1] % unit or not min(size):
            raise ValueError(
                f"condition image {number} is {_by(size)} (width x height); expected multiples of {unit}. Resize or crop "
                f"it, for example to {_by([max(unit, round(side / unit) * unit) for side in size])}."
            )
    if latents is not None and sizes and tuple(latents.shape[-2:]) != (sizes[0][1] // unit, sizes[0][0] // unit):
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} do not fit a condition image of {_by(sizes[0])}: expected "
            f"{sizes[0][1] // unit} rows and {sizes[0][0] // unit} columns"
        )


def _flat(image: Any, depth: int = 0) -> Iterator[tuple[Any, int]]:
    """The conditions in lists of lists, and how deep each lies."""
    if not isinstance(image, (list, tuple)):
        yield image, depth
        return
    for part in image:
        yield from _flat(part, depth + 1)


def _size_of(condition: Any, number: int, channels: set[int]) -> tuple[int, int]:
    """(width, height) of one condition, or a batch of them, that can be read."""
    if isinstance(condition, Image.Image):
        if condition.mode not in EXACT_MODES or "transparency" in condition.info:
            raise ValueError(
                f"condition image {number} has mode {condition.mode!r}{' with transparency' * (condition.mode == 'P')}, "
                f"expected {', '.join(EXACT_MODES)}. Use image.convert('RGB'), or bring 16-bit and float images into 0 to "
                "255 first; diffusers_wadi.downstream.controlnet.condition_image(image, None) does the former."
            )
        return condition.size
    if isinstance(condition, np.ndarray):
        shape = condition.shape[-3:] if condition.ndim > 2 else (*condition.shape, 1)
        height, width, depth = shape
        kind, low, high = condition.dtype.kind, condition.min(initial=0), condition.max(initial=0)
    elif isinstance(condition, torch.Tensor):
        depth, height, width = condition.shape[-3:] if condition.ndim > 2 else (1, *condition.shape[-2:])
        kind = "f" if condition.is_floating_point() else str(condition.dtype)
        low, high = (condition.min().item(), condition.max().item()) if condition.numel() else (0, 0)
    else:
        raise TypeError(
            f"condition image {number} is {type(condition)}, expected a PIL image, a numpy array or a torch tensor; "
            "diffusers.utils.load_image reads files and addresses"
        )
    if kind != "f" or not (low >= 0 and high <= 1):
        raise ValueError(
            f"condition image {number} holds {condition.dtype} from {low} to {high}, expected floats from 0 to 1 (not -1 to "
            "1): divide bytes by 255, or give PIL images"
        )
    if depth not in channels:
        raise ValueError(
            f"condition image {number} has {depth} channels and the ControlNet reads {sorted(channels)}; arrays are "
            "(height, width, channels), tensors (channels, height, width)"
        )
    return width, height


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
