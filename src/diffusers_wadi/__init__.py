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
    from diffusers_wadi.loaders import LoRaDLoaderMixin, load_lorad_adapter, save_lorad_adapter
    from diffusers_wadi.lorad import (
        DEFAULT_RANKS,
        LoRaDConfig,
        LoRaDLayer,
        LoRaDLinear,
        LoRaDModel,
        lorad_target_modules,
        trainable_parameter_count,
    )
    from diffusers_wadi.pipelines import WaDiPipeline
    from diffusers_wadi.schedulers import check_one_step_scheduler, one_step_scheduler
    from diffusers_wadi.shapes import bundled_checkpoint

__version__ = "0.1.0.dev0"

_HOMES = {
    "DEFAULT_RANKS": "lorad",
    "LoRaDConfig": "lorad",
    "LoRaDLayer": "lorad",
    "LoRaDLinear": "lorad",
    "LoRaDLoaderMixin": "loaders",
    "LoRaDModel": "lorad",
    "WaDiPipeline": "pipelines",
    "bundled_checkpoint": "shapes",
    "check_one_step_scheduler": "schedulers",
    "load_lorad_adapter": "loaders",
    "lorad_target_modules": "lorad",
    "one_step_scheduler": "schedulers",
    "save_lorad_adapter": "loaders",
    "trainable_parameter_count": "lorad",
}

__all__ = [
    "DEFAULT_RANKS",
    "LoRaDConfig",
    "LoRaDLayer",
    "LoRaDLinear",
    "LoRaDLoaderMixin",
    "LoRaDModel",
    "WaDiPipeline",
    "__version__",
    "bundled_checkpoint",
    "check_one_step_scheduler",
    "load_lorad_adapter",
    "lorad_target_modules",
    "one_step_scheduler",
    "save_lorad_adapter",
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
