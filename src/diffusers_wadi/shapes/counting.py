"""How many objects an image of Shapes World shows: for sizes above the trained one, where models tend to repeat them."""

from dataclasses import dataclass

import numpy as np

from .._optional import require
from .judge import FOREGROUND, MIN_AREA, _nearest, segment
from .scenes import COLOURS, Scene, parse_caption


@dataclass(frozen=True)
class ObjectCount:
    """`found`: objects on the image, `expected`: the caption's, `repeated`: more than one of a colour of the caption."""

    found: int
    expected: int
    repeated: int

    @property
    def right(self) -> bool:
        return self.found == self.expected


def count_objects(image: np.ndarray, caption: str | Scene) -> ObjectCount:
    """Counts connected parts of one colour each, in the judge's segmentation.

    The smallest part that counts is as small as in a 64-pixel image, whatever the size: what is repeated on a larger
    image has the size that the model was trained on.

    Args:
        image: uint8 array (height, width, 3).
        caption: a Shapes World caption, or its scene.

    Raises:
        ValueError: if the image is no uint8 RGB array, or the caption is not in the grammar.
        ImportError: if scipy is missing (extra "eval").
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"count_objects expects a uint8 RGB image (height, width, 3), but got {image.dtype} {image.shape}"
        )
    scene = parse_caption(caption) if isinstance(caption, str) else caption
    by_colour = _parts_by_colour(image)
    repeated = sum(max(0, by_colour.get(item.colour, 0) - 1) for item in scene.items)
    return ObjectCount(sum(by_colour.values()), len(scene.items), repeated)


def _parts_by_colour(image: np.ndarray) -> dict[str, int]:
    ndimage = require("scipy.ndimage", extra="eval")
    _, _, distance = segment(image)
    foreground = distance > FOREGROUND
    nearest = np.where(foreground, _nearest(image, COLOURS), -1)
    counts = {}
    for index, colour in enumerate(COLOURS):
        mask = nearest == index
        # An object survives one round of erosion; the soft edge between two colours does not.
        core = ndimage.binary_erosion(mask, np.ones((3, 3)), border_value=1)
        labels, number = ndimage.label(mask)
        cores = np.bincount(labels[core], minlength=number + 1)[1:]
        areas = np.bincount(labels.ravel(), minlength=number + 1)[1:]
        if parts := int(((cores >= 1) & (areas >= MIN_AREA)).sum()):
            counts[colour] = parts
    return counts
