#!/usr/bin/env python
"""Memory and time of `wadi analyze` on a pair of files of Stable Diffusion 1.5's UNet, 1.7 GB each, on the CPU.

    python benchmarks/analysis_memory.py --work_dir pair

The pair is that of extraction_memory.py: random weights of the real shapes in float16, every tensor of which changed. What
is measured is a fresh process that does what the command does, figures included: its resident memory, and the part of it
that is not pages of mapped files (Linux only).
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from extraction_memory import GB, machine, resident, shown, write_pair

LABELS = {
    "machine": "machine",
    "files_gb": "base and tuned file, GB",
    "layers": "weights compared",
    "vectors": "vectors in them",
    "seconds": "seconds, files and figures included",
    "before_gb": "memory of its own before, libraries loaded, GB",
    "peak_own_gb": "peak memory of its own, GB",
    "peak_resident_gb": "peak resident memory, mapped files included, GB",
}


def measure(folder: Path, threads: int) -> dict:
    from diffusers_wadi import cli

    torch.set_num_threads(threads)
    before, own, stop = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            own[0] = max(own[0], resident()["own"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    pair, output = [str(folder / f"{name}.safetensors") for name in ("base", "tuned")], folder / "analysis"
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["analyze", *pair, "--output_dir", str(output)])
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    if code:
        raise SystemExit(code)
    (analysis,) = json.loads((output / "analysis.json").read_text())
    return {
        "machine": machine(threads),
        "files_gb": sum(Path(path).stat().st_size for path in pair) / GB,
        "layers": analysis["overall"]["layers"],
        "vectors": analysis["overall"]["vectors"],
        "seconds": seconds,
        "before_gb": before["own"],
        "peak_own_gb": own[0],
        "peak_resident_gb": resident()["peak"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work_dir", required=True, help="Folder for the files (3.7 GB); they are taken as they are if there."
    )
    parser.add_argument("--threads", type=int, default=2, help="Default: 2.")
    parser.add_argument("--output_dir", default=None, help="Folder for analysis_memory.json and analysis_memory.md.")
    parser.add_argument("--step", choices=("write", "measure"), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.work_dir)
    if args.step == "write":
        return write_pair(folder, angle_rank=32)
    if args.step == "measure":
        return print(json.dumps(measure(folder, args.threads)))
    folder.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, __file__, "--work_dir", args.work_dir, "--threads", str(args.threads)]
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
            (output / f"analysis_memory.{suffix}.tmp").write_text(text + "\n")
            os.replace(output / f"analysis_memory.{suffix}.tmp", output / f"analysis_memory.{suffix}")


if __name__ == "__main__":
    main()
