"""From prompts and seeds to pixels in two halves, so that the host need not wait while a device computes.

A call of a pipeline on a GPU returns as soon as everything is enqueued, unless it is asked for images on the host. So
the first half enqueues the drawing and the copy of its pixels, and the second, in another thread, waits for that copy.
Meanwhile the first thread tokenises, seeds and enqueues the next batch. On a CPU the first half does all the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["PendingImages", "start_drawing"]


@dataclass(frozen=True)
class PendingImages:
    """Images that may still be on their way from the device.

    Args:
        pixels: uint8 (n, height, width, 3), on the host once `event` has happened.
        finite: bool (n,), whether all numbers of an image were finite before they were rounded.
        event: of the device, behind the copies; None: they are there.
    """

    pixels: torch.Tensor
    finite: torch.Tensor
    event: Any = None

    def wait(self) -> tuple[np.ndarray, list[bool]]:
        """Pixels and `finite`, when they are there. From any thread, any number of times.

        Raises:
            RuntimeError: the device failed meanwhile.
        """
        if self.event is not None:
            self.event.synchronize()
        return self.pixels.numpy(), self.finite.tolist()


@torch.no_grad()
def start_drawing(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]) -> PendingImages:
    """Draw one image for each prompt with a diffusers text-to-image pipeline.

    Every image has a generator of its own on the CPU, whatever the device, so that a seed means the same noise
    everywhere. The pixels are those that the pipeline itself rounds to, bit for bit.

    Args:
        prompts, seeds: n of each.
        call: further arguments for the pipeline.

    Raises:
        TypeError: the pipeline gives no tensor when asked for one (`output_type="pt"`).
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    images = pipe(
        prompt=list(prompts), generator=generators, output_type="pt", **call
    ).images  # (n, 3, h, w) in [0, 1]
    if not isinstance(images, torch.Tensor):
        raise TypeError(
            f"{type(pipe).__name__} gave a {type(images).__name__} for output_type='pt'; expected a text-to-image "
            "pipeline of diffusers, which gives a tensor"
        )
    finite = images.isfinite().flatten(1).all(1)
    pixels = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()  # a quarter of the bytes
    if images.device.type != "cuda":
        return PendingImages(pixels.cpu(), finite.cpu())
    # Into pinned memory, which PyTorch takes of itself for such a copy.
    pixels, finite = pixels.to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True)
    event = torch.cuda.Event(blocking=True)  # sleeps, where another would spin on a core that the next batch needs
    event.record(torch.cuda.current_stream(images.device))
    return PendingImages(pixels, finite, event)
