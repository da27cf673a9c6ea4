"""The judge of Shapes World as a metric: which attributes of its caption an image shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from diffusers_wadi._optional import require
from diffusers_wadi.evaluation.metrics.images import ImageSet, read_image
from diffusers_wadi.shapes import judge_image, parse_caption


def check_captions(images: ImageSet) -> None:
    """Refuse captions that are not of Shapes World, and images that are not square.

    Raises:
        ValueError: names the first of them.
        ImportError: scipy is missing.
    """
    require("scipy", "eval")
    for file, prompt, (width, height) in zip(images.files, images.prompts, images.sizes):
        try:
            parse_caption(prompt)
        except ValueError as error:
            raise ValueError(
                f"shapes judges captions of Shapes World alone, and that of {file} is none: {error}"
            ) from error
        if width != height:
            raise ValueError(f"shapes judges square images, and {file} is of {width}x{height} pixels")


def shapes_score(images: ImageSet) -> dict[str, Any]:
    """`judge_all` of a set of images, one in memory at a time."""
    return judge_all((np.asarray(read_image(file)) for file in images.files), images.prompts)


def judge_all(images: Iterable[np.ndarray], captions: Iterable[str]) -> dict[str, Any]:
    """What share of the captions holds.

    Args:
        images: uint8 arrays (n, n, 3).
        captions: one for each, of Shapes World.

    Returns:
        "attributes", the share of all attributes that are right, "captions", the share that are wholly right, and
        "by_attribute" with the share of each kind.
    """
    kinds: dict[str, list[bool]] = {}
    whole = []
    for image, caption in zip(images, captions, strict=True):
        verdict = judge_image(image, caption)
        whole.append(all(verdict.values()))
        for name, right in verdict.items():
            kinds.setdefault(name.split(".")[-1], []).append(right)
    return {
        "attributes": float(np.mean([right for rights in kinds.values() for right in rights])),
        "captions": float(np.mean(whole)),
        "by_attribute": {name: float(np.mean(rights)) for name, rights in sorted(kinds.items())},
    }
