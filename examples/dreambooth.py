"""Draw a subject that `training/train_dreambooth_lorad.py` has learned: in many steps, or in one.

With the multi-step model that it was trained on (DDIM, 50 steps, as in the paper):

    python examples/dreambooth.py --subject dreambooth-dog --base stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --prompt "a photo of sks dog in a bucket"

With a one-step LoRaD of the same model, whose angles the subject's are added to:

    python examples/dreambooth.py --subject dreambooth-dog --student wadi-sd15 --weight 0.8 \
        --prompt "a photo of sks dog in a bucket"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from diffusers_wadi import WaDiPipeline
from diffusers_wadi.downstream.dreambooth import load_subject, sampling_scheduler


def load_pipeline(args: argparse.Namespace) -> StableDiffusionPipeline:
    """The multi-step model, or its one-step student; with the subject."""
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    if args.student:
        pipe = WaDiPipeline.from_pretrained(args.student, dtype=dtype)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(args.base, dtype=dtype)
        pipe.scheduler = sampling_scheduler(pipe.scheduler)
    load_subject(pipe, args.subject, args.weight)
    return pipe.to(args.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", required=True, help="Folder or Hub name of a subject's LoRaD or LoRA.")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--base", help="Multi-step model that it was trained on.")
    model.add_argument("--student", help="Instead: a one-step LoRaD of that model, or a pipeline with it.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--weight", type=float, default=1.0, help="Factor on the subject's angles. Default: 1.")
    parser.add_argument("--steps", type=int, default=50, help="Of the multi-step model. Default: 50.")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="Of the multi-step model. Default: 7.5.")
    parser.add_argument("--num_images", type=int, default=4, help="Default: 4.")
    parser.add_argument("--seed", type=int, default=0, help="Default: 0.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", default=".", help="For subject-0.png, subject-1.png, ... Default: here.")
    args = parser.parse_args()
    pipe = load_pipeline(args)
    call = {} if args.student else {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    seeds = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]
    images = pipe([args.prompt] * args.num_images, generator=seeds, **call).images
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(Path(args.output_dir) / f"subject-{i}.png")
        print(Path(args.output_dir) / f"subject-{i}.png")


if __name__ == "__main__":
    main()
