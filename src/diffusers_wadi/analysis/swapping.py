"""Norms of one model with the directions of another, as a checkpoint that runs (Fig. 2c)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from diffusers_wadi._files import folder_written_beside, writable_folder, written_beside
from diffusers_wadi.analysis.comparison import is_vectors
from diffusers_wadi.analysis.sources import Where, open_models
from diffusers_wadi.analysis.weights import Convention, check_convention, recombine
from diffusers_wadi.conversion._weights import STEMS, Source, Weights, refuse_broken

__all__ = ["Taken", "swap_weights", "swapped_tensors"]

Taken = Literal["norm", "direction", "both"]
Model = Literal["base", "tuned"]
SHARD_BYTES = 5 * 10**8  # of weights held at a time


@torch.no_grad()
def swap_weights(
    base: Source,
    tuned: Source,
    output: str | os.PathLike,
    take: Taken = "direction",
    rest: Model | None = None,
    convention: Convention = "column",
    dtype: torch.dtype | None = None,
    base_model: Source | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
    **hub: Any,
) -> Path:
    """Write `base` with the norms or the directions of `tuned`'s weights, as a checkpoint of stock classes.

    If one of the two is, or belongs to, a pipeline, a complete pipeline is written with its other parts, `tuned`'s first;
    else the folder of a model. Weights come in shards of 0.5 GB, which bounds the memory.

    Args:
        base, tuned, base_model, subfolder, variant, progress, **hub: as in `analyze_weights`.
        output: folder to write, or a .safetensors file for the weights alone, which holds them in memory first.
        take: what comes from `tuned`: "direction" (default), "norm", or "both", which makes the weights `tuned`'s.
        rest: whose biases, norm layers and other tensors without vectors. Default None: `base`'s, with "both" `tuned`'s.
        convention: what the vectors are. Default "column": one per output unit, as in the paper.
        dtype: of the tensors; default None takes those of `base`.

    Returns:
        `output`.

    Raises:
        ValueError: a choice that does not exist, no folder with the config of the model, or as in `analyze_weights`.
        OSError: weights that cannot be found, or a folder that is not writable; found out before any work.
    """
    check_convention(convention)
    if take not in get_args(Taken) or rest not in (None, *get_args(Model)):
        raise ValueError(
            f"`take` is one of {', '.join(get_args(Taken))}, `rest` base or tuned, got {take!r}, {rest!r}"
        )
    output, where = Path(output), Where(subfolder, variant, hub)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"the folder {output} is not empty, and other weights in it would be in the way; choose another"
        )
    writable_folder(output.parent)
    first, (second,) = open_models(base, [tuned], base_model, where)
    frame = None if output.suffix == ".safetensors" else _frame((second, first), hub)
    tensors = swapped_tensors(first, second, take, rest, convention, dtype, progress)
    if frame is None:
        with written_beside(output) as temporary:
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
        return output
    with folder_written_beside(output) as staged:
        _copy_all_but_weights(*frame, staged)
        _write_shards(tensors, staged / frame[1])
    return output


def swapped_tensors(
    first: Weights,
    second: Weights,
    take: Taken = "direction",
    rest: Model | None = None,
    convention: Convention = "column",
    dtype: torch.dtype | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `swap_weights` writes, one at a time; its arguments."""
    rest = rest or ("tuned" if take == "both" else "base")
    for key in (progress or iter)(list(first.shapes)):
        before, after = first.read(key), second.read(key)
        refuse_broken(key, first.origin, before)
        refuse_broken(key, second.origin, after)
        if not is_vectors(key, first.shapes[key]):
            swapped = before if rest == "base" else after
        elif take == "both" or torch.equal(before, after):
            swapped = after
        elif take == "direction":
            swapped = recombine(before, after, convention)
        else:
            swapped = recombine(after, before, convention)
        wanted = before.dtype if dtype is None or not before.is_floating_point() else dtype
        yield key, swapped.to(wanted).contiguous()


def _frame(models: Iterable[Weights], hub: dict[str, Any]) -> tuple[Path, str]:
    """The folder of a pipeline with the component's name in it, or the folder of a model with ""."""
    models = list(models)
    for weights in models:
        if weights.pipeline is not None:
            local = Path(weights.pipeline).is_dir()
            folder = weights.pipeline if local else DiffusionPipeline.download(weights.pipeline, **hub)
            return Path(folder), weights.component or ""
    for weights in models:
        if weights.config is not None:
            return weights.config.parent, ""
    raise ValueError(
        f"neither {models[0].origin} nor {models[1].origin} has a config.json to make a model of the weights; pass the "
        "folder of a pipeline or model as one of the two, or an output that ends in .safetensors"
    )


def _copy_all_but_weights(folder: Path, component: str, target: Path) -> None:
    """Everything of a pipeline but the weights of `component`; of a model's folder its config."""
    if not component:
        shutil.copyfile(folder / "config.json", target / "config.json")
        return

    def weights_of_component(path: str, names: list[str]) -> list[str]:
        own = Path(path) == folder / component
        return [name for name in names if own and name.startswith(STEMS)]

    shutil.copytree(folder, target, ignore=weights_of_component, dirs_exist_ok=True)


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """The weights as diffusers and transformers name them: one file, or several and an index."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stem = STEMS[0] if "_class_name" in config else STEMS[1]
    shards: list[dict[str, int]] = []  # of each file on disk: its names and their bytes
    held: dict[str, Tensor] = {}

    def write() -> None:
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        held[name] = tensor
    write()
    if len(shards) == 1:
        os.replace(folder / "0.part", folder / f"{stem}.safetensors")
        return
    places = {}
    for i, shard in enumerate(shards):
        file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"{i}.part", folder / file)
        places |= dict.fromkeys(shard, file)
    total = sum(sum(shard.values()) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
