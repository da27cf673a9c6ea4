"""Saving and loading LoRaD adapters: one safetensors file plus `adapter_config.json`.

The file holds `<component>.<module path>.lorad_A` (out, r) and `.lorad_B` (r, in/2), and in its metadata the same
config as stands beside it, so that either alone describes the adapter. Everything in a file is checked against the
model before the model is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from diffusers_wadi._adapter_files import (
    ADAPTER_CONFIG_NAME,
    LORAD_WEIGHT_NAME,
    METADATA_KEY,
    StateDict,
    config_for,
    read_adapter,
    refuse_lost_layers,
    refuse_misfit,
    refuse_surplus,
    require_safetensors,
    split_factors,
)
from diffusers_wadi._files import hub_options, writable_folder, written_beside
from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.layer import LoRaDLayer

__all__ = [
    "LoRaDLoaderMixin",
    "load_lorad_adapter",
    "lorad_adapter_names",
    "lorad_layers",
    "save_lorad_adapter",
]


def lorad_layers(model: torch.nn.Module) -> Iterator[LoRaDLayer]:
    """The LoRaD layers of a model."""
    return (module for module in model.modules() if isinstance(module, LoRaDLayer))


def lorad_adapter_names(model: torch.nn.Module) -> list[str]:
    """The names of the LoRaD adapters of a model, without those of other PEFT methods."""
    configs = getattr(model, "peft_config", None) or {}
    return [name for name, config in configs.items() if isinstance(config, LoRaDConfig)]


def save_lorad_adapter(
    model: torch.nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    component: str = "unet",
    base_model_name_or_path: str | None = None,
    weight_name: str = LORAD_WEIGHT_NAME,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one adapter of `model` as a folder that `load_lorad_adapter` and `WaDiPipeline.from_pretrained` read.

    Args:
        model: a model with LoRaD adapters.
        folder: where to write; created if need be. Each file appears whole or not at all.
        adapter_name: which adapter.
        component: name of the model in its pipeline, the prefix of the keys.
        base_model_name_or_path: the pipeline that the adapter belongs to: a Hub name, a path, or a folder name inside
            `folder`. Default None keeps what the adapter's config says.
        weight_name: file name of the weights, ending in .safetensors.
        metadata: further strings for the metadata of the file, such as the training settings.
        dtype: of the tensors in the file; float16 halves the file and rounds each factor by 0.05 %. Default None keeps
            theirs (float32). Loaded factors are float32 either way.

    Returns:
        Path of the weights.

    Raises:
        ValueError: no such LoRaD adapter, values that are not finite, or another file format asked for.
        OSError: `folder` is not writable.
    """
    if adapter_name not in lorad_adapter_names(model):
        raise ValueError(f"no LoRaD adapter {adapter_name!r} to save; the model has {lorad_adapter_names(model)}")
    require_safetensors(weight_name)
    path = writable_folder(folder) / weight_name
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # A plain LoRA wrapped around a LoRaD layer puts its own attribute into the path; the file is without it.
    state = {
        f"{component}.{_plain(key)}": value.detach().to("cpu", dtype).contiguous() for key, value in state.items()
    }
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors of {adapter_name!r} are not finite, first {broken[0]}; not saved")
    config = _config_json(model.peft_config[adapter_name], base_model_name_or_path)
    with written_beside(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", METADATA_KEY: config, **(metadata or {})})
    with written_beside(path.parent / ADAPTER_CONFIG_NAME) as temporary:
        temporary.write_text(config + "\n", encoding="utf-8")
    return path


def _config_json(config: LoRaDConfig, base_model_name_or_path: str | None) -> str:
    values = asdict(config) | {"inference_mode": True}
    if base_model_name_or_path is not None:
        values["base_model_name_or_path"] = str(base_model_name_or_path)
    return json.dumps(values, indent=2, sort_keys=True, default=sorted)  # sorted: sets of names


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "base_layer")


def load_lorad_adapter(
    model: torch.nn.Module,
    source: str | os.PathLike | Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    component: str = "unet",
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Load a LoRaD adapter into `model`, where it becomes the active one.

    Args:
        model: the base model, with or without other adapters.
        source: adapter folder, .safetensors file, Hub name, or a state dict.
        adapter_name: name to give it; must be free.
        component: prefix of the keys to strip, if they have it.
        weight_name: file name in a folder or repository, default "pytorch_lorad_weights.safetensors".
        subfolder: folder inside `source`.
        **hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        ValueError: the name is taken, the file is damaged or of another kind, or the adapter does not fit (the message
            holds the first mismatch and their number). The model is then as before.
        OSError: the file cannot be found.
    """
    if adapter_name in (getattr(model, "peft_config", None) or {}):
        raise ValueError(f"adapter name {adapter_name!r} is taken; choose another or delete that adapter first")
    state, saved, origin = read_adapter(source, weight_name, subfolder, hub)
    factors, rest = split_factors(state, component, origin)
    refuse_misfit(model, factors, origin)
    refuse_surplus(rest, saved or {}, origin)
    config = config_for(factors, saved, origin)
    refuse_lost_layers(model, factors, saved, origin)
    tensors = {f"{name}.lorad_{letter}": t for name, pair in factors.items() for letter, t in zip("AB", pair)} | rest
    active = _active_adapters(model)
    try:
        _inject(model, config, adapter_name)
        _fill(model, tensors, set(factors), adapter_name, origin)
    except Exception:
        _discard(model, adapter_name, active)
        raise


def _inject(model: torch.nn.Module, config: LoRaDConfig, adapter_name: str) -> None:
    if hasattr(model, "add_adapter"):
        # diffusers keeps state of its own, which set_adapters and disable_adapters look at. It also clears the base
        # name in the config, which PEFT would otherwise ask the Hub about each time the adapter is saved.
        model.add_adapter(config, adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)


def _fill(model: torch.nn.Module, tensors: StateDict, names: set[str], adapter_name: str, origin: str) -> None:
    layers = {_plain(name) for name, module in model.named_modules() if _carries(module, adapter_name)}
    if layers != names:
        odd = sorted(layers ^ names)
        raise ValueError(f"{origin}: {len(odd)} modules could not be given exactly its layers, first {odd[0]}")
    live = model.state_dict()
    # The names in the file know nothing of wrappers: here is where PEFT looks for them, less the adapter's name.
    places = {_plain(key.removesuffix(f".{adapter_name}")): key for key in live}
    for name in tensors.keys() & places.keys():  # trained biases were not looked at yet, and overwrite the base's
        if tensors[name].shape != live[places[name]].shape or not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{origin}: {name} is not finite or not of shape {tuple(live[places[name]].shape)}")
    homeless = sorted(tensors.keys() - places.keys())
    if homeless and not model.peft_config[adapter_name].modules_to_save:  # those PEFT finds by itself
        raise ValueError(f"{origin}: {len(homeless)} keys have no place in the model, first {homeless[0]}")
    tensors = {places.get(name, name).removesuffix(f".{adapter_name}"): value for name, value in tensors.items()}
    result = set_peft_model_state_dict(model, tensors, adapter_name)
    if result.unexpected_keys:
        raise ValueError(
            f"{origin}: {len(result.unexpected_keys)} keys have no place in the model, first {result.unexpected_keys[0]}"
        )


def _carries(module: torch.nn.Module, adapter_name: str) -> bool:
    return isinstance(module, LoRaDLayer) and adapter_name in module.lorad_A


def _active_adapters(model: torch.nn.Module) -> list[str]:
    return next((list(m.active_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)), [])


def _discard(model: torch.nn.Module, adapter_name: str, active: list[str]) -> None:
    """Take out an adapter that was only half loaded, and make those active that were."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(adapter_name)
    (getattr(model, "peft_config", None) or {}).pop(adapter_name, None)
    if hasattr(model, "unload_lora") and not getattr(model, "peft_config", None):
        model.unload_lora()
    elif active and hasattr(model, "set_adapter"):
        model.set_adapter(active)


def _unwrap(model: torch.nn.Module) -> None:
    """Put what LoRaD layers without adapters are wrapped around back in their places."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRaDLayer):
                setattr(parent, name, child.base_layer)


class LoRaDLoaderMixin:
    """LoRaD adapters for a diffusers pipeline, beside the LoRA methods that it has.

    `set_adapters`, `disable_lora`, `enable_lora`, `get_active_adapters` and `delete_adapters` of the pipeline act on
    LoRaD adapters too; the number in `set_adapters(names, weights)` scales the angle.
    """

    lorad_component = "unet"
    _lorad_removed = False  # adapters were taken out unfused, so what is left is the multi-step base

    def load_lorad_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        weight_name: str | None = None,
        adapter_name: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load an adapter from a folder, a file, the Hub or a state dict; it becomes the active one.

        Args:
            pretrained_model_name_or_path_or_dict: where it is.
            weight_name: file name, default "pytorch_lorad_weights.safetensors".
            adapter_name: default "default_0", "default_1", ...
            subfolder: folder inside the source.
            **kwargs: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            ValueError, OSError: see `load_lorad_adapter`; the pipeline is then as before.
        """
        model = self._lorad_model()
        if adapter_name is None:
            adapter_name = f"default_{len(getattr(model, 'peft_config', None) or {})}"
        source, hub = pretrained_model_name_or_path_or_dict, hub_options(kwargs)
        load_lorad_adapter(model, source, adapter_name, self.lorad_component, weight_name, subfolder, **hub)
        self._lorad_removed = False

    def save_lorad_weights(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str | None = None,
        weight_name: str = LORAD_WEIGHT_NAME,
        base_model_name_or_path: str | None = None,
    ) -> None:
        """Write one adapter as a folder (see `save_lorad_adapter`); without a name there must be exactly one.

        `base_model_name_or_path` defaults to where the pipeline was loaded from; a local folder is stored as its
        absolute path, which means nothing on another machine: pass a Hub name before sharing the adapter.
        """
        model, names = self._lorad_model(), lorad_adapter_names(self._lorad_model())
        if adapter_name is None:
            if len(names) != 1:
                raise ValueError(f"adapter_name is needed to save one of the LoRaD adapters {names}")
            adapter_name = names[0]
        base = base_model_name_or_path or self.config.get("_name_or_path")
        if base_model_name_or_path is None and base and Path(base).is_dir():
            base = str(Path(base).resolve())
        save_lorad_adapter(model, save_directory, adapter_name, self.lorad_component, base, weight_name)

    def fuse_lorad(
        self, lorad_scale: float = 1.0, adapter_names: list[str] | None = None, safe_fusing: bool = False
    ) -> None:
        """Write the rotation into the weights: same images, no cost per call, and ready for `torch.compile`.

        Args:
            lorad_scale: factor on the angles that this call fuses.
            adapter_names: which adapters; default None takes the active ones.
            safe_fusing: check that the new weights are finite before they replace the old ones.

        Raises:
            ValueError: unknown names, or `safe_fusing` found a layer that will not do; nothing is fused then.
        """
        unknown = set(adapter_names or ()) - set(lorad_adapter_names(self._lorad_model()))
        if unknown:
            raise ValueError(
                f"{sorted(unknown)} are no LoRaD adapters; {lorad_adapter_names(self._lorad_model())} are"
            )
        fused: list[tuple[LoRaDLayer, list[str]]] = []
        try:
            for layer in lorad_layers(self._lorad_model()):
                before = list(layer.merged_adapters)
                layer.merge(safe_merge=safe_fusing, adapter_names=adapter_names, scale=lorad_scale)
                fused.append((layer, [name for name in layer.merged_adapters if name not in before]))
        except Exception:
            for layer, names in fused:
                if names:
                    layer.unmerge(names)
            raise

    def unfuse_lorad(self) -> None:
        """Undo every `fuse_lorad`: the adapters act again as before, with the scales they had."""
        for layer in lorad_layers(self._lorad_model()):
            if layer.merged:
                layer.unmerge()

    def unload_lorad_weights(self) -> None:
        """Take all LoRaD adapters out. What was fused stays in the weights, what was not is gone."""
        model, names = self._lorad_model(), lorad_adapter_names(self._lorad_model())
        if not names:
            return
        self._note_removal()
        if len(names) == len(model.peft_config):
            model.unload_lora()
            return
        for layer in lorad_layers(model):
            layer.keep_merged()
        model.delete_adapters(names)
        _unwrap(model)

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method, which takes LoRaD adapters out too; fused ones stay in the weights."""
        self._note_removal()
        super().unload_lora_weights(*args, **kwargs)

    def _note_removal(self) -> None:
        layers = list(lorad_layers(self._lorad_model()))
        if layers:
            self._lorad_removed = not any(layer.merged for layer in layers)

    def _lorad_model(self) -> torch.nn.Module:
        return getattr(self, self.lorad_component)
