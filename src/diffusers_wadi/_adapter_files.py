"""Reading LoRaD adapter files and checking them against a model, before anything is changed in it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors import SafetensorError, safe_open

from diffusers_wadi._files import find_file, probe_file
from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.targets import adaptable_layers, weight_vectors

LORAD_WEIGHT_NAME = "pytorch_lorad_weights.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
COMPONENTS = ("unet", "transformer", "text_encoder")  # by which keys are named that were saved from a pipeline
METADATA_KEY = "lorad_config"

StateDict = dict[str, torch.Tensor]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module path -> A (out, r), B (r, in/2)


def read_adapter_config(source: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> dict[str, Any] | None:
    """The `adapter_config.json` of a folder or Hub repository, or None if it has none (offline: none in the cache).

    Raises:
        ValueError: it is not JSON, or describes another kind of adapter.
    """
    path = probe_file(source, ADAPTER_CONFIG_NAME, subfolder, **hub)
    return None if path is None else _parse_config(path.read_text(encoding="utf-8", errors="replace"), path)


def _parse_config(text: str, origin: str | os.PathLike) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} holds no valid JSON ({error}); get the adapter again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORAD":
        raise ValueError(
            f"{origin} has peft_type {kind!r}, expected 'LORAD'. Load a LoRA with pipe.load_lora_weights instead."
        )
    return config


def read_lorad_file(path: str | os.PathLike) -> tuple[StateDict, dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: another format, or a file cut short or damaged.
    """
    require_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); copy, download or save it again"
        ) from error


def require_safetensors(path: str | os.PathLike) -> None:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: LoRaD weights are read and written as .safetensors only, which cannot carry code")


def read_adapter(
    source: str | os.PathLike | Mapping[str, torch.Tensor], weight_name: str | None, subfolder: str | None, hub: dict
) -> tuple[StateDict, dict[str, Any] | None, str]:
    """Tensors, config (None if there is none) and a name for messages, from a dict, a file, a folder or the Hub."""
    if isinstance(source, Mapping):
        return dict(source), None, "the given state dict"
    path, config = Path(source), None
    if not path.is_file():
        name = weight_name or LORAD_WEIGHT_NAME
        require_safetensors(name)  # before anything is downloaded
        config = read_adapter_config(source, subfolder, **hub)
        path = find_file(source, name, subfolder, **hub)
        if path is None:
            place = "/".join([str(source), *([subfolder] if subfolder else [])])
            raise FileNotFoundError(
                f"no {name} in {place!r}; a LoRaD adapter folder holds it beside {ADAPTER_CONFIG_NAME}. Pass "
                f"weight_name= for another file name, subfolder= for a folder inside."
            )
    elif (path.parent / ADAPTER_CONFIG_NAME).is_file():
        config = read_adapter_config(path.parent)
    state, metadata = read_lorad_file(path)
    if config is None and METADATA_KEY in metadata:
        config = _parse_config(metadata[METADATA_KEY], f"the metadata of {path}")
    return state, config, str(path)


def split_factors(state: StateDict, component: str | None, origin: str) -> tuple[Factors, StateDict]:
    """Pair the A and B of each module; what else there is (bias, modules_to_save) comes second.

    `component` is a prefix that all keys may have and that is dropped; None: the name of any part of a pipeline.
    """
    for prefix in [f"{name}." for name in ((component,) if component else COMPONENTS)]:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            break
    _refuse_foreign(state, origin)
    first = {key[: -len(".lorad_A")]: value for key, value in state.items() if key.endswith(".lorad_A")}
    second = {key[: -len(".lorad_B")]: value for key, value in state.items() if key.endswith(".lorad_B")}
    lonely = sorted(first.keys() ^ second.keys())
    if lonely:
        raise ValueError(
            f"{origin}: {len(lonely)} modules have only one of lorad_A and lorad_B, first {lonely[0]}; get it again"
        )
    rest = {key: value for key, value in state.items() if not key.endswith((".lorad_A", ".lorad_B"))}
    return {name: (first[name], second[name]) for name in first}, rest


def _refuse_foreign(state: StateDict, origin: str) -> None:
    if any(key.endswith(".lorad_A") for key in state):
        return
    example = next(iter(state), None)
    hint = "Save an adapter with save_lorad_adapter or pipe.save_lorad_weights."
    if example is not None and "lora_" in example:
        hint = "This is a LoRA; load it with pipe.load_lora_weights."
    elif any("theta_" in key for key in state):
        hint = (
            "These are training weights in the layout of the authors' release; load what "
            "convert_authors_state_dict_to_lorad makes of them."
        )
    raise ValueError(
        f"{origin} holds no LoRaD weights (keys ending in .lorad_A); its first key is {example!r}. {hint}"
    )


def refuse_misfit(model: torch.nn.Module, factors: Factors, origin: str) -> None:
    modules = dict(model.named_modules())
    problems = [problem for name in factors if (problem := _misfit(name, modules.get(name), *factors[name]))]
    if problems:
        raise ValueError(
            f"the adapter {origin} does not fit this {type(model).__name__}: {len(problems)} of {len(factors)} modules "
            f"differ, first {problems[0]}. Load it onto the base model it was trained on; nothing was changed."
        )


def _misfit(name: str, module: torch.nn.Module | None, a: torch.Tensor, b: torch.Tensor) -> str | None:
    """What is wrong between one module and its factors, or None."""
    if module is None:
        return f"{name}: no such module"
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = getattr(base, "in_proj_weight" if isinstance(base, torch.nn.MultiheadAttention) else "weight", None)
    if weight is None or weight.ndim < 2:
        return f"{name}: a {type(base).__name__} cannot be rotated"
    out_features, in_features = weight_vectors(base)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not a.is_floating_point():
        return f"{name}: lorad_A {tuple(a.shape)} and lorad_B {tuple(b.shape)} are not (out, r) and (r, in/2)"
    if (a.shape[0], b.shape[1]) != (out_features, in_features // 2):  # a convolution may have an odd one over
        return (
            f"{name}: the file is for (out, in) = {(a.shape[0], 2 * b.shape[1])}, "
            f"the model has {(out_features, in_features)}"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return f"{name}: values that are not finite"
    return None


def refuse_surplus(rest: StateDict, saved: dict[str, Any], origin: str) -> None:
    """Refuse tensors beside the factors, but for biases and modules that the config says were trained.

    Raises:
        ValueError: with the first of them and their number. They would overwrite weights of the base.
    """
    biases, modules = saved.get("bias", "none") != "none", saved.get("modules_to_save") or ()
    odd = [
        key
        for key in rest
        if not (biases and key.endswith("bias")) and not any(f".{name}." in f".{key}" for name in modules)
    ]
    if odd:
        raise ValueError(f"{origin} holds {len(odd)} keys that belong to no LoRaD layer, first {odd[0]}")


def refuse_lost_layers(model: torch.nn.Module, factors: Factors, saved: dict[str, Any] | None, origin: str) -> None:
    """Refuse a file without some of the layers that its config names: it would load as a weaker adapter.

    Raises:
        ValueError: the layers of `model` that the config matches, by PEFT's rules, are not those in the file.
    """
    if not saved or not saved.get("target_modules"):
        return
    config, layers = LoRaDConfig.from_peft_type(**saved), dict(adaptable_layers(model))
    if config.target_modules == "all-linear":
        config.target_modules = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)}
    expected = {name for name in layers if check_target_module_exists(config, name)}
    odd = sorted(expected ^ factors.keys())
    if odd:
        raise ValueError(
            f"{origin} holds {len(factors)} layers, but its config names {len(expected)} of this "
            f"{type(model).__name__}: {len(odd)} differ, first {odd[0]}. Get the adapter again, or load it onto the base "
            f"model it was trained on; nothing was changed."
        )


def config_for(factors: Factors, saved: dict[str, Any] | None, origin: str) -> LoRaDConfig:
    """The saved config with targets and ranks taken from the tensors, which cannot be wrong about themselves."""
    ranks = {name: a.shape[1] for name, (a, _) in factors.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    saved = dict(saved or {"peft_type": "LORAD"})
    if "r" in saved and not saved.get("rank_pattern") and set(ranks.values()) != {saved["r"]}:
        raise ValueError(
            f"{origin}: its config says rank {saved['r']}, its tensors have {sorted(set(ranks.values()))}; "
            f"config and weights are not of one adapter"
        )
    exact = {
        "r": common,
        "rank_pattern": {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != common},
        "target_modules": sorted(factors),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return LoRaDConfig.from_peft_type(**saved | exact)
