"""Sample grids for looking at a student while it trains."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor


def latents_grid(vae: AutoencoderKL, latents: Tensor) -> Image.Image:
    """(N, C, H, W) scaled latents as one picture, in rows of the largest number up to 8 that divides N."""
    # One image at a time: the VAE's activations are what takes memory at 512 pixels.
    images = [vae.decode(latent[None] / vae.config.scaling_factor).sample for latent in latents]
    pictures = VaeImageProcessor().postprocess(torch.cat(images).float())
    columns = next(n for n in (8, 7, 6, 5, 4, 3, 2, 1) if len(pictures) % n == 0)
    return make_image_grid(pictures, rows=len(pictures) // columns, cols=columns)
