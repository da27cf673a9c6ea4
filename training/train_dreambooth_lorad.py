"""DreamBooth: teach a Stable Diffusion model a subject from 3 to 10 images, as a LoRaD adapter (or LoRA, or all weights).

    accelerate launch training/train_dreambooth_lorad.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --instance_data_dir dog \
        --instance_prompt "a photo of sks dog" --with_prior_preservation --class_prompt "a photo of dog" \
        --validation_prompt "a photo of sks dog in a bucket" --mixed_precision fp16 --output_dir dreambooth-dog

The output folder gets the adapter (`pytorch_lorad_weights.safetensors`, `adapter_config.json`; with `--method lora`
`pytorch_lora_weights.safetensors`; with `--method full` a whole pipeline), sample grids in `samples/`, and
`checkpoint-N/` folders for `--resume_from_checkpoint latest`. Defaults are those of the paper: LoRaD and LoRA of rank
64, learning rate 1e-4, 1500 steps; full 5e-6, 800 steps; Adam; prior weight 1; 200 class images.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from diffusers_wadi.customization.model import METHODS
from diffusers_wadi.customization.trainer import DreamBoothTrainer
from diffusers_wadi.distillation.adapters import LAYER_SETS
from diffusers_wadi.distillation.flags import (
    MIXED_PRECISION,
    add_adam_flags,
    add_flag,
    add_hub_flags,
    add_schedule_flags,
    add_state_flags,
    begin,
    check_numbers,
    check_output_dir,
    check_packages,
)
from diffusers_wadi.downstream.dreambooth import image_files


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("model and method")
    g.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Folder or Hub id: Stable Diffusion 1.x, 2.x."
    )
    add_flag(g, "revision", None, "Hub revision of it")
    add_flag(g, "variant", None, "Weights variant, e.g. fp16")
    add_flag(g, "method", "lorad", "What is trained", choices=tuple(METHODS))
    add_flag(g, "rank", 64, "Of LoRaD or LoRA, whose alpha is the rank")
    add_flag(
        g, "layers", "linear", "UNet layers of LoRaD and LoRA: linear are the 182 of the paper", choices=LAYER_SETS[1:]
    )
    add_flag(
        g, "train_text_encoder", False, "Train the text encoder too: LoRaD or LoRA on its attention, or all of it"
    )
    add_flag(g, "output_dir", "dreambooth-model", "Where adapter, checkpoints and samples go")
    add_flag(
        g, "base_model_name_or_path", None, "Base named in the adapter's config; None: the model, a folder by its path"
    )


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("images")
    g.add_argument("--instance_data_dir", required=True, help="Folder with images of the subject.")
    g.add_argument("--instance_prompt", required=True, help='What they show, with a rare word: "a photo of sks dog".')
    add_flag(g, "with_prior_preservation", False, "Train on images of the class as well, which the model draws itself")
    add_flag(g, "class_data_dir", None, "Folder of these; None: class_images in output_dir")
    add_flag(g, "class_prompt", None, 'What they show: "a photo of dog"')
    add_flag(g, "prior_loss_weight", 1.0, "Weight of their loss")
    add_flag(g, "num_class_images", 200, "As many are drawn as are missing in the folder")
    add_flag(g, "class_batch_size", 4, "How many are drawn at a time")
    add_flag(g, "class_num_inference_steps", 50, "DDIM steps for them")
    add_flag(g, "class_guidance_scale", 7.5, "Guidance for them")
    add_flag(g, "resolution", None, "Of all images, in pixels; None: the model's own", type=int)
    add_flag(g, "center_crop", False, "Cut the middle out of images that are not square, not any part")
    add_flag(g, "random_flip", False, "Mirror half of the images; not for subjects with a left and a right")
    add_flag(
        g,
        "cache_latents",
        False,
        "Run the VAE's encoder once per image; for images that are not cut or mirrored at random",
    )


def _add_optimiser_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("optimisation")
    add_flag(g, "train_batch_size", 1, "Instance images per process and batch; with the prior as many class images")
    add_flag(g, "gradient_accumulation_steps", 1, "Batches per update")
    add_flag(g, "max_train_steps", None, "Updates; None: 1500, 800 for full", type=int)
    add_flag(g, "num_train_epochs", None, "Instead: passes over the instance images", type=int)
    add_flag(g, "learning_rate", None, "None: 1e-4, 5e-6 for full", type=float)
    add_flag(g, "scale_lr", False, "Multiply it by processes, accumulation and batch size")
    add_flag(g, "min_timestep", 0, "Lowest timestep that is trained")
    add_flag(g, "max_timestep", None, "Highest one, inclusive; None: the last", type=int)
    add_schedule_flags(g, "Its schedule")
    add_adam_flags(g, 0.0, "At 0 AdamW is Adam, the paper's; LoRaD's decay pulls the angles to 0")
    add_flag(g, "max_grad_norm", 1.0, "Gradient clipping")
    add_flag(g, "use_8bit_adam", False, "bitsandbytes' AdamW8bit")


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("machine, checkpoints, samples")
    add_flag(g, "seed", 0, "Of everything")
    add_flag(g, "mixed_precision", "no", "Autocast; what is trained stays float32", choices=tuple(MIXED_PRECISION))
    add_flag(g, "gradient_checkpointing", False, "Recompute activations in backward")
    add_flag(g, "allow_tf32", False, "TF32 in float32 products of NVIDIA GPUs: faster, 10 bits")
    add_state_flags(g, checkpointing_steps=500)
    add_flag(g, "validation_prompt", None, "Of the sample grids; None: there are none")
    add_flag(g, "num_validation_images", 4, "Images of a grid")
    add_flag(g, "validation_steps", 100, "Updates between sample grids; 0: none")
    add_flag(g, "validation_num_inference_steps", 50, "DDIM steps for them")
    add_flag(g, "validation_guidance_scale", 7.5, "Guidance for them")
    add_flag(g, "validation_seed", 0, "Of their noise")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Flags of the script, checked; `input_args` instead of the command line in tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in (_add_model_flags, _add_data_flags, _add_optimiser_flags, _add_machine_flags):
        add(parser)
    add_hub_flags(parser, "LoRaD")
    args = parser.parse_args(input_args)
    check_args(args)
    return args


AT_LEAST = {
    1: "rank num_class_images class_batch_size class_num_inference_steps resolution train_batch_size "
    "gradient_accumulation_steps num_train_epochs num_threads checkpointing_steps checkpoints_total_limit "
    "num_validation_images validation_num_inference_steps logging_steps max_bad_steps",
    0: "max_train_steps prior_loss_weight class_guidance_scale lr_warmup_steps adam_weight_decay validation_steps "
    "validation_guidance_scale seed min_timestep",
}


def check_args(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: names the flag, its value and what is expected.
    """
    positive = "learning_rate max_grad_norm adam_epsilon"
    check_numbers(args, AT_LEAST, positive, below_1="adam_beta1 adam_beta2")
    if args.max_train_steps is not None and args.num_train_epochs is not None:
        raise ValueError("--max_train_steps and --num_train_epochs are both given. Leave one out.")
    check_data_flags(args)
    check_packages(args.report_to, args.use_8bit_adam)
    if args.push_to_hub and args.method != "lorad":
        raise ValueError(f"--push_to_hub is for --method lorad, not {args.method}. Use `hf upload` when it is done.")
    check_output_dir(args.output_dir)


def check_data_flags(args: argparse.Namespace) -> None:
    """Refuse missing folders, prompts that are missing, and class images that cannot be drawn."""
    for name in ("instance_prompt", "class_prompt", "validation_prompt"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            raise ValueError(f"--{name} is empty, expected a few words.")
    image_files(args.instance_data_dir, "--instance_data_dir")
    if not args.with_prior_preservation:
        if args.class_prompt or args.class_data_dir:
            logging.warning("--class_prompt and --class_data_dir do nothing without --with_prior_preservation")
        return
    if args.class_prompt is None:
        raise ValueError("--with_prior_preservation needs --class_prompt, for example 'a photo of dog'.")
    if (
        args.class_data_dir is not None
        and Path(args.class_data_dir).resolve() == Path(args.instance_data_dir).resolve()
    ):
        raise ValueError(f"--class_data_dir and --instance_data_dir are the same folder, {args.class_data_dir}.")


def main(args: argparse.Namespace) -> None:
    """Train with checked flags `args`; the result is in `args.output_dir` afterwards.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped it, after a checkpoint; 130 or 143.
    """
    begin(args.num_threads, args.allow_tf32)
    if received := DreamBoothTrainer(args).train():
        sys.exit(128 + received)


if __name__ == "__main__":
    main(parse_args())
