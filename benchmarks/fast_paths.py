"""The ways to draw that latency.py and memory.py compare: stock diffusers, a plain script, and `optimize()` factor by factor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from real_size import SD_BETAS, random_sd15

from diffusers_wadi import LoRaDConfig, WaDiPipeline, bundled_checkpoint, lorad_target_modules

BARE = {"channels_last": False, "fuse_qkv": False, "prompt_cache": 0}
TEACHERS_CALL = {"shapes": {"guidance_scale": 3.0}, "sd15": {"guidance_scale": 7.5}}
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.0}


@dataclass(frozen=True)
class Way:
    """One way to draw.

    Args:
        make: of a `WaDiPipeline` with its adapter active the callable that draws, with its models as attributes.
        call: arguments of each call.
        same_images: whether the images are to be those of the plain pipeline.
    """

    make: Callable[[WaDiPipeline], Any]
    call: dict[str, Any] = field(default_factory=dict)
    same_images: bool = True


class PlainScript:
    """What a script does that knows one model and one step, in the manner of the authors' `infer`: no pipeline at all."""

    def __init__(self, pipe: Any) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
        self.alpha_cumprod = float(pipe.scheduler.alphas_cumprod[-1])
        self.side = self.unet.config.sample_size

    @torch.no_grad()
    def __call__(self, prompt: list[str], generator: list[torch.Generator]) -> Any:
        device, dtype = self.unet.device, self.unet.dtype
        ids = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = self.text_encoder(ids.to(device))[0]
        noise = torch.cat([torch.randn(1, 4, self.side, self.side, generator=each, dtype=dtype) for each in generator])
        noise = noise.to(device)
        eps = self.unet(noise, torch.tensor(999, device=device), text, return_dict=False)[0]
        x0 = (noise.float() - (1 - self.alpha_cumprod) ** 0.5 * eps.float()) / self.alpha_cumprod**0.5
        decoded = self.vae.decode(x0.to(dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        pixels = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return [Image.fromarray(array) for array in pixels.contiguous().cpu().numpy()]


def with_adapter_merged(pipe: WaDiPipeline) -> WaDiPipeline:
    """Fused by hand, as anybody would: plain modules, nothing else."""
    merged = WaDiPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    merged.fuse_lorad()
    merged.unload_lorad_weights()
    return merged


def stock(pipe: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)


def teacher(pipe: WaDiPipeline) -> StableDiffusionPipeline:
    """The stock pipeline on the base, with the scheduler for many steps."""
    base = WaDiPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    base.unload_lorad_weights()
    parts = base.components | {"scheduler": base._scheduler_of_many_steps()}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def optimized(**settings: Any) -> Callable[[WaDiPipeline], WaDiPipeline]:
    return lambda pipe: WaDiPipeline.from_pipe(pipe).optimize(**settings)


def tiny_vae() -> AutoencoderTiny:
    """Of TAESD's size, with random weights: its time is the same."""
    torch.manual_seed(0)
    return AutoencoderTiny().eval()


def ways(size: str) -> dict[str, Way]:
    """All of them by name."""
    many = {"num_inference_steps": 25, **TEACHERS_CALL[size]}
    found = {
        "stock, 25 steps with guidance": Way(teacher, many, same_images=False),
        "stock, 1 step, adapter not fused": Way(stock, ONE_STEP),
        "stock, 1 step, fused": Way(lambda pipe: stock(with_adapter_merged(pipe)), ONE_STEP),
        "plain script, fused": Way(lambda pipe: PlainScript(with_adapter_merged(pipe))),
        "WaDiPipeline, adapter not fused": Way(WaDiPipeline.from_pipe),
        "WaDiPipeline, fused": Way(with_adapter_merged),
        "optimize: fuse alone": Way(optimized(**BARE)),
        "fuse + qkv": Way(optimized(**BARE | {"fuse_qkv": True})),
        "fuse + channels-last": Way(optimized(**BARE | {"channels_last": True})),
        "fuse + float16": Way(optimized(**BARE, dtype=torch.float16)),
        "fuse + bfloat16": Way(optimized(**BARE, dtype=torch.bfloat16)),
        "fuse + prompt cache": Way(optimized(**BARE | {"prompt_cache": 64})),
        "fuse + regional compile": Way(optimized(**BARE, compile="regional")),
        "fuse + full compile": Way(optimized(**BARE, compile="full")),
        "fuse + full compile, CUDA graphs": Way(
            optimized(**BARE, compile="full", compile_options={"mode": "reduce-overhead"})
        ),
        "fuse + tiny VAE": Way(lambda pipe: optimized(**BARE, vae=tiny_vae())(pipe), same_images=False),
        "optimize()": Way(optimized()),
        "optimize(), full compile": Way(optimized(compile="full", compile_options={"mode": "reduce-overhead"})),
        "optimize(), full compile, tiny VAE": Way(
            lambda pipe: optimized(compile="full", compile_options={"mode": "reduce-overhead"}, vae=tiny_vae())(pipe),
            same_images=False,
        ),
    }
    return found


def load(size: str, folder: Path | None = None) -> WaDiPipeline:
    """The bundled student, or random weights of Stable Diffusion 1.5's size with a student's adapter of rank 256, in float32.

    Args:
        folder: a pipeline as `write_sd15` leaves it, to be read instead.
    """
    if size == "shapes":
        return WaDiPipeline.from_pretrained(bundled_checkpoint())
    pipe = WaDiPipeline(**random_sd15()) if folder is None else WaDiPipeline.from_pretrained(folder)
    targets = lorad_target_modules(pipe.unet, role="student")
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoRaDConfig(r=256, target_modules=targets, init_weights=False), "student")
    for key, parameter in pipe.unet.named_parameters():
        if "lorad_" in key:
            parameter.requires_grad_(False).mul_(0.3)
    return pipe


def write_sd15(folder: Path) -> None:
    """The random weights of `load` in float16, once."""
    if not (folder / "model_index.json").is_file():
        parts = random_sd15(torch.float16) | {
            "scheduler": DDIMScheduler(**SD_BETAS, steps_offset=1, clip_sample=False)
        }
        StableDiffusionPipeline(**parts).save_pretrained(folder)
