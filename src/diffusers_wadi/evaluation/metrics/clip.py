"""CLIP score and HPSv2: both are cosines between an image and its prompt in an open_clip model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_wadi._files import find_file
from diffusers_wadi._optional import require
from diffusers_wadi.evaluation.metrics.images import ImageSet, batches, refuse_not_finite
from diffusers_wadi.evaluation.metrics.options import MetricOptions
from diffusers_wadi.evaluation.weights import local_file, not_downloaded

# The weights that are taken where `clip_pretrained` names none: those on LAION-2B, the best trained of them.
PRETRAINED = {
    "ViT-bigG-14": "laion2b_s39b_b160k",
    "ViT-g-14": "laion2b_s34b_b88k",
    "ViT-H-14": "laion2b_s32b_b79k",
    "ViT-L-14": "laion2b_s32b_b82k",
    "ViT-B-16": "laion2b_s34b_b88k",
    "ViT-B-32": "laion2b_s34b_b79k",
}
HPS_MODEL = "ViT-H-14"
HPS_REPOSITORY = "xswu/HPSv2"
HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@dataclass(frozen=True)
class Source:
    """Which weights of which model, and how images are prepared for it.

    Args:
        model: open_clip's name.
        file: local file of the weights.
        config: open_clip's entry on how they were trained; empty if it knows none.
        option: under which the user gives the file.
    """

    model: str
    file: Path
    config: dict[str, Any]
    option: str


def clip_source(options: MetricOptions) -> Source:
    """The CLIP of the options, downloaded if need be (ViT-bigG-14 is 10 GB).

    Raises:
        ValueError: open_clip has no such model or weights.
        FileNotFoundError: `clip_weights` is not there.
        OSError: they cannot be downloaded; names the option.
    """
    open_clip, model = require("open_clip", "eval"), options.clip_model
    if model not in open_clip.list_models():
        raise ValueError(f"clip_model={model!r}: open_clip has no such model. Others are {', '.join(PRETRAINED)}.")
    tag = options.clip_pretrained or PRETRAINED.get(model)
    config = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    if options.clip_pretrained and not config:
        raise ValueError(f"clip_pretrained={tag!r}: open_clip's weights of {model} are {_tags(open_clip, model)}")
    if options.clip_weights is not None:
        return Source(model, local_file(options.clip_weights, "clip_weights"), config, "clip_weights")
    if not config:
        raise ValueError(
            f"clip_model={model!r} has no default weights. Give clip_weights=FILE, or clip_pretrained, for which open_clip "
            f"knows {_tags(open_clip, model)} here."
        )
    try:
        file = open_clip.download_pretrained(config)
    except Exception as error:  # of several libraries, which have no common base
        raise not_downloaded(f"CLIP {model} ({tag})", _address(config), "clip_weights", error) from error
    return Source(model, Path(file), config, "clip_weights")


def _tags(open_clip: Any, model: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"


def _address(config: dict[str, Any]) -> str:
    return config.get("hf_hub", "").rstrip("/") or config.get("url", "")


def hps_source(options: MetricOptions) -> Source:
    """HPSv2, which is a fine-tuned ViT-H-14, downloaded if need be (2 GB).

    Raises:
        FileNotFoundError: `hps_weights` is not there.
        OSError: it cannot be downloaded; names the option.
    """
    require("open_clip", "eval")
    if options.hps_weights is not None:
        return Source(HPS_MODEL, local_file(options.hps_weights, "hps_weights"), {}, "hps_weights")
    name = HPS_FILES[options.hps_version]
    try:
        file = find_file(HPS_REPOSITORY, name)
    except OSError as error:
        raise not_downloaded(name, HPS_REPOSITORY, "hps_weights", error) from error
    if file is None:
        raise not_downloaded(name, HPS_REPOSITORY, "hps_weights", FileNotFoundError("it has no such file"))
    return Source(HPS_MODEL, file, {}, "hps_weights")


def load_clip(source: Source, device: torch.device) -> tuple[torch.nn.Module, Callable[[Image.Image], Tensor], Any]:
    """Model in float32, preparation of images, and tokenizer.

    Raises:
        ValueError: the file cannot be read as data, or is not of this model.
    """
    open_clip, config = require("open_clip", "eval"), source.config
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            source.model,
            str(source.file),
            device=device,
            force_quick_gelu=config.get("quick_gelu", False),
            image_mean=config.get("mean"),
            image_std=config.get("std"),
            image_interpolation=config.get("interpolation"),
            image_resize_mode=config.get("resize_mode"),
            weights_only=True,
        )
    except Exception as error:  # unpickling, safetensors and torch each have their own
        raise ValueError(
            f"{source.option}={str(source.file)!r} cannot be loaded as open_clip's {source.model}: {str(error)[:300]}"
        ) from error
    return model.eval(), transform, open_clip.get_tokenizer(source.model)


def image_text_cosines(images: ImageSet, source: Source, options: MetricOptions) -> np.ndarray:
    """Cosine between each image of a set (n) and its prompt, float64 (n). Long prompts are cut by the tokenizer.

    Raises:
        ValueError: weights that do not fit; an image that cannot be read, or whose features are not finite.
    """
    device = options.torch_device
    model, transform, tokenizer = load_clip(source, device)
    found = []
    for part, batch in batches(images, transform, options.batch_size, options.num_workers, source.model):
        with torch.no_grad():
            visual = model.encode_image(batch.to(device), normalize=True).cpu().double()
            textual = model.encode_text(tokenizer(images.prompts[part]).to(device), normalize=True).cpu().double()
        refuse_not_finite(visual, images, part, source.model)
        refuse_not_finite(textual, images, part, f"the text half of {source.model}")
        found.append((visual * textual).sum(dim=1))
    return torch.cat(found).numpy()


def clip_score(images: ImageSet, options: MetricOptions) -> float:
    """Mean cosine between image and prompt: plain, from -1 to 1, neither cut at 0 nor times 100; the paper's tables show 0.3."""
    return float(image_text_cosines(images, clip_source(options), options).mean())


def hps_score(images: ImageSet, options: MetricOptions) -> dict[str, Any]:
    """HPSv2 (Wu et al., 2023): 100 times the cosine, as its benchmark prints.

    Returns:
        "mean" over all images, and "styles" with the mean of each group of the prompts.
    """
    scores = 100 * image_text_cosines(images, hps_source(options), options)
    styles = defaultdict(list)
    for group, score in zip(images.groups, scores):
        if group is not None:
            styles[group].append(score)
    return {
        "mean": float(scores.mean()),
        "styles": {name: float(np.mean(values)) for name, values in sorted(styles.items())},
    }
