#!/usr/bin/env python
"""What half precision costs at one step: error of the latents against float32, on the bundled checkpoint.

    python benchmarks/precision.py

The last division by alpha_T multiplies rounding errors by 14.6. "stock step" computes it in the UNet's dtype, as any
diffusers pipeline does; `WaDiPipeline` computes it in float32 after a half-precision UNet.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from diffusers_wadi import WaDiPipeline, bundled_checkpoint
from diffusers_wadi.shapes import heldout_captions, judge_image


def latents_and_images(pipeline, captions: list[str]) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Latents (n, 4, 8, 8) in float32, and the uint8 images they decode to. The text and the noise are the same for all."""
    noise = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(pipeline.unet.dtype)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": noise}
    latents = pipeline(captions, output_type="latent", **call).images.float()
    images = pipeline(captions, output_type="np", **call).images
    return latents, [np.round(image * 255).astype(np.uint8) for image in images]


def share_right(images: list[np.ndarray], captions: list[str]) -> float:
    verdicts = [judge_image(image, caption) for image, caption in zip(images, captions)]
    return float(np.mean([right for verdict in verdicts for right in verdict.values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Adapter folder. Default: the bundled checkpoint.")
    parser.add_argument("--num_captions", type=int, default=128, help="Default: 128.")
    parser.add_argument("--output_dir", default=None, help="Folder for precision.json and precision.md.")
    args = parser.parse_args()
    captions = heldout_captions(args.num_captions, seed=1)
    model = args.model or bundled_checkpoint()
    rows, exact = [], None
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipeline = WaDiPipeline.from_pretrained(model, dtype=dtype)
        pipeline.fuse_lorad()
        stock = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
        for step, runner in (("float32 step", pipeline), ("stock step", stock)):
            runner.set_progress_bar_config(disable=True)
            latents, images = latents_and_images(runner, captions)
            exact = latents if exact is None else exact
            error = ((latents - exact).square().mean().sqrt() / exact.std()).item()
            rows.append(
                {"dtype": str(dtype), "step": step, "error": error, "attributes": share_right(images, captions)}
            )
    table = ["| UNet in | last step | RMS error of x0, in units of its std | attributes right |", "|---|---|---|---|"]
    for row in rows:
        name = row["dtype"].removeprefix("torch.")
        table.append(f"| {name} | {row['step']} | {row['error']:.4f} | {row['attributes']:.1%} |")
    print("\n".join(table))
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", json.dumps(rows, indent=2)), ("md", "\n".join(table))):
            (folder / f"precision.{suffix}.tmp").write_text(text + "\n")
            os.replace(folder / f"precision.{suffix}.tmp", folder / f"precision.{suffix}")


if __name__ == "__main__":
    main()
