#!/usr/bin/env python
"""Quality of the Shapes World teacher and student: attributes right, Fréchet distance, time. The README's numbers.

    python benchmarks/shapes_quality.py --output_dir benchmarks/results
    python benchmarks/shapes_quality.py --output_dir benchmarks/results --backbone pixart

Three generators are compared on the same held-out captions and seeds: the teacher (adapter off, 25 DDIM steps,
guidance 3), the student (adapter on, one step) and the untrained student (adapter off, one step).

Fréchet distance: between Gaussians fitted to 256 features of each image: the mean RGB of each of 8x8 tiles (192
numbers) and the mean absolute luminance gradient of each tile (64 numbers), all from pixels in [0, 1]. The reference is
2,000 renders of other held-out captions, and the distance between two sets of renders shows the floor.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np
import torch
from drawing import draw, seconds_per_image
from PIL import Image

from diffusers_wadi import one_step_pipeline_class
from diffusers_wadi.evaluation.metrics import frechet_distance, judge_all
from diffusers_wadi.shapes import (
    FOLDERS,
    bundled_checkpoint,
    heldout_captions,
    parse_caption,
    render_scenes,
)

ONE = "a large red heart on a white background"  # that is timed
GENERATORS = {
    "teacher, 25 steps": {"adapter": False, "num_inference_steps": 25, "guidance_scale": 3.0},
    "student, 1 step": {"adapter": True, "num_inference_steps": 1, "guidance_scale": 1.0},
    "adapter off, 1 step": {"adapter": False, "num_inference_steps": 1, "guidance_scale": 1.0},
}


def features(images: np.ndarray) -> np.ndarray:
    """uint8 images (n, 64, 64, 3) to float64 features (n, 256)."""
    pixels = images.astype(np.float64) / 255
    n, size, _, _ = pixels.shape
    tiles = (n, 8, size // 8, 8, size // 8)
    colour = pixels.reshape(*tiles, 3).mean(axis=(2, 4))
    gray = pixels.mean(axis=-1)
    gradient = np.abs(np.diff(gray, axis=1, append=gray[:, -1:])) + np.abs(
        np.diff(gray, axis=2, append=gray[:, :, -1:])
    )
    return np.concatenate([colour.reshape(n, -1), gradient.reshape(tiles).mean(axis=(2, 4)).reshape(n, -1)], axis=1)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between the features of two sets of images."""
    return frechet_distance(torch.from_numpy(features(a)), torch.from_numpy(features(b)))


def save_picture(images: dict[str, np.ndarray], captions: list[str], path: Path, columns: int) -> None:
    """One row a generator, the same captions and seeds in each column."""
    rows = [np.concatenate(list(stack[:columns]), axis=1) for stack in images.values()]
    Image.fromarray(np.concatenate(rows, axis=0)).resize((columns * 96, len(rows) * 96), Image.LANCZOS).save(path)


def markdown(results: dict) -> str:
    lines = ["| | attributes right | captions wholly right | Fréchet distance | time of one image |"]
    lines.append("|---|---|---|---|---|")
    for name, r in results["generators"].items():
        lines.append(
            f"| {name} | {r['attributes']:.1%} | {r['captions']:.1%} | {r['frechet']:.3f} | {r['seconds']:.3f} s |"
        )
    lines.append(f"| real renders | {results['real']['attributes']:.1%} | {results['real']['captions']:.1%} "
                 f"| {results['real']['frechet']:.3f} | |")  # fmt: skip
    return "\n".join(lines)


def one_shape_captions() -> list[str]:
    """All held-out captions with a single shape, whose place the caption leaves open."""
    return [caption for caption in heldout_captions(3000, seed=1) if parse_caption(caption).relation is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Adapter folder. Default: the bundled checkpoint.")
    parser.add_argument(
        "--backbone", choices=FOLDERS, default="stable-diffusion", help="Which of the bundled students."
    )
    parser.add_argument("--num_captions", type=int, default=512, help="Held-out captions judged. Default: 512.")
    parser.add_argument(
        "--num_frechet", type=int, default=2000, help="Images for the Fréchet distance. Default: 2000."
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Default: 64.")
    parser.add_argument("--num_threads", type=int, default=None, help="CPU threads. Default: torch's choice.")
    parser.add_argument("--output_dir", default=None, help="Folder for shapes_quality.json, .md and .png.")
    parser.add_argument("--one_shape", action="store_true", help="Only judge the held-out captions with one shape.")
    args = parser.parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)

    model = args.model or bundled_checkpoint(args.backbone)
    pipeline = one_step_pipeline_class(model).from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if args.one_shape:
        for name, call in GENERATORS.items():
            images = draw(pipeline, one_shape_captions(), batch_size=args.batch_size, **call)
            print(name, len(images), json.dumps(judge_all(images, one_shape_captions())))
        return
    captions = heldout_captions(args.num_captions, seed=1)
    frechet_captions = (captions + heldout_captions(args.num_frechet, seed=2))[: args.num_frechet]
    real, floor = (
        render_scenes([parse_caption(c) for c in heldout_captions(args.num_frechet, seed=3)], seed=s) for s in (3, 4)
    )
    same = render_scenes([parse_caption(c) for c in frechet_captions], seed=5)
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "num_captions": args.num_captions,
        "num_frechet": args.num_frechet,
        "generators": {},
        "real": judge_all(same[: args.num_captions], captions) | {"frechet": distance(real, same)},
        "frechet_same_captions": distance(real, floor),
    }
    stacks = {}
    for name, call in GENERATORS.items():
        images = draw(pipeline, frechet_captions, batch_size=args.batch_size, **call)
        stacks[name] = images
        results["generators"][name] = judge_all(images[: args.num_captions], captions) | {
            "frechet": distance(real, images),
            "seconds": seconds_per_image(lambda: draw(pipeline, [ONE], **call), rounds=5),  # noqa: B023
        }
        print(name, json.dumps(results["generators"][name]), flush=True)
    print(markdown(results))
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        stem = "shapes_quality" + ("_pixart" if args.backbone == "pixart" else "")
        for suffix, text in (("json", json.dumps(results, indent=2)), ("md", markdown(results))):
            (folder / f"{stem}.{suffix}.tmp").write_text(text + "\n")
            os.replace(folder / f"{stem}.{suffix}.tmp", folder / f"{stem}.{suffix}")
        save_picture(stacks, captions, folder / f"{stem}.png", columns=10)


if __name__ == "__main__":
    main()
