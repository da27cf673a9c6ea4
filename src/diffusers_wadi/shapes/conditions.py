"""Condition images of Shapes World for a ControlNet, and how well an image keeps to them."""

from __future__ import annotations

import numpy as np

from .judge import FOREGROUND, segment

CONDITIONS = ("mask", "edge")


def foreground_mask(image: np.ndarray) -> np.ndarray:
    """Where an image shows shapes, by the judge's segmentation.

    Args:
        image: uint8 array (n, n, 3).

    Returns:
        bool array (n, n).
    """
    return segment(image)[2] > FOREGROUND


def condition_of(image: np.ndarray, kind: str = "mask") -> np.ndarray:
    """The condition image of a render: its shapes in white on black.

    Args:
        image: uint8 array (n, n, 3).
        kind: "mask" for filled shapes, "edge" for their innermost pixels along the outline. Neither says a colour.

    Returns:
        uint8 array (n, n, 3) of 0 and 255.

    Raises:
        ValueError: another `kind`.
    """
    if kind not in CONDITIONS:
        raise ValueError(f"condition {kind!r} is not known; expected one of {', '.join(CONDITIONS)}")
    mask = foreground_mask(image)
    if kind == "edge":
        mask = mask & ~_inside(mask)
    return np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=-1)


def mask_iou(image: np.ndarray, condition: np.ndarray) -> float:
    """Intersection over union of the shapes in an image and the filled mask that was asked for; 0 without any shape.

    Args:
        image: uint8 array (n, n, 3) that was drawn.
        condition: uint8 array (n, n, 3), a "mask" of `condition_of`.
    """
    drawn, asked = foreground_mask(image), condition[..., 0] > 127
    union = (drawn | asked).sum()
    return float((drawn & asked).sum() / union) if union else 0.0


def _inside(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are all in the mask."""
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
