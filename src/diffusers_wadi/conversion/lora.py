"""A LoRaD adapter as an ordinary LoRA: the change it makes to each weight, cut to a rank."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from diffusers_wadi._files import writable_folder, written_beside
from diffusers_wadi.conversion.report import ConversionReport, LayerReport
from diffusers_wadi.loaders import lorad_adapter_names
from diffusers_wadi.lorad.extraction import check_rank_and_energy, truncated_svd
from diffusers_wadi.lorad.layer import LoRaDLayer
from diffusers_wadi.lorad.rotation import rotate_weight
from diffusers_wadi.lorad.targets import CONVOLUTIONS

__all__ = ["LORA_WEIGHT_NAME", "LoRAExport", "export_lora"]

LORA_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the config of a LoRA


@dataclass(frozen=True)
class LoRAExport:
    """A LoRA.

    Args:
        state_dict: `<component>.<module path>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r); scale 1.
        report: what it keeps of every layer's change.
        component: the model's name in its pipeline.
    """

    state_dict: dict[str, torch.Tensor]
    report: ConversionReport
    component: str = "unet"

    def save(
        self,
        folder: str | os.PathLike,
        weight_name: str = LORA_WEIGHT_NAME,
        dtype: torch.dtype | None = None,
        layout: Literal["diffusers", "kohya"] = "diffusers",
    ) -> Path:
        """Write one file that `pipe.load_lora_weights(folder)` of any Stable Diffusion pipeline takes.

        Args:
            folder: created if need be. The file appears whole or not at all.
            weight_name: file name, ending in .safetensors.
            dtype: of the factors in the file; default None keeps float32.
            layout: names of the tensors: "diffusers" (default), or "kohya" (`lora_unet_...lora_down.weight`), which
                other programs read as well.

        Returns:
            Path of the file.

        Raises:
            ValueError: another file format or layout asked for.
            OSError: `folder` is not writable.
        """
        if Path(weight_name).suffix != ".safetensors":
            raise ValueError(f"{weight_name!r}: a LoRA is written as .safetensors only")
        if layout not in ("diffusers", "kohya"):
            raise ValueError(f"`layout` has to be 'diffusers' or 'kohya', got {layout!r}")
        path = writable_folder(folder) / weight_name
        state, metadata = {key: value.to("cpu", dtype) for key, value in self.state_dict.items()}, {"format": "pt"}
        if layout == "kohya":
            state = _kohya(state)
        else:
            metadata[_METADATA_KEY] = json.dumps(self._lora_config(), sort_keys=True)
        with written_beside(path) as temporary:
            save_file(state, temporary, metadata=metadata)
        return path

    def _lora_config(self) -> dict[str, Any]:
        """The values of a `LoraConfig`, as diffusers stores them: alpha = rank in every layer, so that the scale is 1."""
        ranks = {layer.name: layer.rank for layer in self.report.layers}
        common = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != common}
        values = {"r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": pattern}
        values["target_modules"] = sorted(ranks)
        return {f"{self.component}.{key}": value for key, value in values.items()}


@torch.no_grad()
def export_lora(
    model: torch.nn.Module,
    rank: int | None = None,
    energy: float | None = None,
    adapter_names: str | list[str] | None = None,
    component: str = "unet",
) -> LoRAExport:
    """The LoRA nearest to the LoRaD adapters of a model: per layer the singular values of the change of the weight.

    A rotation changes a weight by a matrix of full rank, so a LoRA of the same rank keeps a part of it only; the report
    says which. At full rank it is the LoRaD itself.

    Args:
        model: with LoRaD adapters, not fused, at the scales that the LoRA is to have.
        rank: rank of every layer (less where a layer is smaller), or the highest if `energy` is given too.
        energy: per layer the smallest rank that keeps this share of the squared norm of the change. One of `rank` and
            `energy` is needed.
        adapter_names: which adapters, together; default None takes the active ones.
        component: the model's name in its pipeline, the prefix of the keys.

    Raises:
        ValueError: no rank, no such adapters, adapters that are fused, or on layers other than Linear and convolutions.
    """
    check_rank_and_energy(rank, energy)
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    unknown = set(names or ()) - set(lorad_adapter_names(model))
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no LoRaD adapters; {lorad_adapter_names(model)} are")
    state, reports = {}, []
    for path, layer in model.named_modules():
        if not isinstance(layer, LoRaDLayer):
            continue
        acting = _acting(path, layer, names)
        if not acting:
            continue
        name = ".".join(part for part in path.split(".") if part != "base_layer")
        weight = layer.get_base_layer().weight
        change = (rotate_weight(weight.float(), layer.get_angles(acting)) - weight.float()).flatten(1)
        left, right, kept, total = truncated_svd(change, rank, energy)
        state |= _factors(f"{component}.{name}", left, right, weight.shape)
        reports.append(_report(name, weight.float().flatten(1), right.shape[0], kept, total))
    if not reports:
        raise ValueError(
            f"this {type(model).__name__} has no active LoRaD adapter to export; load one, or name it in adapter_names"
        )
    return LoRAExport(state, ConversionReport(reports), component)


def _acting(path: str, layer: LoRaDLayer, names: list[str] | None) -> list[str]:
    if layer.merged:
        raise ValueError(f"{path} has adapters fused into its weight; take them out first with pipe.unfuse_lorad()")
    if getattr(layer.get_base_layer(), "groups", 1) != 1:
        raise ValueError(f"{path} is a grouped convolution, which LoRA files cannot describe; leave it out")
    if not isinstance(layer.get_base_layer(), (torch.nn.Linear, *CONVOLUTIONS)):
        kind = type(layer.get_base_layer()).__name__
        raise ValueError(
            f"{path} is a {kind}; LoRA files of diffusers know Linear layers and convolutions. Leave it out"
        )
    if names is None:
        names = [] if layer.disable_adapters else layer.active_adapters
    return [name for name in names if name in layer.lorad_A]


def _factors(prefix: str, left: torch.Tensor, right: torch.Tensor, shape: torch.Size) -> dict[str, torch.Tensor]:
    """The two tensors of one layer; both factors of like size, which 16-bit files round least."""
    ratio = left.norm(dim=0).clamp(min=1e-12).sqrt()
    down, up = right * ratio[:, None], left / ratio
    if len(shape) > 2:
        down, up = down.unflatten(1, shape[1:]), up.reshape(*up.shape, *[1] * (len(shape) - 2))
    return {
        f"{prefix}.lora_A.weight": down.contiguous().cpu(),
        f"{prefix}.lora_B.weight": up.contiguous().cpu(),
    }


def _report(name: str, weight: torch.Tensor, rank: int, kept: float, total: float) -> LayerReport:
    explained, norm = kept / total if total else 1.0, weight.norm().item()
    relative = math.sqrt(total) / norm if norm else 0.0
    return LayerReport(name, tuple(weight.shape), rank, math.sqrt(total), relative, explained, 1 - explained)


def _kohya(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, value in state.items():
        path, kind = key.rsplit(".lora_", 1)
        name = "lora_" + path.replace(".", "_")
        renamed[f"{name}.lora_{'down' if kind.startswith('A') else 'up'}.weight"] = value
        if kind.startswith("A"):
            renamed[f"{name}.alpha"] = torch.tensor(float(value.shape[0]))
    return renamed
