"""Images as files that say how they were made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers_wadi
from diffusers_wadi._files import written_beside


def save_image(image: Any, path: str | os.PathLike, notes: Mapping[str, str]) -> None:
    """Write one image, whole or not at all, with how it was made where the format has room for text (PNG).

    Args:
        image: PIL image.
        path: its suffix chooses the format; a file of this name is replaced.
        notes: settings, such as prompt and seed; the version of this package is added as "software".

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    from PIL.PngImagePlugin import PngInfo

    path = Path(path)
    info = PngInfo()
    for key, value in {**notes, "software": f"diffusers-wadi {diffusers_wadi.__version__}"}.items():
        info.add_itxt(key, value)
    with written_beside(path) as temporary:
        image.save(temporary, **({"pnginfo": info} if path.suffix.lower() == ".png" else {}))
