"""ScaleCrafter on a pipeline: what users call."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils import logging
from torch import nn

from diffusers_wadi.downstream.scalecrafter._convolutions import spread, wideable
from diffusers_wadi.downstream.scalecrafter._presets import (
    PRESET_NATIVE,
    PRESETS,
    RULE,
    ScaleCrafterSettings,
    check_factors,
    preset_settings,
    rule_settings,
    strengthened,
)
from diffusers_wadi.downstream.scalecrafter._state import WHY_NOT_AT_ONE_STEP, State, attach, detach, unwrapped

WIDTHS = {768: "sd15", 1024: "sd21"}  # of the text embeddings
_logger = logging.get_logger(__name__)


def enable_scalecrafter(
    pipe: Any,
    height: int | None = None,
    width: int | None = None,
    *,
    strength: float = 1.0,
    factors: dict[str, float] | None = None,
    preset: str | None = None,
    dispersed: bool | tuple[str, ...] = False,
    noise_damped: bool = False,
    weak_factors: dict[str, float] | None = None,
    until: float | None = None,
) -> None:
    r"""
    Let a UNet pipeline draw larger images than it was trained on, without training: its 3x3 convolutions get a wider
    field (ScaleCrafter). Works on any pipeline with a `unet`, stock ones included; call the pipeline with the same
    `height` and `width` afterwards. Enabling again replaces what was enabled.

    Args:
        pipe (`DiffusionPipeline`):
            The pipeline. Others that share its UNet (`from_pipe`) are affected too.
        height, width (`int`, *optional*):
            Size to draw, in pixels. They choose the factors; may be left out where `factors` are given.
        strength (`float`, *optional*, defaults to 1.0):
            Scales what the preset or the rule says: a factor s becomes 1 + strength (s - 1). One-step models may want
            less than 1, since no undilated steps follow that would mend the texture.
        factors (`dict[str, float]`, *optional*):
            Layer, or block around layers -> how many times wider its field becomes, at least 1, fractions too:
            `{"mid_block": 2.0, "up_blocks.0.resnets": 1.5}`. They go before those of the preset, and are not scaled.
        preset (`str`, *optional*):
            "sd15" or "sd21" for ScaleCrafter's own settings, "rule" for those extrapolated from them. By default the
            former where they exist for this UNet and size, else the latter, with a warning.
        dispersed (`bool` or `tuple[str, ...]`, *optional*, defaults to `False`):
            Also disperse kernels (3x3 to 5x5) in these layers or, with `True`, in those of the preset.
        noise_damped (`bool`, *optional*, defaults to `False`):
            Noise-damped guidance, for several steps with guidance only: the unconditional prediction comes from a
            second pass with weaker factors.
        weak_factors (`dict[str, float]`, *optional*):
            Those weaker factors, if not the preset's.
        until (`float`, *optional*):
            Share of a multi-step schedule, from its noisy end, in which this holds; by default the preset's. One step is
            always inside.

    Raises:
        ValueError: the pipeline has no UNet (PixArt), the size is not a multiple of the latent's pixels, the preset does
            not have it, an unknown layer, a factor below 1, noise-damped guidance on a one-step model, and dispersed
            kernels where a LoRaD of the same convolution is not fused.
    """
    options = {"strength": strength, "factors": factors, "preset": preset, "dispersed": dispersed, "until": until}
    state = _planned(pipe, height, width, **options, noise_damped=noise_damped, weak_factors=weak_factors)
    detach(_unet_of(pipe))
    if state.factors:
        attach(_unet_of(pipe), state)
    else:
        what = "with these factors" if state.size is None else f"at {width}x{height}"
        _logger.warning(f"ScaleCrafter has nothing to widen {what}, so it stays off.")


def disable_scalecrafter(pipe: Any) -> None:
    r"""Undo `enable_scalecrafter`, to the bit. Nothing happens where it is not enabled."""
    detach(_unet_of(pipe))


@contextmanager
def scalecrafter(pipe: Any, height: int | None = None, width: int | None = None, **options: Any) -> Iterator[None]:
    r"""
    `enable_scalecrafter(pipe, height, width, **options)` inside the block and no ScaleCrafter after it, also when it is
    left by an exception.
    """
    enable_scalecrafter(pipe, height, width, **options)
    try:
        yield
    finally:
        disable_scalecrafter(pipe)


def scalecrafter_settings(pipe: Any, height: int, width: int, preset: str | None = None) -> ScaleCrafterSettings:
    r"""
    The settings that `enable_scalecrafter` takes for this size, in pixels, before `strength` and `factors`. What comes
    from the rule is told by a warning.

    Raises:
        ValueError: no UNet, a size that the pipeline cannot draw, or not in the preset.
    """
    unet = _unet_of(pipe)
    _latent_size(pipe, height, width)
    native = (unet.config.sample_size or 0) * pipe.vae_scale_factor
    if preset is None:
        text = unet.config.cross_attention_dim
        name = WIDTHS.get(text) if isinstance(text, int) else None
        known = name if native == PRESET_NATIVE and len(unet.config.block_out_channels) == 4 else None
        preset = known if known and (height, width) in PRESETS[known] else RULE
    if preset != RULE:
        return preset_settings(preset, height, width)
    if not native:
        raise ValueError(
            "the UNet's config has no sample_size, so nothing is known of the size that it was trained at; give preset= or factors="
        )
    settings = rule_settings(native, len(unet.config.block_out_channels), height, width)
    if settings.factors:
        _logger.warning(
            f"ScaleCrafter has no settings for this model at {width}x{height}; its factors are extrapolated from those "
            f"for other sizes: {settings.factors}. Try strength= and factors=."
        )
    return settings


def _unet_of(pipe: Any) -> nn.Module:
    unet = getattr(pipe, "unet", None)
    if unet is None:
        what = "a transformer, which has none" if getattr(pipe, "transformer", None) is not None else "none"
        raise ValueError(
            f"ScaleCrafter widens the 3x3 convolutions of a UNet, and {type(pipe).__name__} has {what}. Use a Stable "
            "Diffusion pipeline, or the sizes that this one was trained on."
        )
    return unwrapped(unet)


def _latent_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int] | None:
    if height is None and width is None:
        return None
    unit = pipe.vae_scale_factor
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < unit or value % unit:
            near = f"; {max(unit, round(value / unit) * unit)} would do" if isinstance(value, (int, float)) else ""
            raise ValueError(f"{name} has to be a multiple of {unit} pixels, but is {value!r}{near}")
    return height // unit, width // unit


def _planned(
    pipe: Any,
    height: int | None,
    width: int | None,
    strength: float,
    factors: dict[str, float] | None,
    preset: str | None,
    dispersed: bool | tuple[str, ...],
    noise_damped: bool,
    weak_factors: dict[str, float] | None,
    until: float | None,
) -> State:
    """Everything that can be wrong with the arguments of `enable_scalecrafter` is found here."""
    names = list(wideable(_unet_of(pipe)))
    size = _latent_size(pipe, height, width)
    if size is None and factors is None:
        raise ValueError("enable_scalecrafter needs the height and width to draw, in pixels, or factors= of your own")
    settings = scalecrafter_settings(pipe, height, width, preset) if size else ScaleCrafterSettings({})
    chosen = _factors(names, settings.factors, factors, strength)
    return State(
        factors=chosen,
        dispersed=_dispersed(names, settings, dispersed, chosen) if chosen else frozenset(),
        weak_factors=_weak_factors(pipe, names, settings, weak_factors, strength) if noise_damped else {},
        until=_checked_until(settings.until if until is None else until),
        progressive=settings.progressive,
        size=size,
        pipeline=weakref.ref(pipe),
    )


def _factors(names: list[str], base: dict, own: dict | None, strength: float) -> dict[str, float]:
    """By layer, without those of 1."""
    if not strength >= 0:
        raise ValueError(f"strength has to be at least 0, but is {strength!r}; 1 takes the factors as they are")
    check_factors(own or {})
    layers = spread(names, strengthened(base, strength)) | spread(names, own or {})
    return {name: factor for name, factor in layers.items() if factor > 1}


def _weak_factors(
    pipe: Any, names: list[str], settings: ScaleCrafterSettings, own: dict[str, float] | None, strength: float
) -> dict[str, float]:
    if getattr(pipe, "is_one_step", False):
        raise ValueError(f"noise_damped=True on a one-step model: {WHY_NOT_AT_ONE_STEP}")
    if own is None and not settings.weak_factors:
        raise ValueError("noise_damped=True needs height and width of a larger image, or weak_factors=")
    return _factors(names, {}, own, 1.0) if own is not None else _factors(names, settings.weak_factors, None, strength)


def _dispersed(
    names: list[str], settings: ScaleCrafterSettings, asked: bool | tuple[str, ...], factors: dict[str, float]
) -> frozenset[str]:
    if isinstance(asked, str):
        asked = (asked,)
    wanted = (settings.dispersed if asked else ()) if isinstance(asked, bool) else tuple(asked)
    if asked and not wanted:
        raise ValueError("dispersed=True needs height and width of a larger image; or name the layers")
    layers = spread(names, dict.fromkeys(wanted, 1.0))
    if lacking := [name for name in layers if name not in factors]:
        raise ValueError(
            f"dispersed={asked!r}: {', '.join(lacking)} would not be widened; give it a factor above 1 with factors=, or "
            "name other layers"
        )
    return frozenset(layers)


def _checked_until(until: float) -> float:
    if not 0 < until <= 1:
        raise ValueError(f"until is a share of the steps, above 0 and at most 1, but is {until!r}")
    return until
