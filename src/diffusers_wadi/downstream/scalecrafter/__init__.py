"""ScaleCrafter: images larger than a UNet was trained on, by wider convolutions and without training."""

from diffusers_wadi.downstream.scalecrafter._pipeline import (
    disable_scalecrafter,
    enable_scalecrafter,
    scalecrafter,
    scalecrafter_settings,
)
from diffusers_wadi.downstream.scalecrafter._presets import ScaleCrafterSettings, read_factors
from diffusers_wadi.downstream.scalecrafter._tiling import disable_synced_tiling, enable_synced_tiling

__all__ = [
    "ScaleCrafterSettings",
    "disable_scalecrafter",
    "disable_synced_tiling",
    "enable_scalecrafter",
    "enable_synced_tiling",
    "read_factors",
    "scalecrafter",
    "scalecrafter_settings",
]
