"""One pipeline for all requests: what it draws, in batches or alone, and always left as it was found."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.utils import logging

from diffusers_wadi.demo.settings import DemoSettings
from diffusers_wadi.demo.zero_gpu import default_device
from diffusers_wadi.downstream.scalecrafter import scalecrafter
from diffusers_wadi.pipelines import WaDiControlNetPipeline, WaDiPipeline, one_step_pipeline_class
from diffusers_wadi.serving import ImageBatcher
from diffusers_wadi.shapes import bundled_checkpoint

SMALL = 50_000_000  # parameters of a denoiser that draws and is measured without a noticeable wait on any machine


@dataclass(frozen=True)
class Drawing:
    """An image, the seconds that it took (its share of a batch), and how it was made, as text."""

    image: Any
    seconds: float
    notes: dict[str, str]


class Engine:
    """Draws with one one-step model, from any number of threads.

    One thread draws for all (see `ImageBatcher`), in the order of arrival: plain images of all who wait together, and
    what switches an adapter, scale or convolution alone, from the switch to its undoing. So no request sees the state of
    another one, and after each the pipeline is bit for bit what it was. What is only to be fast is drawn with a copy of
    the denoiser that has the rotations merged; text encoder and VAE are shared.

    On ZeroGPU every request runs in a process of its own, forked from this one, so that only its own images make a batch.

    Args:
        pipe: one-step pipeline; one with a ControlNet serves both with and without it.
        name: of the model, for the page and the notes in the images.
        controlnet: a ControlNet of the same family. Default None.
        controlnet_name: of it, for the notes.
        sources: (base, tuned) as `analyze_weights` takes them. Default None: there is nothing to compare.
        max_batch: plain images at once. Default 8.

    Raises:
        ValueError: a ControlNet that does not fit.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        controlnet: Any = None,
        controlnet_name: str | None = None,
        sources: tuple[Any, Any] | None = None,
        max_batch: int = 8,
    ) -> None:
        self.name = name
        self._measuring = threading.Lock()
        self._analysis: Any = None
        self._sources = sources
        controlnet = controlnet or getattr(pipe, "controlnet", None)
        self._turning = WaDiPipeline.from_pipe(pipe) if isinstance(pipe, WaDiControlNetPipeline) else pipe
        self._adapters = self._turning.get_active_adapters()
        with _without_warnings():
            self._fused = _with_merged_copy(self._turning) if self._adapters else self._turning
            self._controlled = None
            if controlnet is not None:
                self._controlled = WaDiControlNetPipeline.from_pipe(self._fused, controlnet=controlnet)
        self._controlnet_name = controlnet_name or name
        for each in self._pipes():
            each.set_progress_bar_config(disable=True)
        self._batcher = ImageBatcher(self._fused, max_batch, max_waiting=None)

    @classmethod
    def load(cls, settings: DemoSettings) -> Engine:
        """The pipeline that the settings name.

        Raises:
            OSError, ValueError: see `WaDiPipeline.from_pretrained`.
        """
        device = settings.device or default_device()
        dtype = getattr(torch, settings.dtype or ("float32" if device == "cpu" else "float16"))
        model = settings.model or str(bundled_checkpoint())
        where = {"base_model": settings.base_model, "weight_name": settings.weight_name}
        pipe_class = one_step_pipeline_class(model, **where)
        controlnet = None
        if settings.controlnet:
            controlnet = ControlNetModel.from_pretrained(settings.controlnet, torch_dtype=dtype)
        pipe = pipe_class.from_pretrained(model, **where, dtype=dtype)
        name = settings.model or "the bundled checkpoint"
        sources = _sources(model, **where)
        return cls(pipe, name, controlnet, settings.controlnet, sources, settings.max_batch).to(device)

    def to(self, device: str | torch.device) -> Engine:
        """Move all models; the merging has been done before, since ZeroGPU lends no GPU at the start."""
        for pipe in self._pipes():
            pipe.to(device)
        return self

    def _pipes(self) -> list[Any]:
        return [pipe for pipe in (self._turning, self._fused, self._controlled) if pipe is not None]

    @property
    def denoiser(self) -> Any:
        return getattr(self._turning, self._turning.lorad_component)

    @property
    def is_bundled(self) -> bool:
        return self.name == "the bundled checkpoint"

    @property
    def is_small(self) -> bool:
        return sum(parameter.numel() for parameter in self.denoiser.parameters()) < SMALL

    @property
    def has_adapter(self) -> bool:
        return bool(self._adapters)

    @property
    def has_controlnet(self) -> bool:
        return self._controlled is not None

    @property
    def can_inspect(self) -> bool:
        return self._sources is not None

    @property
    def has_unet(self) -> bool:
        return self._turning.lorad_component == "unet"

    @property
    def side(self) -> int:
        """Height and width that the model was trained at, in pixels."""
        return self.denoiser.config.sample_size * self._turning.vae_scale_factor

    @property
    def usual_guidance(self) -> float:
        """Guidance of the teacher where nobody asks for another: that of its training notes, or what is usual."""
        return 3.0 if self.is_bundled else 7.5 if self.has_unet else 4.5

    def draw(self, prompt: str, seed: int, count: int = 1) -> list[Drawing]:
        """`count` images in one step, of seeds `seed`, `seed + 1`, ..., together with those of others who ask meanwhile."""
        futures = [self._batcher.submit(prompt, seed + i) for i in range(count)]
        try:
            images = [future.result() for future in futures]
        except BaseException:
            for future in futures:  # for nobody would look at them
                future.cancel()
            raise
        return [
            Drawing(image, future.seconds, self._notes(prompt, seed + i, image, {}))
            for i, (image, future) in enumerate(zip(images, futures))
        ]

    def draw_at(self, prompt: str, seed: int, strengths: Sequence[float]) -> list[Drawing]:
        """One image in one step for each factor on the adapter's angles, of the same noise.

        Raises:
            ValueError: there is no adapter.
        """
        self._refuse_without_adapter("turn")

        def draw() -> list[Drawing]:
            drawings = []
            for strength in strengths:
                with self._at_strength(strength):
                    drawings.append(self._run(self._turning, prompt, seed, {"strength": f"{strength:g}"}))
            return drawings

        return self._alone(draw)

    def draw_controlled(self, prompt: str, seed: int, condition: Any, scale: float, detector: str) -> list[Drawing]:
        """One image without and one with the ControlNet, of the same noise.

        Args:
            condition: PIL image, mode RGB, of multiples of 8 pixels.
            scale: `controlnet_conditioning_scale`.
            detector: where `condition` comes from, for the notes.

        Raises:
            ValueError: there is no ControlNet.
        """
        if not self.has_controlnet:
            raise ValueError(
                "there is no ControlNet: start with --controlnet FOLDER_OR_HUB_NAME, or set WADI_CONTROLNET, to one made "
                "for this model's family"
            )
        size = {"height": condition.height, "width": condition.width}
        notes = {"controlnet": self._controlnet_name, "scale": f"{scale:g}", "detector": detector}
        control = {"image": condition, "controlnet_conditioning_scale": float(scale)}

        def draw() -> list[Drawing]:
            plain = self._run(self._fused, prompt, seed, {}, **size)
            return [plain, self._run(self._controlled, prompt, seed, notes, **control)]

        return self._alone(draw)

    def draw_larger(self, prompt: str, seed: int, side: int, strength: float, finest: float) -> list[Drawing]:
        """One image of `side` x `side` pixels without and one with ScaleCrafter, of the same noise.

        Args:
            strength: see `enable_scalecrafter`.
            finest: how many times wider the finest level of the down path sees, which the presets leave alone; 1: as
                the preset.

        Raises:
            ValueError: no UNet, or a size that it cannot draw.
        """
        size = {"height": side, "width": side}
        factors = {"down_blocks.0": finest} if finest > 1 else None
        notes = {"scalecrafter strength": f"{strength:g}", "scalecrafter down_blocks.0": f"{finest:g}"}

        def draw() -> list[Drawing]:
            plain = self._run(self._fused, prompt, seed, {}, **size)
            with scalecrafter(self._fused, **size, strength=strength, factors=factors):
                return [plain, self._run(self._fused, prompt, seed, notes, **size)]

        return self._alone(draw)

    def draw_by_both(self, prompt: str, seed: int, steps: int, guidance: float) -> list[Drawing]:
        """The teacher's image, in `steps` steps with guidance, and the student's in one step, of the same noise.

        Raises:
            ValueError: there is no adapter to switch off.
        """
        self._refuse_without_adapter("switch off")
        notes = {"adapter": "off (the teacher)", "steps": str(steps), "guidance_scale": f"{guidance:g}"}

        def draw() -> list[Drawing]:
            with self._adapter_off():
                call = {"num_inference_steps": steps, "guidance_scale": guidance}
                teacher = self._run(self._turning, prompt, seed, notes, **call)
            return [teacher, self._run(self._fused, prompt, seed, {})]

        return self._alone(draw)

    def analysis(self) -> Any:
        """What changed from teacher to student, a `WeightAnalysis`; measured at the first call.

        Raises:
            ValueError: nothing to compare with.
        """
        if self._sources is None:
            raise ValueError(
                f"{self.name} is one whole model, and nothing says what it was made of: give its adapter "
                "(`wadi extract BASE MODEL -o ADAPTER` finds one), or run `wadi analyze BASE MODEL`"
            )
        with self._measuring:
            if self._analysis is None:
                from diffusers_wadi.analysis import analyze_weights

                base, tuned = self._sources
                self._analysis = analyze_weights(base, tuned, energies=self.is_small, label=self.name)
            return self._analysis

    def close(self) -> None:
        """Draw what is waiting, and nothing more."""
        self._batcher.close()

    def _alone(self, draw: Callable[[], list[Drawing]]) -> list[Drawing]:
        return self._batcher.run(draw).result()

    def _run(self, pipe: Any, prompt: str, seed: int, notes: dict[str, str], **call: Any) -> Drawing:
        # On the CPU whatever the device, so that a seed means the same image everywhere, `wadi generate` included.
        generator = torch.Generator("cpu").manual_seed(seed)
        start = time.perf_counter()
        image = pipe(prompt, generator=generator, **call).images[0]
        return Drawing(image, time.perf_counter() - start, self._notes(prompt, seed, image, notes))

    def _notes(self, prompt: str, seed: int, image: Any, more: dict[str, str]) -> dict[str, str]:
        made = {"prompt": prompt, "model": self.name, "steps": "1"} | more
        return made | {"seed": str(seed), "size": f"{image.width}x{image.height}"}

    @contextmanager
    def _at_strength(self, strength: float) -> Iterator[None]:
        self._turning.set_adapters(self._adapters, [float(strength)] * len(self._adapters))
        try:
            yield
        finally:
            self._turning.set_adapters(self._adapters, [1.0] * len(self._adapters))

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        self._turning.disable_lora()
        try:
            yield
        finally:
            self._turning.enable_lora()

    def _refuse_without_adapter(self, verb: str) -> None:
        if not self.has_adapter:
            raise ValueError(
                f"{self.name} has no adapter to {verb}: the rotations are merged into its weights. Start with the adapter "
                "and its base (`wadi extract BASE MODEL -o ADAPTER` finds one)."
            )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """`from_pipe` warns of modules to keep in float32 even where there are none and nothing is cast."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _with_merged_copy(pipe: Any) -> Any:
    """A pipeline that shares all but the denoiser, of which it has a copy with the rotations merged."""
    own = {pipe.lorad_component: copy.deepcopy(getattr(pipe, pipe.lorad_component))}
    merged = type(pipe).from_pipe(pipe, **own)
    merged.fuse_lorad()
    merged.unload_lorad_weights()
    return merged


def _sources(model: str, base_model: str | None, weight_name: str | None) -> tuple[Any, Any] | None:
    """(base, tuned) to compare; None for a complete pipeline, of which nothing says what it was made of."""
    from diffusers_wadi.pipelines._loading import resolve_source

    source = resolve_source(None, model, base_model, weight_name, None, {})
    return None if source.base is None else (source.base, source.authors_file or source.location)
