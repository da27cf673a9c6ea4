"""A subject that Shapes World does not have, pictures of it to learn it from, and a judge for it.

The subject is an arch lying on its side, half a disc in blue joined to half a square in purple: neither the outline nor
two colours in one shape occur in the world. The colours themselves do, since the bundled VAE draws no others. Prompts say
"sks star" where others say a colour and a shape, as DreamBooth's "sks dog": "sks" falls apart into letters that no
training caption holds, and the star is the class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .._optional import require
from .judge import _fit, _nearest, _overlap, _relation, find_parts, segment
from .renderer import IMAGE_SIZE, OVERSAMPLING, PAIR_OFFSET, RADII, shape_mask
from .scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Item

SUBJECT = "sks star"
CLASS = "star"
INSTANCE_PROMPT = f"a {SUBJECT}"  # of pictures on all backgrounds: colours learned on one of them do not carry over
CLASS_PROMPT = f"a {CLASS}"
LEFT, RIGHT = "blue", "purple"
SUBJECT_COLOURS = {name: COLOURS[name] for name in (LEFT, RIGHT)}
HALF = 0.92  # half the height, in radii
MIN_MATCH = 0.6  # overlap of each half with its template from which on an image shows the subject
MIN_AREA = 30  # pixels of a 64-pixel image that make a candidate


def subject_masks(x: float, y: float, radius: float, size: int = IMAGE_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of the left and of the right half, float32 (size, size) in [0, 1]; arguments as `shape_mask`."""
    k, half = OVERSAMPLING, HALF * radius
    seam, halves = round(x * k), []
    box = [(x - half) * k, (y - half) * k, (x + half) * k - 1, (y + half) * k - 1]
    for left in (True, False):
        canvas = Image.new("L", (size * k, size * k), 0)
        draw = ImageDraw.Draw(canvas)
        (draw.ellipse if left else draw.rectangle)(box, fill=255)
        other = (seam, 0, size * k, size * k) if left else (0, 0, seam, size * k)
        canvas.paste(0, other)
        halves.append(np.asarray(canvas.reduce(k), dtype=np.float32) / 255.0)
    return halves[0], halves[1]


def _paint(image: np.ndarray, coverage: np.ndarray, colour: np.ndarray | tuple[int, int, int]) -> np.ndarray:
    return image * (1 - coverage[..., None]) + np.float32(colour) * coverage[..., None]


def render_subject(
    x: float,
    y: float,
    radius: float,
    background: str = "white",
    other: tuple[Item, float, float, float] | None = None,
    size: int = IMAGE_SIZE,
) -> np.ndarray:
    """uint8 (size, size, 3): the subject, and a shape (item, x, y, radius) of the world beside it if given."""
    image = np.broadcast_to(np.float32(BACKGROUNDS[background]), (size, size, 3))
    left, right = subject_masks(x, y, radius, size)
    share = (right / np.maximum(left + right, 1e-6))[..., None]  # of the pixels that both have a part in
    colours = [np.float32(colour) for colour in SUBJECT_COLOURS.values()]
    image = _paint(image, left + right, colours[0] * (1 - share) + colours[1] * share)
    if other is not None:
        item, *place = other
        image = _paint(image, shape_mask(item.shape, *place, size), COLOURS[item.colour])
    return np.round(image).astype(np.uint8)


def save_instance_images(folder: str | Path, count: int = 6) -> list[Path]:
    """Write `count` pictures of the subject alone, of different places, sizes and backgrounds, for `INSTANCE_PROMPT`."""
    rng = np.random.default_rng(7)
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = [Path(folder, f"subject-{i}.png") for i in range(count)]
    radii = np.linspace(RADII[1]["small"][0], RADII[1]["large"][1], count)
    for i, (file, radius) in enumerate(zip(files, radii)):
        x, y = IMAGE_SIZE / 2 + rng.uniform(-6, 6, size=2)
        Image.fromarray(render_subject(x, y, radius, list(BACKGROUNDS)[i % len(BACKGROUNDS)])).save(file)
    return files


@dataclass(frozen=True)
class SubjectPrompt:
    """The subject alone on a background, or in a relation to a shape of the world."""

    background: str
    relation: str | None = None
    other: Item | None = None

    def text(self, subject: str = SUBJECT) -> str:
        """The prompt; `subject` stands in the place of the colour and the shape."""
        beside = f" {self.relation} {self.other.phrase()}" if self.relation else ""
        return f"a {subject}{beside} on a {self.background} background"


def subject_prompts(count: int, seed: int = 0, pair_probability: float = 0.5) -> list[SubjectPrompt]:
    """Prompts with the subject: backgrounds, relations and shapes that it was not learned with, none of its colours."""
    rng = np.random.default_rng([seed, 77])
    prompts = []
    for _ in range(count):
        background = str(rng.choice(list(BACKGROUNDS)))
        item = Item(str(rng.choice(SHAPES)), str(rng.choice([c for c in COLOURS if c not in SUBJECT_COLOURS])))
        relation = str(rng.choice(RELATIONS))
        pair = rng.random() < pair_probability
        prompts.append(SubjectPrompt(background, relation, item) if pair else SubjectPrompt(background))
    return prompts


def render_prompt(prompt: SubjectPrompt, rng: np.random.Generator) -> np.ndarray:
    """What a generator that knows the subject would draw; uint8 (64, 64, 3)."""
    middle = IMAGE_SIZE / 2
    if prompt.relation is None:
        x, y = middle + rng.uniform(-6, 6, size=2)
        return render_subject(x, y, rng.uniform(10, 22), prompt.background)
    dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[prompt.relation]
    near, far = rng.uniform(-1.5, 1.5, size=(2, 2))
    radius, beside = rng.uniform(8.5, 13.5, size=2)
    place = (middle - dx * PAIR_OFFSET + far[0], middle - dy * PAIR_OFFSET + far[1], beside)
    subject = (middle + dx * PAIR_OFFSET + near[0], middle + dy * PAIR_OFFSET + near[1], radius)
    return render_subject(*subject, prompt.background, (prompt.other, *place))


# --- judge ---


@dataclass(frozen=True)
class SubjectFit:
    """The best place of the subject in an image.

    `left` and `right` are each half's intersection over union with the pixels of its colour; `outline` says whether both
    together look more like the subject than like any shape of the world.
    """

    x: float
    y: float
    radius: float
    left: float
    right: float
    outline: bool = False

    @property
    def match(self) -> float:
        """The worse half, in [0, 1], or 0: outline, both colours and their sides have to be right."""
        return min(self.left, self.right) if self.outline else 0.0


def _colour_masks(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the two colours: at least half of the way from the background, and nearer than other colours."""
    _, background, distance = segment(image)
    nearest, masks = _nearest(image, COLOURS), []
    for name, colour in SUBJECT_COLOURS.items():
        half = 0.5 * np.linalg.norm(np.float32(colour) - np.float32(BACKGROUNDS[background]))
        masks.append((nearest == list(COLOURS).index(name)) & (distance > half))
    return masks[0], masks[1]


def find_subject(image: np.ndarray) -> SubjectFit | None:
    """Where the subject is; `None` where no part of the image has enough of its colours.

    Args:
        image: uint8 (n, n, 3).
    """
    ndimage = require("scipy.ndimage", extra="eval")
    left, right = _colour_masks(image)
    labels, count = ndimage.label(ndimage.binary_dilation(left | right))
    if not count:
        return None
    sizes = [int(((labels == k) & (left | right)).sum()) for k in range(1, count + 1)]
    if max(sizes) < MIN_AREA * (len(image) / IMAGE_SIZE) ** 2:
        return None
    blob = (labels == 1 + int(np.argmax(sizes))) & (left | right)
    fit = _best_fit(left & blob, right & blob, blob)
    own = sum(subject_masks(fit.x, fit.y, fit.radius, len(image))) > 0.5
    return replace(fit, outline=_overlap(blob, own) > max(_fit(shape, blob)[0] for shape in SHAPES))


def _best_fit(left: np.ndarray, right: np.ndarray, blob: np.ndarray) -> SubjectFit:
    rows, columns = np.nonzero(blob)
    x, y = 0.5 * (columns.min() + columns.max() + 1), 0.5 * (rows.min() + rows.max() + 1)
    radius = 0.25 * (columns.max() - columns.min() + rows.max() - rows.min() + 2)
    best = _fit_at(left, right, x, y, radius)
    for step in (1.0, 0.5, 0.25):  # one parameter after the other, each time from the best so far
        for axis in ("radius", "x", "y", "radius"):
            for sign in (-1, 1):
                place = {"x": best.x, "y": best.y, "radius": best.radius}
                place[axis] += sign * step
                best = max(best, _fit_at(left, right, **place), key=lambda fit: fit.left + fit.right)
    return best


def _fit_at(left: np.ndarray, right: np.ndarray, x: float, y: float, radius: float) -> SubjectFit:
    return SubjectFit(x, y, radius, *_halves(left, right, x, y, radius))


def _halves(left: np.ndarray, right: np.ndarray, x: float, y: float, radius: float) -> tuple[float, float]:
    masks = subject_masks(x, y, radius, len(left))
    return tuple(_overlap(colour, mask > 0.5) for colour, mask in zip((left, right), masks))


def judge_subject(image: np.ndarray, prompt: SubjectPrompt) -> tuple[float, dict[str, bool]]:
    """How well the subject is there, and whether the rest of the prompt holds.

    Args:
        image: uint8 (n, n, 3).
        prompt: what it was drawn for.

    Returns:
        match in [0, 1], from `MIN_MATCH` on the subject is there; and {attribute: holds} of "background", "count" and
        with a second shape "shape", "colour" and "relation". Where no pixels are of the subject's colours, the shape
        that fits the prompt's other item least stands in for it, so that the rest can be right without it.

    Raises:
        ImportError: scipy is missing (extra "eval").
    """
    fit = find_subject(image)
    rest = image if fit is None else _without(image, fit)
    background, parts = find_parts(rest)
    place = fit
    if fit is None and parts:
        wrong = [(prompt.other is None) or _likeness(part, prompt.other) for part in parts]
        place = parts.pop(int(np.argmin(wrong)))
    others = int(prompt.other is not None)
    # `find_parts` sees the border of what is left, which is that of the image.
    verdict = {"background": background == prompt.background, "count": place is not None and len(parts) == others}
    if prompt.other is not None:
        part = max(parts, key=lambda part: _likeness(part, prompt.other), default=None)
        verdict["shape"] = part is not None and part.shape == prompt.other.shape
        verdict["colour"] = part is not None and part.colour == prompt.other.colour
        seen = part is not None and place is not None
        verdict["relation"] = seen and _relation(place, part) == prompt.relation
    return (0.0 if fit is None else fit.match), verdict


def _likeness(part, item: Item) -> int:
    return (part.shape == item.shape) + (part.colour == item.colour)


def _without(image: np.ndarray, fit: SubjectFit) -> np.ndarray:
    """The image with the subject painted over: everything near its colours' pixels in the box of the fit."""
    ndimage = require("scipy.ndimage", extra="eval")
    left, right = _colour_masks(image)
    size = len(image)
    rows, columns = np.mgrid[:size, :size]
    reach = 1.15 * fit.radius + 2
    box = (abs(columns + 0.5 - fit.x) < reach) & (abs(rows + 0.5 - fit.y) < reach)
    own = ndimage.binary_dilation((left | right) & box, np.ones((3, 3)), iterations=2)
    out = image.copy()
    out[own] = BACKGROUNDS[segment(image)[1]]
    return out
