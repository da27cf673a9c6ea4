#!/usr/bin/env python
"""Time and memory of one training step: ours, the authors' release re-enacted, and ours with LoRA in place of LoRaD.

    python benchmarks/training_step.py --size small --output_dir benchmarks/results
    python benchmarks/training_step.py --size sd15 --output_dir benchmarks/results      # a GPU; 80 GB for batch 16

One step is one update of the student by score distillation and one of the fake, on the same images. All three train the
same UNet of random weights on the same layers at the same ranks, with random text, AdamW and no tracker. The release
(`release_recipe.py`) gets gradient checkpointing where the others have it, which as published it asked for in vain.

Every row is measured in a process of its own, all of them in turn `--repeats` times; times are medians over all steps
after the first. Memory: what the accelerator had allocated at most, weights included; on a CPU the peak of resident
memory above that of the process with its libraries loaded.
"""

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from release_recipe import ReleaseStep

from diffusers_wadi.distillation import NoiseSchedule, WaDiNetworks
from diffusers_wadi.distillation.adapters import AdapterSpec
from diffusers_wadi.distillation.steps import WaDiSteps

ROOT = Path(__file__).parents[1]
CONTENDERS = ("release", "lora", "ours")
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SIZES = {
    "small": {
        "unet": {
            **BLOCKS,
            "sample_size": 32,
            "block_out_channels": (64, 128, 256, 256),
            "cross_attention_dim": 128,
            "attention_head_dim": 4,
        },
        "text": (32, 128),
        "ranks": (32, 8),
        "settings": [{"batch": 4}],
        "precision": "no",
    },
    "sd15": {
        "unet": {
            **BLOCKS,
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "text": (77, 768),
        "ranks": (256, 32),
        "settings": [
            {"batch": batch, "checkpointing": checkpointing, "compile": compiled}
            for batch in (1, 4, 16)
            for checkpointing in (False, True)
            for compiled in (False, True)
        ],
        "precision": "fp16",
    },
}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GB = 1e9


class RandomText:
    """In place of prompts and their encoder."""

    def __init__(self, shape: tuple[int, int], device: torch.device):
        generator = torch.Generator().manual_seed(1)
        self.all = torch.randn(64, *shape, generator=generator).to(device)
        self.empty = torch.randn(1, *shape, generator=generator).to(device)

    def __len__(self) -> int:
        return len(self.all)

    def at(self, indices: torch.Tensor) -> torch.Tensor:
        return self.all[indices.to(self.all.device)]


def make_unet(size: dict, device: torch.device) -> UNet2DConditionModel:
    torch.manual_seed(0)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[size["precision"]]
    unet = UNet2DConditionModel(**size["unet"]).to(device, dtype).requires_grad_(False).eval()
    if device.type == "cpu" and size["precision"] != "no":  # as the training script does
        unet.set_attn_processor(AttnProcessor())
    return unet


def default_flags(batch: int) -> argparse.Namespace:
    """Of the training script: the release's recipe."""
    spec = importlib.util.spec_from_file_location("train_wadi", ROOT / "training" / "train_wadi.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    required = "--pretrained_teacher_model none --shapes_captions 1 --dry_run".split()
    with tempfile.TemporaryDirectory() as folder:
        args = script.parse_args([*required, "--output_dir", folder, "--train_batch_size", str(batch)])
    args.fake_max_timestep = 999
    return args


def our_step(kind: str, size: dict, setting: dict, accelerator: Accelerator) -> Callable[[], object]:
    unet = make_unet(size, accelerator.device)
    specs = [AdapterSpec(kind, rank, layers="linear") for rank in size["ranks"]]
    networks = WaDiNetworks(unet, *specs, accelerator.autocast)
    if setting.get("checkpointing"):
        networks.enable_gradient_checkpointing()
    if setting.get("compile"):
        networks.compile()
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler(**SD_BETAS), device=accelerator.device)
    text = RandomText(size["text"], accelerator.device)
    shape = (4, unet.config.sample_size, unet.config.sample_size)
    steps = WaDiSteps(default_flags(setting["batch"]), accelerator, networks, schedule, text, shape, None, 1000)
    return steps.vsd_update


def release_step(size: dict, setting: dict, accelerator: Accelerator) -> Callable[[], object]:
    unet = make_unet(size, accelerator.device)
    alphas_cumprod = DDIMScheduler(**SD_BETAS).alphas_cumprod
    scaler = accelerator.scaler
    checkpointing = setting.get("checkpointing", False)
    release = ReleaseStep(unet, *size["ranks"], alphas_cumprod, accelerator.autocast, scaler, checkpointing)
    text = RandomText(size["text"], accelerator.device)
    shape, batch = (4, unet.config.sample_size, unet.config.sample_size), setting["batch"]
    return lambda: release.step(text.all[:batch], text.empty, shape)


def resident(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 / GB


def measure(contender: str, size: dict, setting: dict, steps: int, threads: int | None) -> dict:
    """Seconds of every step after the first, and peak memory in GB, in this process."""
    if threads:
        torch.set_num_threads(threads)
    accelerator = Accelerator(mixed_precision=size["precision"])
    cuda, before = accelerator.device.type == "cuda", resident("VmRSS")
    if contender == "release":
        step = release_step(size, setting, accelerator)
    else:
        step = our_step("lorad" if contender == "ours" else "lora", size, setting, accelerator)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GB if cuda else resident("VmHWM") - before
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"seconds": seconds[1:], "peak": peak, "device": name}


def run_apart(contender: str, args: argparse.Namespace, setting: dict) -> dict:
    """`measure` in a fresh process; what went wrong if it could not."""
    command = [sys.executable, __file__, "--size", args.size, "--steps", str(args.steps), "--measure", contender]
    command += ["--setting", json.dumps(setting)] + (["--threads", str(args.threads)] if args.threads else [])
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measured_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    for setting in SIZES[args.size]["settings"]:
        found: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
        for _ in range(args.repeats):
            for name in CONTENDERS:
                if not (name == "release" and setting.get("compile")):  # which never was compiled
                    found[name].append(run_apart(name, args, setting))
        rows += [summary(name, setting, runs) for name, runs in found.items() if runs]
        for row in rows[-len(CONTENDERS) :]:
            print(json.dumps(row), flush=True)
    return rows


def summary(name: str, setting: dict, runs: list[dict]) -> dict:
    row = {"contender": name, **setting}
    errors = [run["error"] for run in runs if "error" in run]
    if errors:
        return row | {"error": errors[0]}
    seconds = statistics.median(second for run in runs for second in run["seconds"])
    peak = statistics.median(run["peak"] for run in runs)
    return row | {"seconds": seconds, "images_per_second": setting["batch"] / seconds, "peak": peak} | {
        "device": runs[0]["device"]
    }  # fmt: skip


def markdown(rows: list[dict], device: str) -> str:
    """A table of all rows; ratios to the release and to LoRA at the same batch and checkpointing, uncompiled release."""
    lines = [f"{device}, torch {torch.__version__}", ""]
    lines.append("| batch | checkpointing | compile | | s/step | images/s | peak GB | time : release | memory : release "
                 "| time : LoRA | memory : LoRA |")  # fmt: skip
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["batch"], *("yes" if row.get(name) else "no" for name in ("checkpointing", "compile"))]
        cells.append(row["contender"])
        if "error" in row:
            lines.append("| " + " | ".join(map(str, [*cells, row["error"], *[""] * 6])) + " |")
            continue
        cells += [f"{row['seconds']:.3f}", f"{row['images_per_second']:.2f}", f"{row['peak']:.2f}"]
        for other in ("release", "lora"):
            cells += ratios(row, other, rows)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def ratios(row: dict, other: str, rows: list[dict]) -> list[str]:
    """Time and memory of `row` relative to `other` under the same setting."""
    same = ("batch", "checkpointing") + (() if other == "release" else ("compile",))
    for found in rows:
        if found["contender"] == other and all(found.get(key) == row.get(key) for key in same) and "peak" in found:
            return [f"{row[key] / found[key]:.2f}" for key in ("seconds", "peak")]
    return ["", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="Default: small.")
    parser.add_argument("--steps", type=int, default=5, help="Steps measured in each process. Default: 5.")
    parser.add_argument("--repeats", type=int, default=2, help="Processes for each row. Default: 2.")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads. Default: torch's choice.")
    parser.add_argument("--output_dir", default=None, help="Folder for training_step_SIZE.json and .md.")
    parser.add_argument("--measure", choices=CONTENDERS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=json.loads, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        gc.collect()
        print(json.dumps(measure(args.measure, SIZES[args.size], args.setting, args.steps, args.threads)))
        return
    rows = measured_rows(args)
    device = next((row["device"] for row in rows if "device" in row), "nothing ran")
    table = markdown(rows, device)
    print(table)
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", json.dumps(rows, indent=2)), ("md", table)):
            (folder / f"training_step_{args.size}.{suffix}.tmp").write_text(text + "\n")
            os.replace(
                folder / f"training_step_{args.size}.{suffix}.tmp", folder / f"training_step_{args.size}.{suffix}"
            )


if __name__ == "__main__":
    main()
