"""A folder of generated images: which files it is to hold, what made them, and which of them are there.

::

    images/00000.png ...   by the number of the prompt in its whole source; further images of one prompt are 00000-1.png, ...
    prompts.jsonl          a line for each image, in order: file, index, prompt, seed, group
    settings.json          what made them: model, steps, guidance, size, number format, prompt set, versions, ...
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers_wadi._files import writable_folder, written_beside
from diffusers_wadi.evaluation.prompts import PromptSet

__all__ = ["Image", "check_folder", "image_seed", "image_plan", "prepare_folder", "whole_image"]

IMAGES, PROMPTS, SETTINGS = "images", "prompts.jsonl", "settings.json"
UNCOMPARED = ("versions",)  # settings that are told, but need not agree when a run is taken up again
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_STREAM = 2_654_435_761  # 2^32 divided by the golden ratio: multiples of it lie far apart modulo 2^32


@dataclass(frozen=True)
class Image:
    """An image to draw: its file in the folder, the number and text of its prompt, its seed, and the prompt's group."""

    file: str
    index: int
    prompt: str
    seed: int
    group: str | None = None


def image_seed(seed: int, index: int, number: int = 0) -> int:
    """Seed of the noise of one image: (index + 2654435761 * (seed + number)) modulo 2^32.

    So no two prompts of a set share their noise, nor do two sets drawn with other seeds; seed 0 gives image `index` the
    seed `index`. 32 bits are all that torch's generator on the CPU takes.

    Args:
        seed: of the set.
        index: of the prompt in its whole source.
        number: of the image among those of one prompt. Image 1 of seed 0 is image 0 of seed 1.
    """
    return (index + _STREAM * (seed + number)) % 2**32


def image_plan(prompts: PromptSet, seed: int = 0, images_per_prompt: int = 1) -> list[Image]:
    """The images of a set, prompt by prompt."""
    return [
        Image(
            f"{IMAGES}/{prompt.index:05d}{f'-{number}' if number else ''}.png",
            prompt.index,
            prompt.text,
            image_seed(seed, prompt.index, number),
            prompt.group,
        )
        for prompt in prompts
        for number in range(images_per_prompt)
    ]


def whole_image(path: Path) -> bool:
    """Whether a PNG is there from its first to its last bytes; a copy that was cut off is not."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_PNG_START))
            file.seek(-len(_PNG_END), os.SEEK_END)
            return start == _PNG_START and file.read() == _PNG_END
    except OSError:  # not there, or shorter than that
        return False


def prepare_folder(folder: str | Path, plan: Sequence[Image], settings: dict[str, Any]) -> Path:
    """Make a folder for these images, or take up one that was begun with the same settings. By one process alone.

    Raises:
        ValueError: the folder holds images of other settings (each of them named), or of none.
        OSError: it cannot be written to.
    """
    folder = writable_folder(folder)
    images = writable_folder(folder / IMAGES)
    lines = "".join(json.dumps(asdict(image), ensure_ascii=False) + "\n" for image in plan)
    check_folder(folder, settings)
    for leftover in images.glob(".*.png"):  # of a process that was killed while it wrote
        leftover.unlink()
    _write(folder / PROMPTS, lines)
    if not (folder / SETTINGS).is_file() or not any(images.glob("*.png")):
        _write(folder / SETTINGS, _json(settings) + "\n")  # last, so that a folder with settings has its prompts
    return folder


def check_folder(folder: str | Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with images that other settings made, or that nothing says what made. Without images all will do.

    Raises:
        ValueError: with each setting that differs.
    """
    path, images = Path(folder, SETTINGS), Path(folder, IMAGES)
    if not any(file for file in images.glob("*.png") if not file.name.startswith(".")):
        return
    if not path.is_file():
        raise ValueError(f"{images} holds images, but {path} is missing, so nobody knows what made them. {_REMEDY}")
    _refuse_other_settings(path, settings)


_REMEDY = "Give another output_dir, or delete this folder to start anew."


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}). {_REMEDY}") from error
    new = json.loads(_json(settings))  # as it will be read back: tuples are lists then
    old, new = _flat(old), _flat(new)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        differences = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names)
        raise ValueError(f"{path.parent} holds images of other settings: {differences}. {_REMEDY}")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """What is compared, entries of entries as "arguments.eta"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in UNCOMPARED:
            flat |= (
                {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
            )
    return flat


def _json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False, default=str)


def _write(path: Path, text: str) -> None:
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
