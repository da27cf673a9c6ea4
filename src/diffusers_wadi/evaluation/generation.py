"""Images for a set of prompts: in batches, on several processes, and taken up again image by image where it stopped."""

from __future__ import annotations

import inspect
import os
import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from diffusers_wadi._files import written_beside
from diffusers_wadi.evaluation.folders import Image, check_folder, image_plan, prepare_folder, whole_image
from diffusers_wadi.evaluation.prompts import PromptSet
from diffusers_wadi.serving.pixels import PendingImages, start_drawing

__all__ = ["generate_images", "process_state"]

_PATIENCE = timedelta(days=7)  # a process that finishes first waits for the others, long where theirs were missing
_WRITERS = min(8, os.cpu_count() or 1)  # threads: writing a PNG of 512 pixels takes longer than a GPU needs to draw it
_PACKAGES = ("diffusers-wadi", "diffusers", "torch", "transformers", "peft")


@torch.no_grad()
def generate_images(
    pipe: Any,
    prompts: PromptSet,
    folder: str | Path,
    num_inference_steps: int,
    guidance_scale: float,
    resolution: int | None = None,
    batch_size: int = 1,
    images_per_prompt: int = 1,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Draw the images of a prompt set into a folder (see `folders`) with a diffusers text-to-image pipeline.

    Every image has a generator of its own on the CPU, seeded by `image_seed`, so that it starts from the same noise in
    every sample of the set, batch size, number of processes and on every device. What a network makes of it may differ
    in the last bits between batch sizes, and on a GPU from run to run.

    Under `accelerate launch` each process takes every n-th image. Files that are whole are kept; each is written under
    another name and then moved, so that a run may be stopped at any time and started again.

    Args:
        pipe: such as `StableDiffusionPipeline`, on its device. Must take a list of prompts and of generators.
        prompts: see `load_prompts`.
        folder: where to. A folder that was begun is taken up if its settings agree.
        num_inference_steps, guidance_scale: for the pipeline.
        resolution: height and width in pixels. Default None: the pipeline's.
        batch_size: images at once on each process. Default 1.
        images_per_prompt: default 1.
        seed: of the set. Default 0.
        call: further arguments for the pipeline, such as `eta` or `timesteps`. Default None.
        settings: what else to note and to compare in settings.json, such as the name of the model. Default None.
        progress: show a bar. Default True.

    Returns:
        The folder. On every process, once all of them are done.

    Raises:
        ValueError: the folder holds images of other settings, the pipeline lacks an argument, or an image is not finite.
        OSError: the folder cannot be written to.
    """
    arguments = dict(call or {}) | {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    if resolution is not None:
        arguments |= {"height": resolution, "width": resolution}
    _refuse_unknown_arguments(pipe, arguments)
    plan = image_plan(prompts, seed, images_per_prompt)
    noted = _settings(pipe, prompts, arguments, seed, images_per_prompt) | dict(settings or {})
    state = process_state()
    folder = _prepared(state, folder, plan, noted)
    # By place, not by what is missing: processes look at the folder at different times.
    mine = plan[state.process_index :: state.num_processes]
    todo = [image for image in mine if not whole_image(folder / image.file)]
    with _writing(folder, len(mine) - len(todo), len(mine), progress and state.is_main_process) as write:
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            write(batch, _drawn(pipe, batch, arguments))
    state.wait_for_everyone()
    return folder


def process_state() -> PartialState:
    """Which of how many processes this is, and its device: one, unless started by `accelerate launch` or torchrun."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def _prepared(state: PartialState, folder: str | Path, plan: Sequence[Image], settings: dict[str, Any]) -> Path:
    """By the first process alone; the others wait, and then find the same faults or none."""
    if state.is_main_process:
        try:
            prepare_folder(folder, plan, settings)
        finally:
            state.wait_for_everyone()
    else:
        state.wait_for_everyone()
        check_folder(folder, settings)
    return Path(folder)


def _settings(
    pipe: Any, prompts: PromptSet, arguments: dict[str, Any], seed: int, images_per_prompt: int
) -> dict[str, Any]:
    return {
        "pipeline": type(pipe).__name__,
        "scheduler": {"class": type(pipe.scheduler).__name__} | _config(pipe.scheduler),
        "arguments": arguments,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "seed": seed,
        "images_per_prompt": images_per_prompt,
        "prompts": {"source": prompts.name, "number": len(prompts), "digest": prompts.digest},
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }


def _config(scheduler: Any) -> dict[str, Any]:
    """What the scheduler was made with, without the names that diffusers keeps for itself."""
    return {key: value for key, value in sorted(scheduler.config.items()) if not key.startswith("_")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _refuse_unknown_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    known = inspect.signature(type(pipe).__call__).parameters
    missing = [name for name in ("prompt", "generator", "output_type", *arguments) if name not in known]
    if missing:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(missing)}; expected a text-to-image pipeline of diffusers"
        )


def _drawn(pipe: Any, batch: Sequence[Image], arguments: Mapping[str, Any]) -> PendingImages:
    return start_drawing(pipe, [image.prompt for image in batch], [image.seed for image in batch], arguments)


@contextmanager
def _writing(folder: Path, there: int, total: int, progress: bool) -> Iterator[Callable[..., None]]:
    """A function (images, what is drawn of them) that has them written by other threads.

    It returns when those of the call before are on the disk, so that one batch is written while another is drawn. So are
    all when the block ends, by whatever exception; errors of the threads are raised at one of these points.
    """
    from tqdm import tqdm

    waiting: deque[Future] = deque()
    # disable=None shows nothing where nobody looks, as in a file or a test.
    bar = tqdm(total=total, initial=there, unit="image", disable=None if progress else True)
    with bar, ThreadPoolExecutor(_WRITERS) as threads:

        def settle(most: int) -> None:
            while len(waiting) > most:
                waiting.popleft().result()
                bar.update()

        def write(batch: Sequence[Image], drawn: PendingImages) -> None:
            waiting.extend(threads.submit(_write, folder, batch, number, drawn) for number in range(len(batch)))
            settle(len(batch))

        yield write
        settle(0)


def _write(folder: Path, batch: Sequence[Image], number: int, drawn: PendingImages) -> None:
    pixels, finite = drawn.wait()
    for image, good in zip(batch, finite):  # of the whole batch, of which then nothing is written
        if not good:
            raise ValueError(
                f"the image of prompt {image.index} ({image.prompt!r}) is not finite. In half precision numbers overflow: "
                "use float32 (--dtype float32); else the weights are damaged."
            )
    with written_beside(folder / batch[number].file) as temporary:
        PIL.Image.fromarray(pixels[number]).save(temporary)
