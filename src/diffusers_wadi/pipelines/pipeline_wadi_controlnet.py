"""`WaDiControlNetPipeline`: Stable Diffusion in one step, with a ControlNet for the multi-step model.

The pipeline is the stock one, with what `WaDiPipeline` adds to Stable Diffusion. UNet and ControlNet are evaluated once,
at t = T-1, and one residual has to do what the ControlNet was trained to do over many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionControlNetPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from diffusers_wadi.pipelines._control import (
    nets_of,
    real_scale,
    refuse_other_family,
    refuse_unfit_conditions,
    refuse_what_is_void_at_one_step,
)
from diffusers_wadi.pipelines._one_step import OneStepMixin


class WaDiControlNetPipeline(OneStepMixin, StableDiffusionControlNetPipeline):
    r"""
    Text-to-image generation in one step by a LoRaD adapter on Stable Diffusion, controlled by one or more ControlNets
    of the multi-step model.

    Inherits from [`StableDiffusionControlNetPipeline`], whose components, loaders and arguments it has, and adds
    `load_lorad_weights`, `save_lorad_weights`, `fuse_lorad`, `unfuse_lorad` and `unload_lorad_weights`.

    `from_pretrained(model, controlnet=controlnet)` loads what `WaDiPipeline.from_pretrained` loads, with a ControlNet or a
    list of several; a folder saved with its ControlNet needs none.
    `WaDiControlNetPipeline.from_pipe(pipe, controlnet=controlnet)` makes one of a `WaDiPipeline` or any Stable Diffusion
    pipeline, and `WaDiPipeline.from_pipe(pipe)` goes back; models and scheduler are shared, nothing is copied.

    With the adapter switched off (`pipe.disable_lora()`) the same pipeline is the multi-step teacher with ControlNet;
    call it then with the usual number of steps and guidance. A checkpoint without any adapter counts as a fused
    one-step model.
    """

    stock_class = StableDiffusionControlNetPipeline
    denoiser_class = UNet2DConditionModel
    lorad_component = "unet"
    further_components = {"controlnet": "controlnet=ControlNetModel.from_pretrained(...), or a list of such"}

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> WaDiControlNetPipeline:
        r"""
        As [`DiffusionPipeline.from_pipe`], but in the dtype of `pipeline`.

        Args:
            pipeline ([`DiffusionPipeline`]): A Stable Diffusion pipeline, one-step or stock.
            **kwargs: Components to replace, and `controlnet`, which `pipeline` need not have.

        Raises:
            ValueError: `pipeline` is of another kind, such as PixArt, or there is no ControlNet.
        """
        parts = pipeline.components
        if parts.get("unet") is None or parts.get("text_encoder_2") is not None:
            raise ValueError(
                f"{type(pipeline).__name__} is no Stable Diffusion 1.x or 2.x pipeline, and {cls.__name__} is for these "
                "alone; diffusers has no ControlNet pipeline for PixArt-alpha"
            )
        if kwargs.get("controlnet", parts.get("controlnet")) is None:
            raise ValueError(
                f"{type(pipeline).__name__} has no ControlNet; pass {cls.further_components['controlnet']}"
            )
        return super().from_pipe(pipeline, **kwargs)

    def register_modules(self, **kwargs: Any) -> None:
        r"""As [`DiffusionPipeline.register_modules`]; refuses a ControlNet that the UNet has no use for."""
        if kwargs.get("controlnet") is not None and kwargs.get("unet") is not None:
            refuse_other_family(kwargs["unet"], nets_of(kwargs["controlnet"]))
        super().register_modules(**kwargs)

    def _trial_arguments(self) -> dict[str, Any]:
        side, nets = self.unet.config.sample_size * self.vae_scale_factor, nets_of(self.controlnet)
        images = [torch.zeros(1, net.config.conditioning_channels, side, side) for net in nets]
        return super()._trial_arguments() | {"image": images if len(images) > 1 else images[0]}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
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
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (stock default, only read)
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Generate images. All arguments are those of [`StableDiffusionControlNetPipeline.__call__`]; what differs:

        Args:
            image (`PipelineImageInput`):
                The condition, of the size of the image to draw; at one step it is never resized. PIL images of mode RGB,
                L, 1 or P, float arrays (h, w, 3) or tensors (3, h, w) from 0 to 1. For several ControlNets a list with
                one for each. `diffusers_wadi.downstream.controlnet.condition_image` makes one of a photograph.
            num_inference_steps (`int`, *optional*, defaults to 1), guidance_scale (`float`, *optional*, defaults to 1.0):
                More runs as in any pipeline, with one warning.
            controlnet_conditioning_scale (`float` or `list[float]`, *optional*, defaults to 1.0):
                Strength of the control; whole numbers do too. ControlNets were trained for many steps: try 0.5 to 1.5.
            guess_mode (`bool`, *optional*, defaults to `False`):
                Needs guidance, which a one-step model has built in.
            control_guidance_start, control_guidance_end (`float` or `list[float]`, *optional*):
                At one step only 0.0 and 1.0 leave the ControlNet on; others are refused.

        With a float16 or bfloat16 UNet the single scheduler step is computed in float32.

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or `tuple`: as in the stock pipeline.

        Raises:
            ValueError: before any work, at one step: a condition of another size than the image, or of a mode or range
                that would be misread; settings that would switch the ControlNet off; a scheduler that would not feed t =
                T-1. At any number of steps: scales that are not one for each ControlNet.
        """
        self._refuse_scale(cross_attention_kwargs)
        times = sigmas if timesteps is None else timesteps
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        nets = nets_of(self.controlnet)
        controlnet_conditioning_scale = real_scale(controlnet_conditioning_scale, nets)
        if (len(times or ()) or num_inference_steps) == 1:
            refuse_what_is_void_at_one_step(control_guidance_start, control_guidance_end, guess_mode, guidance_scale)
            channels = [net.config.conditioning_channels for net in nets]
            refuse_unfit_conditions(image, height, width, latents, self.vae_scale_factor, channels)
        with self._ready(num_inference_steps, times, guidance_scale, has_negative):
            return super().__call__(
                prompt=prompt,
                image=image,
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
                controlnet_conditioning_scale=controlnet_conditioning_scale,
                guess_mode=guess_mode,
                control_guidance_start=control_guidance_start,
                control_guidance_end=control_guidance_end,
                clip_skip=clip_skip,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                **kwargs,
            )
