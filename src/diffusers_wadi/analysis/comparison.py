"""Two models compared weight by weight, one pair of tensors in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffusers_wadi.analysis.report import LayerChange, OtherChange, WeightAnalysis
from diffusers_wadi.analysis.sources import Where, open_models
from diffusers_wadi.analysis.weights import (
    Convention,
    check_convention,
    rotation_left,
    singular_value_energies,
    squared_norm,
    vector_changes,
)
from diffusers_wadi.conversion._weights import (
    Source,
    Weights,
    matches_names,
    refuse_broken,
    refuse_device_without_float64,
    same_tensor,
)

__all__ = ["Layers", "analyze_weights"]

Layers = Literal["all", "linear", "convolution"]
Progress = Callable[[Iterable[str]], Iterable[str]]


@torch.no_grad()
def analyze_weights(
    base: Source,
    tuned: Source,
    convention: Convention = "column",
    layers: Layers = "all",
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    energies: bool = True,
    base_model: Source | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    device: str | torch.device = "cpu",
    label: str | None = None,
    progress: Progress | None = None,
    **hub: Any,
) -> WeightAnalysis:
    """What changed from `base` to `tuned`: norms, directions, spectrum, and how much of it is a rotation.

    Per weight and overall, the paper's measures (Eq. 13-17, Fig. 2a and 2b) and the share of the change that LoRaD's
    rotations make. Files are read tensor by tensor.

    Args:
        base, tuned: two models of one architecture, or adapters on one: a model, a pipeline, a state dict, a file
            (.safetensors, .pth; diffusers' names or those of the original Stable Diffusion code), a folder or Hub name of
            a model, a pipeline, a LoRaD, LoRA or DoRA, or ORG/NAME/file.safetensors on the Hub.
        convention: "column" (default, the paper's): a vector per output unit. "row": one per input.
        layers: "linear" or "convolution" weights alone; "all" (default) takes every weight of two axes or more.
        target_modules: names (full, or their last parts) or a regular expression. Default None: all of `layers`.
        exclude_modules: weights to leave alone, likewise. Default None.
        energies: compute the singular values of the change. Default True.
        base_model: the checkpoint to put adapters on. Default None: `base`, or what `base` names if it is an adapter.
        subfolder: folder inside the sources; for a pipeline "unet" or "transformer" by default.
        variant: such as "fp16", of the files.
        device: where to compute. Default "cpu".
        label: short name of `tuned` for tables and figures. Default None: its origin.
        progress: wraps the list of names, as `tqdm` does. Default None.
        **hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        ValueError: models of two architectures (with the first tensor that differs), an adapter that does not fit,
            numbers that are not finite, nothing to compare, or a choice that does not exist.
        OSError: weights that cannot be found.
    """
    check_convention(convention)
    if layers not in get_args(Layers):
        raise ValueError(f"`layers` is one of {', '.join(get_args(Layers))}, got {layers!r}")
    device = torch.device(device)
    refuse_device_without_float64(device)
    compare = _Comparison(_Choice(layers, target_modules, exclude_modules), convention, energies, device)
    first, (second,) = open_models(base, [tuned], base_model, Where(subfolder, variant, hub))
    entries = [compare(key, first, second) for key in (progress or iter)(list(first.shapes))]
    found = sorted((entry for entry in entries if isinstance(entry, LayerChange)), key=_network_order)
    if not found:
        raise ValueError(
            f"none of the {len(first.shapes)} tensors of {first.origin} is a weight to compare with layers={layers!r}; "
            "look at `layers`, `target_modules` and `exclude_modules`"
        )
    others = [entry for entry in entries if isinstance(entry, OtherChange)]
    return WeightAnalysis(first.origin, second.origin, convention, found, others, label or second.origin)


@dataclass(frozen=True)
class _Choice:
    layers: str
    targets: str | Iterable[str] | None
    excluded: str | Iterable[str] | None

    def __contains__(self, item: tuple[str, tuple[int, ...]]) -> bool:
        name, shape = item
        kinds = {"all": True, "linear": len(shape) == 2, "convolution": len(shape) > 2}
        left_out = self.excluded is not None and matches_names(name, self.excluded)
        return kinds[self.layers] and not left_out and (self.targets is None or matches_names(name, self.targets))


@dataclass(frozen=True)
class _Comparison:
    choice: _Choice
    convention: Convention
    energies: bool
    device: torch.device

    def __call__(self, key: str, first: Weights, second: Weights) -> LayerChange | OtherChange | None:
        name, shape = key.removesuffix(".weight"), first.shapes[key]
        is_weight = is_vectors(key, shape)
        if is_weight and (name, shape) not in self.choice:
            return None
        before, after = first.read(key), second.read(key)
        refuse_broken(key, first.origin, before)
        refuse_broken(key, second.origin, after)
        same = same_tensor(before, after)
        before, after = before.to(self.device), after.to(self.device)
        if same:
            after = before
        if is_weight:
            return self._layer(name, before, after, same)
        change = squared_norm(_difference(before, after))
        return None if same else OtherChange(key, shape, _relative(change, squared_norm(before)))

    def _layer(self, name: str, before: Tensor, after: Tensor, same: bool) -> LayerChange:
        norm, direction = vector_changes(before, after, self.convention)
        change, left, energies = 0.0, 0.0, np.zeros(0)
        if not same:
            left, difference = rotation_left(before, after), _difference(before, after)
            change = squared_norm(difference)
            if self.energies:
                energies = singular_value_energies(difference).numpy()
        return LayerChange(
            name=name,
            group=group_of(name, before.ndim),
            shape=tuple(before.shape),
            relative_change=_relative(change, squared_norm(before)),
            norm=norm.numpy(),
            direction=direction.numpy(),
            change=change,
            rotation_left=left,
            vectors=before.shape[0] if self.convention == "column" else math.prod(before.shape[1:]),
            energies=energies,
        )


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """In float32, with no widened copy of either beside it: a convolution's takes 118 MB."""
    return after.to(torch.float32, copy=True).sub_(before)


def _relative(change: float, base: float) -> float | None:
    """As a share of the base's norm; None where that is 0."""
    return math.sqrt(change / base) if base else (None if change else 0.0)


_STAGES = ("conv_in", "pos_embed", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out", "proj_out")


def _network_order(layer: LayerChange) -> tuple:
    """Input first, numbers in names by their size; files have the names in the order of the alphabet."""
    first = layer.name.split(".")[0]
    stage = _STAGES.index(first) if first in _STAGES else 3
    return stage, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", layer.name)]


def is_vectors(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a weight that is read as vectors; a table such as PixArt's `scale_shift_table` is not."""
    return key.endswith("weight") and len(shape) > 1 and math.prod(shape) > 0


def group_of(name: str, axes: int) -> str:
    """The kind of layer (`GROUPS`), by the names of diffusers' UNets and transformers."""
    parts = f".{name}."
    if ".attn1." in parts:
        return "self-attention"
    if ".attn2." in parts:
        return "cross-attention"
    if ".ff." in parts:
        return "feed-forward"
    if re.search(r"\.(proj_in|proj_out)\.", parts):
        return "projection"
    if re.search(r"\.(time_emb_proj|time_embedding|adaln_single|timestep_embedder)\.", parts):
        return "time embedding"
    return "convolution" if axes > 2 else "other"
