"""DreamBooth: a subject out of a few images, bound to a rare word; the parts of `training/train_dreambooth_lorad.py`.

The multi-step model is trained, L = MSE(instance) + prior_loss_weight * MSE(class) (paper, customisation; DreamBooth).
Beyond the paper :func:`load_subject` puts the result over a one-step LoRaD: both are angles, and angles add.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from .._files import find_file, writable_folder, written_beside
from ..loaders import load_lorad_adapter

__all__ = [
    "SubjectImages",
    "class_image_file",
    "dreambooth_loss",
    "draw_class_images",
    "image_files",
    "load_subject",
    "missing_class_images",
    "noise_target",
    "sampling_scheduler",
]

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
TEXT_ENCODER = "text_encoder"


# --- images ---


def image_files(folder: str | os.PathLike, what: str = "images") -> list[Path]:
    """The files of a folder, by name; hidden ones are passed over, folders inside are not looked into.

    Args:
        folder: where they lie.
        what: what they are called in an error.

    Raises:
        FileNotFoundError: there is no such folder, or nothing is in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"The folder of {what} {str(folder)!r} does not exist. Give a folder that holds them.")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"The folder of {what} {str(folder)!r} is empty. Put at least one picture into it.")
    return files


def _open(file: Path, resolution: int) -> np.ndarray:
    """uint8 (H, W, 3), upright, the shorter side `resolution` pixels."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} cannot be read as an image ({error}). Take it out of the folder, or save it as PNG or JPEG."
        ) from error
    scale = resolution / min(image.size)
    if scale != 1:
        size = tuple(max(resolution, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.array(image)


class SubjectImages:
    """The pictures of a folder in memory: all read, and so checked, before the training begins.

    They are turned upright by their EXIF tag, made RGB and scaled so that the shorter side has `resolution` pixels.

    Args:
        folder: of the pictures.
        resolution: width and height of what :meth:`at` returns, in pixels.
        center_crop: crop the middle, else anywhere. Default False.
        random_flip: mirror half of the time. Default False: it spoils subjects that have a left and a right.
        what: what they are called in an error.

    Raises:
        FileNotFoundError: see :func:`image_files`.
        ValueError: a file is no image, by its name.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        what: str = "images",
    ):
        self.files = image_files(folder, what)
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self._pixels = [_open(file, resolution) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fixed(self) -> bool:
        """Whether a picture always comes out the same, so that its latents can be kept."""
        square = all(pixels.shape[:2] == (self.resolution,) * 2 for pixels in self._pixels)
        return (self.center_crop or square) and not self.random_flip

    def at(self, indices: Tensor, random: Tensor) -> Tensor:
        """(B, 3, resolution, resolution) float32 in [-1, 1].

        Args:
            indices: (B,) which pictures.
            random: (B, 3) in [0, 1): where to cut (down, right), and whether to mirror (from 0.5).
        """
        return torch.stack([self._cut(int(i), *row) for i, row in zip(indices, random.tolist())])

    def _cut(self, index: int, down: float, right: float, mirror: float) -> Tensor:
        pixels, size = self._pixels[index], self.resolution
        free = [side - size for side in pixels.shape[:2]]
        # A float32 draw from [0, 1) may be 1, by rounding.
        places = (min(space, int(u * (space + 1))) for space, u in zip(free, (down, right)))
        top, left = (space // 2 for space in free) if self.center_crop else places
        pixels = pixels[top : top + size, left : left + size]
        if self.random_flip and mirror >= 0.5:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1


# --- class images ---


def class_image_file(folder: str | os.PathLike, index: int) -> Path:
    """Where the class image that is drawn from seed + `index` goes."""
    return Path(folder) / f"class-{index:05d}.png"


def missing_class_images(folder: str | os.PathLike, count: int) -> list[int]:
    """Indices of the class images that are to be drawn so that `folder` holds `count` pictures.

    Whatever pictures are there count, those of a user too. A folder that is not there is empty.
    """
    there = [] if not Path(folder).is_dir() else [f.name for f in Path(folder).iterdir() if not f.name.startswith(".")]
    wanted = max(0, count - len(there))
    free = (index for index in range(count + len(there)) if class_image_file(folder, index).name not in there)
    return [index for index, _ in zip(free, range(wanted))]


def draw_class_images(
    pipe: StableDiffusionPipeline,
    prompt: str,
    folder: str | os.PathLike,
    indices: Sequence[int],
    resolution: int | None = None,
    batch_size: int = 4,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = lambda batches: batches,
) -> None:
    """Let the model draw its own class before it is trained; each picture appears whole or not at all.

    Picture i depends on `seed` + i alone (and on rounding in batches), so an interrupted run is gone on with by asking
    :func:`missing_class_images` again.

    Args:
        pipe: the untrained pipeline; its present scheduler is used.
        prompt: of the class, such as "a photo of a dog".
        folder: where they go; created if need be.
        indices: which of them.
        resolution: in pixels. Default None: the model's own.
        batch_size: pictures at a time. Default 4.
        num_inference_steps: Default 50 (paper: DDIM, 50 steps).
        guidance_scale: Default 7.5.
        seed: Default 0.
        progress: wraps the batches, e.g. `tqdm`.

    Raises:
        OSError: the folder cannot be written to.
    """
    writable_folder(folder)
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    for batch in progress(batches):
        images = pipe(
            [prompt] * len(batch),
            height=resolution,
            width=resolution,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + index) for index in batch],
        ).images
        for index, image in zip(batch, images):
            with written_beside(class_image_file(folder, index)) as temporary:
                image.save(temporary)


# --- loss ---


def noise_target(scheduler: DDIMScheduler, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network is to predict: the noise, or v = alpha eps - sigma x0 of a v-prediction model; (B, C, H, W)."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, t)
    return noise


def dreambooth_loss(
    prediction: Tensor, target: Tensor, prior_loss_weight: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """MSE(instance) + prior_loss_weight * MSE(class), in float32.

    Args:
        prediction, target: (B, C, H, W); with a prior the first half belongs to instance images, the second to class
            images.
        prior_loss_weight: Default None: no prior, all of the batch are instance images.

    Returns:
        The loss, and what it is made of for the log: "loss", with a prior also "instance_loss" and "prior_loss".

    Raises:
        ValueError: an odd batch with a prior.
    """
    prediction, target = prediction.float(), target.float()
    if prior_loss_weight is None:
        loss = F.mse_loss(prediction, target)
        return loss, {"loss": loss}
    if len(prediction) % 2:
        raise ValueError(
            f"With prior preservation a batch is instance images and as many class images, but it holds {len(prediction)}."
        )
    pairs = zip(prediction.chunk(2), target.chunk(2))
    instance, prior = (F.mse_loss(one, other) for one, other in pairs)
    loss = instance + prior_loss_weight * prior
    return loss, {"loss": loss, "instance_loss": instance, "prior_loss": prior}


# --- inference ---


def sampling_scheduler(scheduler: Any) -> DDIMScheduler:
    """The paper's sampler for the multi-step model, DDIM, on the noise schedule of `scheduler`; from t = T-1 on."""
    settings = {"timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 1}
    return DDIMScheduler.from_config(scheduler.config, **settings)


def load_subject(
    pipe: StableDiffusionPipeline,
    folder: str | os.PathLike,
    weight: float = 1.0,
    adapter_name: str = "subject",
    **hub: Any,
) -> None:
    """Load what `train_dreambooth_lorad.py` wrote with `--method lorad` or `lora` beside the adapters that are active.

    Over the one-step LoRaD of a `WaDiPipeline` this makes one-step images of the subject: a subject's LoRaD adds its
    angles to the student's, a LoRA is added to the rotated weight. What is active stays so, at weight 1.

    Args:
        pipe: a stock `StableDiffusionPipeline`, or a `WaDiPipeline` with its student.
        folder: where it lies, or a Hub name.
        weight: factor on the angles (LoRA: on its change). Default 1.0.
        adapter_name: Default "subject".
        **hub: revision, token, cache_dir, local_files_only, force_download, proxies.

    Raises:
        ValueError, OSError: see `load_lorad_adapter`.
    """
    active = pipe.get_active_adapters()
    if find_file(folder, LORA_FILE, **hub):
        pipe.load_lora_weights(folder, adapter_name=adapter_name, weight_name=LORA_FILE, **hub)
    else:
        load_lorad_adapter(pipe.unet, folder, adapter_name, **hub)
        if find_file(folder, "adapter_config.json", TEXT_ENCODER, **hub):
            load_lorad_adapter(pipe.text_encoder, folder, adapter_name, TEXT_ENCODER, None, TEXT_ENCODER, **hub)
    pipe.set_adapters([*active, adapter_name], [1.0] * len(active) + [weight])
