"""Shapes World: a small exact world to train in, a judge for it, and the bundled one-step checkpoint."""

from pathlib import Path

from .judge import judge_image
from .renderer import render, render_scenes
from .scenes import Item, Scene, heldout_captions, parse_caption, training_captions

__all__ = [
    "Item",
    "Scene",
    "bundled_checkpoint",
    "heldout_captions",
    "judge_image",
    "parse_caption",
    "render",
    "render_scenes",
    "training_captions",
]


FOLDERS = {"stable-diffusion": "checkpoint", "pixart": "checkpoint_pixart"}


def bundled_checkpoint(backbone: str = "stable-diffusion") -> Path:
    """Folder of a bundled one-step student: a LoRaD adapter, with its teacher in the subfolder `teacher`.

    Args:
        backbone: "stable-diffusion" (for `WaDiPipeline`) or "pixart" (for `WaDiPixArtPipeline`).

    Raises:
        ValueError: no such backbone.
        FileNotFoundError: if the package was built without it.
    """
    if backbone not in FOLDERS:
        raise ValueError(f"backbone={backbone!r}: expected one of {', '.join(map(repr, FOLDERS))}.")
    folder = Path(__file__).parent / FOLDERS[backbone]
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"The bundled checkpoint is missing from {folder}. Reinstall diffusers-wadi.")
    return folder
