"""LoRaD: low-rank rotation of weight direction, as an adapter for PEFT and diffusers."""

import peft  # noqa: F401  (first: importing PEFT may call back into this package to register LoRaD)

from diffusers_wadi.lorad.caching import RotationCache, disable_lorad_cache, enable_lorad_cache
from diffusers_wadi.lorad.composition import add_weighted_adapter, hotswap_lorad_adapter
from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.conv import LoRaDConv1d, LoRaDConv2d, LoRaDConv3d, lorad_conv
from diffusers_wadi.lorad.embedding import LoRaDEmbedding, LoRaDTransposedLinear
from diffusers_wadi.lorad.layer import LoRaDLayer, LoRaDLinear
from diffusers_wadi.lorad.mixed_batch import mixed_adapter_batch
from diffusers_wadi.lorad.model import LoRaDModel
from diffusers_wadi.lorad.multihead_attention import LoRaDMultiheadAttention
from diffusers_wadi.lorad.registration import register_lorad
from diffusers_wadi.lorad.rotation import (
    get_rotation_backend,
    lorad_angles,
    lorad_linear,
    rotate,
    rotate_weight,
    rotation_backend,
    set_rotation_backend,
    turn_weight,
    turned_rows,
)
from diffusers_wadi.lorad.targets import DEFAULT_RANKS, lorad_target_modules, trainable_parameter_count

__all__ = [
    "DEFAULT_RANKS",
    "LoRaDConfig",
    "LoRaDConv1d",
    "LoRaDConv2d",
    "LoRaDConv3d",
    "LoRaDEmbedding",
    "LoRaDLayer",
    "LoRaDLinear",
    "LoRaDModel",
    "LoRaDMultiheadAttention",
    "LoRaDTransposedLinear",
    "RotationCache",
    "add_weighted_adapter",
    "disable_lorad_cache",
    "enable_lorad_cache",
    "get_rotation_backend",
    "hotswap_lorad_adapter",
    "lorad_angles",
    "lorad_conv",
    "lorad_linear",
    "lorad_target_modules",
    "mixed_adapter_batch",
    "rotate",
    "rotate_weight",
    "rotation_backend",
    "set_rotation_backend",
    "trainable_parameter_count",
    "turn_weight",
    "turned_rows",
]

register_lorad()
