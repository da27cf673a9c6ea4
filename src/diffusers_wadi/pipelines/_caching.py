"""`enable_lorad_cache` and `disable_lorad_cache` as methods of the one-step pipelines, where the cache is on by default."""

from __future__ import annotations

from diffusers_wadi.lorad.caching import DEFAULT_CACHE_MEMORY, disable_lorad_cache, enable_lorad_cache


class LoRaDCacheMixin:
    """The setting belongs to the denoiser: pipelines that share it (`from_pipe`) share its cache too."""

    def enable_lorad_cache(self, max_memory: int | str = DEFAULT_CACHE_MEMORY) -> None:
        r"""
        Keep the turned weights of unfused LoRaD adapters between calls, so that a call costs what that of a fused
        adapter does, with the same pixels. In this pipeline's calls that is the default, with the default limit; this
        method sets another one, and also serves direct calls of the denoiser without gradients.

        Args:
            max_memory (`int` or `str`, *optional*, defaults to 1 GiB):
                For all layers together, in bytes or as `"512MiB"`. Layers beyond it are turned in every call. SD 1.5's
                student takes 0.54 GB in half precision.

        Raises:
            ValueError: a negative or unreadable `max_memory`, or there is no denoiser.
        """
        enable_lorad_cache(self._lorad_model(), max_memory)

    def disable_lorad_cache(self) -> None:
        r"""Turn the weights of unfused adapters in every call again, and free those that were kept."""
        disable_lorad_cache(self._lorad_model())
