"""Shapes World: what a scene is, how it is said in words, and which captions are held out.

A scene holds one or two flat shapes on a plain background. Its caption comes from a small grammar::

    a [small|large] COLOUR SHAPE on a BACKGROUND background
    a [small|large] COLOUR SHAPE RELATION a [small|large] COLOUR SHAPE on a BACKGROUND background

for example "a large red heart on a white background" or "a small blue ring above a yellow star on a gray background".
A size that is not said is free. Two shapes of one scene always differ in colour, so that every relation means something.
"""

import re
import zlib
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")

# sRGB, 0..255. Chosen far apart, so that the nearest palette colour is robust to the soft edges that a decoder makes.
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 80, 220),
    "yellow": (245, 210, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 205, 215),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (15, 15, 15), "gray": (128, 128, 128)}

# One caption in HELDOUT_EVERY, chosen by a hash of its text, is never trained on.
HELDOUT_EVERY = 16


@dataclass(frozen=True)
class Item:
    """One shape. `size` is None where the caption leaves it free."""

    shape: str
    colour: str
    size: str | None = None

    def phrase(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """One or two items, a background, and for two items the relation of the first to the second."""

    items: tuple[Item, ...]
    background: str
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The scene in words, in the grammar of this module."""
        between = f" {self.relation} " if self.relation else ""
        return f"{between.join(item.phrase() for item in self.items)} on a {self.background} background"


_ITEM = rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{_ITEM}(?: ({'|'.join(RELATIONS)}) {_ITEM})? on a ({'|'.join(BACKGROUNDS)}) background", re.IGNORECASE
)


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes.

    Raises:
        ValueError: if the caption is not in the grammar of Shapes World.
    """
    match = _CAPTION.fullmatch(caption.strip().rstrip("."))
    if match is None:
        raise ValueError(
            f"{caption!r} is not a Shapes World caption. Expected 'a [small|large] COLOUR SHAPE [RELATION a [small|large] "
            f"COLOUR SHAPE] on a BACKGROUND background' with colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; "
            f"relations {', '.join(RELATIONS)}; backgrounds {', '.join(BACKGROUNDS)}."
        )
    size1, colour1, shape1, relation, size2, colour2, shape2, background = (
        part.lower() if part else None for part in match.groups()
    )
    items = (Item(shape1, colour1, size1),)
    if relation:
        items += (Item(shape2, colour2, size2),)
    return Scene(items, background, relation)


def random_scene(rng: np.random.Generator, pair_probability: float = 0.7, size_probability: float = 0.7) -> Scene:
    """Draws a scene: two items with `pair_probability`, each size said with `size_probability`."""
    count = 2 if rng.random() < pair_probability else 1
    colours = rng.choice(list(COLOURS), size=count, replace=False)
    items = tuple(
        Item(str(rng.choice(SHAPES)), str(colour), str(rng.choice(SIZES)) if rng.random() < size_probability else None)
        for colour in colours
    )
    return Scene(items, str(rng.choice(list(BACKGROUNDS))), str(rng.choice(RELATIONS)) if count == 2 else None)


def is_heldout(caption: str) -> bool:
    """Whether a caption is kept out of all training (a fixed 1/16 of the captions)."""
    return zlib.crc32(caption.encode()) % HELDOUT_EVERY == 0


def _scenes(n: int, seed: int, heldout: bool, unique: bool) -> list[Scene]:
    rng = np.random.default_rng([seed, int(heldout)])
    scenes, seen = [], set()
    while len(scenes) < n:
        scene = random_scene(rng)
        if is_heldout(scene.caption) != heldout or (unique and scene.caption in seen):
            continue
        seen.add(scene.caption)
        scenes.append(scene)
    return scenes


def training_scenes(n: int, seed: int = 0) -> list[Scene]:
    """`n` scenes whose captions are not held out. Repeats are possible, as in any data set."""
    return _scenes(n, seed, heldout=False, unique=False)


def training_captions(n: int, seed: int = 0) -> list[str]:
    """Captions of `training_scenes(n, seed)`."""
    return [scene.caption for scene in training_scenes(n, seed)]


def heldout_captions(n: int, seed: int = 0) -> list[str]:
    """`n` different captions that no training ever sees.

    Raises:
        ValueError: if `n` is more than 5,000 (there are about 8,700 held-out captions, and drawing them all is slow).
    """
    if n > 5000:
        raise ValueError(
            f"n must be at most 5000 different held-out captions, but is {n}. Draw twice with other seeds."
        )
    return [scene.caption for scene in _scenes(n, seed, heldout=True, unique=True)]


def change_one_attribute(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """A scene that differs from `scene` in exactly one attribute that its caption states, and that attribute's name.

    The name is one of "background", "relation", "shape", "colour", "size", "count". Used to test that the judge says no.
    """
    pair = scene.relation is not None
    index = int(rng.integers(len(scene.items)))
    item = scene.items[index]
    options = ["background", "shape", "colour", "count"] + ["relation"] * pair + ["size"] * (item.size is not None)
    name = str(rng.choice(options))
    if name == "background":
        return replace(scene, background=_other(rng, BACKGROUNDS, {scene.background})), name
    if name == "relation":
        return replace(scene, relation=_other(rng, RELATIONS, {scene.relation})), name
    if name == "count":
        if pair:
            return Scene((scene.items[index],), scene.background), name
        extra = Item(str(rng.choice(SHAPES)), _other(rng, COLOURS, {item.colour}))
        return Scene((item, extra), scene.background, str(rng.choice(RELATIONS))), name
    used = {other.colour for other in scene.items}
    new = {
        "shape": lambda: replace(item, shape=_other(rng, SHAPES, {item.shape})),
        "colour": lambda: replace(item, colour=_other(rng, COLOURS, used)),
        "size": lambda: replace(item, size=_other(rng, SIZES, {item.size})),
    }[name]()
    return replace(scene, items=scene.items[:index] + (new,) + scene.items[index + 1 :]), name


def _other(rng: np.random.Generator, options, exclude: set[str]) -> str:
    return str(rng.choice([option for option in options if option not in exclude]))
