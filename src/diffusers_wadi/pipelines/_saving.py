"""What turns a pipeline with adapters into a folder that stock diffusers loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_wadi.lorad.layer import LoRaDLayer

UPLOAD_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "token")


def without_adapters(unet: torch.nn.Module) -> torch.nn.Module:
    """The UNet as plain modules: itself if it has no adapters, else a copy with the active ones fused."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        return unet
    plain = copy.deepcopy(unet)
    layers = [module for module in plain.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:  # from the outside in, as a call would
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
    # LoRaD first: it turns the base weight alone, and what a LoRA adds must not be turned with it.
    for layer in sorted(layers, key=lambda layer: not isinstance(layer, LoRaDLayer)):
        if not layer.disable_adapters and not layer.merged:
            layer.merge(safe_merge=True)
    plain.unload_lora()
    return plain


def upload(folder: Path, files: Sequence[str], options: Mapping[str, Any]) -> None:
    """Put these files of a folder into a Hub repository, which is created if need be and named after the folder."""
    import huggingface_hub

    token = options.get("token")
    repository = huggingface_hub.create_repo(
        options.get("repo_id") or folder.resolve().name, private=options.get("private"), token=token, exist_ok=True
    )
    huggingface_hub.upload_folder(
        repo_id=repository.repo_id,
        folder_path=folder,
        allow_patterns=list(files),
        commit_message=options.get("commit_message"),
        create_pr=options.get("create_pr", False),
        token=token,
    )


def default_to_float32(config: Path) -> None:
    """Loaded without a dtype, diffusers' models come as float32 but transformers' as their config says: make them agree."""
    if config.is_file():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
