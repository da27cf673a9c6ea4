"""Rotated weights that are kept between calls, for adapters that are not fused.

A layer turns its weight in every call. While weights, factors, scales and active adapters stay the same it would be the
same turned weight each time: a `RotationCache` keeps it, up to a limit of memory, and the call costs what that of a fused
adapter does, with the same numbers to the last bit. Every use first checks that nothing has changed (`watching`), which
takes microseconds on the host, reads no weight and never waits for the device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from diffusers_wadi.lorad.composition import _unwrapped
from diffusers_wadi.lorad.kept_rotations import DEFAULT_CACHE_MEMORY, KeptRotations, RotationCache, in_pipeline_call
from diffusers_wadi.lorad.layer import TurnedWeightLayer

__all__ = [
    "DEFAULT_CACHE_MEMORY",
    "RotationCache",
    "disable_lorad_cache",
    "enable_lorad_cache",
    "lorad_cache_in_call",
    "share_cache",
]


def enable_lorad_cache(model: nn.Module, max_memory: int | str = DEFAULT_CACHE_MEMORY) -> RotationCache:
    """Keep the turned weights of unfused LoRaD adapters between calls of this model, wherever no gradient is recorded.

    Outputs stay the same to the last bit, whatever is changed between the calls: weights, factors, scales, adapters. The
    setting holds for adapters that are added later, and until `disable_lorad_cache`. Embeddings and torch's own attention
    are turned in every call all the same.

    Args:
        model: with or without LoRaD adapters, such as `pipe.unet`.
        max_memory: for all layers together, in bytes or as "512MiB". Default 1 GiB. Other layers are turned in every
            call, see `RotationCache`.

    Returns:
        The cache, whose `nbytes` says what it holds. It needs no care.

    Raises:
        ValueError: a negative or unreadable `max_memory`.
    """
    return _configure(model, _in_bytes(max_memory), calls_only=False)


def disable_lorad_cache(model: nn.Module) -> None:
    """Turn the weights of unfused adapters in every call again, and free those that were kept."""
    for module in _unwrapped(model).modules():
        if isinstance(module, TurnedWeightLayer) and module.kept_rotations is not None:
            module.kept_rotations.forget(module)
    _configure(model, 0, calls_only=False)


@contextmanager
def lorad_cache_in_call(model: nn.Module) -> Iterator[None]:
    """What the one-step pipelines put around their calls: inside, `model` has a cache with the default limit.

    Not so where `enable_lorad_cache` or `disable_lorad_cache` has said otherwise, whose word holds.
    """
    if _cache_of(model) is None:
        _configure(model, DEFAULT_CACHE_MEMORY, calls_only=True, adopt=True)
    token = in_pipeline_call.set(True)
    try:
        yield
    finally:
        in_pipeline_call.reset(token)


def share_cache(model: nn.Module, layer: nn.Module) -> None:
    """Give a layer that was added to `model` the cache of its model, if there is one."""
    cache = _cache_of(model)
    if isinstance(layer, TurnedWeightLayer) and cache is not None:
        layer.kept_rotations = KeptRotations(cache)


# Beside the models instead of on them: a model that no longer has adapters is plain again, also for pickle.
_caches: WeakKeyDictionary[nn.Module, RotationCache] = WeakKeyDictionary()
_configuring = threading.Lock()


def _cache_of(model: nn.Module) -> RotationCache | None:
    return _caches.get(_unwrapped(model))


def _configure(model: nn.Module, max_memory: int, calls_only: bool, adopt: bool = False) -> RotationCache:
    """Set up the cache of a model and hand it to its layers; `adopt`: as it is, where a copied model has brought one."""
    model = _unwrapped(model)
    layers = [module for module in model.modules() if isinstance(module, TurnedWeightLayer)]
    with _configuring:
        cache = _caches.get(model)
        if cache is None:
            brought = next((layer.kept_rotations.cache for layer in layers if layer.kept_rotations is not None), None)
            cache = brought or RotationCache(max_memory, calls_only)
            adopt = adopt and brought is not None
        if not adopt:
            cache.max_memory, cache.calls_only = max_memory, calls_only
            cache.clear()
        for layer in layers:
            if layer.kept_rotations is None or layer.kept_rotations.cache is not cache:
                layer.kept_rotations = KeptRotations(cache)
        _caches[model] = cache
    return cache


def _in_bytes(size: int | str) -> int:
    if isinstance(size, str):
        from accelerate.utils import convert_file_size_to_int  # slow to import

        try:
            size = convert_file_size_to_int(size)
        except ValueError:
            raise ValueError(f"`max_memory` has to be bytes or a text such as '512MiB', got {size!r}.") from None
    if size < 0:
        raise ValueError(f"`max_memory` has to be 0 or more bytes, got {size}; `disable_lorad_cache` for none.")
    return int(size)
