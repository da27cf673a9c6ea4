"""Whether a pipeline's weights are all there: diffusers and transformers only log what a file lacks or has too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

DENOISERS = ("unet", "transformer")
# Component -> stem of its weight files.
STEMS = dict.fromkeys((*DENOISERS, "vae", "controlnet"), "diffusion_pytorch_model") | {"text_encoder": "model"}
# Names in old files, which the libraries translate as they load, and T5's second name for one table.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
RENAMED["encoder.embed_tokens."] = "shared."
KNOWN_ENCODERS = ("CLIPText", "T5Encoder")


def refuse_incomplete(pipe: Any, options: dict[str, Any]) -> None:
    """Refuse a pipeline of which a model was not filled from its files, or of which the denoiser's files hold more.

    Args:
        pipe: as loaded.
        options: of `from_pretrained`; the components given there are left alone.

    Raises:
        OSError: with the first tensor and their number.
    """
    for name in STEMS:
        model = getattr(pipe, name, None)
        if isinstance(model, torch.nn.Module) and options.get(name) is None:
            for part in getattr(model, "nets", [model]):  # of several ControlNets each lies in a folder of its own
                _refuse(name, part, options)


def _refuse(name: str, model: torch.nn.Module, options: dict[str, Any]) -> None:
    folder = Path(getattr(model.config, "_name_or_path", None) or "(unknown)")
    stored = _stored_names(folder, STEMS[name], options) if _has_usual_names(name, model) else None
    # With a device map tensors may be on the disk, and stand for that on the meta device.
    empty = [] if getattr(model, "hf_device_map", None) else [n for n, p in model.named_parameters() if p.is_meta]
    own = {_usual(key) for key in _own_names(model)}
    missing = sorted(set(map(_usual, empty)) | (set() if stored is None else own - stored))
    surplus = sorted((stored or set()) - own) if name in DENOISERS else []
    if not missing and not surplus:
        return
    problems = [f"it lacks {len(missing)} tensors, first {missing[0]}"] if missing else []
    problems += [f"{len(surplus)} of its tensors have no place there, first {surplus[0]}"] if surplus else []
    raise OSError(
        f"the file in {folder} does not hold this {type(model).__name__}: {'; '.join(problems)}. "
        f"{_remedy(name, surplus, folder / f'{STEMS[name]}.safetensors')}"
    )


def _own_names(model: torch.nn.Module) -> set[str]:
    """Of the tensors that the model's own file should hold; adapters, which transformers loads with it, have theirs."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}
    inner = tuple(f"{name}.{part}." for name, layer in layers.items() for part, _ in layer.named_children())
    names = set()
    for key in model.state_dict():
        if ".base_layer." in key or not key.startswith(inner):
            names.add(key.replace(".base_layer.", "."))
    return names


def _remedy(name: str, surplus: list[str], file: Path) -> str:
    if any(key.endswith((".theta_a", ".theta_b")) for key in surplus):
        cls = {"unet": "WaDiPipeline", "transformer": "WaDiPixArtPipeline"}[name]
        call = f"{cls}.from_pretrained({str(file)!r})"
        return f"These are training weights of the authors' release; {call} reads them as an adapter."
    return "Copy, download or save the pipeline again; weights and config.json must be of one model."


def _has_usual_names(name: str, model: torch.nn.Module) -> bool:
    # Quantised files hold further tensors per weight, and other text encoders other names than their models.
    quantised = getattr(model, "hf_quantizer", None) is not None
    return not quantised and (name != "text_encoder" or type(model).__name__.startswith(KNOWN_ENCODERS))


def _stored_names(folder: Path, stem: str, options: dict[str, Any]) -> set[str] | None:
    """The tensor names in the safetensors file or files that were loaded, None where that was another format."""
    if options.get("use_safetensors") is False:
        return None
    variant = options.get("variant")
    for tag in (f".{variant}", "") if variant else ("",):
        index, file = folder / f"{stem}.safetensors.index{tag}.json", folder / f"{stem}{tag}.safetensors"
        if index.is_file():
            return set(map(_usual, json.loads(index.read_text(encoding="utf-8"))["weight_map"]))
        if file.is_file():
            with safe_open(file, framework="pt") as tensors:
                return set(map(_usual, tensors.keys()))
    return None


def _usual(key: str) -> str:
    for old, new in RENAMED.items():
        key = key.replace(old, new)
    return key.removeprefix("text_model.")
