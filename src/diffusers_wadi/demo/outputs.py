"""Where images lie until the browser has fetched them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_wadi._images import save_image

KEPT_SECONDS = 600.0  # gradio copies a file into its own cache right after the request


class Outputs:
    """A folder of PNG files with their settings in them, which forgets those older than `kept` seconds and goes with
    this object."""

    def __init__(self, kept: float = KEPT_SECONDS) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wadi-demo-"))
        self._kept = kept
        weakref.finalize(self, _remove, self.folder, os.getpid())

    def write(self, image: Any, notes: Mapping[str, str]) -> str:
        """Write a PIL image under a name of its own; returns the path.

        Raises:
            OSError: the disk is full or the folder gone.
        """
        path = self.new_path(f"seed{notes['seed']}" if "seed" in notes else "condition")
        save_image(image, path, notes)
        return str(path)

    def new_path(self, what: str) -> Path:
        """A name that no file has, with `what` it holds in it."""
        self._forget_old()
        return self.folder / f"wadi-{what}-{uuid.uuid4().hex[:8]}.png"

    def _forget_old(self) -> None:
        oldest = time.time() - self._kept
        for path in self.folder.glob("*.png"):
            with contextlib.suppress(FileNotFoundError):  # another request was quicker
                if path.stat().st_mtime < oldest:
                    path.unlink()


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a process that ZeroGPU forked
        shutil.rmtree(folder, ignore_errors=True)
