"""`WaDiPipeline`: Stable Diffusion in one step.

The pipeline is the stock one. It adds the defaults of a one-step model, refuses or repairs what would defeat it, loads
LoRaD adapters, and saves a folder of stock classes. One-step arithmetic is x0 = (z - sigma * eps) / alpha at t = T-1
(paper, one-step generator).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from diffusers_wadi.pipelines._one_step import OneStepMixin


class WaDiPipeline(OneStepMixin, StableDiffusionPipeline):
    r"""
    Text-to-image generation in one step by a LoRaD adapter on Stable Diffusion.

    Inherits from [`StableDiffusionPipeline`], whose components, loaders and arguments it has, and adds
    `load_lorad_weights`, `save_lorad_weights`, `fuse_lorad`, `unfuse_lorad` and `unload_lorad_weights`.

    With the adapter switched off (`pipe.disable_lora()`) or taken out unfused the same pipeline is the multi-step
    teacher; call it then with the usual number of steps and guidance. A checkpoint without any adapter counts as a
    fused one-step model.
    """

    stock_class = StableDiffusionPipeline
    denoiser_class = UNet2DConditionModel
    lorad_component = "unet"

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 1,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (stock default, only read)
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Generate images. All arguments are those of [`StableDiffusionPipeline.__call__`]; what differs:

        Args:
            num_inference_steps (`int`, *optional*, defaults to 1):
                More steps run as in any pipeline, with one warning, since the model was trained for one.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Guidance is part of the trained model. Above 1 it runs as in any pipeline, with one warning.
            negative_prompt (`str` or `list[str]`, *optional*):
                Has an effect only with `guidance_scale` above 1; otherwise there is one warning.
            eta (`float`, *optional*, defaults to 0.0):
                Has no effect at one step.

        With a float16 or bfloat16 UNet the single scheduler step is computed in float32, because it multiplies
        rounding errors by 1 / alpha = 14.6.

        Examples:
            ```py
            >>> from diffusers_wadi import WaDiPipeline, bundled_checkpoint

            >>> pipe = WaDiPipeline.from_pretrained(bundled_checkpoint())
            >>> image = pipe("a large red heart on a white background").images[0]
            ```

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or `tuple`:
                If `return_dict` is `True` the output object, otherwise a tuple of the images and the list of "not safe
                for work" flags.

        Raises:
            ValueError: one step with a scheduler that would not feed t = T-1 (only a warning where the pipeline was put
                together by hand, without a LoRaD), a size that is not a multiple of 8, or
                another argument that the stock pipeline refuses.
        """
        self._refuse_scale(cross_attention_kwargs)
        times = sigmas if timesteps is None else timesteps
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        with self._ready(num_inference_steps, times, guidance_scale, has_negative):
            return super().__call__(
                prompt=prompt,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                num_images_per_prompt=num_images_per_prompt,
                eta=eta,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                ip_adapter_image=ip_adapter_image,
                ip_adapter_image_embeds=ip_adapter_image_embeds,
                output_type=output_type,
                return_dict=return_dict,
                cross_attention_kwargs=cross_attention_kwargs,
                guidance_rescale=guidance_rescale,
                clip_skip=clip_skip,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                **kwargs,
            )
