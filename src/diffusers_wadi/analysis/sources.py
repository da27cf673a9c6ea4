"""The two models to compare, opened without being read: checkpoints of any layout, and adapters on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers_wadi._files import find_file
from diffusers_wadi.analysis.adapters import apply_adapter, read_any_adapter
from diffusers_wadi.authors_files import read_authors_file
from diffusers_wadi.conversion._weights import (
    COMPONENTS,
    STEMS,
    Source,
    Weights,
    open_weights,
    refuse_other_architecture,
)

_ORIGINAL_UNET = "model.diffusion_model."
_FILES = (".safetensors", ".pth", ".pt")
_GONE = "caption_projection.y_embedding"  # a buffer of PixArt's that diffusers no longer has, in the authors' file


@dataclass(frozen=True)
class Where:
    """How to look for weights.

    Args:
        subfolder: folder inside every source; of a pipeline "unet" or "transformer" by default.
        variant: such as "fp16", of the files.
        hub: revision, token, cache_dir, local_files_only, force_download.
    """

    subfolder: str | None = None
    variant: str | None = None
    hub: dict[str, Any] = field(default_factory=dict)


def open_models(
    base: Source, tuned: Sequence[Source], base_model: Source | None, where: Where
) -> tuple[Weights, list[Weights]]:
    """Open a base and what was made of it.

    An adapter among `tuned` is put onto the checkpoint under it: `base_model` if given, else `base`, or, if that is an
    adapter itself, the checkpoint that it names.

    Raises:
        ValueError: two architectures (with the first tensor that differs), an adapter that does not fit or names no
            base, damaged files.
        OSError: weights that cannot be found.
    """
    base, tuned = _local(base, where), [_local(source, where) for source in tuned]
    adapter = _adapter(base, where)
    if adapter is not None:
        ground = base_model or adapter.base
        if ground is None:
            raise ValueError(f"the adapter {adapter.origin} names no base model; pass --base-model (base_model=)")
        ground = _checkpoint(_local(ground, where), where)
        first = apply_adapter(adapter, ground)
    else:
        first = _checkpoint(base, where)
        ground = first if base_model is None else _checkpoint(_local(base_model, where), where)
    others = []
    for source in tuned:
        adapter = _adapter(source, where)
        others.append(_checkpoint(source, where) if adapter is None else apply_adapter(adapter, ground))
        refuse_other_architecture(first, others[-1])
    return first, others


def _adapter(source: Source, where: Where) -> Any:
    if not isinstance(source, (str, os.PathLike)):
        return None
    return read_any_adapter(str(source), where.subfolder, where.hub)


def _local(source: Source, where: Where) -> Source:
    """ORG/NAME/file.safetensors of the Hub as a file here; anything else as it is."""
    if not isinstance(source, (str, os.PathLike)) or Path(source).exists() or Path(source).suffix not in _FILES:
        return source
    parts = Path(source).parts
    if Path(source).is_absolute() or len(parts) < 3:
        raise FileNotFoundError(f"there is no file {source}")
    path = find_file("/".join(parts[:2]), "/".join(parts[2:]), **where.hub)
    if path is None:
        raise FileNotFoundError(f"there is no file {source} here, nor {'/'.join(parts[2:])} in {'/'.join(parts[:2])}")
    return path


def _checkpoint(source: Source, where: Where) -> Weights:
    if isinstance(source, (str, os.PathLike)) and Path(source).is_file() and Path(source).suffix in (".pth", ".pt"):
        weights = replace(open_weights(read_authors_file(source), None, None), origin=str(source))
    else:
        subfolder = where.subfolder or _only_component(source)
        weights = open_weights(source, subfolder, where.variant, **where.hub)
    return _without_gone(_with_diffusers_names(weights))


def _only_component(source: Source) -> str | None:
    """The "unet" or "transformer" in a local folder that is neither a pipeline nor a model, as training leaves one."""
    if not isinstance(source, (str, os.PathLike)) or not Path(source).is_dir():
        return None
    own = [
        "model_index.json",
        *(f"{stem}.safetensors*" for stem in STEMS),
        *(f"{stem}.*.safetensors" for stem in STEMS),
    ]
    if any(next(Path(source).glob(pattern), None) for pattern in own):
        return None
    return next((name for name in COMPONENTS if Path(source, name).is_dir()), None)


def _with_diffusers_names(weights: Weights) -> Weights:
    """The UNet in a file of the original Stable Diffusion code, by the names that diffusers gives its tensors."""
    prefix = next((p for p in (_ORIGINAL_UNET, "") if f"{p}input_blocks.0.0.weight" in weights.shapes), None)
    if prefix is None:
        return weights
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    keys = {_ORIGINAL_UNET + key.removeprefix(prefix): key for key in weights.shapes if key.startswith(prefix)}
    levels = [int(key.split(".")[3]) for key in keys if key.endswith(".0.op.weight")]
    config = {"layers_per_block": min(levels) - 1 if levels else 2}
    if f"{_ORIGINAL_UNET}label_emb.0.0.weight" in keys:
        config["addition_embed_type"] = "text_time"
    names = convert_ldm_unet_checkpoint(keys, config)  # it only moves values, here the old names
    shapes = {name: weights.shapes[key] for name, key in names.items()}
    return replace(weights, shapes=shapes, read=lambda name: weights.read(names[name]))


def _without_gone(weights: Weights) -> Weights:
    return replace(weights, shapes={key: shape for key, shape in weights.shapes.items() if key != _GONE})
