"""New adapters out of those that a model has: weighted sums, which for angles are exact, and swaps in place."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.layer import LoRaDLayer

__all__ = ["add_weighted_adapter", "hotswap_lorad_adapter"]

_COMBINATIONS = ("cat", "svd")


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "cat",
    svd_rank: int | None = None,
) -> None:
    """Add an adapter whose angles are the weighted sum of those of other adapters.

    It equals `set_adapters(adapters, weights)`: rotations in the same planes add their angles, so that the factors
    concatenated along the rank are the sum, with nothing lost. The adapters it came from may be deleted afterwards.
    The new one is not made active. A module that one of them has trained in full (`modules_to_save`) is copied as it
    is, whatever the weight.

    Args:
        model: a model with LoRaD adapters, as `add_adapter`, `inject_adapter_in_model` or `get_peft_model` left it.
        adapters: names of LoRaD adapters; on a layer that lacks some of them, the others are summed.
        weights: a factor on the angles of each, instead of the scale that it has now. Negative ones turn back.
        adapter_name: name of the new adapter; must be free.
        combination_type: "cat" (default): exact, the ranks add up. "svd": the nearest angles of rank `svd_rank`.
        svd_rank: for "svd"; default the largest rank among the adapters.

    Raises:
        ValueError: unknown or repeated adapters, a name that is taken, other than one weight per adapter, weights
            that are not finite, trained biases or tokens among what would be summed, one module that several of them
            have trained in full, or an unknown combination. The model is then as before.
    """
    model = _unwrapped(model)
    _check_sources(model, adapters, weights, adapter_name, combination_type, svd_rank)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRaDLayer) and set(adapters) & set(m.r)}
    _refuse_meta(layers.values())
    limit = None
    if combination_type == "svd":
        limit = svd_rank or max(layer.r[name] for layer in layers.values() for name in adapters if name in layer.r)
    summed = {name: _weighted_sum(layer, dict(zip(adapters, weights)), limit) for name, layer in layers.items()}
    plain = {_plain(name): A.shape[1] for name, (A, _) in summed.items()}
    # The output projection inside an nn.MultiheadAttention comes with that, and is no target of its own.
    plain = {name: rank for name, rank in plain.items() if name.removesuffix(".out_proj") not in plain.keys() - {name}}
    usual = Counter(plain.values()).most_common(1)[0][0]
    model.peft_config[adapter_name] = replace(
        model.peft_config[adapters[0]],
        r=usual,
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in plain.items() if rank != usual},
        target_modules=set(plain),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sorted({n for a in adapters for n in model.peft_config[a].modules_to_save or ()}) or None,
    )
    for name, layer in layers.items():
        layer.set_factors(adapter_name, *summed[name])
    for wrapper in _trained_modules(model):
        for source in set(adapters) & wrapper.modules_to_save.keys():
            wrapper.update(adapter_name)
            wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[source].state_dict())
            wrapper.modules_to_save[adapter_name].requires_grad_(False)


def _trained_modules(model: nn.Module) -> list[ModulesToSaveWrapper]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself where a compiler, a `PeftModel` or a tuner is around it: its module names are the config's."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


def _refuse_meta(layers: Iterable[LoRaDLayer]) -> None:
    if any(p.is_meta for layer in layers for factors in (layer.lorad_A, layer.lorad_B) for p in factors.values()):
        raise ValueError(
            "The adapters of this model are offloaded or not loaded (on the meta device), so that they cannot be read "
            "or changed. Load them, and switch the offload on afterwards."
        )


def _check_sources(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
    configs = getattr(model, "peft_config", None) or {}
    known = [name for name, config in configs.items() if isinstance(config, LoRaDConfig)]
    if not adapters or len(set(adapters)) < len(adapters) or set(adapters) - set(known):
        raise ValueError(f"`adapters` has to name LoRaD adapters, each once, of {known}; got {list(adapters)}.")
    if len(weights) != len(adapters):
        raise ValueError(f"One weight per adapter is needed: {len(adapters)} adapters, {len(weights)} weights.")
    if not all(torch.isfinite(torch.tensor(float(weight))) for weight in weights):
        raise ValueError(f"`weights` have to be finite, got {list(weights)}.")
    if adapter_name in configs:
        raise ValueError(f"The adapter name {adapter_name!r} is taken; choose another or delete that adapter first.")
    if combination_type not in _COMBINATIONS:
        raise ValueError(f"`combination_type` has to be one of {_COMBINATIONS}, got {combination_type!r}.")
    if svd_rank is not None and (combination_type != "svd" or svd_rank < 1):
        raise ValueError(f"`svd_rank` has to be at least 1 and goes with the combination 'svd', got {svd_rank}.")
    for name in adapters:
        if configs[name].trainable_token_indices or configs[name].bias != "none":
            raise ValueError(
                f"Adapter {name!r} trains biases or tokens besides its angles (`bias`, `trainable_token_indices`), and "
                "those have no sum that equals both. Combine adapters without them."
            )
    # The wording is PEFT's, whose users may look for it.
    shared = sum(len(set(adapters) & wrapper.modules_to_save.keys()) > 1 for wrapper in _trained_modules(model))
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{shared} such instance(s). Combine adapters of which one at most has trained a module in full."
        )


def _weighted_sum(layer: LoRaDLayer, weights: Mapping[str, float], limit: int | None) -> tuple[Tensor, Tensor]:
    names = [name for name in weights if name in layer.lorad_A]
    A, B = layer._factors(names, {name: float(weights[name]) for name in names})
    A, B = A.detach().float(), B.detach().float()
    if limit is None or A.shape[1] <= limit:
        return A, B
    # The singular values of A @ B from those of a matrix of the size of the rank.
    left, upper = torch.linalg.qr(A)
    right, lower = torch.linalg.qr(B.T)
    u, s, v = torch.linalg.svd(upper @ lower.T)
    root = s[:limit].sqrt()
    return (left @ u[:, :limit]) * root, root[:, None] * (v[:limit] @ right.T)


@torch.no_grad()
def hotswap_lorad_adapter(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Put other factors into an adapter, in place: no layer is rebuilt, and a compiled model is not compiled again.

    The tensors of the parameters stay where they are. A new adapter of lower rank is filled up with zeros, which do
    not change its angles; a layer that it lacks gets angle zero. The scale stays as it is set.

    Args:
        model: a model with that adapter, compiled or not.
        state_dict: `<module>.lorad_A` and `<module>.lorad_B`, as `get_peft_model_state_dict` or a file has them; a
            prefix that all keys share and no module has ("unet.", "base_model.model.") is taken off.
        adapter_name: the adapter to fill. Default "default".

    Raises:
        ValueError: the adapter is merged, a layer is missing in the model, shapes that do not fit, a higher rank, or
            numbers that are not finite. The model is then as before.
    """
    model = _unwrapped(model)
    layers = {
        _plain(name): m for name, m in model.named_modules() if isinstance(m, LoRaDLayer) and adapter_name in m.r
    }
    if not layers:
        raise ValueError(f"There is no LoRaD adapter {adapter_name!r} to swap; load the first one before compiling.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is fused into the base weights; unfuse it before swapping it.")
    _refuse_meta(layers.values())
    new = _paired(state_dict, layers)
    for name, (A, B) in new.items():
        _check_fit(name, layers[name].lorad_A[adapter_name], layers[name].lorad_B[adapter_name], A, B)
    for name, layer in layers.items():
        for factors, values, axis in zip((layer.lorad_A, layer.lorad_B), new.get(name, (None, None)), (1, 0)):
            target = factors[adapter_name].data
            target.zero_()
            if values is not None:
                target.narrow(axis, 0, values.shape[axis]).copy_(values)


def _plain(name: str) -> str:
    """A module's name without the wrappers of other adapters and of the compiler."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "_orig_mod"))


def _paired(state_dict: Mapping[str, Tensor], layers: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    names = {_plain(key.rpartition(".")[0]) for key in state_dict if key.endswith((".lorad_A", ".lorad_B"))}
    foreign = [key for key in state_dict if not key.endswith((".lorad_A", ".lorad_B"))]
    if foreign or not names:
        raise ValueError(
            f"A swap takes tensors named <module>.lorad_A and .lorad_B only; {len(foreign)} of {len(state_dict)} are "
            f"others, first {next(iter(foreign), None)!r}."
        )
    prefix = _common_prefix(names, layers)
    found = {}
    for key, value in state_dict.items():
        name, _, factor = key.rpartition(".")
        found.setdefault(_plain(name).removeprefix(prefix), {})[factor] = value
    odd = [name for name, pair in found.items() if len(pair) != 2 or name not in layers]
    if odd:
        raise ValueError(
            f"{len(odd)} of {len(found)} modules lack one of lorad_A and lorad_B, or are not adapted in this model, "
            f"first {odd[0]!r}. Load this adapter instead of swapping it in."
        )
    return {name: (pair["lorad_A"], pair["lorad_B"]) for name, pair in found.items()}


def _common_prefix(names: set[str], layers: Mapping[str, Any]) -> str:
    """What stands before the module's own name in every key: found from one key, and only if it serves all."""
    example = min(names)
    known = [layer for layer in layers if example == layer or example.endswith("." + layer)]
    if not known:
        return ""
    prefix = example.removesuffix(max(known, key=len))
    return prefix if all(name.startswith(prefix) for name in names) else ""


def _check_fit(name: str, old_A: Tensor, old_B: Tensor, A: Tensor, B: Tensor) -> None:
    rank = old_A.shape[1]
    fits = A.dim() == B.dim() == 2 and A.shape[1] == B.shape[0] and A.shape[0] == old_A.shape[0]
    if not fits or B.shape[1] != old_B.shape[1]:
        raise ValueError(
            f"{name}: lorad_A {tuple(A.shape)} and lorad_B {tuple(B.shape)} do not fit {tuple(old_A.shape)} and "
            f"{tuple(old_B.shape)} of the adapter in the model; it was trained on another base model."
        )
    if A.shape[1] > rank:
        raise ValueError(
            f"{name}: the new adapter has rank {A.shape[1]}, the one in the model {rank}. A swap in place cannot grow: "
            "load the adapter of the highest rank first."
        )
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ValueError(f"{name}: values that are not finite; get the adapter again.")
