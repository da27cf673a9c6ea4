"""Sample grids for looking at a student while it trains: what its users will get, through the pipeline they will use."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn

from .._files import written_beside
from ..pipelines import WaDiPipeline, WaDiPixArtPipeline
from .backbones import Backbone, PixArtBackbone
from .text_encoders import unpack_mask

logger = logging.getLogger(__name__)


def one_step_pipeline(backbone: Backbone, denoiser: nn.Module, vae: nn.Module, scheduler) -> DiffusionPipeline:
    """The pipeline of a student of ``backbone``, without text encoder: it is given embeddings."""
    if vae.dtype != backbone.dtype:
        vae = vae.to(backbone.dtype)
    parts = {"vae": vae, "text_encoder": None, "tokenizer": None, "scheduler": scheduler}
    if isinstance(backbone, PixArtBackbone):
        pipe = WaDiPixArtPipeline(transformer=denoiser, **parts)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        # WaDiPipeline is for the last timestep; a student that starts earlier (--t_init) has another scheduler.
        pipeline_class = WaDiPipeline if isinstance(scheduler, DDIMScheduler) else StableDiffusionPipeline
        pipe = pipeline_class(unet=denoiser, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # one image at a time: the VAE's activations are what takes memory at 512 pixels
    return pipe


class GridPainter:
    """Draws the same prompts from the same noise whenever it is asked; no random stream of the training is touched.

    Args:
        backbone: the teacher's kind.
        denoiser, vae: with the student's adapter; as loaded. The VAE is cast to the denoiser's precision, in which
            users run it too.
        scheduler: the student's.
        text: (N, L, D) embeddings of the prompts, as the backbone's encoder makes them.
        latent_shape: (C, H, W).
        seed: of the noise.
        batch_size: images at a time.
    """

    def __init__(
        self,
        backbone: Backbone,
        denoiser: nn.Module,
        vae: nn.Module,
        scheduler,
        text: Tensor,
        latent_shape: tuple[int, int, int],
        seed: int,
        batch_size: int,
    ):
        self.backbone, self.denoiser, self.batch_size = backbone, denoiser, batch_size
        self.pipe = one_step_pipeline(backbone, denoiser, vae, scheduler)
        self.noise = torch.randn(len(text), *latent_shape, generator=torch.Generator().manual_seed(seed))
        self.text = text.cpu()

    @torch.no_grad()
    def images(self) -> list[Image.Image]:
        """One picture per prompt, by the role and weights that are active now."""
        training = self.denoiser.training
        self.denoiser.eval()
        try:
            parts = zip(self.noise.split(self.batch_size), self.text.split(self.batch_size))
            return [image for noise, text in parts for image in self._draw(noise, text)]
        finally:
            self.denoiser.train(training)

    def _draw(self, noise: Tensor, text: Tensor) -> list[Image.Image]:
        target = {"device": self.backbone.device, "dtype": self.backbone.dtype}
        call: dict[str, Any] = {"latents": noise.to(**target), "num_inference_steps": 1, "guidance_scale": 1.0}
        text = text.to(**target)
        if isinstance(self.backbone, PixArtBackbone):
            text, call["prompt_attention_mask"] = unpack_mask(text)
            call |= {"negative_prompt": None, "use_resolution_binning": False}
        height, width = (size * self.backbone.vae_factor for size in noise.shape[2:])
        return self.pipe(prompt_embeds=text, height=height, width=width, **call).images


def image_grid(images: list[Image.Image]) -> Image.Image:
    """One picture, in rows of the largest number up to 8 that divides N."""
    columns = next(n for n in (8, 7, 6, 5, 4, 3, 2, 1) if len(images) % n == 0)
    return make_image_grid(images, rows=len(images) // columns, cols=columns)


def save_grid(images: list[Image.Image], file: Path) -> Path:
    """Write :func:`image_grid`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(file) as temporary:
        image_grid(images).save(temporary)
    return file


def send_images(accelerator: Accelerator, images: list[Image.Image], captions: list[str], step: int) -> list[str]:
    """Give the images to every tracker that takes any; one that fails is reported and does not keep the others from it.

    Returns:
        Names of the trackers that took them.
    """
    took = []
    for tracker in accelerator.trackers:
        try:
            if _send(tracker, images, captions, step):
                took.append(tracker.name)
        except Exception as error:  # whatever a service does must not end the training
            logger.warning("%s did not take the samples of step %d: %s", tracker.name, step, error)
    return took


def _send(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> bool:
    if tracker.name == "tensorboard":
        stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
        tracker.log_images({"validation": stack}, step=step, dataformats="NHWC")
    elif tracker.name == "wandb":
        import wandb

        shown = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions)]
        tracker.log({"validation": shown}, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({"validation": images if tracker.name == "swanlab" else image_grid(images)}, step=step)
    else:
        return False
    return True
