"""Reading weights one tensor at a time, from a model, a state dict, a file, a folder or the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from diffusers_wadi._adapter_files import ADAPTER_CONFIG_NAME
from diffusers_wadi._files import find_file, probe_file
from diffusers_wadi.pipelines._optimization import as_it_was

Source = torch.nn.Module | DiffusionPipeline | Mapping[str, torch.Tensor] | str | os.PathLike

STEMS = ("diffusion_pytorch_model", "model")
COMPONENTS = ("unet", "transformer")


@dataclass(frozen=True)
class Weights:
    """Tensors by name, read when asked for.

    Args:
        shapes: name -> shape.
        read: name -> tensor, on the CPU if it comes from a file.
        origin: where they come from, for messages.
        pipeline: the pipeline folder or Hub name that they are a part of, if any.
        component: name of the model in that pipeline ("unet", "transformer").
        config: the `config.json` beside the weights, if any.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    origin: str
    pipeline: str | None = None
    component: str | None = None
    config: Path | None = None


def open_weights(source: Source, subfolder: str | None, variant: str | None, **hub: Any) -> Weights:
    """Open weights without reading them.

    Args:
        source: a model, a pipeline, a state dict, a .safetensors file, or a folder or Hub name: of one model, or of a pipeline.
        subfolder: folder inside `source`; for a pipeline its "unet" or "transformer" by default.
        variant: "fp16" and the like, as in diffusers' file names. Without it, the plain file comes first.
        **hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        ValueError: adapters that are not fused, another file format, or a damaged file.
        OSError: no such file.
    """
    if isinstance(source, DiffusionPipeline):
        return _of_pipeline(source, subfolder)
    if isinstance(source, torch.nn.Module):
        if any(isinstance(module, BaseTunerLayer) for module in source.modules()):
            raise ValueError(
                f"this {type(source).__name__} carries adapters; fuse them and take them out first "
                "(`pipe.fuse_lorad()`, `pipe.unload_lorad_weights()`), or save the pipeline and pass its folder"
            )
        return _of_mapping(source.state_dict(), f"the given {type(source).__name__}")
    if isinstance(source, Mapping):
        return _of_mapping(source, "the given state dict")
    if Path(source).is_file():
        return _of_files({str(source): Path(source)}, str(source))
    return _of_folder(str(source), subfolder, variant, hub)


def _of_pipeline(pipe: Any, component: str | None) -> Weights:
    pipe = as_it_was(pipe)  # of an optimized pipeline the models themselves
    component = component or next((name for name in COMPONENTS if name in pipe.components), None)
    model = pipe.components.get(component)
    if model is None:
        raise ValueError(
            f"this {type(pipe).__name__} has no {component or ' or '.join(COMPONENTS)}; pass the model itself"
        )
    weights = open_weights(model, None, None)
    return Weights(weights.shapes, weights.read, weights.origin, pipe.config.get("_name_or_path") or None, component)


def _of_mapping(tensors: Mapping[str, torch.Tensor], origin: str) -> Weights:
    empty = [key for key, value in tensors.items() if value.is_meta]
    if empty:
        raise ValueError(
            f"{origin} has {len(empty)} tensors on the meta device, first {empty[0]}: they are offloaded or were never "
            "loaded. Pass the folder or file instead, or load without offloading."
        )
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return Weights(shapes, lambda key: tensors[key].detach().cpu(), origin)


def _of_folder(source: str, subfolder: str | None, variant: str | None, hub: dict) -> Weights:
    """A folder or Hub name: of a model with its weights, or of a pipeline with `model_index.json`."""
    if Path(source).is_dir() and (Path(source, subfolder or "", ADAPTER_CONFIG_NAME)).is_file():
        raise ValueError(f"{source} is an adapter, not a checkpoint; fuse it first (`wadi fuse {source} -o FOLDER`)")
    index = probe_file(source, "model_index.json", **hub)
    if index is None and Path(source).is_dir() and not Path(source, subfolder or "").is_dir():
        subfolder = None  # one model's own folder, beside a pipeline to which `subfolder` refers
    pipeline, component = (None, None) if index is None else (source, subfolder)
    if index is not None and subfolder is None:
        parts = json.loads(index.read_text(encoding="utf-8"))
        component = subfolder = next((name for name in COMPONENTS if name in parts), None)
    elif index is None and Path(source, "..", "model_index.json").is_file():  # one model of a local pipeline
        pipeline, component = str(Path(source).resolve().parent), Path(source).resolve().name
    files = _find(source, subfolder, variant, hub)
    if not files:
        names = " or ".join(f"{stem}.safetensors" for stem in STEMS)
        raise FileNotFoundError(
            f"no {names}{f' of variant {variant}' if variant else ''} in {source!r}"
            f"{f', subfolder {subfolder!r}' if subfolder else ''}. Pass the folder of one model or of a pipeline, "
            "with --subfolder (subfolder=) if the model lies deeper, or a .safetensors file."
        )
    origin = source if subfolder is None else f"{source}/{subfolder}"
    weights = _of_files(files, origin)
    config = probe_file(source, "config.json", subfolder, **hub)
    return Weights(weights.shapes, weights.read, origin, pipeline, component, config)


def _find(source: str, subfolder: str | None, variant: str | None, hub: dict) -> dict[str, Path]:
    """The weight files by name; several where an index says so."""
    tags = (f".{variant}",) if variant else ("", ".fp16")
    for tag in tags:
        for stem in STEMS:
            for name in (f"{stem}.safetensors.index{tag}.json", f"{stem}{tag}.safetensors"):
                path = find_file(source, name, subfolder, **hub)
                if path is None:
                    continue
                if path.suffix == ".safetensors":
                    return {name: path}
                shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
                found = {shard: find_file(source, shard, subfolder, **hub) for shard in shards}
                missing = [shard for shard, place in found.items() if place is None]
                if missing:
                    raise FileNotFoundError(
                        f"{path} names {missing[0]}, which is not there; copy or download it again"
                    )
                return found
    return {}


def _of_files(files: Mapping[str, Path], origin: str) -> Weights:
    homes, shapes = {}, {}
    for path in files.values():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: weights are read from .safetensors only, which cannot carry code")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    homes[key], shapes[key] = path, tuple(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete safetensors file ({error}); copy or download it again"
            ) from error

    def read(key: str) -> torch.Tensor:
        # Opened anew for each: pages of an open file stay in memory once they were read, gigabytes in the end.
        with safe_open(homes[key], framework="pt") as file:
            return file.get_tensor(key)

    return Weights(shapes, read, origin)


def matches_names(name: str, wanted: str | Iterable[str]) -> bool:
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def same_tensor(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than that one of them was stored in fewer bits."""
    if torch.equal(before, after):
        return True
    if before.dtype == after.dtype or not (before.is_floating_point() and after.is_floating_point()):
        return False
    return torch.equal(before.to(after.dtype), after) or torch.equal(after.to(before.dtype), before)


def _odd(first: Weights, second: Weights) -> Iterator[str]:
    for key in sorted(first.shapes.keys() | second.shapes.keys()):
        if first.shapes.get(key) != second.shapes.get(key):
            yield key


def refuse_other_architecture(first: Weights, second: Weights) -> None:
    odd = list(_odd(first, second))
    if not odd:
        return
    key = odd[0]
    hint = "Both have to be one architecture, and no adapters or training weights beside the model's own."
    if any(name.startswith("model.diffusion_model.") for name in odd):
        hint = (
            "A file in the original Stable Diffusion layout has to become a diffusers folder first: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    raise ValueError(
        f"{first.origin} and {second.origin} differ in {len(odd)} of {len(first.shapes)} tensors' names or shapes, first "
        f"{key}: {first.shapes.get(key, 'absent')} and {second.shapes.get(key, 'absent')}. {hint}"
    )


def refuse_device_without_float64(device: torch.device) -> None:
    if device.type == "mps":
        raise ValueError("this computes in float64, which device mps does not have; pass cpu")


def refuse_broken(key: str, origin: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{origin}: {key} holds numbers that are not finite; get the checkpoint again")
