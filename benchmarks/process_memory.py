"""Time and memory of a command in a fresh process, on a pair of files of Stable Diffusion 1.5's UNet.

The weights are random, of the real shapes, in float16: a base, and the same with every Linear turned by angles of low
rank and every tensor perturbed, so that all of them are read and compared. Memory is measured twice (Linux only): all that
is resident, and the part of it that is not pages of mapped files. Those can be dropped at any time; the other part is
what the machine must have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from diffusers_wadi.lorad import rotate

SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
GB = 1e9
NAMES = ("base", "tuned")
LABELS = {
    "machine": "machine",
    "files_gb": "base and tuned file, GB",
    "seconds": "seconds, reading and writing included",
    "before_gb": "memory of its own before, libraries loaded, GB",
    "peak_own_gb": "peak memory of its own, GB",
    "peak_resident_gb": "peak resident memory, mapped files included, GB",
    "peak_resident_above_files_gb": "the same less the size of the files, GB",
}


def write_pair(folder: Path, angle_rank: int = 32) -> None:
    """Write base.safetensors and tuned.safetensors, 1.7 GB each."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UNet2DConditionModel(**SD15_UNET).state_dict().items()}
    generator, base, tuned = torch.Generator().manual_seed(0), {}, {}
    for key, shape in shapes.items():
        fan_in = max(1, shape[1:].numel())
        weight = torch.randn(shape, generator=generator) / fan_in**0.5
        turned = weight
        if len(shape) == 2:
            A = torch.randn(shape[0], angle_rank, generator=generator)
            B = torch.randn(angle_rank, shape[1] // 2, generator=generator)
            turned = rotate(weight, A @ B * (0.05 / angle_rank**0.5))
        noise = 0.005 * torch.randn(shape, generator=generator) / fan_in**0.5
        base[key], tuned[key] = weight.half(), (turned + noise).half()
    for name, state in zip(NAMES, (base, tuned)):
        save_file(state, folder / f"{name}.safetensors")


def resident() -> dict[str, float]:
    """Resident memory of this process in GB: all of it, its peak, and the part that is no mapped file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"all": "VmRSS", "peak": "VmHWM", "own": "RssAnon"}
    return {name: int(lines[key].split()[0]) * 1024 / GB for name, key in names.items()}


def machine(threads: int) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {threads} threads, torch {torch.__version__}"


@contextmanager
def watched(numbers: dict[str, Any]) -> Iterator[None]:
    """Put time and memory of the block into `numbers`."""
    numbers["before_gb"], own, stop = resident()["own"], [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            own[0] = max(own[0], resident()["own"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield
        numbers["seconds"] = time.perf_counter() - start
    finally:
        stop.set()
        watcher.join()
    numbers |= {"peak_own_gb": own[0], "peak_resident_gb": resident()["peak"]}


def measure(work: Callable[[Path, Path, Path], Mapping[str, Any]], folder: Path, threads: int) -> dict[str, Any]:
    """`work(base, tuned, folder)` and its own numbers, in this process."""
    torch.set_num_threads(threads)
    pair = [folder / f"{name}.safetensors" for name in NAMES]
    row: dict[str, Any] = {"machine": machine(threads), "files_gb": sum(file.stat().st_size for file in pair) / GB}
    with watched(row):
        found = work(*pair, folder)
    return row | {"peak_resident_above_files_gb": row["peak_resident_gb"] - row["files_gb"]} | found


def run(
    script: str, doc: str, work: Callable[..., Mapping[str, Any]], labels: Mapping[str, str], **flags: tuple[int, str]
) -> None:
    """The command line of a benchmark: writes the pair, measures in a fresh process, prints and keeps a table.

    Args:
        script, doc: `__file__` and `__doc__` of the benchmark; its results are named as the script.
        work: see `measure`; gets `flags` as keywords.
        labels: what the table calls the numbers that `work` returns.
        **flags: further integer flags: default and help.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, name = parser.add_argument, Path(script).stem
    add("--work_dir", required=True, help="Folder for the files (3.7 GB); they are taken as they are if there.")
    add("--threads", type=int, default=2, help="Default: 2.")
    for flag, (default, text) in flags.items():
        add(f"--{flag}", type=int, default=default, help=f"{text} Default: {default}.")
    add("--output_dir", default=None, help=f"Folder for {name}.json and {name}.md.")
    add("--step", choices=("write", "measure"), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.work_dir)
    if args.step == "write":
        return write_pair(folder)
    if args.step == "measure":
        options = {flag: getattr(args, flag) for flag in flags}
        row = measure(lambda *paths: work(*paths, **options), folder, args.threads)
        return print(json.dumps(row))
    folder.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, *sys.argv]
    if not (folder / "tuned.safetensors").is_file():
        subprocess.run([*again, "--step", "write"], check=True)
    done = subprocess.run([*again, "--step", "measure"], check=True, capture_output=True, text=True)
    report(json.loads(done.stdout.splitlines()[-1]), {**LABELS, **labels}, name, args.output_dir)


def report(row: Mapping[str, Any], labels: Mapping[str, str], name: str, folder: str | None) -> None:
    """Print the numbers as a table, and write it and them to NAME.md and NAME.json in `folder`."""
    shown = {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in row.items()}
    table = "\n".join(["| | |", "|---|---|", *(f"| {labels[key]} | {value} |" for key, value in shown.items())])
    print(table)
    if folder is None:
        return
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(row, indent=2)), ("md", table)):
        (output / f"{name}.{suffix}.tmp").write_text(text + "\n")
        os.replace(output / f"{name}.{suffix}.tmp", output / f"{name}.{suffix}")
