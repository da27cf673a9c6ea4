"""What turns a pipeline with adapters into a folder, or a Hub repository, that stock diffusers loads."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_wadi._adapter_ops import unload_adapters
from diffusers_wadi._files import folder_written_beside
from diffusers_wadi._hub import UploadOptions, publish
from diffusers_wadi._offloading import offloading_paused
from diffusers_wadi.lorad.attention_conversion import fuse_lorad_attn_processors
from diffusers_wadi.lorad.attention_processor import LoRaDAttnProcessor
from diffusers_wadi.lorad.layer import LoRaDLayer
from diffusers_wadi.model_card import CardDetails, pipeline_card, with_sample_grid


class OneStepCheckpointMixin:
    """Saves a one-step pipeline with adapters as stock classes, on the disk or on the Hub."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        card: CardDetails | None = None,
        **kwargs: Any,
    ) -> None:
        r"""
        Save a complete checkpoint of stock classes, which `DiffusionPipeline.from_pretrained` and the like load
        without this package. Active adapters are fused in the saved copy of the UNet or transformer; this pipeline is
        not changed. Nothing half-written replaces an older file.

        The folder gives the pixels of this pipeline with fused adapters: bit for bit in float32. In float16 and
        bfloat16 stock diffusers takes the one scheduler step in half precision, which this class does not.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write, created if need be.
            safe_serialization (`bool`, *optional*, defaults to `True`): Write safetensors.
            push_to_hub (`bool`, *optional*, defaults to `False`): Upload the files that were saved, with a generated
                model card, which does not replace a card that a person wrote.
            card (`CardDetails`, *optional*): What the card is to say of training, data, licence and samples.
            **kwargs: As in [`DiffusionPipeline.save_pretrained`]: `variant`, `max_shard_size`, and for the upload
                `repo_id` (default: the name of the folder), `commit_message`, `private`, `token`, `create_pr`, `subfolder`.

        Raises:
            OSError: the folder is not writable (found out before any work), or the Hub refuses.
        """
        self._save(save_directory, safe_serialization, push_to_hub, card, kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        card: CardDetails | None = None,
    ) -> str:
        r"""
        Upload a complete checkpoint of stock classes, see `save_pretrained`, with a generated model card. Arguments as in
        [`DiffusionPipeline.push_to_hub`], and `card` (`CardDetails`, *optional*).

        Returns:
            `str`: URL of the commit, or of the pull request.
        """
        names = [field.name for field in fields(UploadOptions)]
        given = {name: value for name, value in locals().items() if name in names}
        with tempfile.TemporaryDirectory() as folder:
            return self._save(folder, safe_serialization, True, card, given | {"variant": variant})

    def _save(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool,
        push: bool,
        card: CardDetails | None,
        kwargs: dict[str, Any],
    ) -> str:
        target = Path(save_directory)
        names = [field.name for field in fields(UploadOptions)]
        upload = UploadOptions(**{name: kwargs.pop(name) for name in names if name in kwargs})
        models = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        with folder_written_beside(target) as staged, offloading_paused(models):
            denoiser = getattr(self, self.lorad_component)
            parts = self.components | {self.lorad_component: without_adapters(denoiser)}
            parts["scheduler"] = self._scheduler_to_save()
            stock = self.stock_class(**parts, **self._settings_to_save())
            stock.save_pretrained(str(staged), safe_serialization=safe_serialization, **kwargs)
            default_to_float32(staged / "text_encoder" / "config.json")
            files = [file.relative_to(staged).as_posix() for file in staged.rglob("*") if file.is_file()]
        if not push:
            return ""
        # Not by diffusers, which would upload before the dtype is set.
        details = with_sample_grid(self, card)
        configs = getattr(denoiser, "peft_config", None) or {}
        ranks = {name: configs[name].r for name in self.get_active_adapters() if hasattr(configs.get(name), "r")}
        base = self.config.get("_name_or_path")
        base = None if base is None or Path(base).exists() else base
        text = pipeline_card(upload.name(target), base, ranks, details, type(self).__name__)
        return publish(target, files, upload, text, details)

    def _settings_to_save(self) -> dict[str, Any]:
        """What the stock class takes beside the components, as `requires_safety_checker`."""
        names = self._get_signature_keys(self.stock_class)[1]
        return {name: self.config[name] for name in names if name in self.config and name not in self.components}


def without_adapters(model: torch.nn.Module | None) -> torch.nn.Module | None:
    """The model as plain modules: itself if it has no adapters, else a copy with the active ones fused."""
    if model is None or not has_adapters(model):
        return model
    plain = copy.deepcopy(model)
    fuse_adapters(plain)
    return plain


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether there are adapters of any kind in it, acting or not."""
    return any(isinstance(part, BaseTunerLayer | LoRaDAttnProcessor) for part in model.modules())


def fuse_adapters(model: torch.nn.Module) -> None:
    """Write the active adapters into the weights and put plain modules in the places of all adapted ones."""
    fuse_lorad_attn_processors(model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:  # from the outside in, as a call would
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
    # LoRaD first: it turns the base weight alone, and what a LoRA adds must not be turned with it.
    for layer in sorted(layers, key=lambda layer: not isinstance(layer, LoRaDLayer)):
        if not layer.disable_adapters and not layer.merged:
            layer.merge(safe_merge=True)
    if layers:
        unload_adapters(model)


def default_to_float32(config: Path) -> None:
    """Loaded without a dtype, diffusers' models come as float32 but transformers' as their config says: make them agree."""
    if config.is_file():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
