"""Adapters put onto the weights of a checkpoint one tensor at a time: LoRaD, the authors' angles, LoRA and DoRA."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusers_wadi._adapter_files import ADAPTER_CONFIG_NAME, LORAD_WEIGHT_NAME, METADATA_KEY, split_factors
from diffusers_wadi._files import folder_inside, probe_file
from diffusers_wadi.authors_files import (
    convert_authors_state_dict_to_lorad,
    read_authors_file,
    split_authors_state_dict,
)
from diffusers_wadi.conversion._weights import COMPONENTS, Weights, refuse_broken
from diffusers_wadi.lorad import lorad_angles
from diffusers_wadi.lorad.rotation import rotate_weight

StateDict = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]

WEIGHT_NAMES = (LORAD_WEIGHT_NAME, "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_LORA_METADATA = "lora_adapter_metadata"  # where diffusers keeps the config of a LoRA
_THETAS = (".theta_a", ".theta_b")
# Ends of the keys of a LoRA, by what they hold: PEFT's, diffusers' older ones, kohya's.
_LORA_ENDS = {
    "down": (".lora_A.weight", ".lora.down.weight", ".lora_down.weight", "_lora.down.weight"),
    "up": (".lora_B.weight", ".lora.up.weight", ".lora_up.weight", "_lora.up.weight"),
    "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale"),
    "alpha": (".alpha",),
}


@dataclass(frozen=True)
class Adapter:
    """What a file says of an adapter.

    Args:
        state: its tensors.
        origin: where it comes from, for messages.
        config: its config, as far as there is one.
        base: folder or Hub name of the pipeline that it names as its base, None if it names none.
    """

    state: StateDict
    origin: str
    config: dict[str, Any] = field(default_factory=dict)
    base: str | None = None

    @property
    def is_lora(self) -> bool:
        return not any(key.endswith(".lorad_A") for key in self.state)


def read_any_adapter(source: str, subfolder: str | None, hub: dict[str, Any]) -> Adapter | None:
    """The adapter in a file, folder or Hub repository; None for anything else, such as a checkpoint.

    Raises:
        ValueError: a damaged file.
        OSError: `source` is neither here nor on the Hub.
    """
    if Path(source).is_file():
        return _of_file(Path(source), source, Path(source).parent, {})
    if probe_file(source, "model_index.json", **hub) is not None:
        return None
    for name in WEIGHT_NAMES:
        path = probe_file(source, name, subfolder, **hub)
        if path is not None:
            config = probe_file(source, ADAPTER_CONFIG_NAME, subfolder, **hub)
            adapter = _of_file(path, source, None if config is None else config.parent, hub)
            if adapter is not None and adapter.base is not None:
                inside = folder_inside(source, adapter.base, "model_index.json", subfolder, **hub)
                return replace(adapter, base=str(inside or adapter.base))
            return adapter
    return None


def _of_file(path: Path, origin: str, folder: Path | None, hub: dict[str, Any]) -> Adapter | None:
    config = _json(folder / ADAPTER_CONFIG_NAME) if folder and (folder / ADAPTER_CONFIG_NAME).is_file() else {}
    if path.suffix in (".pth", ".pt"):
        return _of_authors(read_authors_file(path), origin)
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            if not any(".lorad_A" in key or "lora" in key or key.endswith(_THETAS) for key in keys):
                return None
            state = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy or download it again") from error
    if any(key.endswith(_THETAS) for key in keys):
        return _of_authors(state, origin)
    for name in (METADATA_KEY, _LORA_METADATA):
        config = config or (json.loads(metadata[name]) if name in metadata else {})
    if name := config.get("base_model_name_or_path"):
        inside = path.parent / name
        name = str(inside) if (inside / "model_index.json").is_file() else name
    return Adapter(state, origin, config, name or None)


def _of_authors(state: Mapping[str, Tensor], origin: str) -> Adapter | None:
    thetas = split_authors_state_dict(state)[0]
    return Adapter(convert_authors_state_dict_to_lorad(thetas), origin) if thetas else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds no valid JSON ({error}); get the adapter again") from error


def apply_adapter(adapter: Adapter, weights: Weights) -> Weights:
    """The weights as the adapter at scale 1 makes them, computed in float32 when a tensor is read.

    Raises:
        ValueError: a tensor that fits no layer of `weights`, or that is not finite.
    """
    for key, value in adapter.state.items():
        refuse_broken(key, adapter.origin, value)
    changes = _lora_changes(adapter, weights) if adapter.is_lora else _lorad_changes(adapter, weights)

    def read(key: str) -> Tensor:
        tensor = weights.read(key)
        return changes[key](tensor) if key in changes else tensor

    return replace(weights, read=read, origin=f"{adapter.origin} on {weights.origin}")


def _lorad_changes(adapter: Adapter, weights: Weights) -> dict[str, Change]:
    state = _without_prefix(adapter.state)
    factors, rest = split_factors(state, "", adapter.origin)
    changes: dict[str, Change] = {}
    for name, (a, b) in factors.items():
        shape = _shape_of(f"{name}.weight", weights, adapter)
        if (a.shape[0], b.shape[1]) != (shape[0], math.prod(shape[1:]) // 2) or a.shape[1] != b.shape[0]:
            _refuse(adapter, weights, name, f"angles {tuple(a.shape)} x {tuple(b.shape)} on a weight {shape}")
        changes[f"{name}.weight"] = lambda w, a=a, b=b: rotate_weight(w.float(), lorad_angles(a, b).double())
    for key, value in rest.items():  # biases and modules_to_save
        if tuple(value.shape) != _shape_of(key, weights, adapter):
            _refuse(adapter, weights, key, f"{tuple(value.shape)} on {weights.shapes[key]}")
        changes[key] = lambda _, value=value: value
    return changes


def _lora_changes(adapter: Adapter, weights: Weights) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for name, parts in _lora_parts(adapter, weights).items():
        shape = _shape_of(f"{name}.weight", weights, adapter)
        if not {"down", "up"} <= parts.keys():
            _refuse(adapter, weights, name, f"only {', '.join(parts)} of its two factors")
        down, up = parts["down"].flatten(1), parts["up"].flatten(1)
        if (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:])) or up.shape[1] != down.shape[0]:
            _refuse(adapter, weights, name, f"factors {tuple(up.shape)} x {tuple(down.shape)} on a weight {shape}")
        scale = _lora_scale(name, down.shape[0], parts.get("alpha"), adapter.config)
        changes[f"{name}.weight"] = _lora_change(down, up, scale, parts.get("magnitude"))
    return changes


def _lora_change(down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None) -> Change:
    def change(weight: Tensor) -> Tensor:
        rows = weight.float().flatten(1) + scale * (up.float() @ down.float())
        if magnitude is not None:  # DoRA: the norm of every row is trained
            rows = rows * (magnitude.float().reshape(-1, 1) / rows.norm(dim=1, keepdim=True))
        return rows.reshape(weight.shape)

    return change


def _lora_parts(adapter: Adapter, weights: Weights) -> dict[str, dict[str, Tensor]]:
    """Module path -> its tensors; those of text encoders are passed over."""
    underscored = {
        key.removesuffix(".weight").replace(".", "_"): key.removesuffix(".weight") for key in weights.shapes
    }
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in _without_prefix(adapter.state).items():
        if key.startswith(("text_encoder", "lora_te")):
            continue
        kind, end = next(((k, e) for k, ends in _LORA_ENDS.items() for e in ends if key.endswith(e)), (None, None))
        if kind is None:
            _refuse(adapter, weights, key, "no part of a LoRA that is known here")
        name = re.sub(r"\.processor\.(to_[qkv]|to_out)$", r".\1", key.removesuffix(end))
        name = re.sub(r"\.to_out$", ".to_out.0", name)
        name = underscored.get(re.sub(r"^lora_(unet|transformer)_", "", name), name)
        parts.setdefault(name, {})[kind] = value
    if not parts:
        raise ValueError(f"{adapter.origin} holds no LoRA of a UNet or transformer")
    return parts


def _lora_scale(name: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any]) -> float:
    """alpha / r, with the alpha of the file, else of the config, else r."""
    config = {key.removeprefix("unet.").removeprefix("transformer."): value for key, value in config.items()}
    if alpha is not None:
        value = float(alpha)
    else:
        patterns = config.get("alpha_pattern") or {}
        matching = (p for p in patterns if re.match(rf"(.*\.)?({p})$", name))
        value = float(patterns.get(next(matching, None), config.get("lora_alpha", rank)))
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _without_prefix(state: StateDict) -> StateDict:
    """Keys without the names that stand before a model's own: PEFT's, and that of the component in its pipeline."""
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    for component in COMPONENTS:
        if any(key.startswith(f"{component}.") for key in state):
            return {key.removeprefix(f"{component}."): value for key, value in state.items()}
    return state


def _shape_of(key: str, weights: Weights, adapter: Adapter) -> tuple[int, ...]:
    if key not in weights.shapes:
        _refuse(adapter, weights, key, "no such tensor there")
    return weights.shapes[key]


def _refuse(adapter: Adapter, weights: Weights, name: str, problem: str) -> None:
    raise ValueError(
        f"the adapter {adapter.origin} does not fit {weights.origin}: {name}: {problem}. Pass the checkpoint that it was "
        "trained on as BASE, or with --base-model (base_model=)."
    )
