"""Adapters on a model, with diffusers' adapter methods (`PeftAdapterMixin`) or without, as PixArt's transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.layer import LoRaDLayer


def lorad_layers(model: torch.nn.Module) -> Iterator[LoRaDLayer]:
    """The LoRaD layers of a model."""
    return (module for module in model.modules() if isinstance(module, LoRaDLayer))


def tuner_layers(model: torch.nn.Module) -> Iterator[BaseTunerLayer]:
    """The layers of adapters of any kind."""
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def adapter_names(model: torch.nn.Module) -> list[str]:
    """The names of the adapters of a model, of any kind."""
    return list(getattr(model, "peft_config", None) or {})


def lorad_adapter_names(model: torch.nn.Module) -> list[str]:
    """The names of the LoRaD adapters of a model, without those of other PEFT methods."""
    return [name for name in adapter_names(model) if isinstance(model.peft_config[name], LoRaDConfig)]


def active_adapters(model: torch.nn.Module) -> list[str]:
    """The adapters that act now, or would if adapters were not switched off; [] without any."""
    return next((list(layer.active_adapters) for layer in tuner_layers(model)), [])


def refuse_copy(model: torch.nn.Module) -> None:
    """Refuse what an optimized pipeline draws with: an adapter that is put there would be lost."""
    if (owner := getattr(model, "draws_only_for", None)) is not None:
        raise copy_refusal(owner)


def copy_refusal(pipeline_name: str) -> ValueError:
    """What `refuse_copy` raises."""
    return ValueError(
        f"this model is a copy that only draws, in an optimized {pipeline_name}. Use the pipeline's own methods "
        "(load_lorad_weights, set_adapters, save_pretrained, ...), or call pipe.unoptimize() first."
    )


def add_adapter(model: torch.nn.Module, config: LoRaDConfig, name: str, low_cpu_mem_usage: bool = False) -> None:
    """As diffusers' `add_adapter`: the new adapter is the active one.

    Args:
        low_cpu_mem_usage: leave its factors on the meta device, to be filled by `set_peft_model_state_dict`.
    """
    # Else PEFT would ask the Hub about the base each time the adapter is saved.
    config.base_model_name_or_path = None
    inject_adapter_in_model(config, model, name, low_cpu_mem_usage=low_cpu_mem_usage)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True  # what diffusers' own methods ask before they do anything
    for layer in tuner_layers(model):
        layer.set_adapter(name)


def set_adapters(model: torch.nn.Module, names: Sequence[str], weights: Sequence[float]) -> None:
    """Make these adapters the active ones, at these scales, for a model without diffusers' method of that name."""
    for layer in tuner_layers(model):
        layer.set_adapter(list(names))
        for name, weight in zip(names, weights):
            layer.set_scale(name, weight)


def enable_adapters(model: torch.nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off."""
    for layer in tuner_layers(model):
        layer.enable_adapters(enabled)


def delete_adapters(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Remove adapters of any kind, and the LoRaD layers that then hold none; what is fused is to be unfused before."""
    for name in names:
        for layer in tuner_layers(model):
            layer.delete_adapter(name)
        model.peft_config.pop(name, None)
    if not adapter_names(model):
        unload_adapters(model)
        return
    unwrap_empty(model)


def unload_adapters(model: torch.nn.Module) -> None:
    """Plain modules again, as diffusers' `unload_lora`; what is fused stays in the weights."""
    if hasattr(model, "unload_lora"):
        model.unload_lora()
        return
    _replace(model, BaseTunerLayer)
    if hasattr(model, "peft_config"):
        del model.peft_config


def unwrap_empty(model: torch.nn.Module) -> None:
    """Put what LoRaD layers without adapters are wrapped around back in their places."""
    _replace(model, LoRaDLayer, only_empty=True)


def _replace(model: torch.nn.Module, kind: type, only_empty: bool = False) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            while isinstance(child, kind) and not (only_empty and _has_adapters(child)):
                child = child.base_layer
                setattr(parent, name, child)


def _has_adapters(layer: Any) -> bool:
    return bool(len(layer.lorad_A))


def discard(model: torch.nn.Module, name: str, active: list[str]) -> None:
    """Take out an adapter that was only half loaded, and make those active that were."""
    for layer in tuner_layers(model):
        layer.delete_adapter(name)
    (getattr(model, "peft_config", None) or {}).pop(name, None)
    if not adapter_names(model):
        unload_adapters(model)
        return
    unwrap_empty(model)
    for layer in tuner_layers(model):
        layer.set_adapter(active)
