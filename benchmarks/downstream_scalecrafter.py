"""Images of twice the trained side from the 64x64 Shapes World model, with and without ScaleCrafter.

    python benchmarks/downstream_scalecrafter.py --images 200
    python benchmarks/downstream_scalecrafter.py --search student --images 64    # how the options below were found

Counted are the objects on each image (`diffusers_wadi.shapes.counting`) against those of its caption. The captions were
never trained on, and those of the search are others than those of the table. Teacher: DDIM with guidance 3; student: one
step. Both start from the same noise with and without ScaleCrafter.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_wadi import WaDiPipeline, bundled_checkpoint
from diffusers_wadi.downstream.scalecrafter import enable_synced_tiling, scalecrafter
from diffusers_wadi.shapes import heldout_captions
from diffusers_wadi.shapes.counting import count_objects

SIDE = 128
BATCH = 20
TABLE_SEED, SEARCH_SEED = 31, 32  # of the held-out captions
# The rule's factors of 2 leave the finest level alone; in this UNet of two levels that is half of it.
STUDENT: dict[str, Any] = {"height": SIDE, "width": SIDE, "factors": {"down_blocks.0": 2.5}}
TEACHER: dict[str, Any] = STUDENT
GUIDANCE = 3.0


def load_pipeline() -> WaDiPipeline:
    pipe = WaDiPipeline.from_pretrained(bundled_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: WaDiPipeline,
    captions: list[str],
    steps: int,
    options: dict[str, Any] | None,
    keep: Path | None = None,
) -> tuple[np.ndarray, float]:
    """uint8 images (n, 128, 128, 3) and seconds per image: by the student at one step, else by the teacher.

    Image i starts from seed i. `options` are those of ScaleCrafter, None to do without. Batches that lie in the folder
    `keep` are not drawn again.
    """
    (pipe.enable_lora if steps == 1 else pipe.disable_lora)()
    images, seconds = [], 0.0
    with nullcontext() if options is None else scalecrafter(pipe, **options):
        for first in range(0, len(captions), BATCH):
            path = None if keep is None else keep / f"{first}-{len(captions[first : first + BATCH])}.npz"
            if path is None or not path.is_file():
                batch = draw_batch(pipe, captions[first : first + BATCH], steps, first)
                if path is not None:
                    np.savez(path.with_suffix(".tmp.npz"), **batch)
                    os.replace(path.with_suffix(".tmp.npz"), path)
            else:
                batch = dict(np.load(path))
            images.append(batch["images"])
            seconds += float(batch["seconds"])
    return np.concatenate(images), seconds / len(captions)


def draw_batch(pipe: WaDiPipeline, captions: list[str], steps: int, first: int) -> dict[str, Any]:
    start = time.perf_counter()
    images = pipe(
        captions,
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        guidance_scale=1.0 if steps == 1 else GUIDANCE,
        generator=[torch.Generator().manual_seed(first + i) for i in range(len(captions))],
        output_type="np",
    ).images
    return {"images": np.round(images * 255).astype(np.uint8), "seconds": time.perf_counter() - start}


def judged(images: np.ndarray, captions: list[str]) -> dict[str, float]:
    counts = [count_objects(image, caption) for image, caption in zip(images, captions)]
    return {
        "objects counted right": float(np.mean([count.right for count in counts])),
        "images with a repeated object": float(np.mean([count.repeated > 0 for count in counts])),
        "repeated objects per image": float(np.mean([count.repeated for count in counts])),
        "objects per image of the caption": float(
            np.sum([count.found for count in counts]) / np.sum([count.expected for count in counts])
        ),
    }


def measure(
    *, images: int, steps: int, work_dir: Path, who: Sequence[str] = ("teacher", "student")
) -> list[dict[str, Any]]:
    """Rows for the table of `downstream.py`: teacher and student, without and with ScaleCrafter.

    Batches that `work_dir` has already are not drawn again. Settings or models that changed need another folder.
    """
    captions, pipe, rows = heldout_captions(images, seed=TABLE_SEED), load_pipeline(), []
    cells = {"teacher": (f"teacher, {steps} steps", steps, TEACHER), "student": ("student, 1 step", 1, STUDENT)}
    for generator, count, options in (cells[each] for each in who):
        for setting, chosen in (("128x128, plain", None), ("128x128, ScaleCrafter", options)):
            folder = work_dir / f"{generator.split(',')[0]}-{count}-{setting.split()[1]}"
            folder.mkdir(parents=True, exist_ok=True)
            drawn, seconds = draw(pipe, captions, count, chosen, folder)
            Image.fromarray(np.concatenate(list(drawn[:10]), axis=1)).save(folder / "first.png")
            cell = {"task": "scalecrafter", "generator": generator, "setting": setting}
            rows += [
                cell | {"metric": metric, "value": value, "images": images, "seconds_per_image": seconds}
                for metric, value in judged(drawn, captions).items()
            ]
    return rows


def search(images: int, steps: int, candidates: list[dict[str, Any] | None]) -> None:
    """Prints what each candidate gives on captions of the search, student or teacher by `steps`."""
    captions, pipe = heldout_captions(images, seed=SEARCH_SEED), load_pipeline()
    for options in candidates:
        found = judged(draw(pipe, captions, steps, options)[0], captions)
        print(steps, json.dumps(options), {name: round(value, 3) for name, value in found.items()}, flush=True)


def candidates_to_search() -> list[dict[str, Any] | None]:
    """No ScaleCrafter, the rule at several strengths, all blocks alike, and one block more or less than the rule."""
    size = {"height": SIDE, "width": SIDE}
    blocks = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    found: list[dict[str, Any] | None] = [None]
    found += [size | {"strength": strength} for strength in (0.25, 0.5, 0.75, 1.0)]
    found += [{"factors": dict.fromkeys(blocks, factor)} for factor in (1.25, 1.5, 2.0)]
    found += [size | {"factors": {block: factor}} for block in blocks for factor in (1.0, 1.5, 2.0)]
    best = [{"down_blocks.0": 2.0}, {"down_blocks.0": 2.5}]
    found += [size | {"factors": b | more} for b in best for more in ({"up_blocks.1": 1.25}, {"up_blocks.1": 1.5})]
    found += [size | {"factors": b | {"up_blocks.0": factor}} for b in best for factor in (2.5, 3.0)]
    return [*found, size | {"factors": best[1]}, size | {"factors": {"down_blocks.0": 3.0}}]


def candidates_for_the_teacher() -> list[dict[str, Any] | None]:
    """What is best for the student, for several shares of the steps."""
    return [None, {"height": SIDE, "width": SIDE}, *(STUDENT | {"until": until} for until in (0.6, 0.8, 1.0))]


def picture(work_dir: Path, output: Path) -> None:
    """The rows of `measure`, from the images that it left: teacher plain, with; student plain, with."""
    rows = [
        Image.open(next(work_dir.glob(f"{who}-*-{how}/first.png")))
        for who in ("teacher", "student")
        for how in ("plain", "ScaleCrafter")
    ]
    width, height = rows[0].size
    together = Image.new("RGB", (width, 4 * height))
    for i, row in enumerate(rows):
        together.paste(row, (0, i * height))
    together.resize((width * 3 // 4, 3 * height), Image.LANCZOS).quantize(256).save(output, optimize=True)


def run_at_real_size(random_sd15: Any) -> dict[str, Any]:
    """1024x1024 in one step by the preset of Stable Diffusion 1.5, on random weights, decoded in synced tiles."""
    pipe = WaDiPipeline(**random_sd15())
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 1024, "width": 1024, "prompt": "a red heart", "output_type": "latent"}
    start = time.perf_counter()
    with scalecrafter(pipe, 1024, 1024):
        state = pipe.unet._scalecrafter
        latents = pipe(generator=torch.Generator().manual_seed(0), **call).images
    unet_seconds = time.perf_counter() - start
    enable_synced_tiling(pipe)
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    if image.shape != (1, 3, 1024, 1024) or not image.isfinite().all():
        raise RuntimeError(f"expected a finite image of 1024x1024, got {tuple(image.shape)}")
    return {
        "widened_convolutions": len(state.factors),
        "latents": list(latents.shape),
        "image": list(image.shape),
        "dtype": str(image.dtype),
        "unet_seconds": round(unet_seconds, 1),
        "decode_seconds": round(time.perf_counter() - start - unet_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="Images per cell. Default: 256.")
    parser.add_argument("--steps", type=int, default=50, help="Steps of the teacher. Default: 50.")
    parser.add_argument("--work_dir", type=Path, default=Path("scalecrafter-work"), help="Default: %(default)s.")
    parser.add_argument("--picture", type=Path, default=None, help="File for ten images of each cell.")
    parser.add_argument("--search", choices=["student", "teacher"], help="Try options on other captions.")
    args = parser.parse_args()
    if args.search:
        student = args.search == "student"
        candidates = candidates_to_search() if student else candidates_for_the_teacher()
        return search(args.images, 1 if student else args.steps, candidates)
    for row in measure(images=args.images, steps=args.steps, work_dir=args.work_dir):
        print(json.dumps(row))
    if args.picture:
        picture(args.work_dir, args.picture)


if __name__ == "__main__":
    main()
