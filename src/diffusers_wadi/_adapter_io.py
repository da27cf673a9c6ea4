"""Saving and loading LoRaD adapters: one safetensors file plus `adapter_config.json`.

The file holds `<component>.<module path>.lorad_A` (out, r) and `.lorad_B` (r, in/2), and in its metadata the same
config as stands beside it, so that either alone describes the adapter. Everything in a file is checked against the
model before the model is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
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
from diffusers_wadi._adapter_ops import (
    active_adapters,
    adapter_names,
    add_adapter,
    discard,
    lorad_adapter_names,
    refuse_copy,
)
from diffusers_wadi._files import refuse_unknown_options, writable_folder, written_beside
from diffusers_wadi._offloading import offloading_paused
from diffusers_wadi.lorad.composition import hotswap_lorad_adapter
from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.layer import LoRaDLayer


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
    with offloading_paused([model]):
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
        _sort_metadata(temporary)
    with written_beside(path.parent / ADAPTER_CONFIG_NAME) as temporary:
        temporary.write_text(config + "\n", encoding="utf-8")
    return path


def _sort_metadata(path: Path) -> None:
    """Order the metadata of a safetensors file, which come in another order each time: the same adapter, the same file."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:  # else some character is spelt otherwise here; the file is right as it is
            file.seek(8)
            file.write(text)


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
    component: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    low_cpu_mem_usage: bool = True,
    hotswap: bool = False,
    **hub: Any,
) -> None:
    """Load a LoRaD adapter into `model`, where it becomes the active one.

    Args:
        model: the base model, with or without other adapters, offloaded or not.
        source: adapter folder, .safetensors file, Hub name, or a state dict.
        adapter_name: name to give it; must be free, or with `hotswap` that of the adapter to replace.
        component: prefix of the keys to strip, if they have it. Default None: "unet", "transformer" or "text_encoder".
        weight_name: file name in a folder or repository, default "pytorch_lorad_weights.safetensors".
        subfolder: folder inside `source`.
        low_cpu_mem_usage: use the tensors of the file instead of copying them into freshly drawn ones. Default True.
        hotswap: put the values into the adapter of that name in place, which must have these layers and no lower
            ranks; a compiled model is not compiled again, and what is active stays so. Default False.
        **hub: revision, token, cache_dir, local_files_only, force_download, proxies.

    Raises:
        ValueError: the name is taken, the file is damaged or of another kind, or the adapter does not fit (the message
            holds the first mismatch and their number). The model is then as before.
        OSError: the file cannot be found.
    """
    refuse_unknown_options(hub)
    refuse_copy(model)
    if adapter_name in adapter_names(model) and not hotswap:
        raise ValueError(f"adapter name {adapter_name!r} is taken; choose another or delete that adapter first")
    state, saved, origin = read_adapter(source, weight_name, subfolder, hub)
    factors, rest = split_factors(state, component, origin)
    refuse_misfit(model, factors, origin)
    refuse_surplus(rest, saved or {}, origin)
    config = config_for(factors, saved, origin)
    refuse_lost_layers(model, factors, saved, origin)
    tensors = {f"{name}.lorad_{letter}": t for name, pair in factors.items() for letter, t in zip("AB", pair)} | rest
    if hotswap:
        with offloading_paused([model]):
            hotswap_lorad_adapter(model, tensors, adapter_name)
        return
    if isinstance(source, Mapping) and low_cpu_mem_usage:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # training must not change the caller's
    active = active_adapters(model)
    with offloading_paused([model]):
        try:
            add_adapter(model, config, adapter_name, low_cpu_mem_usage)
            _fill(model, tensors, set(factors), adapter_name, origin, low_cpu_mem_usage)
        except Exception:
            discard(model, adapter_name, active)
            raise


def _fill(
    model: torch.nn.Module,
    tensors: StateDict,
    names: set[str],
    adapter_name: str,
    origin: str,
    low_cpu_mem_usage: bool,
) -> None:
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
    if low_cpu_mem_usage:  # biases of a float16 base stay float16
        tensors = {
            name: tensor.to(live[places[name]]) if name in places and not live[places[name]].is_meta else tensor
            for name, tensor in tensors.items()
        }
    tensors = {places.get(name, name).removesuffix(f".{adapter_name}"): value for name, value in tensors.items()}
    result = set_peft_model_state_dict(model, tensors, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    if result.unexpected_keys:
        raise ValueError(
            f"{origin}: {len(result.unexpected_keys)} keys have no place in the model, first {result.unexpected_keys[0]}"
        )


def _carries(module: torch.nn.Module, adapter_name: str) -> bool:
    return isinstance(module, LoRaDLayer) and adapter_name in module.lorad_A
