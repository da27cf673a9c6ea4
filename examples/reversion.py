#!/usr/bin/env python
"""One-step images of a relation that `training/train_reversion.py` has learned as `<R>`.

Stable Diffusion 1.5 with the paper authors' one-step weights (some 5 GB are downloaded at the first run); `painted_on` is
the folder of the embedding, or a file of it, `.bin` too:

    python examples/reversion.py --embedding painted_on --prompt "a cat <R> a stone" "a dog <R> a wall"

Shapes World, with the bundled student:

    python examples/reversion.py --model bundled --embedding reversion-beside \
        --prompt "a red heart <R> a blue ring on a white background"

The embedding has to be learned on a model of the same text encoder: Stable Diffusion 1.x and 2.x have different ones.
Written is one row of images for each prompt.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from diffusers_wadi import WaDiPipeline, bundled_checkpoint
from diffusers_wadi._files import writable_folder

AUTHORS, AUTHORS_FILE = "gudaochangsheng/WaDi", "rotated_unet-sdv1-5.safetensors"


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", required=True, nargs="+", help="What to draw, with <R> for the relation; one or several.")
    add("--embedding", required=True, help="Folder, file or Hub repository of the learned embedding.")
    add("--model", default=AUTHORS, help="One-step model or LoRaD adapter, or: bundled. Default: %(default)s.")
    add("--weight_name", help=f"File in the model. Default for the authors' repository: {AUTHORS_FILE}.")
    add("--num_images", type=int, default=4, help="Of each prompt. Default: 4.")
    add("--seed", type=int, default=0, help="Of the first image; the next have the next seeds. Default: 0.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: cuda where there is one.")
    add("--output", default="reversion.png", help="Default: %(default)s.")
    return parser.parse_args(input_args)


def load_pipeline(args: argparse.Namespace) -> WaDiPipeline:
    """In float16 on a GPU; bfloat16 would cost detail, since one step multiplies rounding errors by 14.6."""
    model = bundled_checkpoint() if args.model == "bundled" else args.model
    name = args.weight_name or (AUTHORS_FILE if args.model == AUTHORS else None)
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    pipe = WaDiPipeline.from_pretrained(model, weight_name=name, torch_dtype=dtype).to(args.device)
    pipe.load_textual_inversion(args.embedding)
    return pipe


def main(input_args: list[str] | None = None) -> Path:
    args = parse_args(input_args)
    writable_folder(Path(args.output).parent)
    pipe = load_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    seeds = [torch.Generator().manual_seed(args.seed + i) for _ in args.prompt for i in range(args.num_images)]
    images = pipe(prompts, generator=seeds).images
    make_image_grid(images, rows=len(args.prompt), cols=args.num_images).save(args.output)
    print(f"Wrote {args.output}")
    return Path(args.output)


if __name__ == "__main__":
    main()
