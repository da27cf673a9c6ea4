"""From a LoRaD adapter to attention processors and back, and from processors into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffusers_wadi.lorad.attention_processor import (
    PROJECTIONS,
    LoRaDAttnProcessor,
    LoRaDProjection,
    base_of,
    free_base,
    refuse_unfit,
)
from diffusers_wadi.lorad.layer import LoRaDLayer
from diffusers_wadi.lorad.quantization import is_quantized
from diffusers_wadi.lorad.rotation import lorad_angles, rotate

__all__ = ["attn_processors_from_lorad", "fuse_lorad_attn_processors", "lorad_state_dict_from_attn_processors"]

logger = logging.get_logger(__name__)

_SUFFIX = ".processor"
# Those that compute what the stock processor computes, so that LoRaD may stand in for them.
_REPLACEABLE = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"}

Factors = dict[str, tuple[Tensor, Tensor]]  # projection or module path -> A (out, r), B (r, in/2)


def attn_processors_from_lorad(
    model: nn.Module, adapter: str | Mapping[str, Tensor] = "default", strict: bool = True
) -> dict[str, nn.Module | Any]:
    """The processors that act as a LoRaD adapter does, for `model.set_attn_processor`.

    The factors are copies. Switch the adapter off or take it out before the processors are set (`disable_adapters()`,
    `unload_lora()`): a layer is turned by one of the two. Attentions that the adapter does not touch keep the
    processors they have.

    Args:
        model: a diffusers model with attention processors.
        adapter: name of an adapter in the model, or a state dict with native keys (`<module path>.lorad_A`, with or
            without the name of the component in front), as a saved file holds it. Default "default".
        strict: refuse an adapter that also covers layers which processors cannot carry. Default True; False leaves
            those layers out, with a warning.

    Returns:
        Processor by name, as in `model.attn_processors`.

    Raises:
        ValueError: no such adapter, one that is fused, layers besides the four (the message names the first), factors
            that do not fit, or an attention whose own processor computes something else. The model is not changed.
    """
    factors, others, scales = _read(model, adapter)
    attentions = {name.removesuffix(_SUFFIX): processor for name, processor in model.attn_processors.items()}
    chosen: dict[str, Factors] = {}
    for path, pair in factors.items():
        home, projection = next(((path[: -len(p) - 1], p) for p in PROJECTIONS if path.endswith(f".{p}")), ("", ""))
        if home in attentions:
            chosen.setdefault(home, {})[projection] = pair
        else:
            others.append(path)
    _report_others(sorted(others), len(factors), strict)
    if not chosen:
        raise ValueError(f"the adapter touches none of {PROJECTIONS} of the {len(attentions)} attentions")
    problems = [text for home, pairs in chosen.items() for text in _misfits(model, home, pairs, attentions[home])]
    if problems:
        raise ValueError(
            f"the adapter does not fit the attentions of this {type(model).__name__}: {len(problems)} of {len(factors)} "
            f"layers differ, first {problems[0]}"
        )
    made = {home: _processor(model.get_submodule(home), home, pairs, scales) for home, pairs in chosen.items()}
    return {home + _SUFFIX: made.get(home, processor) for home, processor in attentions.items()}


def lorad_state_dict_from_attn_processors(
    model: nn.Module | Mapping[str, Any], component: str | None = None
) -> dict[str, Tensor]:
    """The factors in LoRaD processors under the keys of native adapters, `<module path>.lorad_A` and `.lorad_B`.

    `load_lorad_adapter` takes it as it is, and as a safetensors file. A `scale` other than 1 is multiplied into `A`,
    since files hold none.

    Args:
        model: a model with LoRaD processors, or processors by name.
        component: name of the model in its pipeline ("unet") to put in front of the keys, as in saved files. Default
            None.

    Raises:
        ValueError: there is no LoRaD processor.
    """
    processors = model if isinstance(model, Mapping) else model.attn_processors
    prefix, state = f"{component}." if component else "", {}
    for name, processor in processors.items():
        if not isinstance(processor, LoRaDAttnProcessor):
            continue
        for projection, layer in processor.projections.items():
            path = f"{prefix}{name.removesuffix(_SUFFIX)}.{projection}"
            A, B = layer.A.detach().clone(), layer.B.detach().clone()
            state[f"{path}.lorad_A"] = A if processor.scale == 1.0 else A * processor.scale
            state[f"{path}.lorad_B"] = B
    if not state:
        kinds = sorted({type(processor).__name__ for processor in processors.values()})
        raise ValueError(f"no LoRaDAttnProcessor among the {len(processors)} processors, which are {', '.join(kinds)}")
    return state


@torch.no_grad()
def fuse_lorad_attn_processors(model: nn.Module) -> None:
    """Turn the weights themselves by the angles in the LoRaD processors, and put stock processors in their places.

    For good: nothing is kept to undo it. Does nothing where there is no LoRaD processor.

    Raises:
        ValueError: a quantised or offloaded weight, factors that are not finite, or a LoRaD adapter of the tuner that
            acts on the same layer. The model is then as before.
    """
    found = {
        name.removesuffix(_SUFFIX): processor
        for name, processor in getattr(model, "attn_processors", {}).items()
        if isinstance(processor, LoRaDAttnProcessor)
    }
    turns = []
    for home, processor in found.items():
        for name, factors in processor.projections.items():
            layer = model.get_submodule(f"{home}.{name}")
            _refuse_unfusable(layer, factors, f"{home}.{name}")
            turns.append((layer, factors, processor.scale))
    for layer, factors, scale in turns:
        _turn_weight(layer, lorad_angles(factors.A, factors.B, scale))
    for home in found:
        attn = model.get_submodule(home)
        attn.set_processor(AttnProcessor2_0() if attn.scale_qk else AttnProcessor())


def _refuse_unfusable(layer: nn.Module, factors: LoRaDProjection, path: str) -> None:
    free_base(layer, path)
    base = base_of(layer)
    if is_quantized(base) or base.weight.is_meta or factors.A.is_meta:
        raise ValueError(f"{path}: its weight is quantised or offloaded and cannot be turned in place")
    if problem := _misfit(base, factors.A, factors.B):
        raise ValueError(f"{path}: {problem}")


def _turn_weight(layer: nn.Module, theta: Tensor) -> None:
    # What a fused LoRA has added is not the base's, and must not be turned with it.
    chain = [m for m in layer.modules() if isinstance(m, BaseTunerLayer)]
    merged = [(m, list(m.merged_adapters)) for m in chain if m.merged and not isinstance(m, LoRaDLayer)]
    for adapter, _ in merged:
        adapter.unmerge()
    weight = base_of(layer).weight
    weight.copy_(rotate(weight, theta.to(weight.device)))
    for adapter, names in reversed(merged):
        adapter.merge(adapter_names=names)


def _read(model: nn.Module, adapter: str | Mapping[str, Tensor]) -> tuple[Factors, list[str], dict[str, float]]:
    """The factors of an adapter by module path, what else it trains, and the factor on the angles by module path."""
    if not hasattr(model, "attn_processors"):
        raise ValueError(f"{type(model).__name__} has no attention processors")
    if isinstance(adapter, Mapping):
        return *_read_state(model, adapter), {}
    layers = {
        ".".join(part for part in name.split(".") if part != "base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, LoRaDLayer) and adapter in module.lorad_A
    }
    if not layers:
        raise ValueError(f"no LoRaD adapter {adapter!r}; the model has {sorted(getattr(model, 'peft_config', {}))}")
    fused = [name for name, layer in layers.items() if adapter in layer.merged_adapters]
    if fused:
        raise ValueError(f"{len(fused)} layers are fused, first {fused[0]}; unfuse them first, or both would act")
    config = model.peft_config[adapter]
    others = [f"{name} (modules_to_save)" for name in config.modules_to_save or ()]
    others += [f"biases ({config.bias})"] if config.bias != "none" else []
    factors = {name: (layer.lorad_A[adapter], layer.lorad_B[adapter]) for name, layer in layers.items()}
    return factors, others, {name: layer.scaling[adapter] for name, layer in layers.items()}


def _read_state(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[Factors, list[str]]:
    first = next(iter(state), "")
    children = {name for name, _ in model.named_children()}
    prefix = first.split(".")[0] + "."
    if prefix[:-1] not in children and all(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    paths = {key[: -len(".lorad_A")] for key in state if key.endswith((".lorad_A", ".lorad_B"))}
    lonely = sorted(path for path in paths if not {f"{path}.lorad_A", f"{path}.lorad_B"} <= state.keys())
    if not paths or lonely:
        what = f"only one of lorad_A and lorad_B for {len(lonely)} modules, first {lonely[0]}" if lonely else "none"
        raise ValueError(f"expected keys ending in .lorad_A and .lorad_B, found {what}; the first key is {first!r}")
    others = [key for key in state if not key.endswith((".lorad_A", ".lorad_B"))]
    return {path: (state[f"{path}.lorad_A"], state[f"{path}.lorad_B"]) for path in paths}, others


def _report_others(others: list[str], count: int, strict: bool) -> None:
    if not others:
        return
    text = (
        f"attention processors carry {', '.join(PROJECTIONS)} only, and this adapter of {count} layers covers "
        f"{len(others)} besides: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
    )
    if strict:
        raise ValueError(f"{text}. Keep the adapter, or pass strict=False to leave these layers out.")
    logger.warning(f"{text}. These are left out, so the processors are not the whole adapter.")


def _misfits(model: nn.Module, home: str, pairs: Factors, processor: Any) -> list[str]:
    """What is wrong with the factors for one attention."""
    attn, kind = model.get_submodule(home), type(processor).__name__
    if kind not in _REPLACEABLE and not isinstance(processor, LoRaDAttnProcessor):
        return [f"{home} has a {kind}, in whose place LoRaDAttnProcessor would compute something else"]
    try:
        refuse_unfit(attn)
    except ValueError as error:
        return [f"{home}: {error}"]
    found = [(f"{home}.{name}", base_of(attn.get_submodule(name)), *pair) for name, pair in pairs.items()]
    return [f"{path}: {problem}" for path, layer, a, b in found if (problem := _misfit(layer, a, b))]


def _misfit(layer: nn.Linear, a: Tensor, b: Tensor) -> str | None:
    shape = layer.out_features, layer.in_features  # not the weight's, which quantisation may pack
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not a.is_floating_point():
        return f"lorad_A {tuple(a.shape)} and lorad_B {tuple(b.shape)} are not (out, r) and (r, in/2)"
    if (a.shape[0], 2 * b.shape[1]) != shape:
        return f"factors for (out, in) = {(a.shape[0], 2 * b.shape[1])}, the model has {shape}"
    if a.is_meta or b.is_meta:
        return "its factors are offloaded; switch the offload off first"
    return None if torch.isfinite(a).all() and torch.isfinite(b).all() else "values that are not finite"


@torch.no_grad()
def _processor(attn: Attention, home: str, pairs: Factors, scales: Mapping[str, float]) -> LoRaDAttnProcessor:
    own = {name: scales.get(f"{home}.{name}", 1.0) for name in pairs}
    scale = own[next(iter(own))] if len(set(own.values())) == 1 else 1.0
    processor = LoRaDAttnProcessor.from_attention(attn, {name: a.shape[1] for name, (a, _) in pairs.items()}, scale)
    for name, (a, b) in pairs.items():
        layer, device = processor.projections[name], base_of(attn.get_submodule(name)).weight.device
        device = "cpu" if device.type == "meta" else device  # an offloaded base
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        layer.A.data = (a if scale == own[name] else a * own[name]).to(device, dtype, copy=True)
        layer.B.data = b.to(device, dtype, copy=True)
    return processor
