"""Relations that the Shapes World teacher has no word for: exemplars to learn them from, and a judge of what was learned.

The grammar of Shapes World knows left of, right of, above and below. "East of" is another word for one of these, "beside"
stands for two, left of or right of, whichever: a meaning that no word of the grammar has. What the teacher never drew, such
as one thing diagonally above the other, no word of one token makes it draw. Exemplars are in ReVersion's data format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from .judge import _relation, find_parts
from .renderer import IMAGE_SIZE, render
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Item, Scene

MEANINGS = {"east of": ("right of",), "beside": ("left of", "right of")}
"""New relation -> the relations of the grammar that it stands for."""


def relation_scenes(n: int, seed: int = 0, relation: str = "east of", without: Iterable[Scene] = ()) -> list[Scene]:
    """Scenes of two things in a new relation, sizes not said; their colours differ.

    Args:
        n: how many, all different.
        seed: of the draw.
        relation: a key of `MEANINGS`. Default "east of".
        without: scenes whose things are not to appear together again, in either order: the exemplars, for what is to be
            unseen.

    Raises:
        ValueError: `relation` is none of `MEANINGS`.
    """
    _check(relation)
    rng = np.random.default_rng(seed)
    taken = {frozenset(_plain(scene)) for scene in without}
    scenes: dict[Scene, None] = {}
    while len(scenes) < n:
        colours = rng.choice(list(COLOURS), size=2, replace=False)
        items = tuple(Item(str(rng.choice(SHAPES)), str(colour)) for colour in colours)
        if frozenset(items) not in taken:
            scenes[Scene(items, str(rng.choice(list(BACKGROUNDS))), relation)] = None
    return list(scenes)


def _plain(scene: Scene) -> tuple[Item, ...]:
    return tuple(replace(item, size=None) for item in scene.items)


def _check(relation: str) -> None:
    if relation not in MEANINGS:
        raise ValueError(f"relation is {relation!r}, expected one of {', '.join(MEANINGS)}.")


def render_relation(scene: Scene, rng: np.random.Generator, size: int = IMAGE_SIZE) -> np.ndarray:
    """Draw a scene of a new relation, in one of its meanings; uint8 (size, size, 3)."""
    _check(scene.relation)
    return render(replace(scene, relation=str(rng.choice(MEANINGS[scene.relation]))), rng, size)


def write_exemplars(folder: str | Path, n: int = 10, seed: int = 0, relation: str = "east of") -> list[Scene]:
    """Write `n` images `0.png`, ... with their `text.json`, two caption templates each, with and without sizes.

    Args:
        folder: made if need be.
        n: images. Default 10, the most that ReVersion was used with.
        seed: of scenes and images.
        relation: a key of `MEANINGS`. Default "east of". The name is nowhere in the files.

    Returns:
        The scenes, sizes said.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, n])
    captions, scenes = {}, []
    for k, plain in enumerate(relation_scenes(n, seed, relation)):
        scene = replace(plain, items=tuple(replace(item, size=str(rng.choice(SIZES))) for item in plain.items))
        Image.fromarray(render_relation(scene, rng)).save(folder / f"{k}.png")
        captions[f"{k}.png"] = [prompt_of(scene, "{}"), prompt_of(plain, "{}")]
        scenes.append(scene)
    (folder / "text.json").write_text(json.dumps(captions, indent=2) + "\n", encoding="utf-8")
    return scenes


def prompt_of(scene: Scene, word: str) -> str:
    """The scene in words, with `word` for its relation: a placeholder, or "{}" for a template."""
    return replace(scene, relation=word).caption


def judge_relation(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Whether an image shows two things in a new relation.

    Args:
        image: uint8 (n, n, 3).
        scene: with a relation of `MEANINGS`.

    Returns:
        "relation": both colours are there, and their largest parts stand so; "scene": as well, both shapes, the
        background and the number of things are right.

    Raises:
        ImportError: scipy is missing (extra "eval").
    """
    _check(scene.relation)
    background, parts = find_parts(np.asarray(image))
    found = [next((part for part in parts if part.colour == item.colour), None) for item in scene.items]
    related = None not in found and _relation(*found) in MEANINGS[scene.relation]
    shapes = related and all(part.shape == item.shape for part, item in zip(found, scene.items))
    return {"relation": related, "scene": shapes and len(parts) == 2 and background == scene.background}
