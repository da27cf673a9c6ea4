"""Draws a Shapes World scene: seeded, anti-aliased, 64x64 by default."""

import math

import numpy as np
from PIL import Image, ImageDraw

from .scenes import BACKGROUNDS, COLOURS, Item, Scene

IMAGE_SIZE = 64
OVERSAMPLING = 4

# Radius in pixels of a 64-pixel image, uniform in the range. A pair has to share the image, so its shapes are smaller.
RADII = {
    1: {"small": (10.0, 12.0), "large": (19.0, 22.0)},
    2: {"small": (8.5, 9.5), "large": (12.5, 13.5)},
}
# Centres: a single shape strays from the middle in both directions. The shapes of a pair stray from the middles of their
# halves, little along the line that joins these and freely across it, each by itself. The freedom is what makes one
# step hard: the mean of all images of a caption, which an untrained student draws, must be none of them.
JITTER = 6.0
PAIR_JITTER = {"along": 1.5, "across": 6.0}
PAIR_OFFSET = 16.0


def _heart(points: int = 48) -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return list(zip(x / 16.0, (y + 2.5) / 16.0))


def _regular(corners: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """A polygon whose corners lie at the angles of a regular one, starting at the top, with radii taken in turn."""
    angles = [2 * math.pi * k / corners - math.pi / 2 for k in range(corners)]
    return [(radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a)) for k, a in enumerate(angles)]


# Outlines for radius 1 around (0, 0), y down. Circle and ring are drawn as ellipses.
_OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(x, y + 0.2) for x, y in _regular(3, (1.1,))],
    "star": _regular(10, (1.1, 0.46)),
    "heart": _heart(),
}
_ELLIPSES = {"circle": (0.95, 0.0), "ring": (1.0, 0.5)}


def shape_mask(shape: str, x: float, y: float, radius: float, size: int = IMAGE_SIZE) -> np.ndarray:
    """Coverage of one shape, in [0, 1].

    Args:
        shape: one of `SHAPES`.
        x, y: centre in pixels, from the top left corner.
        radius: in pixels.
        size: width and height of the image in pixels.

    Returns:
        float32 array (size, size).
    """
    k = OVERSAMPLING
    canvas = Image.new("L", (size * k, size * k), 0)
    draw = ImageDraw.Draw(canvas)
    if shape in _ELLIPSES:
        for part, fill in zip(_ELLIPSES[shape], (255, 0)):
            r = radius * part
            if r > 0:
                draw.ellipse([(x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k], fill=fill)
    else:
        draw.polygon([((x + radius * u) * k, (y + radius * v) * k) for u, v in _OUTLINES[shape]], fill=255)
    return np.asarray(canvas.reduce(k), dtype=np.float32) / 255.0


def _placements(scene: Scene, rng: np.random.Generator) -> list[tuple[Item, float, float, float]]:
    """(item, x, y, radius) for each item, in pixels of a 64-pixel image."""
    count, middle = len(scene.items), IMAGE_SIZE / 2
    dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}.get(scene.relation, (0, 0))
    placed = []
    for item, side in zip(scene.items, (1, -1)):
        jitter_x, jitter_y = rng.uniform(-1, 1, size=2) * _jitter(dx, dy)
        size = item.size or ("small", "large")[int(rng.integers(2))]
        radius = float(rng.uniform(*RADII[count][size]))
        placed.append(
            (item, middle + side * dx * PAIR_OFFSET + jitter_x, middle + side * dy * PAIR_OFFSET + jitter_y, radius)
        )
    return placed


def _jitter(dx: int, dy: int) -> tuple[float, float]:
    """Largest horizontal and vertical stray, for one shape (0, 0) or a pair joined by the line (dx, dy)."""
    if not (dx or dy):
        return JITTER, JITTER
    along, across = PAIR_JITTER["along"], PAIR_JITTER["across"]
    return (along, across) if dx else (across, along)


def render(scene: Scene, rng: np.random.Generator, size: int = IMAGE_SIZE) -> np.ndarray:
    """Draws a scene. Positions, exact radii and unsaid sizes come from `rng`.

    Args:
        scene: what to draw.
        rng: the source of everything that the caption leaves open.
        size: width and height in pixels, default 64.

    Returns:
        uint8 array (size, size, 3).
    """
    scale = size / IMAGE_SIZE
    image = np.broadcast_to(np.float32(BACKGROUNDS[scene.background]), (size, size, 3))
    for item, x, y, radius in _placements(scene, rng):
        coverage = shape_mask(item.shape, x * scale, y * scale, radius * scale, size)[..., None]
        image = image * (1 - coverage) + np.float32(COLOURS[item.colour]) * coverage
    return np.round(image).astype(np.uint8)


def render_scenes(scenes: list[Scene], seed: int = 0, size: int = IMAGE_SIZE) -> np.ndarray:
    """uint8 array (n, size, size, 3). Image `i` depends on `seed` and `i` alone."""
    return np.stack([render(scene, np.random.default_rng([seed, i]), size) for i, scene in enumerate(scenes)])
