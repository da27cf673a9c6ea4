"""How long a pipeline takes from prompt to pixels: text encoder, denoiser, decoder, and what lies between."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_wadi.evaluation.folders import image_seed

__all__ = ["BatchLatency", "Latency", "device_name", "measure_latency"]


@dataclass(frozen=True)
class BatchLatency:
    """Seconds that calls with so many prompts took.

    Args:
        batch_size: prompts in a call.
        seconds: of each call, in the order they were made; at least two.
    """

    batch_size: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third: half of the calls lay between them."""
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.median


@dataclass(frozen=True)
class Latency:
    """Latencies of one pipeline on one device.

    Args:
        device: its name, and for a CPU the number of threads.
        dtype: number format of the networks.
        batches: by batch size.
    """

    device: str
    dtype: str
    batches: tuple[BatchLatency, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds of a call by batch size, with their median and quartiles."""
        batches = {
            str(batch.batch_size): {
                "median_s": batch.median,
                "q1_s": batch.quartiles[0],
                "q3_s": batch.quartiles[1],
                "images_per_s": batch.images_per_second,
                "calls": len(batch.seconds),
            }
            for batch in self.batches
        }
        return {"device": self.device, "dtype": self.dtype, "batches": batches}

    def lines(self) -> list[str]:
        """What to show: a line for each batch size."""
        return [
            f"batch {batch.batch_size}: {batch.median:.4f} s (quartiles {batch.quartiles[0]:.4f} to "
            f"{batch.quartiles[1]:.4f} of {len(batch.seconds)} calls), {batch.images_per_second:.2f} images/s"
            for batch in self.batches
        ]


@torch.no_grad()
def measure_latency(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float,
    resolution: int | None = None,
    batch_sizes: Sequence[int] = (1,),
    warmup: int = 3,
    repeats: int = 20,
    call: Mapping[str, Any] | None = None,
) -> Latency:
    """Time whole calls of a pipeline, from the texts to PIL images, with nothing left to do on the device.

    Args:
        pipe: on its device.
        prompts: taken in turn.
        num_inference_steps, guidance_scale, resolution, call: as in `generate_images`.
        batch_sizes: prompts in a call; each size is measured by itself. Default 1.
        warmup: calls of each size before the clock starts. Default 3.
        repeats: calls that count, at least 2. Default 20.

    Raises:
        ValueError: no prompts, or a number that is too small.
    """
    if not prompts or not batch_sizes or min(batch_sizes) < 1 or warmup < 0 or repeats < 2:
        raise ValueError(
            f"latency takes at least 1 prompt, batch sizes of at least 1, warmup >= 0 and repeats >= 2; got {len(prompts)} "
            f"prompts, batch_sizes={list(batch_sizes)}, warmup={warmup}, repeats={repeats}"
        )
    arguments = dict(call or {}) | {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    if resolution is not None:
        arguments |= {"height": resolution, "width": resolution}
    device = pipe._execution_device
    batches = []
    for size in batch_sizes:
        seconds = [
            _timed(pipe, _texts(prompts, number, size), number, device, arguments)
            for number in range(warmup + repeats)
        ]
        batches.append(BatchLatency(size, tuple(seconds[warmup:])))
    return Latency(device_name(device), str(pipe.dtype).removeprefix("torch."), tuple(batches))


def _texts(prompts: Sequence[str], number: int, size: int) -> list[str]:
    return [prompts[(number * size + i) % len(prompts)] for i in range(size)]


def _timed(pipe: Any, texts: list[str], number: int, device: torch.device, arguments: dict[str, Any]) -> float:
    generators = [torch.Generator("cpu").manual_seed(image_seed(number, i)) for i in range(len(texts))]
    _wait_for(device)
    start = time.perf_counter()
    pipe(prompt=texts, generator=generators, **arguments)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given: calls return before."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device | str) -> str:
    """As its maker calls it; of a CPU with the threads that torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'' if threads == 1 else 's'}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")  # on Linux; platform knows no more than the architecture there
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "CPU"
