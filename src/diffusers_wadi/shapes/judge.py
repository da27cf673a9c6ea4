"""Says which attributes of a caption an image shows: pure image processing, no network.

The background is the palette's background colour nearest to the image border. What differs from it is cut into
connected parts of one palette colour each, and each part is matched against rendered templates of every shape.
Relation and size follow from the fitted centres and radii.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from .._optional import require
from .renderer import IMAGE_SIZE, RADII, shape_mask
from .scenes import BACKGROUNDS, COLOURS, SHAPES, Item, Scene, parse_caption

MIN_AREA = 40  # pixels of a 64-pixel image; the smallest shape drawn has about 90
FOREGROUND = 60  # RGB distance from the background at which something else begins
MIN_INNER = 10  # inner pixels that a colour needs to count as present
MIN_OVERLAP = 0.7  # intersection over union with the best template; below it a part is no shape at all


@dataclass(frozen=True)
class Part:
    """One connected foreground part. `shape` is "unknown" where no template fits; position and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    overlap: float


def _nearest(pixels: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Index of the nearest palette colour for pixels (..., 3)."""
    colours = np.array(list(palette.values()), dtype=np.float32)
    return ((pixels[..., None, :].astype(np.float32) - colours) ** 2).sum(-1).argmin(-1)


def _vote(indices: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return list(palette)[int(np.bincount(indices.ravel(), minlength=len(palette)).argmax())]


@cache
def _template_box(shape: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the shape's outline for radius 1 around (0, 0)."""
    rows, columns = np.nonzero(shape_mask(shape, 128, 128, 100, size=256) > 0.5)
    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return tuple((edge - 128) / 100 for edge in edges)


def _overlap(mask: np.ndarray, template: np.ndarray) -> float:
    return float((mask & template).sum() / max((mask | template).sum(), 1))


def _fit(shape: str, mask: np.ndarray) -> tuple[float, float, float, float]:
    """(overlap, x, y, radius) of the best template of one shape, started from the bounding box and refined."""
    rows, columns = np.nonzero(mask)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=float)
    left, top, right, bottom = _template_box(shape)
    radius = 0.5 * ((box[2] - box[0]) / (right - left) + (box[3] - box[1]) / (bottom - top))
    x = 0.5 * (box[0] + box[2]) - radius * 0.5 * (left + right)
    y = 0.5 * (box[1] + box[3]) - radius * 0.5 * (top + bottom)
    best = (-1.0, x, y, radius)
    for r in (radius, radius - 0.7, radius + 0.7):
        best = max(best, (_overlap(mask, shape_mask(shape, x, y, r, len(mask)) > 0.5), x, y, r))
    return best


def segment(image: np.ndarray) -> tuple[np.ndarray, str, np.ndarray]:
    """What lies before the background: where the distance is more than `FOREGROUND`.

    Args:
        image: uint8 array (n, n, 3).

    Returns:
        Pixels of the border (m, 3), the background's name by their vote, and every pixel's RGB distance to it (n, n).
    """
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, :2].reshape(-1, 3)])
    background = _vote(_nearest(border, BACKGROUNDS), BACKGROUNDS)
    distance = np.linalg.norm(image.astype(np.float32) - np.float32(BACKGROUNDS[background]), axis=-1)
    return border, background, distance


def find_parts(image: np.ndarray) -> tuple[str, list[Part]]:
    """Background ("unknown" where the border is no background colour) and foreground parts, largest first.

    Args:
        image: uint8 array (n, n, 3).
    """
    ndimage = require("scipy.ndimage", extra="eval")
    border, background, distance = segment(image)
    foreground = distance > FOREGROUND
    # Soft edges take colours between two palette entries, so only inner pixels say which colours are there.
    inner = ndimage.binary_erosion(foreground, np.ones((3, 3)))
    counts = np.bincount(_nearest(image[inner], COLOURS), minlength=len(COLOURS))
    present = {name: rgb for (name, rgb), n in zip(COLOURS.items(), counts) if n >= MIN_INNER * _area_scale(image)}
    # An image whose border is mostly no palette colour has no background that a caption could name.
    seen = (
        background
        if (np.linalg.norm(border - np.float32(BACKGROUNDS[background]), axis=-1) < 60).mean() > 0.6
        else "unknown"
    )
    if not present:
        return seen, []
    nearest = _nearest(image, present)
    parts = []
    for index, colour in enumerate(present):
        labels, count = ndimage.label(foreground & (nearest == index))
        masks = [labels == k for k in range(1, count + 1)]
        parts += [_describe(distance, mask, colour, background) for mask in masks if _is_part(mask, inner, image)]
    return seen, [part for _, part in sorted(parts, key=lambda pair: -pair[0])]


def _area_scale(image: np.ndarray) -> float:
    return (len(image) / IMAGE_SIZE) ** 2


def _is_part(mask: np.ndarray, inner: np.ndarray, image: np.ndarray) -> bool:
    """Large enough, and not a mere edge of something else."""
    return (mask & inner).any() and mask.sum() >= MIN_AREA * _area_scale(image)


def _describe(distance: np.ndarray, mask: np.ndarray, colour: str, background: str) -> tuple[int, Part]:
    """(area, part): the shape whose best template overlaps most."""
    # Half of the way from the background to the shape's own colour is where the drawn edge lies.
    half = 0.5 * np.linalg.norm(np.float32(COLOURS[colour]) - np.float32(BACKGROUNDS[background]))
    edge = mask & (distance > half)
    fits = {shape: _fit(shape, edge if edge.any() else mask) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name][0])
    overlap, x, y, radius = fits[shape]
    return int(mask.sum()), Part(shape if overlap >= MIN_OVERLAP else "unknown", colour, x, y, radius, overlap)


def _relation(first: Part, second: Part) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _size(part: Part, count: int, scale: float) -> str:
    """The size whose range of radii is nearer, on a logarithmic scale."""
    threshold = np.sqrt(RADII[count]["small"][1] * RADII[count]["large"][0])
    return "large" if part.radius / scale > threshold else "small"


def _item_verdict(item: Item, part: Part | None, prefix: str, count: int, scale: float) -> dict[str, bool]:
    verdict = {
        f"{prefix}shape": part is not None and part.shape == item.shape,
        f"{prefix}colour": part is not None and part.colour == item.colour,
    }
    if item.size:
        verdict[f"{prefix}size"] = part is not None and _size(part, count, scale) == item.size
    return verdict


def _verdict(scene: Scene, background: str, parts: list[Part], order: tuple[int, ...], scale: float):
    count = len(scene.items)
    chosen = [parts[i] if i < len(parts) else None for i in order]
    verdict = {"background": background == scene.background, "count": len(parts) == count}
    for k, (item, part) in enumerate(zip(scene.items, chosen), start=1):
        verdict |= _item_verdict(item, part, f"{k}." if count > 1 else "", count, scale)
    if scene.relation:
        verdict["relation"] = None not in chosen and _relation(*chosen) == scene.relation
    return verdict


def judge_image(image: np.ndarray, caption: str | Scene) -> dict[str, bool]:
    """Which attributes of the caption hold in the image.

    Args:
        image: uint8 array (n, n, 3), square, any size (templates scale with it).
        caption: a Shapes World caption, or the scene that it describes.

    Returns:
        {attribute: holds}. Attributes: "background", "count", "shape", "colour", and "size" where the caption says one;
        for two items these are "1.shape", "2.shape", ... and "relation". Parts of the image are assigned to the items
        so that most attributes hold.

    Raises:
        ValueError: if the image is not a square uint8 RGB array, or the caption is not in the grammar.
        ImportError: if scipy is missing (extra "eval").
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(
            f"judge_image expects a square uint8 RGB image (n, n, 3), but got {image.dtype} {image.shape}. "
            "Convert it with np.asarray(image.convert('RGB'))."
        )
    scene = parse_caption(caption) if isinstance(caption, str) else caption
    background, parts = find_parts(image)
    orders = [(0,)] if len(scene.items) == 1 else [(0, 1), (1, 0)]
    scale = len(image) / IMAGE_SIZE
    return max((_verdict(scene, background, parts, order, scale) for order in orders), key=lambda v: sum(v.values()))
