"""Pipelines to evaluate: by a preset, or any text-to-image pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

import diffusers_wadi.pipelines as our_pipelines
from diffusers_wadi._files import NotCachedError, find_file, hub_options, probe_file
from diffusers_wadi.authors_files import fitting_weights
from diffusers_wadi.evaluation.presets import Preset, WeightFile
from diffusers_wadi.evaluation.weights import read_state
from diffusers_wadi.schedulers import one_step_scheduler
from diffusers_wadi.shapes import bundled_checkpoint

__all__ = ["load_pipeline", "load_preset"]

COMPONENTS = ("unet", "transformer")


def load_preset(
    preset: Preset,
    model: str | Path | None = None,
    weights: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    **hub: Any,
) -> DiffusionPipeline:
    """A pipeline that runs a published model as its authors do.

    Args:
        preset: see `PRESETS`.
        model: folder or Hub name to load in the place of the preset's `base`. Default None.
        weights: file in the place of the preset's LoRA or denoiser. Default None.
        dtype: of the weights. Default float32.
        **hub: revision, token, cache_dir, local_files_only, force_download.

    A safety checker is left out: it replaces images by black ones, which no metric expects.

    Raises:
        OSError: a file cannot be had; with its name and the option that takes it from elsewhere.
        ValueError: weights of another model.
    """
    file = preset.lora or preset.denoiser
    if weights is not None and file is None:
        raise ValueError(f"the preset of {preset.label} has no weights besides its pipeline; leave weights out")
    path = None if file is None else _weight_file(file, weights, hub)  # first, since it is small where it is a LoRA
    base = str(model or _base(preset))
    if hasattr(our_pipelines, preset.pipeline):
        cls = getattr(our_pipelines, preset.pipeline)
        source, extra = (base, {}) if path is None else (str(path), {"base_model": base})
        return _quiet(
            _explained(base, lambda: cls.from_pretrained(source, dtype=dtype, **_unchecked(cls), **extra, **hub))
        )
    cls = getattr(diffusers, preset.pipeline)
    parts = {} if preset.denoiser is None else {"unet": _denoiser(base, path, dtype, hub)}
    pipe = _explained(base, lambda: cls.from_pretrained(base, dtype=dtype, **_unchecked(cls), **parts, **hub))
    if preset.lora is not None:
        _fuse_lora(pipe, path)
    if preset.negative_output:
        for parameter in pipe.unet.conv_out.parameters():
            parameter.data.neg_()
    if preset.scheduler is not None:
        pipe.scheduler = _scheduler(pipe.scheduler, preset)
    return _quiet(pipe)


def load_pipeline(
    model: str | Path, base_model: str | Path | None = None, dtype: torch.dtype = torch.float32, **hub: Any
) -> DiffusionPipeline:
    """Any text-to-image pipeline of diffusers, or a LoRaD adapter on its base.

    Args:
        model: folder or Hub name of a complete pipeline (`model_index.json`) or of an adapter (`adapter_config.json`).
        base_model: base of an adapter. Default None: the one that it names.
        dtype: of the weights. Default float32.
        **hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        OSError: it cannot be had.
        ValueError: an adapter that does not fit.
    """
    model = str(model)
    if is_adapter(model, base_model, **hub):
        cls = our_pipelines.one_step_pipeline_class(model, base_model=base_model, **hub)
        return _quiet(cls.from_pretrained(model, base_model=base_model, dtype=dtype, **_unchecked(cls), **hub))
    load = DiffusionPipeline.from_pretrained
    pipe = _explained(model, lambda: load(model, dtype=dtype, **hub))
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    return _quiet(pipe)


def is_adapter(model: str | Path, base_model: str | Path | None = None, **hub: Any) -> bool:
    """Whether `WaDiPipeline.from_pretrained` is to load it: an adapter or a file, not a complete pipeline."""
    if base_model is not None or Path(model).is_file():
        return True
    return probe_file(model, "model_index.json", **hub_options(hub)) is None


def _base(preset: Preset) -> str | Path:
    return preset.base if preset.bundled is None else bundled_checkpoint(preset.bundled) / preset.base


def _unchecked(cls: type) -> dict[str, Any]:
    """Arguments of `from_pretrained` that leave a safety checker out, where the class knows one; safetensors alone."""
    optional = getattr(cls, "_optional_components", ())
    more = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in optional else {}
    return {"use_safetensors": True} | more


def _quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _explained(origin: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"cannot load the pipeline {origin!r}: {reason} Its folder from elsewhere goes in as MODEL."
        ) from error


def _weight_file(file: WeightFile, weights: str | Path | None, hub: dict[str, Any]) -> Path:
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"weights {str(weights)!r}: no such file (--preset_weights)")
        return path
    advice = "Download it elsewhere and give the file with --preset_weights."
    try:
        path = find_file(file.repository, file.name, **hub_options(hub))
    except NotCachedError as error:
        raise NotCachedError(f"cannot get {file.name} of {file.repository} from the Hub. {advice}") from error
    except OSError as error:
        raise OSError(f"cannot get {file.name} of {file.repository}: {error} {advice}") from error
    if path is None:
        raise FileNotFoundError(f"{file.repository} on the Hub holds no {file.name}. {advice}")
    return path


def _denoiser(base: str, path: Path, dtype: torch.dtype, hub: dict[str, Any]) -> torch.nn.Module:
    """A UNet of the base's config with the weights of a file; the base's own are not even downloaded."""
    from accelerate import init_empty_weights

    kind = diffusers.UNet2DConditionModel
    config = _explained(base, lambda: kind.load_config(base, subfolder="unet", **hub_options(hub)))
    with init_empty_weights():
        model = kind.from_config(config)
    state = fitting_weights(model, read_state(path, "weights"), str(path))
    model.load_state_dict({key: value.to(dtype, copy=True) for key, value in state.items()}, assign=True)
    return model.eval()


def _fuse_lora(pipe: DiffusionPipeline, path: Path) -> None:
    """Merge a LoRA into the weights, as the authors of all of these do."""
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    if not any(pipe.get_list_adapters().values()):  # diffusers only logs that no key was for this model
        raise ValueError(f"{path} holds no LoRA for the {type(pipe).__name__} of this preset; get the file again")
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _scheduler(own: Any, preset: Preset) -> Any:
    if preset.scheduler == "one_step":
        return one_step_scheduler(own, **preset.scheduler_settings)
    return getattr(diffusers, preset.scheduler).from_config(own.config, **preset.scheduler_settings)
