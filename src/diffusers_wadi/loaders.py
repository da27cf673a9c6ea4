"""`LoRaDLoaderMixin`: LoRaD adapters for diffusers pipelines, from a folder, a file, the Hub or a state dict, and back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_wadi import _adapter_ops as ops
from diffusers_wadi._adapter_files import LORAD_WEIGHT_NAME
from diffusers_wadi._adapter_io import load_lorad_adapter, save_lorad_adapter
from diffusers_wadi._adapter_ops import lorad_adapter_names, lorad_layers
from diffusers_wadi._hub import UploadOptions, publish, refuse_local_base
from diffusers_wadi._offloading import offloading_paused
from diffusers_wadi.lorad.layer import LoRaDLayer
from diffusers_wadi.lorad.merging import outer_unmerged
from diffusers_wadi.model_card import CardDetails, adapter_card, with_sample_grid

__all__ = [
    "LoRaDLoaderMixin",
    "load_lorad_adapter",
    "lorad_adapter_names",
    "lorad_layers",
    "save_lorad_adapter",
]


class LoRaDLoaderMixin:
    """LoRaD adapters for any diffusers pipeline with a `unet` or a `transformer`; to be named before the pipeline class.

    The adapter methods of the pipeline (`set_adapters`, `get_active_adapters`, `get_list_adapters`, `disable_lora`,
    `enable_lora`, `delete_adapters`) act on LoRaD adapters too, and are here for pipelines that have none; the number
    in `set_adapters(names, weights)` scales the angle. All of this works while model, sequential or group offload is
    active.

        class MyPipeline(LoRaDLoaderMixin, StableDiffusionXLPipeline): ...
    """

    lorad_component: str | None = None  # default: "unet" if the pipeline has one, else "transformer"
    # True: adapters were taken out unfused, so what is left is the multi-step base; None: there never was one.
    _lorad_removed: bool | None = None

    def load_lorad_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        weight_name: str | None = None,
        adapter_name: str | None = None,
        subfolder: str | None = None,
        low_cpu_mem_usage: bool = True,
        hotswap: bool = False,
        **hub: Any,
    ) -> None:
        """Load an adapter from a folder, a file, the Hub or a state dict; it becomes the active one.

        Args:
            pretrained_model_name_or_path_or_dict: where it is.
            weight_name: file name, default "pytorch_lorad_weights.safetensors".
            adapter_name: default "default_0", "default_1", ...
            subfolder: folder inside the source.
            low_cpu_mem_usage: use the tensors of the file as they are. Default True.
            hotswap: replace the values of the adapter `adapter_name` in place, if it has these layers and no lower
                ranks. Default False.
            **hub: revision, token, cache_dir, local_files_only, force_download, proxies.

        Raises:
            ValueError, OSError: see `load_lorad_adapter`; the pipeline is then as before.
        """
        component, model = self._lorad_component(), self._lorad_model()
        if adapter_name is None:
            taken, number = ops.adapter_names(model), 0
            while f"default_{number}" in taken:
                number += 1
            adapter_name = f"default_{number}"
        source, how = pretrained_model_name_or_path_or_dict, (low_cpu_mem_usage, hotswap)
        load_lorad_adapter(model, source, adapter_name, component, weight_name, subfolder, *how, **hub)
        self._lorad_removed = False

    def save_lorad_weights(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str | None = None,
        weight_name: str = LORAD_WEIGHT_NAME,
        base_model_name_or_path: str | None = None,
        push_to_hub: bool = False,
        card: CardDetails | None = None,
        **upload: Any,
    ) -> None:
        """Write one adapter as a folder (see `save_lorad_adapter`); without a name there must be exactly one.

        Args:
            save_directory: where to write.
            adapter_name: which adapter.
            weight_name: file name of the weights.
            base_model_name_or_path: default is where the pipeline was loaded from; a local folder is stored as its
                absolute path, which means nothing on another machine: pass a Hub name before sharing the adapter.
            push_to_hub: upload what was written, with a model card. Default False.
            card: what the card is to say; see `CardDetails`.
            **upload: repo_id (default: the name of the folder), commit_message, private, token, create_pr,
                subfolder.

        Raises:
            ValueError: no such adapter, or a local base to be pushed.
            OSError: the folder cannot be written to, or the Hub refuses.
        """
        options = UploadOptions.of(upload)
        model, names = self._lorad_model(), lorad_adapter_names(self._lorad_model())
        if adapter_name is None:
            if len(names) != 1:
                raise ValueError(f"adapter_name is needed to save one of the LoRaD adapters {names}")
            adapter_name = names[0]
        base = base_model_name_or_path or self.config.get("_name_or_path")
        if base_model_name_or_path is None and base and Path(base).is_dir():
            base = str(Path(base).resolve())
        if push_to_hub:
            refuse_local_base(base)
        path = save_lorad_adapter(model, save_directory, adapter_name, self._lorad_component(), base, weight_name)
        more = self._save_beside_adapter(path.parent)
        if push_to_hub:
            card = with_sample_grid(self, card)
            config, kind = model.peft_config[adapter_name], (type(self).__name__, hasattr(self, "is_one_step"))
            text = adapter_card(options.name(path.parent), config, base, weight_name, card, *kind)
            publish(path.parent, [path.name, "adapter_config.json", *more], options, text, card)

    def _save_beside_adapter(self, folder: Path) -> list[str]:
        """Write what else an adapter of this pipeline needs; returns the files, relative to `folder`."""
        return []

    def push_lorad_to_hub(self, repo_id: str, adapter_name: str | None = None, **options: Any) -> None:
        """Upload one adapter with a generated model card; `options` are those of `save_lorad_weights`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_lorad_weights(folder, adapter_name, push_to_hub=True, repo_id=repo_id, **options)

    def set_adapters(self, adapter_names: Sequence[str] | str, adapter_weights: Any = None) -> None:
        """Make these adapters the active ones; a LoRaD adapter's weight is a factor on its angles (default 1).

        Raises:
            ValueError: an unknown name, or not as many weights as names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._refuse_unknown(names)
        if hasattr(super(), "set_adapters"):
            super().set_adapters(names, adapter_weights)
            return
        weights = adapter_weights if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} adapters {names}, but {len(weights)} weights; pass one weight for each")
        ops.set_adapters(self._lorad_model(), names, [1.0 if weight is None else weight for weight in weights])

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters that are active."""
        stock = super().get_active_adapters() if hasattr(super(), "get_active_adapters") else []
        model = self._present_model()
        return stock or ([] if model is None else ops.active_adapters(model))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> the names of its adapters, of any kind."""
        found = super().get_list_adapters() if hasattr(super(), "get_list_adapters") else {}
        names = ops.adapter_names(self._present_model())
        return found | ({self._lorad_component(): names} if names else {})

    def disable_lora(self) -> None:
        """Switch all adapters off, LoRaD's too: the pipeline is its base model."""
        if hasattr(super(), "disable_lora"):
            super().disable_lora()
        else:
            ops.enable_adapters(self._lorad_model(), False)

    def enable_lora(self) -> None:
        """Switch the active adapters on again."""
        if hasattr(super(), "enable_lora"):
            super().enable_lora()
        else:
            ops.enable_adapters(self._lorad_model(), True)

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Remove adapters, of any kind.

        Raises:
            ValueError: an unknown name, or a LoRaD adapter that is fused; nothing is removed then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._refuse_unknown(names)
        model = self._present_model()
        fused = {name for layer in self._lorad_layers() for name in layer.merged_adapters} & set(names)
        if fused:
            raise ValueError(
                f"{sorted(fused)} are fused into the weights; call unfuse_lorad() first, or unload_lorad_weights() to "
                "keep them there"
            )
        if set(lorad_adapter_names(model)) <= set(names):
            self._note_removal()
        with offloading_paused(self._models()):
            if hasattr(super(), "delete_adapters"):
                super().delete_adapters(names)
                names = []
            if model is not None:
                ops.delete_adapters(model, names)

    def fuse_lorad(
        self, lorad_scale: float = 1.0, adapter_names: list[str] | None = None, safe_fusing: bool = False
    ) -> None:
        """Write the rotation into the weights: same images, no cost per call, and ready for `torch.compile`.

        Args:
            lorad_scale: factor on the angles that this call fuses.
            adapter_names: which adapters; default None takes the active ones.
            safe_fusing: check that the new weights are finite before they replace the old ones.

        Raises:
            ValueError: unknown names, or `safe_fusing` found a layer that will not do; nothing is fused then.
        """
        model = self._lorad_model()
        unknown = set(adapter_names or ()) - set(lorad_adapter_names(model))
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no LoRaD adapters; {lorad_adapter_names(model)} are")
        fused: list[tuple[LoRaDLayer, list[str]]] = []
        with offloading_paused([model]), outer_unmerged(model):
            try:
                for layer in lorad_layers(model):
                    before = list(layer.merged_adapters)
                    layer.merge(safe_merge=safe_fusing, adapter_names=adapter_names, scale=lorad_scale)
                    fused.append((layer, [name for name in layer.merged_adapters if name not in before]))
            except Exception:
                for layer, names in fused:
                    if names:
                        layer.unmerge(names)
                raise
        self._note_fused()

    def unfuse_lorad(self) -> None:
        """Undo every `fuse_lorad`: the adapters act again as before, with the scales they had."""
        model = self._lorad_model()
        with offloading_paused([model]), outer_unmerged(model):
            for layer in lorad_layers(model):
                if layer.merged:
                    layer.unmerge()
        self._note_fused()

    def unload_lorad_weights(self) -> None:
        """Take all LoRaD adapters out. What was fused stays in the weights, what was not is gone."""
        model, names = self._lorad_model(), lorad_adapter_names(self._lorad_model())
        if not names:
            return
        self._note_removal()
        with offloading_paused([model]):
            if len(names) == len(model.peft_config):
                ops.unload_adapters(model)
            else:
                for layer in lorad_layers(model):
                    layer.keep_merged()
                ops.delete_adapters(model, names)
        self._note_fused()

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method, which takes LoRaD adapters out too; fused ones stay in the weights."""
        self._note_removal()
        with offloading_paused(self._models()):
            super().unload_lora_weights(*args, **kwargs)

    def _note_removal(self) -> None:
        layers = self._lorad_layers()
        if layers:
            self._lorad_removed = not any(layer.merged for layer in layers)

    def _note_fused(self) -> None:
        """Keep what stock `fused_loras` and `num_fused_loras` say true, for adapters of all kinds."""
        if hasattr(self, "_merged_adapters"):
            layers = [layer for model in self._models() for layer in ops.tuner_layers(model)]
            self._merged_adapters = {name for layer in layers for name in layer.merged_adapters}

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        known = {name for names in self.get_list_adapters().values() for name in names}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"Adapter name(s) {unknown} not in the list of present adapters: {sorted(known)}.")

    def _lorad_component(self) -> str:
        return next((name for name, _ in self._denoisers()), self.lorad_component or "unet")

    def _lorad_model(self) -> torch.nn.Module:
        model = self._present_model()
        if model is None:
            lacks = f"no {self.lorad_component}" if self.lorad_component else "neither a unet nor a transformer"
            raise ValueError(
                f"this {type(self).__name__} has {lacks} to adapt; build it with one, or name the component in "
                "lorad_component"
            )
        return model

    def _present_model(self) -> torch.nn.Module | None:
        """The model that takes LoRaD adapters, or None in a pipeline of other parts (the text encoder alone, say)."""
        return next((model for _, model in self._denoisers()), None)

    def _denoisers(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for name in [self.lorad_component] if self.lorad_component else ["unet", "transformer"]:
            if isinstance(model := getattr(self, name, None), torch.nn.Module):
                yield name, model

    def _lorad_layers(self) -> list[LoRaDLayer]:
        model = self._present_model()
        return [] if model is None else list(lorad_layers(model))

    def _models(self) -> list[torch.nn.Module]:
        return [model for model in self.components.values() if isinstance(model, torch.nn.Module)]
