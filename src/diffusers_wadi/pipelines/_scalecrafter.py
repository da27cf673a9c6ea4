"""`enable_scalecrafter` and `disable_scalecrafter` as methods of the one-step pipelines, like `enable_freeu`."""

from __future__ import annotations

from typing import Any


class ScaleCrafterMixin:
    """The applications lie above the pipelines, so the one that the methods need is imported when they are called."""

    def enable_scalecrafter(self, height: int | None = None, width: int | None = None, **options: Any) -> None:
        r"""
        Draw images larger than the UNet was trained on, of `height` x `width` pixels, by wider convolutions and without
        training. `options` and errors: [`~diffusers_wadi.downstream.scalecrafter.enable_scalecrafter`].
        """
        from diffusers_wadi.downstream.scalecrafter import enable_scalecrafter

        enable_scalecrafter(self, height, width, **options)

    def disable_scalecrafter(self) -> None:
        r"""Undo `enable_scalecrafter`, to the bit."""
        from diffusers_wadi.downstream.scalecrafter import disable_scalecrafter

        disable_scalecrafter(self)
