"""The steps of `optimize()`: which models are copied and how, and what is left out and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import logging

from diffusers_wadi.pipelines import _fast_copies as fast
from diffusers_wadi.pipelines._fast_images import with_fast_images
from diffusers_wadi.pipelines._prompt_cache import PromptCache
from diffusers_wadi.pipelines._saving import has_adapters


@dataclass(frozen=True)
class OptimizationReport:
    """What `optimize` did, and what it left out and why, by the name of its argument."""

    done: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = "; ".join(f"{name}: {what}" for name, what in self.done.items()) or "nothing"
        left = "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
        return done + (f". Left out: {left}" if left else "")


_logger = logging.get_logger(__name__)


def models_of(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def device_of(model: torch.nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)


def copies_of(
    pipe: Any,
    models: dict[str, torch.nn.Module],
    settings: dict[str, Any],
    device: torch.device,
    report: OptimizationReport,
) -> dict[str, torch.nn.Module]:
    """The models to draw with, of those that need not stay as they are."""
    denoiser = models.get(pipe.lorad_component)
    dtype = settings["dtype"] or _usual_dtype(denoiser, device)
    made = {}
    for name, model in models.items():
        if getattr(model, "hf_quantizer", None) is not None:
            report.left_out[name] = "its weights are quantised"
        elif dtype is not None or name in (pipe.lorad_component, "vae", "controlnet"):
            made[name] = _copy_of(model, name, pipe, settings, dtype, report)
            fast.refuse_what_would_be_lost(made[name], type(pipe).__name__)
    if dtype is not None:
        report.done["dtype"] = str(dtype).removeprefix("torch.")
    if settings["channels_last"]:
        report.done["channels_last"] = "convolutions"
    if pipe.lorad_component in made:
        _fuse_qkv(made[pipe.lorad_component], settings["fuse_qkv"], device, report)
    return made


def _copy_of(
    model: torch.nn.Module,
    name: str,
    pipe: Any,
    settings: dict[str, Any],
    dtype: torch.dtype | None,
    report: OptimizationReport,
) -> torch.nn.Module:
    if name == "vae" and settings["vae"] is not None:
        report.done["vae"] = type(settings["vae"]).__name__
        copied = fast.fast_copy(settings["vae"]).eval().to(device_of(model))
        fast.carry_settings(model, copied)
        dtype = dtype or model.dtype
    else:
        copied = _fused_copy(model, settings, report) if name == pipe.lorad_component else fast.fast_copy(model)
    if dtype is not None:
        fast.cast(copied, dtype)
    if settings["channels_last"]:
        fast.to_channels_last(copied)
    return copied


def _usual_dtype(denoiser: torch.nn.Module | None, device: torch.device) -> torch.dtype | None:
    is_exact = denoiser is not None and denoiser.dtype == torch.float32
    return torch.float16 if device.type == "cuda" and is_exact else None


def _fused_copy(model: torch.nn.Module, settings: dict[str, Any], report: OptimizationReport) -> torch.nn.Module:
    if settings["fuse"] and not has_adapters(model):
        report.left_out["fuse"] = "there are no adapters"
    elif settings["fuse"]:
        try:
            copied = fast.fast_copy(model, fuse=True)
        except ValueError as error:  # such as a quantised layer in a model that is not
            report.left_out["fuse"] = str(error)
        else:
            report.done["fuse"] = "adapters in the weights"
            return copied
    return fast.fast_copy(model)


def _fuse_qkv(
    denoiser: torch.nn.Module, wanted: bool | None, device: torch.device, report: OptimizationReport
) -> None:
    if wanted is False or (wanted is None and device.type == "cpu"):
        return
    if reason := fast.why_not_qkv(denoiser):
        report.left_out["fuse_qkv"] = reason
        return
    try:
        fast.fuse_qkv(denoiser)
        report.done["fuse_qkv"] = "queries, keys and values in one product"
    except ValueError as error:
        report.left_out["fuse_qkv"] = str(error)


def compile_or_say_why(pipe: Any, settings: dict[str, Any], report: OptimizationReport) -> None:
    """Compile and try; what fails is undone."""
    denoiser, vae = getattr(pipe, pipe.lorad_component, None), getattr(pipe, "vae", None)
    reason = None
    if denoiser is None or pipe.lorad_component not in pipe._optimization.originals:
        reason = "there is no model to compile"
    elif any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in denoiser.modules()):
        reason = "weights that are offloaded change their places"
    else:
        try:
            fast.compile_parts(denoiser, vae, settings["compile"], dict(settings["compile_options"] or {}))
            pipe._try_compiled()
        except Exception as error:  # of the many that a compiler may have
            fast.uncompile(denoiser, vae)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if reason is None:
        report.done["compile"] = settings["compile"]
    else:
        report.left_out["compile"] = reason
        _logger.warning(f"The pipeline is not compiled, and draws all the same: {reason}")


def set_up(pipe: Any, settings: dict[str, Any], report: OptimizationReport) -> PromptCache | None:
    """What an optimized pipeline has beside its models: images without detours, and the cache of prompts that is returned."""
    if getattr(pipe, "image_processor", None) is not None:
        with_fast_images(pipe.image_processor)
    if not settings["prompt_cache"]:
        return None
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "tokenizer", None) is None:
        report.left_out["prompt_cache"] = "there is no text encoder"
        return None
    report.done["prompt_cache"] = f"{settings['prompt_cache']:g} MB"
    return PromptCache(settings["prompt_cache"])
