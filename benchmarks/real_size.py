"""Each downstream path once at the size of Stable Diffusion 1.5, on random weights: shapes, dtypes, presets, memory.

    python benchmarks/real_size.py --tasks controlnet reversion scalecrafter dreambooth

The pictures mean nothing, since no weights are downloaded: what is proven is that the paths run at real size, and what
is measured is the peak memory of the process and the seconds taken. Each task runs in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_wadi import bundled_checkpoint, one_step_scheduler

TASKS = ("controlnet", "reversion", "scalecrafter", "dreambooth")
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


def random_sd15(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Components of a Stable Diffusion 1.5 pipeline with random weights, for `StableDiffusionPipeline(**components)`.

    The UNet (859,520,964 parameters) and the VAE have the published configs, the text encoder CLIP ViT-L/14's width,
    depth and 77 positions; its vocabulary is that of the bundled tokenizer, since CLIP's is not at hand offline.
    """
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(bundled_checkpoint() / "teacher" / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {
        "unet": UNet2DConditionModel(**SD15_UNET).to(dtype).eval(),
        "vae": AutoencoderKL(**SD15_VAE).to(dtype).eval(),
        "text_encoder": CLIPTextModel(text).to(dtype).eval(),
        "tokenizer": tokenizer,
        "scheduler": one_step_scheduler(SD_BETAS),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }


def run_task(task: str) -> dict[str, Any]:
    """`run_at_real_size(random_sd15)` of `downstream_<task>.py`, timed: its own findings, seconds and peak memory in GB."""
    module = importlib.import_module(f"downstream_{task}")
    start = time.perf_counter()
    found = module.run_at_real_size(random_sd15)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"task": task, **found, "seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--in_process", action="store_true", help="run one task here and print it as JSON")
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(run_task(args.tasks[0])))
        return
    for task in args.tasks:
        command = [sys.executable, str(Path(__file__)), "--in_process", "--tasks", task]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
