"""From decoded images to PIL ones, and from a pipeline to its device, without detours; the results are those of diffusers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn


class NoBar:
    """In the place of a progress bar for a single step."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *details: Any) -> None:
        pass

    def update(self, n: int = 1) -> None:
        """Nothing to show."""


def with_fast_images(processor: Any) -> None:
    """Have this image processor round PIL images to bytes where they are: a quarter of the data leaves the device."""
    # A user's own processor does what it does.
    names = ("postprocess", "denormalize", "pt_to_numpy", "numpy_to_pil")
    ours = all(getattr(type(processor), name, None) is getattr(VaeImageProcessor, name) for name in names)
    if ours and not vars(processor).keys() & set(names):
        processor.postprocess = functools.partial(_postprocess, processor)


def without_fast_images(processor: Any) -> None:
    """Undo `with_fast_images`."""
    own = getattr(processor, "__dict__", {}).get("postprocess")
    if getattr(own, "func", None) is _postprocess:
        del processor.postprocess


def _postprocess(
    processor: Any, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
) -> Any:
    plain = all(do_denormalize) if do_denormalize is not None else processor.config.do_normalize
    if output_type != "pil" or not plain or not isinstance(image, torch.Tensor) or image.shape[1:2] != (3,):
        return type(processor).postprocess(processor, image, output_type, do_denormalize)
    pixels = processor.denormalize(image).float().mul(255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def device_without_hooks(parts: Iterable[Any]) -> torch.device | None:
    """Where the models among these are, None if one is offloaded or of no device; a tenth of the time of diffusers' own search."""
    devices = []
    for model in parts:
        if not isinstance(model, nn.Module):
            continue
        stack = [model]
        while stack:
            module = stack.pop()
            if "_hf_hook" in vars(module) or "_diffusers_hook" in vars(module):
                return None
            stack += [child for child in module._modules.values() if child is not None]
        devices.append(next((parameter.device for parameter in model.parameters()), torch.device("meta")))
    if not devices or any(device.type == "meta" for device in devices):
        return None
    return next((device for device in devices if device.type != "cpu"), devices[0])
