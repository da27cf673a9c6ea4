"""One-step text-to-image diffusion by low-rank rotation (LoRaD) for diffusers.

The public names load on first use, and LoRaD registers itself with PEFT at the moment PEFT is imported (or at once
when it already is). Importing PEFT costs more than a second, because it brings transformers and accelerate, and
`import diffusers` by itself does not pay that either. Nobody can hand PEFT a LoRaD config or file before PEFT is
imported, so the registration is always in time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffusers_wadi._on_import import when_imported

if TYPE_CHECKING:
    from diffusers_wadi.authors_files import (
        convert_authors_state_dict_to_lorad,
        convert_lorad_state_dict_to_authors,
        load_authors_weights,
        read_authors_file,
        save_authors_file,
    )
    from diffusers_wadi.conversion import export_lora, export_single_file, extract_lorad
    from diffusers_wadi.loaders import LoRaDLoaderMixin, load_lorad_adapter, save_lorad_adapter
    from diffusers_wadi.lorad import (
        DEFAULT_RANKS,
        LoRaDConfig,
        LoRaDConv2d,
        LoRaDLayer,
        LoRaDLinear,
        LoRaDModel,
        RotationCache,
        add_weighted_adapter,
        disable_lorad_cache,
        enable_lorad_cache,
        hotswap_lorad_adapter,
        lorad_target_modules,
        mixed_adapter_batch,
        rotation_backend,
        set_rotation_backend,
        trainable_parameter_count,
    )
    from diffusers_wadi.lorad.attention_conversion import (
        attn_processors_from_lorad,
        fuse_lorad_attn_processors,
        lorad_state_dict_from_attn_processors,
    )
    from diffusers_wadi.lorad.attention_processor import LoRaDAttnProcessor
    from diffusers_wadi.model_card import CardDetails
    from diffusers_wadi.pipelines import (
        WaDiControlNetPipeline,
        WaDiPipeline,
        WaDiPixArtPipeline,
        one_step_pipeline_class,
    )
    from diffusers_wadi.schedulers import check_one_step_scheduler, one_step_scheduler
    from diffusers_wadi.shapes import bundled_checkpoint

__version__ = "0.1.0.dev0"

_HOMES = {
    "CardDetails": "model_card",
    "DEFAULT_RANKS": "lorad",
    "LoRaDAttnProcessor": "lorad.attention_processor",
    "LoRaDConfig": "lorad",
    "LoRaDConv2d": "lorad",
    "LoRaDLayer": "lorad",
    "LoRaDLinear": "lorad",
    "LoRaDLoaderMixin": "loaders",
    "LoRaDModel": "lorad",
    "RotationCache": "lorad",
    "WaDiControlNetPipeline": "pipelines",
    "WaDiPipeline": "pipelines",
    "WaDiPixArtPipeline": "pipelines",
    "add_weighted_adapter": "lorad",
    "attn_processors_from_lorad": "lorad.attention_conversion",
    "bundled_checkpoint": "shapes",
    "check_one_step_scheduler": "schedulers",
    "convert_authors_state_dict_to_lorad": "authors_files",
    "convert_lorad_state_dict_to_authors": "authors_files",
    "disable_lorad_cache": "lorad",
    "enable_lorad_cache": "lorad",
    "export_lora": "conversion",
    "export_single_file": "conversion",
    "extract_lorad": "conversion",
    "fuse_lorad_attn_processors": "lorad.attention_conversion",
    "hotswap_lorad_adapter": "lorad",
    "load_authors_weights": "authors_files",
    "load_lorad_adapter": "loaders",
    "lorad_state_dict_from_attn_processors": "lorad.attention_conversion",
    "lorad_target_modules": "lorad",
    "mixed_adapter_batch": "lorad",
    "one_step_pipeline_class": "pipelines",
    "one_step_scheduler": "schedulers",
    "read_authors_file": "authors_files",
    "rotation_backend": "lorad",
    "save_authors_file": "authors_files",
    "save_lorad_adapter": "loaders",
    "set_rotation_backend": "lorad",
    "trainable_parameter_count": "lorad",
}

__all__ = [
    "CardDetails",
    "DEFAULT_RANKS",
    "LoRaDAttnProcessor",
    "LoRaDConfig",
    "LoRaDConv2d",
    "LoRaDLayer",
    "LoRaDLinear",
    "LoRaDLoaderMixin",
    "LoRaDModel",
    "RotationCache",
    "WaDiControlNetPipeline",
    "WaDiPipeline",
    "WaDiPixArtPipeline",
    "__version__",
    "add_weighted_adapter",
    "attn_processors_from_lorad",
    "bundled_checkpoint",
    "check_one_step_scheduler",
    "convert_authors_state_dict_to_lorad",
    "convert_lorad_state_dict_to_authors",
    "disable_lorad_cache",
    "enable_lorad_cache",
    "export_lora",
    "export_single_file",
    "extract_lorad",
    "fuse_lorad_attn_processors",
    "hotswap_lorad_adapter",
    "load_authors_weights",
    "load_lorad_adapter",
    "lorad_state_dict_from_attn_processors",
    "lorad_target_modules",
    "mixed_adapter_batch",
    "one_step_pipeline_class",
    "one_step_scheduler",
    "read_authors_file",
    "rotation_backend",
    "save_authors_file",
    "save_lorad_adapter",
    "set_rotation_backend",
    "trainable_parameter_count",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_lorad() -> None:
    # The package registers at its end. Where its own import is what brought PEFT in, this finds it half loaded and
    # leaves the rest to it.
    importlib.import_module(".lorad", __name__)


def _register_auto_pipelines() -> None:
    importlib.import_module(".pipelines", __name__).register_auto_pipelines()


when_imported("peft", _register_lorad)
when_imported("diffusers.pipelines.auto_pipeline", _register_auto_pipelines)
