"""`WaDiPipeline`: Stable Diffusion in one step.

The pipeline is the stock one. It adds the defaults of a one-step model, refuses or repairs what would defeat it, loads
LoRaD adapters, and saves a folder of stock classes. One-step arithmetic is x0 = (z - sigma * eps) / alpha at t = T-1
(paper, one-step generator).
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_wadi.loaders import LoRaDLoaderMixin, lorad_layers
from diffusers_wadi.pipelines._loading import load_pipeline, resolve_source
from diffusers_wadi.pipelines._saving import OneStepCheckpointMixin
from diffusers_wadi.schedulers import check_one_step_scheduler, one_step_scheduler

logger = logging.get_logger(__name__)

LOW_PRECISION = (torch.float16, torch.bfloat16)


class WaDiPipeline(LoRaDLoaderMixin, OneStepCheckpointMixin, StableDiffusionPipeline):
    r"""
    Text-to-image generation in one step by a LoRaD adapter on Stable Diffusion.

    Inherits from [`StableDiffusionPipeline`], whose components, loaders and arguments it has, and adds
    `load_lorad_weights`, `save_lorad_weights`, `fuse_lorad`, `unfuse_lorad` and `unload_lorad_weights`.

    With the adapter switched off (`pipe.disable_lora()`) or taken out unfused the same pipeline is the multi-step
    teacher; call it then with the usual number of steps and guidance. A checkpoint without any adapter counts as a
    fused one-step model.
    """

    _warned: frozenset[str] = frozenset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        base_model: str | os.PathLike | None = None,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> WaDiPipeline:
        r"""
        Load a complete one-step checkpoint, a LoRaD adapter together with the base model it names, or a file of the
        paper's authors.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Local folder or Hub repository: a complete pipeline (`model_index.json`) or an adapter
                (`adapter_config.json` with `peft_type` "LORAD" and the weights). With `weight_name`, or as the path of
                a file, also the authors' UNets (`"gudaochangsheng/WaDi"`) and training files (`theta_a`, `theta_b`).
            base_model (`str` or `os.PathLike`, *optional*):
                Pipeline to put the adapter or the authors' UNet on. By default the `base_model_name_or_path` of the
                adapter's config: a folder inside its folder or repository, else a path, else a Hub name; for the
                authors' published files Stable Diffusion 1.5 or 2.1-base.
            weight_name (`str`, *optional*, defaults to `"pytorch_lorad_weights.safetensors"`):
                File name of the weights, such as `"rotated_unet-sdv1-5.safetensors"` for one of the authors' UNets.
            adapter_name (`str`, *optional*, defaults to `"default_0"`):
                Name to give the adapter.
            subfolder (`str`, *optional*):
                Folder inside `pretrained_model_name_or_path` to load from.
            **kwargs:
                As in [`DiffusionPipeline.from_pretrained`]: `dtype` or `torch_dtype` (default float32), `variant`, `revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download`, components to replace, ... They apply to the base
                pipeline; those that concern the Hub also to the adapter, except that `revision` is the adapter's.

        A scheduler that would not feed t = T-1 at one step (as in most Stable Diffusion checkpoints) is replaced by
        `one_step_scheduler(scheduler.config)`, which is logged. A `scheduler/` folder beside the adapter, as training
        writes it, takes the place of the base pipeline's. With the authors' files the scheduler has their
        `alphas_cumprod[T-1]` of 0.0047. Their `.pth` files are read as tensors only; code in them is not run.

        Returns:
            `WaDiPipeline`.

        Raises:
            OSError: the folder, repository or a file in it is missing or damaged.
            ValueError: the adapter or UNet does not fit the base model, or the base model does not predict epsilon.
        """
        plain = super().from_pretrained
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            # Else diffusers' models come as float32 but transformers' in the dtype of their config, and do not fit.
            kwargs["dtype"] = torch.float32
        source = resolve_source(pretrained_model_name_or_path, base_model, weight_name, subfolder, kwargs)
        pipe = load_pipeline(plain, source, weight_name, adapter_name, kwargs)
        pipe._repair_scheduler()
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> WaDiPipeline:
        r"""
        As [`DiffusionPipeline.from_pipe`], but in the dtype of `pipeline`, where the stock default casts the shared
        components, and with them the source, to float32.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = pipeline.dtype
        return super().from_pipe(pipeline, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> WaDiPipeline:
        r"""As [`DiffusionPipeline.to`]; LoRaD angles stay float32, since half precision rounds small ones away."""
        angles = _angle_parameters(self)
        exact = [parameter.data for parameter in angles]
        pipe = super().to(*args, **kwargs)
        for parameter, data in zip(angles, exact):
            parameter.data = data.to(parameter.device)
        return pipe

    @property
    def is_one_step(self) -> bool:
        """Whether the UNet is now the one-step generator: its adapter is on or fused, or it never had one."""
        layers = list(lorad_layers(self.unet))
        if not layers:
            return not self._lorad_removed
        return any(_is_acting(layer) for layer in layers)

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
            ValueError: one step with a scheduler that would not feed t = T-1, a size that is not a multiple of 8, or
                another argument that the stock pipeline refuses.
        """
        steps = len(timesteps or sigmas or ()) or num_inference_steps
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        self._warn_of_unsuitable(steps, guidance_scale, has_negative)
        one_step = steps == 1
        if one_step and timesteps is None and sigmas is None:
            check_one_step_scheduler(self.scheduler)
        with self._float32_step(one_step and self.unet.dtype in LOW_PRECISION):
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

    def _repair_scheduler(self) -> None:
        try:
            check_one_step_scheduler(self.scheduler)
        except ValueError as reason:
            unfit, self.scheduler = self.scheduler, one_step_scheduler(self.scheduler)
            logger.warning(
                f"The scheduler of this checkpoint ({type(unfit).__name__}) was replaced by one_step_scheduler(...) "
                f"with its betas, because {str(reason).split('. ')[0]}."
            )

    def _warn_of_unsuitable(self, steps: int, guidance_scale: float, has_negative: bool) -> None:
        off = "switch the adapter off (`pipe.disable_lora()`) for the multi-step teacher"
        if steps > 1 and self.is_one_step:
            self._warn_once(
                "steps",
                f"num_inference_steps={steps}: this model was trained for one step at t = T-1. Use 1, or {off}.",
            )
        if guidance_scale > 1 and self.is_one_step:
            self._warn_once(
                "guidance",
                f"guidance_scale={guidance_scale}: guidance is already in this one-step model; more doubles the cost "
                f"and burns colours. Use 1.0, or {off}.",
            )
        if has_negative and guidance_scale <= 1:
            self._warn_once(
                "negative",
                f"The negative prompt has no effect at guidance_scale={guidance_scale}; it needs more than 1.",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned = self._warned | {kind}
            logger.warning(message)

    @contextmanager
    def _float32_step(self, wanted: bool) -> Iterator[None]:
        """Compute `scheduler.step` in float32 inside the block.

        The scheduler is exchanged for a copy of it, so that pipelines that share it (`from_pipe`) do not notice, and
        nothing is left behind by an exception.
        """
        if not wanted:
            yield
            return
        original = self.scheduler
        precise = copy.copy(original)
        precise.step = _in_float32(precise.step)
        self.scheduler = precise
        try:
            yield
        finally:
            self.scheduler = original


def _in_float32(step: Callable) -> Callable:
    # wraps: the pipeline reads the signature of `step` to see which arguments it may pass.
    @functools.wraps(step)
    def precise_step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> tuple:
        result = step(model_output.float(), timestep, sample.float(), **kwargs | {"return_dict": False})
        return result[0].to(model_output.dtype), *result[1:]

    return precise_step


def _is_acting(layer: BaseTunerLayer) -> bool:
    # Switched off counts even when merged: such a layer unmerges itself at its next call.
    active = layer.merged or any(name in layer.lorad_A for name in layer.active_adapters)
    return active and not layer.disable_adapters


def _angle_parameters(pipe: WaDiPipeline) -> list[torch.nn.Parameter]:
    layers = lorad_layers(pipe.unet) if isinstance(pipe.unet, torch.nn.Module) else ()
    return [p for layer in layers for p in (*layer.lorad_A.values(), *layer.lorad_B.values())]


def register_auto_pipelines() -> None:
    """Make `AutoPipelineFor...from_pipe(wadi_pipeline)` work; does nothing the second time."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
    from diffusers.pipelines import auto_pipeline

    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["wadi"] = WaDiPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["wadi"] = StableDiffusionImg2ImgPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING["wadi"] = StableDiffusionInpaintPipeline
