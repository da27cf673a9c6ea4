"""LoRaD on a model: finds the layers, wraps them, and leaves the model as it was when something does not fit."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from diffusers_wadi.lorad.base_layers import check_base_layer
from diffusers_wadi.lorad.caching import share_cache
from diffusers_wadi.lorad.composition import add_weighted_adapter
from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.conv import LoRaDConv1d, LoRaDConv2d, LoRaDConv3d
from diffusers_wadi.lorad.embedding import LoRaDEmbedding, LoRaDTransposedLinear
from diffusers_wadi.lorad.layer import LoRaDLayer, LoRaDLinear
from diffusers_wadi.lorad.mixed_batch import mixed_adapter_batch
from diffusers_wadi.lorad.multihead_attention import LoRaDMultiheadAttention
from diffusers_wadi.lorad.targets import adaptable_linears, lorad_target_modules

try:
    from peft.utils.error import NoMatchingPeftModuleError
except ImportError:  # PEFT before 0.20 raises a plain ValueError
    NoMatchingPeftModuleError = ValueError

__all__ = ["LoRaDModel"]

# The LoRaD layer for each kind of base layer.
_LAYERS = {
    nn.Linear: LoRaDLinear,
    nn.Conv1d: LoRaDConv1d,
    nn.Conv2d: LoRaDConv2d,
    nn.Conv3d: LoRaDConv3d,
    Conv1D: LoRaDTransposedLinear,
    nn.Embedding: LoRaDEmbedding,
    nn.MultiheadAttention: LoRaDMultiheadAttention,
}

# PEFT's word for an adapter that is meant to match nothing at first.
_DUMMY_TARGETS = "dummy-target-modules"


class LoRaDModel(BaseTuner):
    """The tuner behind `get_peft_model`, `inject_adapter_in_model` and diffusers' `add_adapter`.

    Args:
        model: the model to adapt; its layers are replaced in place.
        peft_config: a `LoRaDConfig`, or a dictionary of them by adapter name.
        adapter_name: name of the adapter.
        options: `low_cpu_mem_usage`, `state_dict`: as in PEFT.

    Raises:
        ValueError: no layer matches, or a matched layer cannot be adapted. The model is left as it was.
    """

    prefix = "lorad_"
    tuner_layer_cls = LoRaDLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(
        self, model: nn.Module, peft_config: LoRaDConfig | dict[str, LoRaDConfig], adapter_name: str, **options: Any
    ) -> None:
        known = set(getattr(model, "peft_config", None) or {})
        try:
            super().__init__(model, peft_config, adapter_name, **options)
        except Exception:
            _forget_failed_adapter(model, known)
            raise

    def _prepare_adapter_config(self, peft_config: LoRaDConfig, model_config: dict) -> LoRaDConfig:
        """Without target_modules: PEFT's usual layers of a transformers model, the paper's of a diffusion backbone."""
        if peft_config.target_modules is None:
            usual = self.target_module_mapping.get(model_config.get("model_type"))
            usual = self._paper_targets() if usual is None else usual
            peft_config.target_modules = usual if isinstance(usual, str) else set(usual)
        return peft_config

    def _paper_targets(self) -> list[str]:
        try:
            return lorad_target_modules(self.model)
        except ValueError as error:
            raise ValueError(f"Please specify `target_modules` in `peft_config`. {error}") from None

    def _prepare_model(self, peft_config: LoRaDConfig, model: nn.Module) -> None:
        """PEFT calls this before it touches the first layer: the moment to look at all of them."""
        if peft_config.target_modules == _DUMMY_TARGETS:
            return
        matched = _without_uncalled(model, self._matched_modules(peft_config, model))
        for name, module in matched.items():
            check_base_layer(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, name)
        narrowed = peft_config.exclude_modules or peft_config.modules_to_save or peft_config.layers_to_transform
        if not matched and not narrowed:  # PEFT's own message is the better one where these took the layers away
            raise NoMatchingPeftModuleError(_no_match_message(peft_config, model))

    def _matched_modules(self, peft_config: LoRaDConfig, model: nn.Module) -> dict[str, nn.Module]:
        """What the config matches, by PEFT's rules, leaving out the inside of layers that are adapted already."""
        if peft_config.target_modules == "all-linear":
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = {name for name, _ in adaptable_linears(model)}
        inside, matched = (), {}
        for name, module in model.named_modules():
            if not name or (inside and name.startswith(inside)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (name + ".",)
            if self._check_target_module_exists(peft_config, name):
                matched[name] = module
        return matched

    def _create_and_replace(
        self,
        peft_config: LoRaDConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            return  # see `_without_uncalled`
        pattern = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        r = peft_config.rank_pattern.get(pattern, peft_config.r)
        existing = _lorad_layer_within(target)
        if existing is not None:
            existing.update_layer(adapter_name, r, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer_cls = next(layer for kind, layer in _LAYERS.items() if isinstance(base, kind))
        new_module = layer_cls(target, adapter_name, r, peft_config)
        share_cache(self.model, new_module)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading: the base is complete, and PEFT would give it a weight and bias that some do not have
            setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's `autocast_adapter_dtype`: True keeps the factors in float32, False takes the dtype of the base."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, LoRaDLayer) and layer.weight.is_floating_point():
                layer.cast_adapter(adapter_name, layer.weight.dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this around every forward pass: `adapter_names` names an adapter for every sample."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        beams = kwargs.get("num_beams") or 1  # beam search repeats every sample
        with mixed_adapter_batch(self, [name for name in adapter_names for _ in range(beams)]):
            yield

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat", **svd: Any
    ) -> None:
        """See `diffusers_wadi.lorad.add_weighted_adapter`."""
        add_weighted_adapter(self.model, adapters, weights, adapter_name, combination_type, **svd)


def _lorad_layer_within(module: nn.Module | None) -> LoRaDLayer | None:
    """The LoRaD layer that `module` is, or that another adapter has wrapped."""
    while module is not None and not isinstance(module, LoRaDLayer):
        module = getattr(module, "base_layer", None)
    return module


def _without_uncalled(model: nn.Module, matched: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Leave out the output projections of torch's own attentions: nobody calls them, so an adapter would not act."""
    uncalled = [name for name in matched if isinstance(_parent(model, name), nn.MultiheadAttention)]
    if uncalled:
        warnings.warn(
            f"{len(uncalled)} of the target modules are left alone, first `{uncalled[0]}`: an nn.MultiheadAttention "
            f"reads their weights without calling them. To adapt it, name `{uncalled[0].rpartition('.')[0]}` itself.",
            stacklevel=2,
        )
    return {name: module for name, module in matched.items() if name not in uncalled}


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _no_match_message(peft_config: LoRaDConfig, model: nn.Module) -> str:
    names = [name for name, _ in adaptable_linears(model)]
    wanted = peft_config.target_modules
    wanted = repr(wanted) if isinstance(wanted, str) else sorted(wanted)
    return (
        f"Target modules {wanted} not found in the base model. It is a {type(model).__name__} with {len(names)} Linear "
        f"layers, such as {', '.join(names[:3]) or '(none)'}. Pass full names, their last parts, a regular expression "
        'over full names, or "all-linear" as `target_modules`.'
    )


def _forget_failed_adapter(model: nn.Module, known: set[str]) -> None:
    """Take back what PEFT and diffusers note about an adapter before they try to inject it."""
    configs = getattr(model, "peft_config", None) or {}
    for name in set(configs) - known:
        del configs[name]
    if not known and getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
