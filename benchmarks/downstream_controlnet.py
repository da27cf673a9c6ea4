#!/usr/bin/env python
"""ControlNet on Shapes World: does one step put the shapes where the condition says, as 50 steps of the teacher do?

    python benchmarks/downstream_controlnet.py --work_dir shapes-controlnet --picture docs/images/controlnet.png

A ControlNet for masks is trained on the multi-step teacher by `training/train_shapes_controlnet.py`, unless WORK_DIR has
it, and then used unchanged by the one-step student. Each held-out caption comes with the mask of one render of it. Mask
IoU is between that mask and the shapes that the judge's segmentation finds in the image drawn; without control it says
how much a mask of the same caption fits by chance.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from drawing import draw, seconds_per_image
from PIL import Image

from diffusers_wadi import (
    LoRaDConfig,
    WaDiControlNetPipeline,
    WaDiPipeline,
    bundled_checkpoint,
    lorad_target_modules,
)
from diffusers_wadi.shapes import heldout_captions, judge_image, parse_caption, render_scenes
from diffusers_wadi.shapes.conditions import condition_of, mask_iou

SCRIPT = Path(__file__).parent.parent / "training" / "train_shapes_controlnet.py"
GENERATORS = ("teacher", "student")
SCALES = (1.0, 0.5)


def call_of(generator: str, steps: int) -> tuple[str, dict[str, Any]]:
    """A generator's name in the table, and how it is called."""
    if generator == "teacher":
        return f"teacher, {steps} steps", {"adapter": False, "num_inference_steps": steps, "guidance_scale": 3.0}
    return "student, 1 step", {"adapter": True, "num_inference_steps": 1, "guidance_scale": 1.0}


def trained_controlnet(work_dir: Path) -> ControlNetModel:
    """The ControlNet for masks in WORK_DIR/mask, trained there first, with the script's own settings, if need be."""
    folder = work_dir / "mask" / "controlnet"
    if not folder.is_dir():
        threads = ["--num_threads", str(torch.get_num_threads())]
        subprocess.run([sys.executable, str(SCRIPT), "--output_dir", str(work_dir / "mask"), *threads], check=True)
    return ControlNetModel.from_pretrained(folder)


def conditions_for(captions: Sequence[str]) -> list[Image.Image]:
    """The mask of one render of each caption."""
    renders = render_scenes([parse_caption(caption) for caption in captions], seed=5)
    return [Image.fromarray(condition_of(image)) for image in renders]


def judged(images: np.ndarray, captions: Sequence[str], masks: Sequence[Image.Image]) -> dict[str, float]:
    """Mean mask IoU, and what the judge says of the captions."""
    verdicts = [judge_image(image, caption) for image, caption in zip(images, captions)]
    return {
        "mask IoU": float(np.mean([mask_iou(image, np.asarray(mask)) for image, mask in zip(images, masks)])),
        "attributes right": float(np.mean([right for verdict in verdicts for right in verdict.values()])),
        "captions wholly right": float(np.mean([all(verdict.values()) for verdict in verdicts])),
    }


def measure(
    *,
    images: int,
    steps: int,
    work_dir: Path,
    scales: Sequence[float] = SCALES,
    who: Sequence[str] = GENERATORS,
    picture: Path | None = None,
) -> list[dict[str, Any]]:
    """One row for each generator, setting and metric.

    Args:
        images: held-out captions in each cell.
        steps: of the teacher.
        work_dir: where the ControlNet is, or goes.
        scales: controlnet_conditioning_scale of the student's cells with control; the teacher has the first one only.
        who: of `GENERATORS`.
        picture: PNG to write, ten captions wide.
    """
    controlnet = trained_controlnet(Path(work_dir))
    plain = WaDiPipeline.from_pretrained(bundled_checkpoint())
    controlled = WaDiControlNetPipeline.from_pipe(plain, controlnet=controlnet)
    captions = heldout_captions(images, seed=5)
    masks, rows, shown = conditions_for(captions), [], {}
    for generator, how in (call_of(generator, steps) for generator in who):
        for scale in (None, *(scales[:1] if how["num_inference_steps"] > 1 else scales)):
            pipe, setting = (plain, "without control") if scale is None else (controlled, f"mask, scale {scale:g}")
            pipe.set_progress_bar_config(disable=True)
            call = how | ({} if scale is None else {"controlnet_conditioning_scale": scale})
            given = None if scale is None else masks
            drawn = draw(pipe, captions, control=given, **call)
            shown[generator, setting] = drawn
            first = given and given[:1]
            seconds = seconds_per_image(lambda: draw(pipe, captions[:1], control=first, **call))  # noqa: B023
            for metric, value in judged(drawn, captions, masks).items():
                row = {"task": "controlnet", "generator": generator, "setting": setting, "metric": metric}
                rows.append(row | {"value": value, "images": images, "seconds_per_image": seconds})
            print(json.dumps(rows[-3:]), file=sys.stderr, flush=True)
    if picture is not None:
        save_picture(masks, shown, picture)
    return rows


def save_picture(
    masks: Sequence[Image.Image], shown: dict[tuple[str, str], np.ndarray], path: Path, columns: int = 10
) -> None:
    """Top row the masks, then a row for each cell, in order."""
    stacks = [np.stack([np.asarray(mask) for mask in masks]), *shown.values()]
    grid = np.concatenate([np.concatenate(list(stack[:columns]), axis=1) for stack in stacks], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def run_at_real_size(random_sd15: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """One step of 512x512 pixels with a ControlNet of Stable Diffusion 1.5's size and a rank-64 LoRaD, random weights."""
    components = random_sd15()
    unet = components["unet"]
    controlnet = ControlNetModel.from_unet(unet).eval()
    for part in (controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        for parameter in part.parameters():  # zero in a fresh one, and then nothing would be seen of it
            torch.nn.init.normal_(parameter, std=0.02)
    unet.add_adapter(
        LoRaDConfig(r=64, target_modules=lorad_target_modules(unet, role="student")), adapter_name="student"
    )
    pipe = WaDiControlNetPipeline(**components, controlnet=controlnet)
    seen: list[tuple[int, ...]] = []
    controlnet.register_forward_hook(lambda module, args, result: seen.extend(tuple(part.shape) for part in result[0]))
    condition, detector = _condition_512()
    image = pipe("a red ring on a white background", image=condition, output_type="np").images
    return {
        "image": list(image.shape),
        "finite": bool(np.isfinite(image).all()),
        "dtype": str(unet.dtype).removeprefix("torch."),
        "condition": detector,
        "controlnet_parameters": sum(parameter.numel() for parameter in controlnet.parameters()),
        "residuals": [len(seen), list(seen[0]), list(seen[-1])],
    }


def _condition_512() -> tuple[Image.Image, str]:
    scene = parse_caption("a large red ring on a white background")
    render = render_scenes([scene], size=512)[0]
    try:
        from diffusers_wadi.downstream.controlnet import condition_image

        return condition_image(render, "canny"), "canny"
    except ImportError:
        return Image.fromarray(condition_of(render)), "mask"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as one table, a line for each generator and setting."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines = ["| | " + " | ".join([*metrics, "seconds an image"]) + " |", "|---" * (len(metrics) + 2) + "|"]
    cells: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["generator"], row["setting"]), {})[row["metric"]] = row
    for (generator, setting), found in cells.items():
        values = [f"{found[metric]['value']:.3f}" for metric in metrics]
        seconds = f"{next(iter(found.values()))['seconds_per_image']:.3f}"
        lines.append(f"| {generator}, {setting} | " + " | ".join([*values, seconds]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work_dir", type=Path, required=True, help="Folder of the ControlNet; trained there if it is not yet.")
    add("--images", type=int, default=200, help="Held-out captions in each cell. Default: 200.")
    add("--steps", type=int, default=50, help="Steps of the teacher. Default: 50.")
    add("--scales", type=float, nargs="+", default=SCALES, help="Strengths. Default: 1.0 0.5.")
    add("--generators", nargs="+", choices=GENERATORS, default=GENERATORS, help="Default: both.")
    add("--num_threads", type=int, help="CPU threads. Default: torch's choice.")
    add("--picture", type=Path, help="PNG to write.")
    args = parser.parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    options = {"scales": args.scales, "who": args.generators, "picture": args.picture}
    rows = measure(images=args.images, steps=args.steps, work_dir=args.work_dir, **options)
    print(json.dumps(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
