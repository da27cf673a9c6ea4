"""What each button does: checks the request, draws, and gives files with captions. Nothing here knows gradio."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image, ImageOps

from diffusers_wadi._optional import require
from diffusers_wadi.demo.engine import Drawing, Engine
from diffusers_wadi.demo.outputs import Outputs
from diffusers_wadi.demo.settings import DemoSettings

LARGEST_SEED = 2**53 - 1  # beyond it a browser rounds numbers
PATH = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
AS_IT_IS = "none: the image is the condition"
ALL_LAYERS = "all layers"
Gallery = list[tuple[str, str]]  # (path of a PNG, caption)


class Requests:
    """The requests of the page, each (values of its fields) -> (what is shown). All raise ValueError with a remedy for
    what the user can put right, before anything is drawn."""

    def __init__(self, engine: Engine, settings: DemoSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.outputs = Outputs()

    def generate(self, prompt: str, seed: float, count: float) -> tuple[Gallery, str]:
        """Images in one step, of seeds that count up."""
        prompt, seed = self._prompt(prompt), _whole("the seed", seed, 0, LARGEST_SEED)
        count = _whole("the number of images", count, 1, self.settings.max_images)
        drawings = self.engine.draw(prompt, seed, count)
        each = drawings[0].seconds
        together = "" if count == 1 else f" · {count} in {_time(count * each)}"
        return self._gallery(drawings, _seed_caption), f"**{_time(each)}** per image{together} · one step"

    def at_strength(self, prompt: str, seed: float, strength: float) -> tuple[Gallery, str]:
        """One image with this factor on the adapter's angles."""
        prompt, seed = self._prompt(prompt), _whole("the seed", seed, 0, LARGEST_SEED)
        drawings = self.engine.draw_at(prompt, seed, [_real("the strength", strength, 0, 2)])
        return self._gallery(drawings, _strength_caption), f"**{_time(drawings[0].seconds)}** per image · one step"

    def strength_path(self, prompt: str, seed: float) -> Gallery:
        """One image for each of `PATH`, from the teacher's weights to beyond the student's."""
        prompt, seed = self._prompt(prompt), _whole("the seed", seed, 0, LARGEST_SEED)
        return self._gallery(self.engine.draw_at(prompt, seed, PATH), _strength_caption)

    def condition(self, drawn: Any, detector: str) -> str:
        """What the detector sees in what was drawn or uploaded."""
        image = self._condition(drawn, detector)
        return self.outputs.write(image, {"detector": detector})

    def control(self, prompt: str, seed: float, drawn: Any, detector: str, scale: float) -> tuple[str, Gallery, str]:
        """The condition, and one image without and one with the ControlNet."""
        prompt, seed = self._prompt(prompt), _whole("the seed", seed, 0, LARGEST_SEED)
        scale = _real("the scale", scale, 0, 2)
        condition = self._condition(drawn, detector)
        drawings = self.engine.draw_controlled(prompt, seed, condition, scale, detector)
        names = ("without", f"scale {scale:g}")
        shown = self._gallery(drawings, lambda drawing, i: f"{names[i]} · {_time(drawing.seconds)}")
        return self.outputs.write(condition, {"detector": detector}), shown, _times(drawings, names)

    def high_resolution(
        self, prompt: str, seed: float, times: float, strength: float, finest: float
    ) -> tuple[Gallery, str]:
        """One image larger than the model was trained on, without and with ScaleCrafter."""
        prompt, seed = self._prompt(prompt), _whole("the seed", seed, 0, LARGEST_SEED)
        side = self._large_side(_real("the size", times, 1, self.largest / self.engine.side))
        strength, finest = _real("the strength", strength, 0, 2), _real("the finest level", finest, 1, 4)
        drawings = self.engine.draw_larger(prompt, seed, side, strength, finest)
        names = ("plain", "ScaleCrafter")
        shown = self._gallery(drawings, lambda drawing, i: f"{names[i]} · {_time(drawing.seconds)}")
        return shown, f"{_times(drawings, names)} · {side}x{side}, trained at {self.engine.side}x{self.engine.side}"

    def compare(self, prompt: str, seed: float, steps: float, guidance: float) -> tuple[Gallery, str]:
        """The teacher in several steps beside the student in one, of the same noise."""
        prompt, seed = self._prompt(prompt), _whole("the seed", seed, 0, LARGEST_SEED)
        steps = _whole("the number of steps", steps, 1, self.settings.max_steps)
        drawings = self.engine.draw_by_both(prompt, seed, steps, _real("the guidance", guidance, 1, 20))
        counts = (f"{steps} step{'s' * (steps > 1)}", "1 step")
        shown = self._gallery(drawings, lambda drawing, i: f"{counts[i]} · {_time(drawing.seconds)}")
        ratio = drawings[0].seconds / drawings[1].seconds
        return (
            shown,
            f"{_times(drawings, [f'teacher, {counts[0]}', 'student, 1 step'])} · **{ratio:.1f} times** as fast",
        )

    def inspect(self, group: str) -> tuple[str, str, str]:
        """A figure of every layer's change of norm and direction, a summary, and a table of the layers changed most.

        Args:
            group: a kind of layer, or `ALL_LAYERS`.

        Raises:
            ValueError: nothing to compare with, or no such layers.
            ImportError: matplotlib is missing.
        """
        require("matplotlib", "demo")
        from diffusers_wadi.analysis import plot_layers

        analysis = self.engine.analysis()
        if group != ALL_LAYERS:
            layers = [layer for layer in analysis.layers if layer.group == group]
            if not layers:
                groups = ", ".join(found.name for found in analysis.groups())
                raise ValueError(f"there are no layers of kind {group!r}; choose one of {ALL_LAYERS}, {groups}")
            analysis = replace(analysis, layers=layers, others=[])
        path = self.outputs.new_path("layers")
        plot_layers(analysis).savefig(path, dpi=150)
        return str(path), analysis.summary(), analysis.layer_table(12)

    @property
    def largest(self) -> int:
        """Pixels of the largest side that may be asked for."""
        return self.settings.max_size or 4 * self.engine.side

    def detectors(self) -> list[str]:
        """What turns a picture into a condition; without controlnet_aux only the picture itself."""
        from diffusers_wadi.downstream.controlnet import detector_names

        with warnings.catch_warnings():  # of which controlnet_aux has a page when it is imported
            warnings.simplefilter("ignore")
            try:
                return [AS_IT_IS, *detector_names()]
            except ImportError:
                return [AS_IT_IS]

    def _prompt(self, prompt: Any) -> str:
        prompt = " ".join(str(prompt or "").split())
        if not prompt:
            raise ValueError("there is no prompt: say what to draw")
        if len(prompt) > self.settings.max_prompt:
            raise ValueError(
                f"the prompt has {len(prompt)} characters, and at most {self.settings.max_prompt} are taken; shorten it"
            )
        return prompt

    def _condition(self, drawn: Any, detector: str) -> Image.Image:
        picture = _picture(drawn)
        names = self.detectors()
        if detector not in names:
            raise ValueError(f"there is no detector {detector!r} here; choose one of {', '.join(names)}")
        from diffusers_wadi.downstream.controlnet import condition_image

        size = (self.engine.side, self.engine.side)
        # Cut rather than squeezed to a square, so that shapes keep their proportions.
        picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        return condition_image(picture, None if detector == AS_IT_IS else detector, size=size)

    def _large_side(self, times: float) -> int:
        unit = 16 if self.engine.side <= 256 else 64  # of latents that every level of the UNet can halve
        return max(unit, round(times * self.engine.side / unit) * unit)

    def _gallery(self, drawings: Sequence[Drawing], caption: Any) -> Gallery:
        return [(self.outputs.write(d.image, d.notes), caption(d, i)) for i, d in enumerate(drawings)]


def _picture(drawn: Any) -> Image.Image:
    """What the drawing board holds, on black where nothing is, so that white lines are lines."""
    image = drawn.get("composite") or drawn.get("background") if isinstance(drawn, dict) else drawn
    if image is None:
        raise ValueError("there is no picture: draw one, or upload it")
    image = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")


def _whole(what: str, value: Any, low: int, high: int) -> int:
    number = _real(what, value, low, high)
    if number != int(number):
        raise ValueError(f"{what} is {value!r}; expected a whole number")
    return int(value)


def _real(what: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is {value!r}; expected a number") from error
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{what} is {value!r}; expected {low} to {high}")
    return number


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _times(drawings: Sequence[Drawing], names: Sequence[str]) -> str:
    return " · ".join(f"{name} **{_time(drawing.seconds)}**" for name, drawing in zip(names, drawings))


def _seed_caption(drawing: Drawing, _: int) -> str:
    return f"seed {drawing.notes['seed']}"


def _strength_caption(drawing: Drawing, _: int) -> str:
    strength = float(drawing.notes["strength"])
    names = {0.0: " · teacher", 1.0: " · student"}
    return f"{strength:g}{names.get(strength, '')}"
