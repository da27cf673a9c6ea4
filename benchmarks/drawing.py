"""What the Shapes World benchmarks share: images of a pipeline from fixed seeds, and the time that one takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def draw(
    pipe: Any,
    prompts: Sequence[str],
    *,
    adapter: bool,
    batch_size: int = 50,
    first_seed: int = 0,
    control: Sequence[Any] | None = None,
    **call: Any,
) -> np.ndarray:
    """uint8 images (n, H, W, 3), of which image i starts from seed `first_seed` + i whatever the batches.

    Args:
        pipe: any pipeline from text to images.
        prompts: one for each image.
        adapter: with the adapters of its denoiser, or, where it has any, with them switched off.
        batch_size: images drawn at a time.
        first_seed: see above.
        control: a condition image for each prompt, if it is a ControlNet pipeline.
        **call: further arguments of `pipe`.
    """
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if getattr(denoiser, "peft_config", None):
        owner = (
            denoiser if hasattr(denoiser, "enable_adapters") else pipe
        )  # PixArt's has no adapter methods of its own
        name = "adapters" if owner is denoiser else "lora"
        getattr(owner, f"{'enable' if adapter else 'disable'}_{name}")()
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        given = {} if control is None else {"image": list(control[start : start + batch_size])}
        seeds = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(batch))]
        images.append(pipe(batch, generator=seeds, output_type="np", **given, **call).images)
    return np.round(np.concatenate(images) * 255).astype(np.uint8)


def seconds_per_image(one: Callable[[], Any], rounds: int = 3) -> float:
    """Median wall time of `one()`, which draws one image from prompt to pixels, after a warm-up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        one()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))
