#!/usr/bin/env python
"""Many clients and one pipeline: one request at a time under a lock against `ImageBatcher`; and `generate_images`.

    python benchmarks/serving.py --output_dir benchmarks/results
    python benchmarks/serving.py --model MODEL --dtype float16 --output_dir benchmarks/results       # a GPU

N clients, each a thread that asks for the next image when it has the last one. All ways of serving are measured in turn,
`--rounds` times. Requests per second: the median of the rounds, over all clients. Latency: from request to PIL image, over
all requests of all rounds.

`generate_images` draws a prompt set into a folder of PNGs; "drawn, then written" is what it did before, one after the
other. Nothing runs in parallel on one core, so what overlap could hide there is shown by itself: the time that PIL and PNG
take of an image.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from diffusers_wadi import bundled_checkpoint, one_step_pipeline_class
from diffusers_wadi._files import written_beside
from diffusers_wadi.evaluation import Prompt, PromptSet, generate_images
from diffusers_wadi.evaluation.folders import image_seed
from diffusers_wadi.evaluation.latency import device_name
from diffusers_wadi.serving import ImageBatcher
from diffusers_wadi.shapes import heldout_captions

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.0}
Ask = Callable[[str, int], Image.Image]


class OneAtATime:
    """The pipeline behind a lock."""

    def __init__(self, pipe) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def ask(self, prompt: str, seed: int) -> Image.Image:
        with self._lock:
            return self._pipe(prompt, generator=torch.Generator().manual_seed(seed)).images[0]

    def close(self) -> dict:
        return {}


class Batched(ImageBatcher):
    """As `OneAtATime`, with a batcher."""

    def ask(self, prompt: str, seed: int) -> Image.Image:
        return self.submit(prompt, seed).result()


def serve(ask: Ask, prompts: Sequence[str], clients: int) -> tuple[float, list[float]]:
    """Seconds until all prompts are drawn by so many clients at once, and the latency of each."""
    latencies: list[float] = []

    def client(number: int) -> None:
        for seed in range(number, len(prompts), clients):
            start = time.perf_counter()
            ask(prompts[seed], seed)
            latencies.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, latencies


def ways_to_serve(pipe, batch_sizes: Sequence[int], waits: Sequence[float]) -> dict[str, Callable]:
    """By name: all batch sizes without waiting, and the waits with the second largest."""
    ways: dict[str, Callable] = {"one at a time": lambda: OneAtATime(pipe)}
    settings = [(size, 0.0) for size in batch_sizes] + [(sorted(batch_sizes)[-2:][0], wait) for wait in waits]
    for size, wait in settings:
        name = f"batches of {size}" + (f", max_wait {1000 * wait:g} ms" if wait else "")
        ways[name] = lambda size=size, wait=wait: Batched(pipe, size, wait)
    return ways


def serving_rows(ways: dict[str, Callable], prompts: Sequence[str], clients: Sequence[int], rounds: int) -> list[dict]:
    runs: dict[tuple[int, str], list[tuple[float, list[float]]]] = {}
    sizes: dict[tuple[int, str], float] = {}
    for _ in range(rounds):
        for count in clients:
            for name, make in ways.items():
                with closing(make()) as server:
                    runs.setdefault((count, name), []).append(serve(server.ask, prompts, count))
                if isinstance(server, Batched):
                    sizes[count, name] = server.statistics().mean_batch_size
    rows = []
    for (count, name), measured in runs.items():
        latencies = sorted(latency for _, some in measured for latency in some)
        p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
        rate = statistics.median(len(prompts) / seconds for seconds, _ in measured)
        plain = statistics.median(len(prompts) / seconds for seconds, _ in runs[count, "one at a time"])
        rows.append(
            {
                "clients": count,
                "way": name,
                "requests_per_s": rate,
                "against_one_at_a_time": rate / plain,
                "p50_s": p50,
                "p95_s": p95,
                "p99_s": p99,
                "mean_batch_size": sizes.get((count, name), 1.0),
            }
        )
    return rows


def drawn_then_written(pipe, prompts: PromptSet, folder: Path, batch_size: int) -> None:
    """What `generate_images` did when it had one thread."""
    (folder / "images").mkdir(parents=True)
    for first in range(0, len(prompts), batch_size):
        batch = prompts.prompts[first : first + batch_size]
        generators = [torch.Generator().manual_seed(image_seed(0, prompt.index)) for prompt in batch]
        images = pipe([prompt.text for prompt in batch], generator=generators, output_type="np", **ONE_STEP).images
        for prompt, pixels in zip(batch, (images * 255).round().astype(np.uint8)):
            with written_beside(folder / "images" / f"{prompt.index:05d}.png") as temporary:
                Image.fromarray(pixels).save(temporary)


def folder_rows(pipe, captions: Sequence[str], batch_size: int, rounds: int) -> list[dict]:
    prompts = PromptSet("benchmark", tuple(Prompt(i, text) for i, text in enumerate(captions)))
    seconds: dict[str, list[float]] = {"drawn, then written": [], "generate_images": []}
    with tempfile.TemporaryDirectory() as place:
        for number in range(rounds):
            before, now = Path(place, f"before-{number}"), Path(place, f"now-{number}")
            seconds["drawn, then written"].append(timed(drawn_then_written, pipe, prompts, before, batch_size))
            arguments = {"batch_size": batch_size, "progress": False, **ONE_STEP}
            seconds["generate_images"].append(timed(generate_images, pipe, prompts, now, **arguments))
        pictures = [Image.open(path) for path in sorted(Path(now, "images").iterdir())]
        old = [Image.open(path) for path in sorted(Path(before, "images").iterdir())]
        assert all(np.array_equal(one, other) for one, other in zip(pictures, old, strict=True))
        encoding = timed(encode, [np.asarray(picture) for picture in pictures], Path(place)) / len(pictures)
    return [
        {
            "way": name,
            "images_per_s": len(captions) / statistics.median(taken),
            "ms_per_image": 1000 * statistics.median(taken) / len(captions),
            "of_it_png_ms": 1000 * encoding,
        }
        for name, taken in seconds.items()
    ]


def encode(images: Sequence[np.ndarray], folder: Path) -> None:
    for pixels in images:
        with written_beside(folder / "one.png") as temporary:
            Image.fromarray(pixels).save(temporary)


def timed(function: Callable, *args, **options) -> float:
    start = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - start


def markdown(result: dict) -> str:
    machine = result["machine"]
    about = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [f"{machine['device']}, {machine['dtype']}, {machine['model']}; {about}; {machine['date']}", ""]
    lines += [
        "| clients | | requests/s | against one at a time | latency p50 | p95 | p99 | mean batch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["serving"]:
        times = " | ".join(f"{1000 * row[name]:.0f} ms" for name in ("p50_s", "p95_s", "p99_s"))
        lines.append(
            f"| {row['clients']} | {row['way']} | {row['requests_per_s']:.1f} | {row['against_one_at_a_time']:.2f} | "
            f"{times} | {row['mean_batch_size']:.1f} |"
        )
    lines += ["", "| a folder of PNGs | images/s | ms per image | PIL and PNG alone, ms |", "|---|---|---|---|"]
    lines += [
        f"| {row['way']} | {row['images_per_s']:.1f} | {row['ms_per_image']:.1f} | {row['of_it_png_ms']:.1f} |"
        for row in result["folder"]
    ]
    return "\n".join(lines) + "\n"


def write(result: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(result, indent=2) + "\n"), ("md", markdown(result))):
        (folder / f"serving.{suffix}.tmp").write_text(text)
        os.replace(folder / f"serving.{suffix}.tmp", folder / f"serving.{suffix}")


def measured(args: argparse.Namespace) -> dict:
    device = torch.device(args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    dtype = args.dtype or ("float32" if device.type == "cpu" else "float16")
    model = args.model or str(bundled_checkpoint())
    pipe = one_step_pipeline_class(model).from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
    if pipe.get_active_adapters():
        pipe.fuse_lorad()
    pipe.set_progress_bar_config(disable=True)
    captions = heldout_captions(max(args.requests, args.images), seed=1)
    ways = ways_to_serve(pipe, args.batch_sizes, args.waits)
    for size in args.batch_sizes:  # each is compiled, cached or tuned once
        pipe(captions[:size])
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    machine = {
        "device": device_name(device),
        "dtype": dtype,
        "model": args.model or "the bundled checkpoint",
        "versions": versions,
        "date": date.today().isoformat(),
    }
    return {
        "machine": machine,
        "serving": serving_rows(ways, captions[: args.requests], args.clients, args.rounds),
        "folder": folder_rows(pipe, captions[: args.images], args.folder_batch_size, args.rounds),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=None, help="One-step checkpoint or adapter. Default: the bundled one.")
    add("--device", default=None, help="Default: the GPU if there is one.")
    add("--dtype", default=None, help="Default: float16 on a GPU, float32 on the CPU.")
    add("--clients", type=int, nargs="+", default=[1, 8, 32], help="Default: 1 8 32.")
    add("--batch_sizes", type=int, nargs="+", default=[1, 4, 8, 16], help="max_batch_size; default: 1 4 8 16.")
    add("--waits", type=float, nargs="*", default=[0.005, 0.05], help="max_wait, seconds; default: 0.005 0.05.")
    add("--requests", type=int, default=96, help="In each round, of all clients together. Default: 96.")
    add("--images", type=int, default=128, help="Of the folder. Default: 128.")
    add("--folder_batch_size", type=int, default=8, help="Default: 8, as of wadi evaluate.")
    add("--rounds", type=int, default=3, help="Default: 3.")
    add("--output_dir", default=None, help="Folder for serving.json and serving.md.")
    args = parser.parse_args(argv)
    result = measured(args)
    print(markdown(result))
    if args.output_dir:
        write(result, Path(args.output_dir))


if __name__ == "__main__":
    main()
