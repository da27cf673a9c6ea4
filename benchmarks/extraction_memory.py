#!/usr/bin/env python
"""Memory and time of `extract_lorad` on a pair of files of Stable Diffusion 1.5's UNet, 1.7 GB each, on the CPU.

    python benchmarks/extraction_memory.py --work_dir pair

The weights are random, of the real shapes, in float16: a base, and the same with every Linear turned by angles of low
rank and every tensor perturbed, so that all of them are read, fitted or reported. What is measured is a fresh process
that extracts and saves, and nothing else: its resident memory, and the part of it that is not pages of mapped files
(Linux only). Mapped pages of the weight files can be dropped at any time; the other part is what the machine must have.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from diffusers_wadi.conversion import extract_lorad
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
LABELS = {
    "machine": "machine",
    "files_gb": "base and tuned file, GB",
    "rank": "rank",
    "layers": "layers adapted",
    "left_out": "further tensors that changed, reported",
    "explained_of_layers": "share of the layers' change explained",
    "seconds": "seconds, saving included",
    "before_gb": "memory of its own before, libraries loaded, GB",
    "peak_own_gb": "peak memory of its own, GB",
    "peak_resident_gb": "peak resident memory, mapped files included, GB",
    "peak_resident_above_files_gb": "the same less the size of the files, GB",
}


def write_pair(folder: Path, angle_rank: int) -> None:
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
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, folder / f"{name}.safetensors")


def shown(value: str | int | float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def resident() -> dict[str, float]:
    """Resident memory of this process in GB: all of it, its peak, and the part that is no mapped file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"all": "VmRSS", "peak": "VmHWM", "own": "RssAnon"}
    return {name: int(lines[key].split()[0]) * 1024 / GB for name, key in names.items()}


def machine(threads: int) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {threads} threads, torch {torch.__version__}"


def measure(folder: Path, rank: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    before, own, stop = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            own[0] = max(own[0], resident()["own"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    found = extract_lorad(folder / "base.safetensors", folder / "tuned.safetensors", rank=rank)
    found.save(folder / "adapter")
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    files = sum((folder / f"{name}.safetensors").stat().st_size for name in ("base", "tuned")) / GB
    return {
        "machine": machine(threads),
        "files_gb": files,
        "rank": rank,
        "layers": len(found.report.layers),
        "left_out": len(found.report.left_out),
        "explained_of_layers": found.report.explained_of_layers,
        "seconds": seconds,
        "before_gb": before["own"],
        "peak_own_gb": own[0],
        "peak_resident_gb": resident()["peak"],
        "peak_resident_above_files_gb": resident()["peak"] - files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work_dir", required=True, help="Folder for the files (3.7 GB); they are taken as they are if there."
    )
    parser.add_argument("--rank", type=int, default=256, help="Rank of the adapter. Default: 256, the paper's.")
    parser.add_argument("--threads", type=int, default=2, help="Default: 2.")
    parser.add_argument(
        "--output_dir", default=None, help="Folder for extraction_memory.json and extraction_memory.md."
    )
    parser.add_argument("--step", choices=("write", "measure"), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.work_dir)
    if args.step == "write":
        return write_pair(folder, angle_rank=32)
    if args.step == "measure":
        return print(json.dumps(measure(folder, args.rank, args.threads)))
    folder.mkdir(parents=True, exist_ok=True)
    again = [
        sys.executable,
        __file__,
        "--work_dir",
        args.work_dir,
        "--rank",
        str(args.rank),
        "--threads",
        str(args.threads),
    ]
    if not (folder / "tuned.safetensors").is_file():
        subprocess.run([*again, "--step", "write"], check=True)
    done = subprocess.run([*again, "--step", "measure"], check=True, capture_output=True, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    table = "\n".join(["| | |", "|---|---|", *(f"| {LABELS[key]} | {shown(value)} |" for key, value in row.items())])
    print(table)
    if args.output_dir:
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", json.dumps(row, indent=2)), ("md", table)):
            (output / f"extraction_memory.{suffix}.tmp").write_text(text + "\n")
            os.replace(output / f"extraction_memory.{suffix}.tmp", output / f"extraction_memory.{suffix}")


if __name__ == "__main__":
    main()
