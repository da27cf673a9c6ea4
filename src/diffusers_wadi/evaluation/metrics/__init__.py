"""How good a set of generated images is: FID, precision and recall, CLIP score, HPSv2, and the judge of Shapes World."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_wadi._optional import require
from diffusers_wadi.evaluation.metrics.clip import clip_score, clip_source, hps_score, hps_source, image_text_cosines
from diffusers_wadi.evaluation.metrics.images import ImageSet, open_images
from diffusers_wadi.evaluation.metrics.inception import (
    check_sets,
    feature_statistics,
    frechet_distance,
    inception_features,
    inception_file,
    load_inception,
    precision_recall,
    read_statistics,
    warn_of_sets,
)
from diffusers_wadi.evaluation.metrics.options import MetricOptions
from diffusers_wadi.evaluation.metrics.shapes import check_captions, judge_all, shapes_score

__all__ = [
    "METRICS",
    "ImageSet",
    "MetricOptions",
    "check_metrics",
    "compute_metrics",
    "feature_statistics",
    "frechet_distance",
    "image_text_cosines",
    "judge_all",
    "open_images",
    "precision_recall",
]

METRICS = ("fid", "precision_recall", "clip_score", "hpsv2", "shapes")
"""What can be measured."""

_ON_INCEPTION = ("fid", "precision_recall")
_ON_PROMPTS = ("clip_score", "hpsv2", "shapes")


def check_metrics(
    metrics: Sequence[str], options: MetricOptions | None = None, folder: str | os.PathLike | None = None
) -> None:
    """Refuse what would fail later, before images are generated or networks run. Downloads the weights that are needed.

    Args:
        metrics: of `METRICS`.
        options: settings. Default None: the defaults.
        folder: the set of generated images, if it is there already. Default None: it is left out of the checks.

    Raises:
        ValueError: an unknown metric, a setting that does not fit, images or prompts that do not.
        ImportError: a package is missing; names the extra.
        OSError: weights or reference that are not there, or cannot be downloaded; names the option.
    """
    _prepare(metrics, options or MetricOptions(), folder)


def compute_metrics(
    folder: str | os.PathLike, metrics: Sequence[str], options: MetricOptions | None = None
) -> dict[str, float | dict[str, Any]]:
    """Measure a set of generated images.

    Args:
        folder: with `prompts.jsonl` and its images; for "fid" and "precision_recall" any folder of images will do.
        metrics: of `METRICS`.
        options: settings. Default None: the defaults.

    Returns:
        By metric. "fid" and "clip_score" (mean cosine) are numbers, "precision_recall" is {"precision", "recall"},
        "hpsv2" {"mean", "styles": {...}}, "shapes" {"attributes", "captions", "by_attribute": {...}}.

    Raises:
        as `check_metrics`, and ValueError for images that turn out to be broken when they are read.
    """
    options = options or MetricOptions()
    sets = _prepare(metrics, options, folder)
    found: dict[str, Any] = _on_inception(sets, options) if sets.on_inception else {}
    if "clip_score" in metrics:
        found["clip_score"] = clip_score(sets.generated, options)
    if "hpsv2" in metrics:
        found["hpsv2"] = hps_score(sets.generated, options)
    if "shapes" in metrics:
        found["shapes"] = shapes_score(sets.generated)
    return {name: found[name] for name in METRICS if name in found}


@dataclass(frozen=True)
class _Sets:
    generated: ImageSet | None
    real: ImageSet | None
    statistics: dict[str, Any] | None
    on_inception: list[str]


def _prepare(metrics: Sequence[str], options: MetricOptions, folder: str | os.PathLike | None) -> _Sets:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"there is no metric {unknown[0]!r}; expected some of {', '.join(METRICS)}")
    on_inception = [name for name in _ON_INCEPTION if name in metrics]
    on_prompts = [name for name in _ON_PROMPTS if name in metrics]
    real, statistics = _reference(on_inception, options) if on_inception else (None, None)
    generated = open_images(folder, bool(on_prompts)) if folder is not None and metrics else None
    if generated and on_inception:
        check_sets(generated, real, on_inception, options.image_size)
    if "shapes" in metrics:
        require("scipy", "eval")
        if generated:
            check_captions(generated)
    if on_inception:
        inception_file(options.inception_weights)
    if "clip_score" in metrics:
        clip_source(options)
    if "hpsv2" in metrics:
        hps_source(options)
    return _Sets(generated, real, statistics, on_inception)


def _reference(metrics: list[str], options: MetricOptions) -> tuple[ImageSet | None, dict[str, Any] | None]:
    """The real images, or their statistics."""
    for package in ("torch_fidelity", "torchvision"):
        require(package, "eval")
    if options.reference is None:
        raise ValueError(
            f"{' and '.join(metrics)} need reference=FOLDER of real images (FID also FILE.npz of their statistics)"
        )
    path = Path(options.reference)
    if path.suffix == ".npz" and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"reference={str(path)!r} is not there. Give a folder of images or an .npz file.")
        if "precision_recall" in metrics:
            raise ValueError(
                f"precision_recall needs the images themselves, and reference={str(path)!r} has only statistics"
            )
        return None, read_statistics(path)
    return open_images(path, option="reference"), None


def _on_inception(sets: _Sets, options: MetricOptions) -> dict[str, Any]:
    """FID, precision and recall, on features that are computed once."""
    warn_of_sets(sets.generated, sets.real, sets.on_inception, options.image_size)
    network = load_inception(options.inception_weights, options.torch_device)
    generated = inception_features(sets.generated, network, options)
    real = inception_features(sets.real, network, options) if sets.real else None
    found: dict[str, Any] = {}
    if "fid" in sets.on_inception:
        found["fid"] = frechet_distance(generated, sets.statistics if real is None else real)
    if "precision_recall" in sets.on_inception:
        found["precision_recall"] = precision_recall(generated, real)
    return found
