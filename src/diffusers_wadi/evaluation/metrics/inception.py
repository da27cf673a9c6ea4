"""FID, precision and recall: torch-fidelity's functions on torch-fidelity's InceptionV3, fed batch by batch.

Its network squeezes every image to 299x299 with the bilinear resizing of TensorFlow 1 (no antialiasing, aspect ratio not
kept), and its features are those of the last pooling layer (2,048).
"""

from __future__ import annotations

import io
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_wadi._optional import require
from diffusers_wadi.evaluation.metrics.images import ImageSet, batches, refuse_not_finite
from diffusers_wadi.evaluation.metrics.options import MetricOptions
from diffusers_wadi.evaluation.weights import local_file, not_downloaded, read_state

logger = logging.getLogger(__name__)

NEIGHBOURS = 3  # k of precision and recall: torch-fidelity's default, and that of Kynkäänniemi et al. (2019)
LAYER, FEATURES = "2048", 2048
Statistics = dict[str, np.ndarray]


def feature_statistics(features: Tensor) -> Statistics:
    """Mean `mu` (d) and covariance `sigma` (d, d) of features (n, d), n at least 2, in float64.

    float64 because torch-fidelity's mean of float32 features is a float32, which no statistics file is.
    """
    return require("torch_fidelity.metric_fid", "eval").fid_features_to_statistics(features.cpu().double())


def frechet_distance(first: Statistics | Tensor, second: Statistics | Tensor) -> float:
    """Fréchet distance between two Gaussians, as torch-fidelity computes it.

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al. (2017), Eq. 6.

    Args:
        first, second: features (n, d), or their statistics.
    """
    module = require("torch_fidelity.metric_fid", "eval")
    pair = [feature_statistics(side) if isinstance(side, Tensor) else side for side in (first, second)]
    return module.fid_statistics_to_metric(*pair, verbose=False)[module.KEY_METRIC_FID]


def precision_recall(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019), as torch-fidelity computes them, with k = 3.

    Precision is the share of generated points within the ball around some real point that reaches to its third nearest
    other real point; recall the share of real points within such balls around generated ones.

    Args:
        generated, real: features (n, d) and (m, d), n and m at least 4.
    """
    module = require("torch_fidelity.metric_prc", "eval")
    result = module.prc_features_to_metric(
        generated, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    return {"precision": result[module.KEY_METRIC_PRECISION], "recall": result[module.KEY_METRIC_RECALL]}


def read_statistics(path: Path) -> Statistics:
    """`mu` and `sigma` of an .npz file, as pytorch-fid and clean-fid write it.

    Raises:
        ValueError: not such a file, not of 2,048 features, or with numbers that are not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name].astype(np.float64) for name in ("mu", "sigma")}
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no statistics file with arrays `mu` and `sigma`: {error}") from error
    shapes = stored["mu"].shape, stored["sigma"].shape
    if shapes != ((FEATURES,), (FEATURES, FEATURES)):
        raise ValueError(
            f"{path}: expected mu of shape (2048,) and sigma of (2048, 2048), got {shapes[0]} and {shapes[1]}"
        )
    if not all(np.isfinite(array).all() for array in stored.values()):
        raise ValueError(f"{path} holds NaN or infinite numbers; make the statistics anew")
    return stored


def inception_file(weights: str | os.PathLike | None) -> Path:
    """The local file of torch-fidelity's InceptionV3, downloaded (91 MB) into torch's cache if need be.

    Raises:
        FileNotFoundError: `weights` is given and not there.
        OSError: it cannot be downloaded; names the file and the option.
    """
    if weights is not None:
        return local_file(weights, "inception_weights")
    url = require("torch_fidelity.feature_extractor_inceptionv3", "eval").URL_INCEPTION_V3
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = path.stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=checksum, progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise not_downloaded(path.name, url, "inception_weights", error) from error
    return path


def load_inception(weights: str | os.PathLike | None, device: torch.device) -> torch.nn.Module:
    """torch-fidelity's InceptionV3 up to the last pooling layer.

    Raises:
        ValueError: the file is not of this network.
        OSError: see `inception_file`.
    """
    module = require("torch_fidelity.feature_extractor_inceptionv3", "eval")
    path = inception_file(weights)
    # torch-fidelity unpickles the file that it is given, whatever is in it; so it is given tensors that were read as data.
    buffer = io.BytesIO()
    torch.save(read_state(path, "inception_weights"), buffer)
    buffer.seek(0)
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", [LAYER], feature_extractor_weights_path=buffer
        )
    except RuntimeError as error:
        raise ValueError(
            f"inception_weights={str(path)!r} does not fit torch-fidelity's InceptionV3 (of {module.URL_INCEPTION_V3}; "
            f"torchvision's is another network): {str(error)[:300]}"
        ) from error
    return network.to(device)


def inception_features(images: ImageSet, network: torch.nn.Module, options: MetricOptions) -> Tensor:
    """Features (n, 2048) of a set, float32 on the CPU.

    Raises:
        ValueError: an image that cannot be read, or whose features are not finite, by name.
    """
    found = []
    transform = _transform(options.image_size)
    for part, batch in batches(
        images, transform, options.batch_size, options.num_workers, f"Inception, {images.folder}"
    ):
        with torch.no_grad():
            features = network(batch.to(options.torch_device))[0].float().cpu()
        refuse_not_finite(features, images, part, "Inception")
        found.append(features)
    return torch.cat(found)


def _transform(image_size: int | None) -> Callable[[Image.Image], Tensor]:
    """From an image to uint8 (3, height, width), resized and cropped the way torch-fidelity does with folders."""
    from torchvision import transforms

    fit = [] if image_size is None else [transforms.Resize(image_size), transforms.CenterCrop(image_size)]
    return transforms.Compose([*fit, transforms.PILToTensor()])


def check_sets(generated: ImageSet, real: ImageSet | None, metrics: list[str], image_size: int | None) -> None:
    """Refuse what FID, precision and recall cannot be computed of.

    Args:
        generated: the images.
        real: the others, or None for a statistics file.
        metrics: of "fid" and "precision_recall", those that are wanted.
        image_size: see `MetricOptions`.

    Raises:
        ValueError: too few images, or images of different sizes in one set.
    """
    least = NEIGHBOURS + 1 if "precision_recall" in metrics else 2
    for images in filter(None, (generated, real)):
        if len(images) < least:
            raise ValueError(
                f"{images.folder} holds {len(images)} image(s), and {' and '.join(metrics)} need at least {least}; "
                "the paper's protocol has 30,000"
            )
        if image_size is None:
            _refuse_sizes(images)


def warn_of_sets(generated: ImageSet, real: ImageSet | None, metrics: list[str], image_size: int | None) -> None:
    """Log what the numbers will say little about. Arguments as `check_sets`."""
    few = [images for images in filter(None, (generated, real)) if len(images) < FEATURES]
    if "fid" in metrics and few:
        logger.warning(
            "FID of %s: below %d images their covariance is not of full rank, and the value is far too high. Compare it "
            "with values of the same number of images only.",
            " and ".join(f"{len(images)} images of {images.folder}" for images in few),
            FEATURES,
        )
    if real and image_size is None and generated.sizes[0] != real.sizes[0]:
        logger.warning(
            "%s has images of %s pixels and %s of %s: Inception's own resizing leaves different traces in them. "
            "image_size brings both to one size.",
            *(generated.folder, _text(generated.sizes[0]), real.folder, _text(real.sizes[0])),
        )


def _refuse_sizes(images: ImageSet) -> None:
    other = next((i for i, size in enumerate(images.sizes) if size != images.sizes[0]), None)
    if other is not None:
        raise ValueError(
            f"{images.folder} has images of different sizes: {images.files[0].name} of {_text(images.sizes[0])} and "
            f"{images.files[other].name} of {_text(images.sizes[other])} pixels. Set image_size, to which all are resized "
            "and cropped, such as 512."
        )


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
