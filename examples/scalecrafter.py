#!/usr/bin/env python
"""A one-step image larger than the model was trained on, without and with ScaleCrafter side by side.

The bundled model, which was trained at 64x64, at twice that; nothing is downloaded:

    python examples/scalecrafter.py

Stable Diffusion 1.5 with the paper authors' one-step weights (some 5 GB are downloaded at the first run), at 1024x1024:

    python examples/scalecrafter.py --model gudaochangsheng/WaDi --prompt "a cabin by a lake, oil painting" \
        --height 1024 --width 1024

One step has no undilated steps after it that would mend the texture, so the best strength may be below 1: look at several.
Written are the image without ScaleCrafter and one for each strength, in one row.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from diffusers_wadi import WaDiPipeline, bundled_checkpoint
from diffusers_wadi._files import writable_folder
from diffusers_wadi.downstream.scalecrafter import enable_synced_tiling, scalecrafter, scalecrafter_settings


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", default="a large red heart on a white background", help="What to draw. Default: %(default)s.")
    add("--height", type=int, default=128, help="In pixels, a multiple of 8. Default: 128.")
    add("--width", type=int, default=128, help="In pixels, a multiple of 8. Default: 128.")
    add("--model", default="bundled", help="One-step model or LoRaD adapter. Default: the bundled one.")
    add(
        "--weight_name",
        help="File in the model. Default for the authors' repository: rotated_unet-sdv1-5.safetensors.",
    )
    add("--preset", choices=["sd15", "sd21", "rule"], help="Default: what fits the model and the size.")
    add("--strengths", type=float, nargs="+", default=[0.5, 0.75, 1.0], help="Default: 0.5 0.75 1.0.")
    add("--dispersed", action="store_true", help="Disperse kernels as well.")
    add("--tiled", action="store_true", help="Decode in tiles that share their statistics, to save memory.")
    add("--seed", type=int, default=0, help="Of the start noise, the same for every image. Default: 0.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: cuda where there is one.")
    add("--output", default="scalecrafter.png", help="Default: %(default)s.")
    return parser.parse_args(input_args)


def load_pipeline(args: argparse.Namespace) -> WaDiPipeline:
    """In float16 on a GPU; bfloat16 would cost detail, since one step multiplies rounding errors by 14.6."""
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    model = bundled_checkpoint() if args.model == "bundled" else args.model
    name = args.weight_name or ("rotated_unet-sdv1-5.safetensors" if args.model == "gudaochangsheng/WaDi" else None)
    return WaDiPipeline.from_pretrained(model, weight_name=name, dtype=dtype).to(args.device)


def main(args: argparse.Namespace) -> None:
    output = Path(args.output)
    writable_folder(output.parent)
    pipe = load_pipeline(args)
    if args.tiled:
        enable_synced_tiling(pipe, storage_device="cpu")
    size = {"height": args.height, "width": args.width}
    settings = scalecrafter_settings(pipe, **size, preset=args.preset)
    print(f"factors by {settings.source}: {settings.factors}")

    def draw():
        generator = torch.Generator().manual_seed(args.seed)  # on the CPU, so that a seed is one image everywhere
        return pipe(args.prompt, generator=generator, **size).images[0]

    images = [draw()]
    for strength in args.strengths:
        with scalecrafter(pipe, **size, preset=args.preset, strength=strength, dispersed=args.dispersed):
            images.append(draw())
    make_image_grid(images, rows=1, cols=len(images)).save(output)
    print(f"wrote {output}: without ScaleCrafter, then strengths {', '.join(map(str, args.strengths))}")


if __name__ == "__main__":
    main(parse_args())
