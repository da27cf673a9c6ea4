#!/usr/bin/env python
"""Where the time of one image goes, and how far each part is from the floor: text encoder, denoiser, decoder, the rest.

    python benchmarks/latency.py --threads 1 --output_dir benchmarks/results
    python benchmarks/latency.py --size sd15 --repeats 50 --batches 1 16 --output_dir benchmarks/results      # a GPU

All ways to draw (fast_paths.py) take turns in random order, `--repeats` rounds. A round times one call as it is, from texts to PIL images,
and one in which the device is waited for before and after each part; "rest" is what that call takes beside its three
parts: tokenizing, noise, the scheduler's step, bytes to images, Python. Medians, with the quartiles of the first.

Floor: operations of the three parts (torch's FlopCounterMode) over the rate of a matrix product measured in the same run,
and bytes of their weights over the bandwidth of a copy measured in the same run; the larger is the least that each part
takes. With `--judge` the judge of Shapes World scores each way on held-out captions, from the same noise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from fast_paths import PlainScript, Way, load, ways, with_adapter_merged
from torch.utils.flop_counter import FlopCounterMode

from diffusers_wadi.evaluation.latency import device_name
from diffusers_wadi.evaluation.metrics import judge_all
from diffusers_wadi.shapes import heldout_captions

PARTS = ("text", "denoiser", "decode")
SLOW = ("compile",)
MS = 1e3


class Clock:
    """Times the three parts of a way, and counts their operations, while switched on."""

    def __init__(self, runner: Any, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.on, self._device = False, device
        for part, model in (("text", runner.text_encoder), ("denoiser", runner.unet)):
            # Where torch.compile puts itself, so that a compiled model is timed and not traced with the clock in it.
            model._compiled_call_impl = self._timed(part, model._compiled_call_impl or model._call_impl)
        runner.vae.decode = self._timed("decode", runner.vae.decode)

    def _timed(self, part: str, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return call(*args, **kwargs)
            wait(self._device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            wait(self._device)
            self.seconds[part] += time.perf_counter() - start
            return result

        return timed


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def draw(runner: Any, way: Way, prompts: list[str], seed: int) -> Any:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return runner(prompts, generator=generators, **way.call)


def one_round(
    runner: Any, way: Way, clock: Clock, prompts: list[list[str]], seed: int, device: torch.device
) -> dict[str, float]:
    """Seconds of a call as it is, with the first prompts, and of a call taken apart, with the second."""
    wait(device)
    start = time.perf_counter()
    draw(runner, way, prompts[0], seed)
    wait(device)
    total = time.perf_counter() - start
    clock.seconds, clock.on = dict.fromkeys(PARTS, 0.0), True
    start = time.perf_counter()
    draw(runner, way, prompts[1], seed)
    wait(device)
    apart = time.perf_counter() - start
    clock.on = False
    return {"total": total, **clock.seconds, "rest": apart - sum(clock.seconds.values())}


def measured(
    runners: dict[str, Any], clocks: dict[str, Clock], chosen: dict[str, Way], batch: int, args: argparse.Namespace
) -> dict[str, dict]:
    """All ways in turn: median seconds by part, and the quartiles of the whole."""
    device, captions = torch.device(args.device), heldout_captions(512, seed=1)
    first = batch == args.batches[0]
    names = [name for name in runners if first or not is_slow_to_start(name)]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    order = random.Random(
        0
    )  # of no one always after the same one, whose memory is still warm or has just been given back
    for number in range(args.warmup + args.repeats):
        # The second differ from all first ones, which a cache may know.
        prompts = [
            [captions[(start + number * batch + i) % len(captions)] for i in range(batch)] for start in (0, 259)
        ]
        for name in order.sample(names, len(names)):
            runner = runners[name]
            many = chosen[name].call.get("num_inference_steps", 1) > 1
            if many and number >= args.warmup + max(2, args.repeats // 4):
                continue  # it takes as long as many of the others together
            if "cache" in name:  # for prompts that come again: now they have come once
                for known in prompts:
                    draw(runner, chosen[name], known, number)
            rounds[name].append(one_round(runner, chosen[name], clocks[name], prompts, number, device))
    return {name: summary(found[args.warmup :], batch) for name, found in rounds.items()}


def summary(rounds: list[dict[str, float]], batch: int) -> dict[str, float]:
    middle = {part: statistics.median(each[part] for each in rounds) for part in ("total", *PARTS, "rest")}
    low, _, high = statistics.quantiles([each["total"] for each in rounds], n=4, method="inclusive")
    compute = sum(middle[part] for part in PARTS)
    return middle | {
        "q1": low,
        "q3": high,
        "calls": len(rounds),
        "rest_over_compute": middle["rest"] / compute,
        "images_per_second": batch / middle["total"],
    }


def operations(runner: Any, batch: int, device: torch.device) -> dict[str, float]:
    """Floating-point operations of each part of one step."""
    counts = {}
    side, length = runner.unet.config.sample_size, runner.tokenizer.model_max_length
    dtype, width = runner.unet.dtype, runner.unet.config.cross_attention_dim
    inputs = {
        "text": lambda: runner.text_encoder(torch.zeros(batch, length, dtype=torch.long, device=device)),
        "denoiser": lambda: runner.unet(
            torch.zeros(batch, 4, side, side, dtype=dtype, device=device),
            999,
            torch.zeros(batch, length, width, dtype=dtype, device=device),
        ),
        "decode": lambda: runner.vae.decode(torch.zeros(batch, 4, side, side, dtype=dtype, device=device)),
    }
    for part, call in inputs.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counts[part] = counter.get_total_flops()
    return counts


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of a matrix product, and bytes read and written a second of a copy: the best of ten each."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.zeros((1 << 30 if device.type == "cuda" else 1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = best(lambda: a @ b, device)
    copied = best(lambda: target.copy_(source), device)
    return {"operations_per_second": 2 * side**3 / product, "bytes_per_second": 2 * source.numel() / copied}


def best(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def floor(runner: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """The least seconds of each part, by operations and by bytes of weights."""
    device, dtype = torch.device(args.device), runner.unet.dtype
    rate, counts = rates(device, dtype), operations(runner, batch, device)
    decoder = [runner.vae.decoder, getattr(runner.vae, "post_quant_conv", None)]
    models = {
        "text": [runner.text_encoder],
        "denoiser": [runner.unet],
        "decode": [part for part in decoder if part is not None],
    }
    found: dict[str, Any] = {"batch": batch, "dtype": str(dtype), **rate}
    for part in PARTS:
        size = sum(p.nbytes for model in models[part] for p in model.parameters())
        found[part] = {
            "operations": counts[part],
            "weight_bytes": size,
            "seconds_of_operations": counts[part] / rate["operations_per_second"],
            "seconds_of_bytes": size / rate["bytes_per_second"],
        }
    found["seconds"] = sum(max(found[p]["seconds_of_operations"], found[p]["seconds_of_bytes"]) for p in PARTS)
    return found


def judged(runners: dict[str, Any], chosen: dict[str, Way], number: int, plain: str) -> dict[str, dict]:
    """What the judge of Shapes World says of each way that is to draw the same, and how alike the images are."""
    captions, found = heldout_captions(number, seed=1), {}
    images: dict[str, np.ndarray] = {}
    for name in [plain, *(name for name in runners if name != plain)]:
        if not chosen[name].same_images:
            continue
        drawn, size = [], 1 if is_slow_to_start(name) else 64
        for start in range(0, number, size):
            out = draw(runners[name], chosen[name], captions[start : start + size], start)
            drawn += [np.asarray(image) for image in getattr(out, "images", out)]
        images[name] = np.stack(drawn)
        found[name] = judge_all(images[name], captions) | {"least_cosine": least_cosine(images[name], images[plain])}
    return found


def least_cosine(images: np.ndarray, others: np.ndarray) -> float:
    """Of the pixels of corresponding images, the least alike pair."""
    a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (images, others))
    return float(((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)).clip(1e-12)).min())


def markdown(results: dict[str, Any]) -> str:
    lines = [
        f"{results['machine']}, torch {results['torch']}, diffusers {results['diffusers']}, {results['date']}",
        "",
    ]
    for batch, rows in results["batches"].items():
        floored = results["floors"][batch]
        first = next(iter(rows.values()))["total"]
        lines += [f"Batch {batch}, milliseconds of a call:", ""]
        lines.append(
            "| | whole (quartiles) | text encoder | denoiser | decoder | rest | rest : compute | images/s | times faster than the first |"
        )
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for name, row in rows.items():
            whole = f"{row['total'] * MS:.1f} ({row['q1'] * MS:.1f} to {row['q3'] * MS:.1f})"
            parts = " | ".join(f"{row[part] * MS:.2f}" for part in (*PARTS, "rest"))
            lines.append(f"| {name} | {whole} | {parts} | {row['rest_over_compute']:.0%} | {row['images_per_second']:.1f} "
                         f"| {first / row['total']:.1f} |")  # fmt: skip
        least = [max(floored[p]["seconds_of_operations"], floored[p]["seconds_of_bytes"]) * MS for p in PARTS]
        lines.append(f"| floor of one step in {floored['dtype'].removeprefix('torch.')} | {floored['seconds'] * MS:.2f} | "
                     + " | ".join(f"{each:.2f}" for each in least) + f" | | | {int(batch) / floored['seconds']:.1f} | |")  # fmt: skip
        giga = ", ".join(
            f"{p} {floored[p]['operations'] / 1e9:.2f} and {floored[p]['weight_bytes'] / 1e6:.1f}" for p in PARTS
        )
        lines += ["", f"Floor: {floored['operations_per_second'] / 1e9:.0f} G operations/s in a matrix product, "
                  f"{floored['bytes_per_second'] / 1e9:.1f} GB/s in a copy; G operations and MB of weights: {giga}.", ""]  # fmt: skip
    if results.get("judge"):
        lines += [
            f"The judge of Shapes World on {results['judge_captions']} held-out captions, from the same noise:",
            "",
        ]
        lines += [
            "| | attributes right | captions wholly right | least cosine to the plain pipeline |",
            "|---|---|---|---|",
        ]
        for name, row in results["judge"].items():
            lines.append(f"| {name} | {row['attributes']:.2%} | {row['captions']:.2%} | {row['least_cosine']:.6f} |")
    left = {name: why for name, why in results["left_out"].items() if why}
    lines += ["", *(f'Left out in "{name}": {why}.' for name, why in left.items())] if left else []
    return "\n".join(lines)


def is_slow_to_start(name: str) -> bool:
    """Whether a way compiles, which on a CPU takes minutes for each size of batch: only the first is measured there."""
    return not torch.cuda.is_available() and any(word in name for word in SLOW)


def chosen_ways(args: argparse.Namespace) -> dict[str, Way]:
    everything = ways(args.size)
    if args.ways:
        return {name: way for name, way in everything.items() if any(text in name for text in args.ways)}
    if torch.device(args.device).type == "cuda":
        return everything
    left = SLOW if not args.compile else ("CUDA graphs", "optimize(), full compile")
    return {name: way for name, way in everything.items() if not any(word in name for word in left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--size", choices=("shapes", "sd15"), default="shapes", help="Bundled checkpoint, or random weights of SD 1.5."
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: a GPU if there is one.")
    add("--ways", nargs="+", default=None, help="Parts of the names of the ways to take. Default: all, on a CPU without "
        "those that compile.")  # fmt: skip
    add("--compile", action="store_true", help="Also, on a CPU, the ways that compile, for the first size of batch.")
    add("--batches", nargs="+", type=int, default=[1, 16], help="Prompts in a call. Default: 1 16.")
    add("--repeats", type=int, default=20, help="Rounds that count, at least 2. Default: 20.")
    add("--warmup", type=int, default=3, help="Rounds before. Default: 3.")
    add("--judge", type=int, default=0, help="Captions for the judge of Shapes World. Default: 0, none.")
    add("--threads", type=int, default=None, help="CPU threads. Default: torch's choice.")
    add("--output_dir", default=None, help="Folder for latency.json and .md (latency_sd15 for that size).")
    results = run(parser.parse_args())
    print(results)


def run(args: argparse.Namespace) -> str:
    """Measure, write, and return the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen, pipe = chosen_ways(args), load(args.size)
    if torch.device(args.device).type == "cuda":
        pipe.to(torch.float16)
    pipe.to(args.device)
    runners, left_out = {}, {}
    for name, way in chosen.items():
        runners[name] = way.make(pipe)
        if not isinstance(runners[name], PlainScript):
            runners[name].set_progress_bar_config(disable=True)
            left_out[name] = str(getattr(runners[name], "optimization", None) or "").partition("Left out: ")[2]
    floors = {str(batch): floor(PlainScript(with_adapter_merged(pipe)), batch, args) for batch in args.batches}
    clocks = {name: Clock(runner, torch.device(args.device)) for name, runner in runners.items()}
    results = {
        "machine": device_name(args.device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.date.today().isoformat(),
        "size": args.size,
        "batches": {},
        "floors": floors,
        "left_out": left_out,
    }
    for batch in args.batches:
        results["batches"][str(batch)] = measured(runners, clocks, chosen, batch, args)
        print(json.dumps(results["batches"][str(batch)]), flush=True)
    if args.judge:
        results["judge"] = judged(runners, chosen, args.judge, next(n for n in chosen if chosen[n].same_images))
        results["judge_captions"] = args.judge
    table = markdown(results)
    if args.output_dir:
        write(Path(args.output_dir), "latency" if args.size == "shapes" else f"latency_{args.size}", results, table)
    return table


def write(folder: Path, stem: str, results: dict[str, Any], table: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(results, indent=2)), ("md", table)):
        (folder / f"{stem}.{suffix}.tmp").write_text(text + "\n")
        os.replace(folder / f"{stem}.{suffix}.tmp", folder / f"{stem}.{suffix}")


if __name__ == "__main__":
    main()
