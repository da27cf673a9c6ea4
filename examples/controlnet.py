#!/usr/bin/env python
"""One-step images that keep to a condition, at several strengths of control side by side.

Stable Diffusion 1.5 with the paper authors' one-step weights (some 5 GB are downloaded at the first run):

    pip install "diffusers-wadi[controlnet]"
    python examples/controlnet.py --image house.jpg --detector canny --prompt "a house in winter, oil painting"

Shapes World, with the bundled student and a ControlNet of `training/train_shapes_controlnet.py`:

    python examples/controlnet.py --model bundled --controlnet shapes-controlnet/controlnet --image mask.png --detector none \
        --prompt "a large red heart on a white background"

ControlNets were trained for many steps, and one step has to take all of their effect at once: look at the strengths and
choose. Written are the condition and one image for each strength, in one row.
"""

import argparse
from pathlib import Path

import torch
from diffusers import ControlNetModel
from diffusers.utils import make_image_grid

from diffusers_wadi import WaDiControlNetPipeline, bundled_checkpoint
from diffusers_wadi._files import writable_folder
from diffusers_wadi.downstream.controlnet import condition_image


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", required=True, help="What to draw.")
    add("--image", required=True, help="File or address of the image that the condition is taken from.")
    add("--detector", default="canny", help="Of controlnet_aux; none: the image is a condition. Default: canny.")
    add(
        "--model",
        default="gudaochangsheng/WaDi",
        help="One-step model or LoRaD adapter, or: bundled. Default: %(default)s.",
    )
    add(
        "--weight_name",
        help="File in the model. Default for the authors' repository: rotated_unet-sdv1-5.safetensors.",
    )
    add("--controlnet", default="lllyasviel/control_v11p_sd15_canny", help="Of the same family. Default: %(default)s.")
    add("--scales", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.25, 1.5], help="Strengths. Default: 0.5 to 1.5.")
    add("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="Default: that of the image.")
    add("--seed", type=int, default=0, help="Of the start noise, the same for every strength. Default: 0.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: cuda where there is one.")
    add("--output", default="controlnet.png", help="Default: %(default)s.")
    return parser.parse_args(input_args)


def load_pipeline(args: argparse.Namespace) -> WaDiControlNetPipeline:
    """In float16 on a GPU; bfloat16 would cost detail, since one step multiplies rounding errors by 14.6."""
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    controlnet = ControlNetModel.from_pretrained(args.controlnet, dtype=dtype)
    model = bundled_checkpoint() if args.model == "bundled" else args.model
    name = args.weight_name or ("rotated_unet-sdv1-5.safetensors" if args.model == "gudaochangsheng/WaDi" else None)
    return WaDiControlNetPipeline.from_pretrained(model, weight_name=name, controlnet=controlnet, dtype=dtype).to(
        args.device
    )


def main(args: argparse.Namespace) -> None:
    output = Path(args.output)
    writable_folder(output.parent)
    detector = None if args.detector == "none" else args.detector
    condition = condition_image(args.image, detector, size=args.size and tuple(args.size), device=args.device)
    pipe = load_pipeline(args)
    images = [condition]
    for scale in args.scales:
        generator = torch.Generator().manual_seed(args.seed)  # on the CPU, so that a seed is one image everywhere
        images += pipe(args.prompt, image=condition, controlnet_conditioning_scale=scale, generator=generator).images
    make_image_grid(images, rows=1, cols=len(images)).save(output)
    print(f"wrote {output}: the condition, then strengths {', '.join(map(str, args.scales))}")


if __name__ == "__main__":
    main(parse_args())
