#!/usr/bin/env python
"""Peak memory of loading a pipeline and of drawing with it, for stock diffusers and for `optimize()` in its variants.

    python benchmarks/memory.py --threads 1 --output_dir benchmarks/results
    python benchmarks/memory.py --size sd15 --work_dir sd15 --output_dir benchmarks/results      # a GPU

Every row is measured in processes of its own, `--repeats` times, and is the median. On a GPU: what torch had allocated at
most. On a CPU: resident memory of the process that is its own or of a mapped file of weights, above that of the same process
with its libraries loaded. "loaded" is what stays once the pipeline can draw; the peaks are those of loading (with fusing and optimizing) and of
one call.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from fast_paths import ONE_STEP, TEACHERS_CALL, load, tiny_vae, write_sd15
from latency import write
from process_memory import resident, watched

from diffusers_wadi.evaluation.latency import device_name

MB = 1e6
ROWS: dict[str, dict[str, Any]] = {
    "stock, fused checkpoint, 1 step": {"stock": True},
    "stock, fused checkpoint, 25 steps with guidance": {"stock": True, "many": True},
    "WaDiPipeline, adapter not fused": {},
    "WaDiPipeline, fuse_lorad() and unload_lorad_weights()": {"merge": True},
    "optimize()": {"optimize": {}},
    "optimize(keep_original='cpu')": {"optimize": {"keep_original": "cpu"}},
    "optimize(keep_original=False)": {"optimize": {"keep_original": False}},
    "optimize(keep_original=False, channels_last=False)": {
        "optimize": {"keep_original": False, "channels_last": False}
    },
    "optimize(keep_original=False, vae=tiny)": {"optimize": {"keep_original": False}, "tiny": True},
    "optimize(keep_original=False, dtype=float16)": {"optimize": {"keep_original": False}, "dtype": torch.float16},
}


@contextmanager
def peak(device: torch.device, numbers: dict[str, float], name: str) -> Iterator[None]:
    """Put the most memory that was taken in the block into `numbers`, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield
        torch.cuda.synchronize(device)
        numbers[name] = torch.cuda.max_memory_allocated(device)
        return
    found: dict[str, Any] = {}
    give_back()
    with watched(found):
        yield
    numbers[name] = max(found["peak_own_gb"], resident()["own"]) * 1e9 + mapped_weights()


def now(device: torch.device) -> float:
    if device.type == "cuda":
        gc.collect()
        return torch.cuda.memory_allocated(device)
    give_back()
    return resident()["own"] * 1e9 + mapped_weights()


def give_back() -> None:
    """Return to the system what the C library keeps of freed memory, which for small tensors is most of it."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def mapped_weights() -> float:
    """Resident bytes of mapped safetensors files (Linux)."""
    size, counting = 0.0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[:1].islower() or line[:1].isdigit():  # the head of a mapping: its addresses and its file
            counting = line.endswith(".safetensors")
        elif counting and line.startswith("Rss:"):
            size += int(line.split()[1]) * 1024
    return size


def pipeline(row: dict[str, Any], args: argparse.Namespace, device: torch.device) -> Any:
    """What is measured, ready to draw."""
    folder = Path(args.work_dir) if args.work_dir else None
    if row.get("stock"):
        pipe = StableDiffusionPipeline.from_pretrained(folder / "fused")
        return pipe.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    pipe = load(args.size, folder / "base" if args.size == "sd15" else None)
    if device.type == "cuda":
        pipe.to(torch.float16)
    pipe.to(device)
    if row.get("merge"):
        pipe.fuse_lorad()
        pipe.unload_lorad_weights()
    if "optimize" in row:
        given = {"dtype": row.get("dtype"), "vae": tiny_vae() if row.get("tiny") else None}
        pipe.optimize(**row["optimize"], **given)
    return pipe


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Bytes taken by one row, in this process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    row, device, numbers = ROWS[name], torch.device(args.device), {}
    before = now(device)
    with torch.no_grad():
        with peak(device, numbers, "loading_peak"):
            pipe = pipeline(row, args, device)
        pipe.set_progress_bar_config(disable=True)
        numbers["loaded"] = now(device)
        call = {"num_inference_steps": 25, **TEACHERS_CALL[args.size]} if row.get("many") else ONE_STEP
        for batch in args.batches:
            prompts = ["a red heart on a white background"] * batch
            with peak(device, numbers, f"batch_{batch}_peak"):
                pipe(prompts, generator=torch.Generator().manual_seed(0), **call)
    return {key: value - before for key, value in numbers.items()}


def prepare(args: argparse.Namespace) -> None:
    """Write what the stock pipeline reads: a fused checkpoint."""
    folder = Path(args.work_dir)
    if args.size == "sd15":
        write_sd15(folder / "base")
    if not (folder / "fused" / "model_index.json").is_file():
        load(args.size, folder / "base" if args.size == "sd15" else None).save_pretrained(folder / "fused")


def measured_apart(name: str, flags: list[str]) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, *flags, "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table_of(results: dict[str, Any]) -> str:
    lines = [
        f"{results['machine']}, torch {results['torch']}, diffusers {results['diffusers']}, {results['date']}",
        "",
    ]
    columns = list(next(iter(results["rows"].values())))
    lines.append("| MB | " + " | ".join(column.replace("_", " ") for column in columns) + " | last : stock |")
    lines.append("|---" * (len(columns) + 2) + "|")
    first = next(iter(results["rows"].values()))
    for name, row in results["rows"].items():
        cells = " | ".join(f"{row[column] / MB:.0f}" for column in columns)
        lines.append(f"| {name} | {cells} | {row[columns[-1]] / first[columns[-1]]:.2f} |")
    return "\n".join(lines)


def run(args: argparse.Namespace, apart: Callable[[str, list[str]], dict[str, float]] = measured_apart) -> str:
    """Measure all rows in turn, write, and return the table."""
    prepare(args)
    flags = ["--size", args.size, "--device", args.device, "--work_dir", args.work_dir]
    flags += ["--batches", *map(str, args.batches)] + (["--threads", str(args.threads)] if args.threads else [])
    names = [name for name in ROWS if not args.rows or any(text in name for text in args.rows)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            found[name].append(apart(name, flags))
    rows = {
        name: {column: statistics.median(each[column] for each in runs) for column in runs[0]}
        for name, runs in found.items()
    }
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {"machine": device_name(args.device), "torch": torch.__version__, "diffusers": diffusers.__version__}
    results |= {"date": datetime.date.today().isoformat(), "size": args.size, "repeats": args.repeats, "rows": rows}
    table = table_of(results)
    if args.output_dir:
        write(Path(args.output_dir), "memory" if args.size == "shapes" else f"memory_{args.size}", results, table)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--size", choices=("shapes", "sd15"), default="shapes", help="Bundled checkpoint, or random weights of SD 1.5."
    )
    add("--work_dir", required=True, help="Folder for a fused checkpoint (sd15: 5 GB); taken as it is if there.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: a GPU if there is one.")
    add("--rows", nargs="+", default=None, help="Parts of the names of the rows to measure. Default: all.")
    add("--batches", nargs="+", type=int, default=[1, 16], help="Prompts in a call. Default: 1 16.")
    add("--repeats", type=int, default=3, help="Processes for each row. Default: 3.")
    add("--threads", type=int, default=None, help="CPU threads. Default: torch's choice.")
    add("--output_dir", default=None, help="Folder for memory.json and .md (memory_sd15 for that size).")
    add("--measure", choices=ROWS, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    print(run(args))


if __name__ == "__main__":
    main()
