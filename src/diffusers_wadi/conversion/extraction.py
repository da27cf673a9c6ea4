"""The LoRaD adapter between two checkpoints: a base, and what fine-tuning or distillation made of it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffusers_wadi._adapter_files import ADAPTER_CONFIG_NAME, LORAD_WEIGHT_NAME, METADATA_KEY
from diffusers_wadi._files import probe_file, writable_folder, written_beside
from diffusers_wadi.conversion._weights import (
    Source,
    Weights,
    matches_names,
    open_weights,
    refuse_broken,
    refuse_device_without_float64,
    refuse_other_architecture,
    same_tensor,
)
from diffusers_wadi.conversion.report import ConversionReport, LayerReport, LeftOut
from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.extraction import LayerFit, check_rank_and_energy, fit_layer

__all__ = ["REPORT_NAME", "Extraction", "extract_lorad"]

REPORT_NAME = "extraction_report.json"
_SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Extraction:
    """An extracted adapter.

    Args:
        state_dict: `<module path>.lorad_A` (out, r) and `.lorad_B` (r, in/2), as `load_lorad_adapter` takes it.
        config: its config.
        report: what it explains of every tensor's change.
        component: the model's name in its pipeline.
        scheduler: scheduler config file of the tuned pipeline, None where there is none.
    """

    state_dict: dict[str, torch.Tensor]
    config: LoRaDConfig
    report: ConversionReport
    component: str = "unet"
    scheduler: Path | None = None

    def save(
        self,
        folder: str | os.PathLike,
        base_model_name_or_path: str | None = None,
        weight_name: str = LORAD_WEIGHT_NAME,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Write an adapter folder, as `load_lorad_adapter` and `WaDiPipeline.from_pretrained` read it, and the report.

        Args:
            folder: created if need be. Each file appears whole or not at all.
            base_model_name_or_path: the pipeline that the adapter belongs to, a Hub name or path. Default None: the
                one that `base` came from, where it came from one.
            weight_name: file name of the weights, ending in .safetensors.
            dtype: of the factors in the file; default None keeps float32.

        Returns:
            Path of the weights.

        Raises:
            ValueError: another file format asked for.
            OSError: `folder` is not writable.
        """
        if Path(weight_name).suffix != ".safetensors":
            raise ValueError(f"{weight_name!r}: LoRaD weights are written as .safetensors only")
        path = writable_folder(folder) / weight_name
        values = asdict(self.config) | {"inference_mode": True}
        values["base_model_name_or_path"] = base_model_name_or_path or self.config.base_model_name_or_path
        config = json.dumps(values, indent=2, sort_keys=True, default=sorted)  # sorted: sets of names
        state = {f"{self.component}.{key}": value.to("cpu", dtype) for key, value in self.state_dict.items()}
        with written_beside(path) as temporary:
            save_file(state, temporary, metadata={"format": "pt", METADATA_KEY: config})
        with written_beside(path.parent / ADAPTER_CONFIG_NAME) as temporary:
            temporary.write_text(config + "\n", encoding="utf-8")
        with written_beside(path.parent / REPORT_NAME) as temporary:
            temporary.write_text(self.report.to_json() + "\n", encoding="utf-8")
        if self.scheduler is not None:
            target = writable_folder(path.parent / "scheduler") / "scheduler_config.json"
            with written_beside(target) as temporary:
                shutil.copyfile(self.scheduler, temporary)
        return path


@torch.no_grad()
def extract_lorad(
    base: Source,
    tuned: Source,
    rank: int | None = None,
    energy: float | None = None,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    convolutions: bool = False,
    subfolder: str | None = None,
    component: str | None = None,
    variant: str | None = None,
    rounds: int = 8,
    device: str | torch.device = "cpu",
    **hub: Any,
) -> Extraction:
    """The LoRaD adapter that turns `base` nearest to `tuned`, with what it explains of the change.

    Linear layers that changed are adapted, all other changes reported. Files are read layer by layer.

    Args:
        base, tuned: two models of one architecture, each given as a model, a pipeline, a state dict, a
            .safetensors file, or a folder or Hub name of a model or a pipeline. Adapters in them have to be fused.
        rank: rank of every layer (less where a layer is smaller), or the highest if `energy` is given too.
        energy: per layer the smallest rank that holds this share of the squared angles, weighted by the lengths they
            turn. One of `rank` and `energy` is needed.
        target_modules: names (full, or their last parts) or a regular expression. Default None: every Linear layer.
        exclude_modules: layers to leave alone, likewise. Default None.
        convolutions: adapt convolutions too (the paper's "Linear + Conv"). Default False.
        subfolder: folder inside `base` and `tuned`; for a pipeline "unet" or "transformer" by default. Where one of the
            two is the folder of the model itself it applies to the other alone.
        component: name of the model in its pipeline, the prefix of the keys in the file. Default None: the name in
            the pipeline, or told from the layers' names.
        variant: such as "fp16", of the files of both.
        rounds: rounds of refinement per layer. Default 8.
        device: where to compute. Default "cpu".
        **hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        ValueError: no rank, models of two architectures, adapters that are not fused, numbers that are not finite, or
            nothing to adapt.
        OSError: weights that cannot be found.
    """
    check_rank_and_energy(rank, energy)
    refuse_device_without_float64(torch.device(device))
    chosen = _Choice(target_modules, exclude_modules, convolutions)
    first, second = (open_weights(source, subfolder, variant, **hub) for source in (base, tuned))
    refuse_other_architecture(first, second)
    fits, report = _fit_all(first, second, chosen, torch.device(device), (rank, energy, rounds))
    if not fits:
        raise ValueError(_nothing_to_adapt(first, second, report.left_out))
    component = component or second.component or first.component or _component_by_names(fits)
    scheduler = None if second.pipeline is None else probe_file(second.pipeline, _SCHEDULER, **hub)
    state = {f"{name}.lorad_{letter}": t for name, pair in fits.items() for letter, t in zip("AB", pair)}
    return Extraction(state, _config(fits, rank, _base_name(first.pipeline)), report, component, scheduler)


def _fit_all(
    first: Weights, second: Weights, chosen: _Choice, device: torch.device, settings: tuple
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], ConversionReport]:
    """Factors by layer, one pair of tensors in memory at a time; `settings`: rank, energy and rounds."""
    fits, report = {}, ConversionReport()
    for key in first.shapes:
        before, after = first.read(key), second.read(key)
        if same_tensor(before, after):
            continue
        refuse_broken(key, first.origin, before)
        refuse_broken(key, second.origin, after)
        reason = chosen.reason_to_leave(key, tuple(before.shape))
        if reason is not None:
            report.left_out.append(_left_out(key, before, after, reason))
            continue
        name = key.removesuffix(".weight")
        fit = fit_layer(before.to(device), after.to(device), *settings)
        fits[name] = (fit.A.cpu().contiguous(), fit.B.cpu().contiguous())
        report.layers.append(_layer_report(name, before, fit))
    return fits, report


class _Choice:
    """Which tensors are weights that LoRaD adapts."""

    def __init__(
        self, targets: str | Iterable[str] | None, excluded: str | Iterable[str] | None, convolutions: bool
    ) -> None:
        self.targets, self.excluded, self.convolutions = targets, excluded, convolutions

    def reason_to_leave(self, key: str, shape: tuple[int, ...]) -> str | None:
        name, _, kind = key.rpartition(".")
        if kind != "weight" or len(shape) < 2:
            return "a bias, norm or single value"
        if len(shape) > 2 and not self.convolutions:
            return "a convolution"
        if "embed" in name.rpartition(".")[2]:  # `time_embedding.linear_1` is a Linear, `class_embedding` is a table
            return "an embedding table"
        if len(shape) == 2 and shape[1] % 2:
            return "an odd number of input columns"
        if self.excluded is not None and matches_names(name, self.excluded):
            return "excluded"
        if self.targets is not None and not matches_names(name, self.targets):
            return "not among target_modules"
        return None


def _layer_report(name: str, before: torch.Tensor, fit: LayerFit) -> LayerReport:
    norm = before.float().norm().item()
    lengths = min(fit.left_by_lengths, fit.left)  # rounding may have it the other way round
    return LayerReport(
        name,
        shape=tuple(before.flatten(1).shape),
        rank=fit.B.shape[0],
        change=math.sqrt(fit.change),
        relative_change=math.sqrt(fit.change) / norm if norm else math.inf,
        explained=1 - fit.left / fit.change,
        lost_to_rank=(fit.left - lengths) / fit.change,
        lost_to_lengths=lengths / fit.change,
    )


def _left_out(key: str, before: torch.Tensor, after: torch.Tensor, reason: str) -> LeftOut:
    norm, change = before.float().norm().item(), (after.float() - before.float()).norm().item()
    return LeftOut(key, tuple(before.shape), change, change / norm if norm else math.inf, reason)


def _config(fits: dict[str, tuple[torch.Tensor, torch.Tensor]], rank: int | None, base: str | None) -> LoRaDConfig:
    ranks = {name: A.shape[1] for name, (A, _) in fits.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    if rank in ranks.values():
        common = rank
    return LoRaDConfig(
        r=common,
        rank_pattern={f"^{re.escape(name)}$": r for name, r in ranks.items() if r != common},
        target_modules=sorted(fits),
        base_model_name_or_path=base,
    )


def _base_name(pipeline: str | None) -> str | None:
    """A local folder by its absolute path, since a relative one means nothing elsewhere."""
    return str(Path(pipeline).resolve()) if pipeline is not None and Path(pipeline).is_dir() else pipeline


def _component_by_names(names: Iterable[str]) -> str:
    return "transformer" if any(name.startswith("transformer_blocks.") for name in names) else "unet"


def _nothing_to_adapt(first: Weights, second: Weights, left_out: list[LeftOut]) -> str:
    if not left_out:
        return f"{first.origin} and {second.origin} hold the same weights; there is nothing to extract"
    reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(e.reason for e in left_out).most_common())
    return (
        f"none of the {len(left_out)} tensors in which {second.origin} differs from {first.origin} is a Linear layer to "
        f"adapt ({reasons}). Look at `target_modules` and `exclude_modules`."
    )
