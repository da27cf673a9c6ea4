"""LoRaD: low-rank rotation of weight direction, as an adapter for PEFT and diffusers."""

import peft  # noqa: F401  (first: importing PEFT may call back into this package to register LoRaD)

from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.layer import LoRaDLayer, LoRaDLinear
from diffusers_wadi.lorad.model import LoRaDModel
from diffusers_wadi.lorad.registration import register_lorad
from diffusers_wadi.lorad.rotation import lorad_angles, lorad_linear, rotate
from diffusers_wadi.lorad.targets import DEFAULT_RANKS, lorad_target_modules, trainable_parameter_count

__all__ = [
    "DEFAULT_RANKS",
    "LoRaDConfig",
    "LoRaDLayer",
    "LoRaDLinear",
    "LoRaDModel",
    "lorad_angles",
    "lorad_linear",
    "lorad_target_modules",
    "rotate",
    "trainable_parameter_count",
]

register_lorad()
