"""What hangs on a UNet while ScaleCrafter is enabled, and what happens around each of its calls."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import logging
from torch import Tensor, nn

from diffusers_wadi.downstream.scalecrafter._convolutions import (
    base_of,
    is_widened,
    mark_hooked,
    remove_hooks,
    restore,
    wideable,
    widen,
)

STATE = "_scalecrafter"  # on the UNet
WHY_NOT_AT_ONE_STEP = (
    "noise-damped guidance takes the unconditional prediction from a less dilated pass, and a one-step generator has "
    "none: its guidance is part of the weights and it never saw an empty prompt. Leave noise_damped=False, or use the "
    "multi-step model (pipe.disable_lora()) with guidance_scale > 1."
)
_logger = logging.get_logger(__name__)


@dataclass
class State:
    """Factors are by layer. `size`: of the latents, in latent pixels; None where none was given."""

    factors: dict[str, float]
    dispersed: frozenset[str]
    weak_factors: dict[str, float]
    until: float
    progressive: bool
    size: tuple[int, int] | None
    pipeline: weakref.ref
    applied: dict[str, float] = field(default_factory=dict)
    in_weak_pass: bool = False
    warned: set[tuple[int, ...]] = field(default_factory=set)


def attach(unet: nn.Module, state: State) -> None:
    """Widen the layers of `state` from now on."""
    detach(unet)
    setattr(unet, STATE, state)
    try:
        _apply(unet, state.factors)
    except BaseException:
        detach(unet)
        raise
    unet.register_forward_pre_hook(_before, with_kwargs=True)
    if state.weak_factors:
        unet.register_forward_hook(_damp_noise, with_kwargs=True)


def detach(unet: nn.Module) -> None:
    """Undo `attach`; nothing happens where there is nothing to undo."""
    remove_hooks(unet, (_before, _damp_noise))
    unet.__dict__.pop(STATE, None)
    restore(unet)


def _apply(unet: nn.Module, factors: dict[str, float]) -> None:
    """Make `factors` those that the layers have now."""
    state: State = getattr(unet, STATE)
    if state.applied == factors:
        return
    restore(unet)
    layers = wideable(unet)
    for name, factor in factors.items():
        widen(layers[name], factor, name in state.dispersed)
    mark_hooked(base_of(unet.conv_in))  # for `_before`
    state.applied = factors


def _before(unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    state: State = getattr(unet, STATE)
    if state.in_weak_pass:
        return
    # Inside a compiled graph the layers cannot be exchanged, and what is fixed needs no looking after.
    if torch.compiler.is_compiling() and not _changing(state) and not state.weak_factors:
        return
    _look_after(unet, args, kwargs)


@torch.compiler.disable
def _look_after(unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    state: State = getattr(unet, STATE)
    _refuse_stale(unet, state)
    _warn_of_other_size(state, args[0] if args else kwargs["sample"])
    if state.weak_factors:
        _check_steps(unet, state)
    if _changing(state):
        _apply(unet, _factors_at(state, float(torch.as_tensor(_timestep(args, kwargs)).flatten()[0])))


def _timestep(args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs["timestep"]


def _changing(state: State) -> bool:
    """Whether the factors depend on the step."""
    return state.until < 1 or state.progressive


def _factors_at(state: State, t: float, steps: int = 1000) -> dict[str, float]:
    """ScaleCrafter counts steps; t says the same for evenly spaced ones, and needs no knowledge of the scheduler.

    It is within `until` where t >= steps (1 - until): for 50 steps from t = 981 on and until = 0.6 the first 30.
    Factors that fall are whole, but never above the one that they start from, so that one step has just that one.
    """
    if t < round(steps * (1 - state.until), 6):
        return {}
    if not state.progressive:
        return state.factors
    left = max(0.0, 1 - (1 - (t + 1) / steps) / state.until)
    return {name: min(s, float(max(math.ceil(round(s * left, 6)), 2))) for name, s in state.factors.items()}


def _refuse_stale(unet: nn.Module, state: State) -> None:
    if not all(is_widened(unet.get_submodule(name)) for name in state.applied):
        raise RuntimeError(
            "an adapter was loaded or removed on a convolution that ScaleCrafter had widened; call enable_scalecrafter "
            "again"
        )


def _warn_of_other_size(state: State, sample: Tensor) -> None:
    size = tuple(sample.shape[-2:])
    if state.size is not None and size != state.size and size not in state.warned:
        state.warned.add(size)
        _logger.warning(
            f"ScaleCrafter is enabled for latents of {state.size[0]}x{state.size[1]} (height x width), and this call has "
            f"{size[0]}x{size[1]}. Pass that height and width to the pipeline too, or call enable_scalecrafter anew."
        )


def _pipeline_of(unet: nn.Module, state: State) -> Any:
    pipeline = state.pipeline()
    if pipeline is None or unwrapped(pipeline.unet) is not unet:
        raise RuntimeError(
            "noise-damped guidance was enabled on another pipeline, whose UNet this is no longer or a copy of; call "
            "enable_scalecrafter on the pipeline in use"
        )
    return pipeline


def _check_steps(unet: nn.Module, state: State) -> None:
    if len(_pipeline_of(unet, state).scheduler.timesteps) == 1:
        raise ValueError(f"noise_damped=True at one step: {WHY_NOT_AT_ONE_STEP}")


@torch.compiler.disable
def _damp_noise(unet: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Noise-damped guidance: weak(uncond) + w (wide(cond) - wide(uncond)) for whatever w the pipeline uses.

    The pipeline computes u + w (c - u) from the output (u, c), so it is given u = weak(uncond) and
    c = weak(uncond) + wide(cond) - wide(uncond). Without guidance (w <= 1) the batch is not doubled and nothing changes.
    """
    state: State = getattr(unet, STATE)
    if state.in_weak_pass or not state.applied or not _pipeline_of(unet, state).do_classifier_free_guidance:
        return None
    batch = output[0].shape[0]
    now = state.applied
    weak = {name: min(factor, now.get(name, 1.0)) for name, factor in state.weak_factors.items()}
    state.in_weak_pass = True
    try:
        _apply(unet, weak)
        damped = unet(*_first_half(args, batch), **_first_half(kwargs, batch))[0]
    finally:
        state.in_weak_pass = False
        _apply(unet, now)
    unconditional, conditional = output[0].chunk(2)
    noise = torch.cat([damped, damped + conditional - unconditional])
    return (noise, *output[1:]) if isinstance(output, tuple) else UNet2DConditionOutput(sample=noise)


def _first_half(value: Any, batch: int) -> Any:
    """Arguments for the unconditional half of a doubled batch."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
        return value[: batch // 2]
    if isinstance(value, (tuple, list)):
        return type(value)(_first_half(item, batch) for item in value)
    if isinstance(value, dict):
        return {key: _first_half(item, batch) for key, item in value.items()}
    return value


def unwrapped(unet: nn.Module) -> nn.Module:
    """The UNet itself where `torch.compile` has wrapped it."""
    return getattr(unet, "_orig_mod", unet)
