"""What turns a pipeline with adapters into a folder that stock diffusers loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


def without_adapters(unet: torch.nn.Module) -> torch.nn.Module:
    """The UNet as plain modules: itself if it has no adapters, else a copy with the active ones fused."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        return unet
    plain = copy.deepcopy(unet)
    for layer in (module for module in plain.modules() if isinstance(module, BaseTunerLayer)):
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge(safe_merge=True)
    plain.unload_lora()
    return plain


def default_to_float32(config: Path) -> None:
    """Loaded without a dtype, diffusers' models come as float32 but transformers' as their config says: make them agree."""
    if config.is_file():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
