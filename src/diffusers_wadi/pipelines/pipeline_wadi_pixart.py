"""`WaDiPixArtPipeline`: PixArt-alpha in one step.

The pipeline is the stock one, with what `WaDiPipeline` adds to Stable Diffusion. Of the transformer's 8 output channels
the first 4 are eps, the others its learned variance, which one step has no use for: x0 = (z - sigma * eps) / alpha at
t = T-1. PixArt's own schedule ends at alphas_cumprod = 4.04e-5, so that x0 would be 157 times eps and its errors; the
authors' release takes 0.0047 in training and in use, and so does this pipeline unless a scheduler says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ImagePipelineOutput, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.utils import is_bs4_available, is_ftfy_available

from diffusers_wadi.authors_files import AUTHORS_TERMINAL_ALPHA_CUMPROD
from diffusers_wadi.pipelines._one_step import OneStepMixin

BINNED_SIZES = (32, 64, 128)  # sample sizes for which the stock pipeline has a table of aspect ratios


class WaDiPixArtPipeline(OneStepMixin, PixArtAlphaPipeline):
    r"""
    Text-to-image generation in one step by a LoRaD adapter on PixArt-alpha.

    Inherits from [`PixArtAlphaPipeline`], whose components and arguments it has, and adds `load_lorad_weights`,
    `save_lorad_weights`, `fuse_lorad`, `unfuse_lorad` and `unload_lorad_weights`, and `set_adapters`, `disable_lora` and
    the like, which the stock class lacks.

    With the adapter switched off (`pipe.disable_lora()`) or taken out unfused the same pipeline is the multi-step
    teacher, with the checkpoint's own scheduler; call it then with the usual number of steps and guidance. A checkpoint
    without any adapter counts as a fused one-step model.
    """

    stock_class = PixArtAlphaPipeline
    denoiser_class = PixArtTransformer2DModel
    lorad_component = "transformer"
    terminal_alpha_cumprod = AUTHORS_TERMINAL_ALPHA_CUMPROD
    _step_index = 1

    def check_inputs(self, prompt: str | list[str] | None, height: int, width: int, *args: Any, **kwargs: Any) -> None:
        r"""As [`PixArtAlphaPipeline.check_inputs`], and a size has to be a whole number of the transformer's patches."""
        unit = self.vae_scale_factor * self.transformer.config.patch_size
        if height % unit or width % unit:
            raise ValueError(
                f"height and width have to be multiples of {unit} (a latent is {self.vae_scale_factor} pixels, a patch "
                f"{self.transformer.config.patch_size} latents), got {height} and {width}"
            )
        super().check_inputs(prompt, height, width, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str = "",
        num_inference_steps: int = 1,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int | None = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int, torch.Tensor], None] | None = None,
        callback_steps: int = 1,
        clean_caption: bool | None = None,
        use_resolution_binning: bool | None = None,
        max_sequence_length: int = 120,
        **kwargs: Any,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images. All arguments are those of [`PixArtAlphaPipeline.__call__`]; what differs:

        Args:
            num_inference_steps (`int`, *optional*, defaults to 1):
                More steps run as in any pipeline, with one warning, since the model was trained for one.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Guidance is part of the trained model. Above 1 it runs as in any pipeline, with one warning.
            negative_prompt (`str`, *optional*, defaults to `""`):
                Has an effect only with `guidance_scale` above 1; otherwise there is one warning.
            eta (`float`, *optional*, defaults to 0.0):
                Has no effect at one step.
            clean_caption (`bool`, *optional*):
                Clean the prompt before it is encoded. By default where beautifulsoup4 and ftfy are installed, as the
                stock pipeline does and as training does.
            use_resolution_binning (`bool`, *optional*):
                Draw at the nearest size that the model was trained on, and resize. By default if the transformer's
                `sample_size` is one of 32, 64 and 128, for which such sizes are known.

        With a float16 or bfloat16 transformer the single scheduler step is computed in float32, because it multiplies
        rounding errors by 1 / alpha = 14.6.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: If `return_dict` is `True` the output object, otherwise a tuple of the
                images.

        Raises:
            ValueError: one step with a scheduler that would not feed t = T-1 (only a warning where the pipeline was put
                together by hand, without a LoRaD), a size that is not a whole number of
                patches, or another argument that the stock pipeline refuses.
        """
        if clean_caption is None:
            clean_caption = is_bs4_available() and is_ftfy_available()
        if use_resolution_binning is None:
            use_resolution_binning = self.transformer.config.sample_size in BINNED_SIZES
        times = sigmas if timesteps is None else timesteps
        has_negative = bool(negative_prompt) or negative_prompt_embeds is not None
        with self._ready(num_inference_steps, times, guidance_scale, has_negative):
            return super().__call__(
                prompt=prompt,
                negative_prompt=negative_prompt,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                height=height,
                width=width,
                eta=eta,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                negative_prompt_embeds=negative_prompt_embeds,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                output_type=output_type,
                return_dict=return_dict,
                callback=callback,
                callback_steps=callback_steps,
                clean_caption=clean_caption,
                use_resolution_binning=use_resolution_binning,
                max_sequence_length=max_sequence_length,
                **kwargs,
            )
