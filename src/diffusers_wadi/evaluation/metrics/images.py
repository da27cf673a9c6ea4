"""Sets of images on disk, generated or real: opened with every check that needs no pixels, then read in batches."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PROMPTS = "prompts.jsonl"


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order.

    Args:
        folder: where they were looked for.
        files: their paths.
        prompts: one for each of them, or None for a set without prompts.
        groups: the style of each, such as "anime", or None; None for a set without prompts.
        sizes: (width, height) of each, in pixels.
    """

    folder: Path
    files: list[Path]
    prompts: list[str] | None
    groups: list[str | None] | None
    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.files)


def open_images(folder: str | os.PathLike, prompts: bool = False, option: str = "folder") -> ImageSet:
    """Open a set of images: a generated one, known by its prompts.jsonl, or any folder of images with its subfolders.

    Args:
        folder: where they are.
        prompts: whether prompts are needed. Default False.
        option: how the caller named the folder, for messages.

    Raises:
        FileNotFoundError: no such folder, or no prompts.jsonl where prompts are needed.
        ValueError: no images, files that are none or cannot be read, prompts.jsonl of the wrong form or not of these
            images. Names the first such file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{option}={str(folder)!r} is not a folder. Give the folder that holds the images.")
    if (folder / PROMPTS).is_file():
        entries = _read_prompts(folder / PROMPTS)
        files = [folder / entry["file"] for entry in entries]
        _refuse_mismatch(folder, files)
        sizes = _read_sizes(files)
        return ImageSet(folder, files, [e["prompt"] for e in entries], [e.get("group") for e in entries], sizes)
    if prompts:
        raise FileNotFoundError(
            f"{folder} has no {PROMPTS}, so what its images should show is not known. Give a folder that `wadi evaluate` wrote."
        )
    files = _find_images(folder)
    if not files:
        raise ValueError(f"{option}={str(folder)!r} holds no images ({', '.join(SUFFIXES)}), nor do its subfolders")
    return ImageSet(folder, files, None, None, _read_sizes(files))


def _find_images(folder: Path) -> list[Path]:
    """All files but hidden ones, which must be images, in the order of their names."""
    found = (
        path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    files = sorted(path for path in found if path.is_file())
    others = [file for file in files if file.suffix.lower() not in SUFFIXES]
    if others:
        raise ValueError(
            f"{len(others)} of the {len(files)} files in {folder} are not images by their names, first "
            f"{str(others[0].relative_to(folder))!r}. Move them out, or give the folder that holds images alone."
        )
    return files


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            entries.append(_read_entry(path, number, line))
    if not entries:
        raise ValueError(f"{path} is empty: no image was generated yet, so there is nothing to measure")
    return entries


def _read_entry(path: Path, number: int, line: str) -> dict[str, Any]:
    expected = (
        f'{path}, line {number}: expected {{"file": "images/00000.png", "prompt": "...", ...}}, got {line[:80]!r}'
    )
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(expected) from error
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file", "prompt")):
        raise ValueError(expected)
    if not isinstance(entry.get("group"), str | None):
        raise ValueError(f"{expected}. A group is a name or null.")
    if Path(entry["file"]).is_absolute() or ".." in Path(entry["file"]).parts:
        raise ValueError(f"{path}, line {number}: the file {entry['file']!r} leaves the folder")
    return entry


def _refuse_mismatch(folder: Path, files: list[Path]) -> None:
    """One line for each image and one image for each line."""
    if len(set(files)) < len(files):
        twice = next(file for file, count in Counter(files).items() if count > 1)
        raise ValueError(
            f"{folder / PROMPTS} names {twice.relative_to(folder)} twice; expected one line for each image"
        )
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(files)} images of {folder / PROMPTS} are missing, first "
            f"{str(missing[0].relative_to(folder))!r}. Run the generation again: it makes what is missing."
        )
    extra = sorted(set(_find_images(folder / "images")) - set(files)) if (folder / "images").is_dir() else []
    if extra:
        raise ValueError(
            f"{len(extra)} images are not in {folder / PROMPTS}, first {str(extra[0].relative_to(folder))!r}. "
            "They are of another run; move them out."
        )


def _read_sizes(files: list[Path]) -> list[tuple[int, int]]:
    """(width, height) of each from its header, which shows what is no image before any network runs."""
    sizes, broken = [], []
    for file in tqdm(files, desc="opening images", disable=None if len(files) > 1000 else True):
        try:
            with Image.open(file) as image:
                _refuse_float(file, image)
                sizes.append(image.size)
        except OSError:  # PIL's for what it does not know, too
            broken.append(file)
    if broken:
        raise ValueError(f"{len(broken)} of {len(files)} files are no images that can be read, first {broken[0]}")
    return sizes


def _refuse_float(file: Path, image: Image.Image) -> None:
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image)
        broken = int((~np.isfinite(pixels)).sum())
        raise ValueError(
            f"{file} holds pixels of type {pixels.dtype}" + f", {broken} of them NaN or infinite" * bool(broken)
            + ". Expected 8 bits for each channel; generate it anew."
        )  # fmt: skip


def read_image(file: Path) -> Image.Image:
    """As RGB.

    Raises:
        ValueError: it breaks off or is none, by name.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
        raise ValueError(f"{file} cannot be read as an image ({error}). Generate or copy it anew.") from error


class _Files(Dataset):
    def __init__(self, files: Sequence[Path], transform: Callable[[Image.Image], torch.Tensor]):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(read_image(self.files[index]))


def batches(
    images: ImageSet,
    transform: Callable[[Image.Image], torch.Tensor],
    batch_size: int,
    num_workers: int = 0,
    title: str = "",
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Read a set, one batch in memory at a time.

    Args:
        images: the set.
        transform: from an RGB image to a tensor of one shape.
        batch_size: images at a time; the last batch may be smaller.
        num_workers: processes that read. Default 0.
        title: of the progress bar.

    Yields:
        Which images of the set, and their tensors (batch, ...).
    """
    loader = DataLoader(_Files(images.files, transform), batch_size, num_workers=num_workers)
    start = 0
    for batch in tqdm(loader, desc=title, disable=None):
        yield slice(start, start + len(batch)), batch
        start += len(batch)


def refuse_not_finite(features: torch.Tensor, images: ImageSet, part: slice, network: str) -> None:
    """Refuse features (batch, n) that are not finite.

    Raises:
        ValueError: names the image of the first of them.
    """
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        file = images.files[part][int((~finite).nonzero()[0])]
        raise ValueError(
            f"{network} gives NaN or infinite features for {file}. Look at the image; if it is sound, the weights are not."
        )
