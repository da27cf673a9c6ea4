"""Condition images for `WaDiControlNetPipeline`, by the detectors of controlnet_aux.

    condition = condition_image("house.jpg", "canny", low_threshold=80)
    image = pipe("a house in winter", image=condition).images[0]

A one-step pipeline takes the condition as it is, so it has to have the size of the picture to draw, and a mode that shows
what is meant. Both are seen to here. Weights of detectors are fetched when they are first needed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diffusers.utils import load_image, logging
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps

from diffusers_wadi._optional import require

__all__ = ["condition_image", "detector_names", "load_detector"]

UNIT = 8  # pixels per latent
USUAL_RESOLUTION = 512  # the detectors' own default for the smaller side, for which the size asked for is put
ANNOTATORS = "lllyasviel/Annotators"
# Detectors that controlnet_aux has and its `processor` does not name: class, repository, arguments of from_pretrained.
FURTHER: dict[str, tuple[str, str | None, dict[str, str]]] = {
    "anyline": ("AnylineDetector", "TheMistoAI/MistoLine", {"filename": "MTEED.pth", "subfolder": "Anyline"}),
    "lineart_standard": ("LineartStandardDetector", None, {}),
    "mobile_sam": ("SamDetector", "dhkim2810/MobileSAM", {"model_type": "vit_t", "filename": "mobile_sam.pt"}),
    "sam": ("SamDetector", "ybelkada/segment-anything", {"subfolder": "checkpoints"}),
    "teed": ("TEEDdetector", "fal-ai/teed", {"filename": "5_model.pth"}),
}
# Packages that these need beyond what controlnet_aux brings; it only warns of them and fails in the middle.
NEEDED_BY = {"mediapipe_face": ("mediapipe",), "dwpose": ("mmcv", "mmpose", "mmdet")}

_logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Recipe:
    cls: type
    repository: str | None  # None: no weights
    loading: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # by which "openpose_hand" differs from "openpose"


def detector_names() -> list[str]:
    """Every name that `condition_image` takes: those of `controlnet_aux.processor`, and the detectors that it leaves out.

    Raises:
        ImportError: controlnet_aux is missing; names the extra that brings it.
    """
    return sorted(_recipes())


def load_detector(
    name: str, weights: str | os.PathLike | None = None, device: Any = None
) -> tuple[Callable, dict[str, Any]]:
    """A detector of controlnet_aux, kept for the next call, and the settings that its name stands for.

    Args:
        name: one of `detector_names()`.
        weights: folder or Hub repository with its weights, default the one that controlnet_aux names.
        device: where it runs. Default: where it is, at first the CPU.

    Raises:
        ImportError: controlnet_aux, or a package that this detector needs besides, is missing.
        ValueError: no such detector, or `weights` for one that has none.
        OSError: the weights are neither here nor can they be downloaded.
    """
    recipes = _recipes()
    if name not in recipes:
        raise ValueError(f"detector {name!r} is not known; expected one of {', '.join(sorted(recipes))}")
    recipe = recipes[name]
    missing = [package for package in NEEDED_BY.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"{name!r} needs {' and '.join(missing)} too: pip install {' '.join(missing)}", name=missing[0]
        )
    if weights is not None and recipe.repository is None:
        raise ValueError(f"{name!r} has no weights to load; leave out weights={str(weights)!r}")
    source = None if recipe.repository is None else str(weights or recipe.repository)
    try:
        detector = _loaded(recipe.cls, source, tuple(recipe.loading.items()))
    except (OSError, httpx.HTTPError) as error:
        free = ", ".join(sorted(other for other, its in recipes.items() if its.repository is None))
        raise OSError(
            f"the weights of detector {name!r} could not be had from {source!r}: {' '.join(str(error).split())[:300]} "
            f"Offline, put them into a folder and pass weights=FOLDER, or take a detector without weights ({free})."
        ) from error
    if device is not None and hasattr(detector, "to"):
        detector.to(device)
    return detector, recipe.settings


def condition_image(
    image: Image.Image | np.ndarray | str | os.PathLike,
    detector: str | None = "canny",
    size: tuple[int, int] | None = None,
    weights: str | os.PathLike | None = None,
    device: Any = None,
    **options: Any,
) -> Image.Image:
    """What a detector sees in an image, as an RGB image of the size to draw.

    Args:
        image: PIL image, uint8 array (h, w) or (h, w, 3 or 4), file or address. Turned as its EXIF data say; what is
            transparent becomes white.
        detector: one of `detector_names()`. None leaves the image as it is, but for size and mode.
        size: (width, height) in pixels, multiples of 8. Default: that of `image`, each side cut to a multiple of 8.
        weights: folder or Hub repository of the detector's weights.
        device: where it runs.
        **options: of the detector, such as `low_threshold` and `high_threshold` of "canny", or `detect_resolution`, the
            smaller side at which it looks, default that of `size`.

    Returns:
        PIL image, mode RGB, of `size`.

    Raises:
        ImportError, OSError: see `load_detector`.
        ValueError: unknown detector, a size that is no multiple of 8, or an image with more than 8 bits a channel.
        TypeError: an option that this detector does not have, or an image of another type.
    """
    picture = _as_rgb(image)
    size = _checked_size(size, picture)
    if picture.size != size:
        picture = picture.resize(size, Image.LANCZOS)
    if detector is None:
        if options:
            raise TypeError(f"options {sorted(options)} are for a detector, and detector is None")
        return picture
    run, settings = load_detector(detector, weights, device)
    found = run(picture, **_arguments(detector, run, settings, options, min(size)))
    if isinstance(found, np.ndarray):
        found = Image.fromarray(found)
    if not isinstance(found, Image.Image):
        raise TypeError(f"{detector!r} with {options} gives {type(found).__name__}; expected one image")
    found = found.convert("RGB")
    if max(high for _, high in found.getextrema()) == 0:
        _logger.warning(f"{detector!r} found nothing in this image: the condition is black, and controls nothing.")
    if found.size != size:  # detectors work in multiples of 64; lines stay lines when enlarged
        found = found.resize(size, Image.BOX if found.width > size[0] else Image.NEAREST)
    return found


def _recipes() -> dict[str, _Recipe]:
    package = require("controlnet_aux", extra="controlnet")
    processor = require("controlnet_aux.processor", extra="controlnet")
    recipes = {}
    for name, entry in processor.MODELS.items():
        loads = entry["checkpoint"] and hasattr(entry["class"], "from_pretrained")
        settings = dict(processor.MODEL_PARAMS.get(name, {}))
        recipes[name] = _Recipe(entry["class"], ANNOTATORS if loads else None, settings=settings)
    for name, (cls, repository, loading) in FURTHER.items():
        if hasattr(package, cls):
            recipes.setdefault(name, _Recipe(getattr(package, cls), repository, loading))
    return recipes


@functools.lru_cache(maxsize=4)
def _loaded(cls: type, source: str | None, loading: tuple[tuple[str, str], ...]) -> Callable:
    return cls() if source is None else cls.from_pretrained(source, **dict(loading))


def _as_rgb(image: Any) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        image = load_image(str(image), convert_method=ImageOps.exif_transpose)
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(
                f"the array holds {image.dtype}; expected uint8 from 0 to 255: (255 * array).astype('uint8')"
            )
        image = Image.fromarray(image)
    elif isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
    else:
        raise TypeError(f"image is {type(image)}, expected a PIL image, a uint8 array, or the name of a file")
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"the image has mode {image.mode!r}, more than 8 bits a channel, which a conversion would clip to white; scale "
            "it to 0..255 and Image.fromarray(array.astype('uint8')) first"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _checked_size(size: Iterable[int] | None, picture: Image.Image) -> tuple[int, int]:
    width, height = (side // UNIT * UNIT for side in picture.size) if size is None else size
    if width < UNIT or height < UNIT or width % UNIT or height % UNIT:
        given = f"the image of {picture.width}x{picture.height}" if size is None else f"size={width}x{height}"
        raise ValueError(f"{given} will not do (width x height): expected multiples of {UNIT}, at least {UNIT}")
    return width, height


def _arguments(name: str, run: Callable, settings: dict, options: dict, side: int) -> dict[str, Any]:
    """The call's arguments; many detectors swallow misspelt ones."""
    parameters = list(inspect.signature(run).parameters.values())[1:]  # the first is the image
    named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "output_type"}
    unknown = sorted(set(options) - set(named))
    if unknown:
        raise TypeError(f"{name!r} has no option {unknown[0]!r}; it has {', '.join(sorted(named))}")
    arguments = {key: side for key in ("detect_resolution", "image_resolution") if named.get(key) == USUAL_RESOLUTION}
    if any(p.name == "output_type" for p in parameters):
        arguments["output_type"] = "pil"
    return arguments | settings | options
