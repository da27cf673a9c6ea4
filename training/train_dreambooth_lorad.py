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
import importlib.util
import logging
import sys
import tempfile
from pathlib import Path

import torch
from diffusers.optimization import SchedulerType

from diffusers_wadi.customization.model import DTYPES, METHODS
from diffusers_wadi.customization.trainer import DreamBoothTrainer
from diffusers_wadi.distillation.adapters import LAYER_SETS
from diffusers_wadi.distillation.distributed import set_num_threads
from diffusers_wadi.distillation.monitoring import tracker_names
from diffusers_wadi.downstream.dreambooth import image_files


def _flag(group, name: str, default, help: str, **kwargs) -> None:
    if default is False:
        kwargs.setdefault("action", "store_true")
    elif "type" not in kwargs and default is not None:
        kwargs["type"] = type(default)
    group.add_argument(f"--{name}", default=default, help=f"{help} (default: %(default)s)", **kwargs)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("model and method")
    g.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Folder or Hub id: Stable Diffusion 1.x, 2.x."
    )
    _flag(g, "revision", None, "Hub revision of it")
    _flag(g, "variant", None, "Weights variant, e.g. fp16")
    _flag(g, "method", "lorad", "What is trained", choices=tuple(METHODS))
    _flag(g, "rank", 64, "Of LoRaD or LoRA, whose alpha is the rank")
    _flag(
        g, "layers", "linear", "UNet layers of LoRaD and LoRA: linear are the 182 of the paper", choices=LAYER_SETS[1:]
    )
    _flag(g, "train_text_encoder", False, "Train the text encoder too: LoRaD or LoRA on its attention, or all of it")
    _flag(g, "output_dir", "dreambooth-model", "Where adapter, checkpoints and samples go")
    _flag(
        g, "base_model_name_or_path", None, "Base named in the adapter's config; None: the model, a folder by its path"
    )


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("images")
    g.add_argument("--instance_data_dir", required=True, help="Folder with images of the subject.")
    g.add_argument("--instance_prompt", required=True, help='What they show, with a rare word: "a photo of sks dog".')
    _flag(g, "with_prior_preservation", False, "Train on images of the class as well, which the model draws itself")
    _flag(g, "class_data_dir", None, "Folder of these; None: class_images in output_dir")
    _flag(g, "class_prompt", None, 'What they show: "a photo of dog"')
    _flag(g, "prior_loss_weight", 1.0, "Weight of their loss")
    _flag(g, "num_class_images", 200, "As many are drawn as are missing in the folder")
    _flag(g, "class_batch_size", 4, "How many are drawn at a time")
    _flag(g, "class_num_inference_steps", 50, "DDIM steps for them")
    _flag(g, "class_guidance_scale", 7.5, "Guidance for them")
    _flag(g, "resolution", None, "Of all images, in pixels; None: the model's own", type=int)
    _flag(g, "center_crop", False, "Cut the middle out of images that are not square, not any part")
    _flag(g, "random_flip", False, "Mirror half of the images; not for subjects with a left and a right")
    _flag(
        g,
        "cache_latents",
        False,
        "Run the VAE's encoder once per image; for images that are not cut or mirrored at random",
    )


def _add_optimiser_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("optimisation")
    _flag(g, "train_batch_size", 1, "Instance images per process and batch; with the prior as many class images")
    _flag(g, "gradient_accumulation_steps", 1, "Batches per update")
    _flag(g, "max_train_steps", None, "Updates; None: 1500, 800 for full", type=int)
    _flag(g, "num_train_epochs", None, "Instead: passes over the instance images", type=int)
    _flag(g, "learning_rate", None, "None: 1e-4, 5e-6 for full", type=float)
    _flag(g, "scale_lr", False, "Multiply it by processes, accumulation and batch size")
    _flag(g, "min_timestep", 0, "Lowest timestep that is trained")
    _flag(g, "max_timestep", None, "Highest one, inclusive; None: the last", type=int)
    kinds = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    _flag(g, "lr_scheduler", "constant", "Its schedule", choices=kinds)
    _flag(g, "lr_warmup_steps", 0, "Steps of its linear increase")
    _flag(g, "adam_beta1", 0.9, "Adam")
    _flag(g, "adam_beta2", 0.999, "Adam")
    _flag(g, "adam_weight_decay", 0.0, "At 0 AdamW is Adam, the paper's; LoRaD's decay pulls the angles to 0")
    _flag(g, "adam_epsilon", 1e-8, "Adam")
    _flag(g, "max_grad_norm", 1.0, "Gradient clipping")
    _flag(g, "use_8bit_adam", False, "bitsandbytes' AdamW8bit")


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("machine, checkpoints, samples")
    _flag(g, "seed", 0, "Of everything")
    _flag(g, "mixed_precision", "no", "Autocast; what is trained stays float32", choices=tuple(DTYPES))
    _flag(g, "gradient_checkpointing", False, "Recompute activations in backward")
    _flag(g, "allow_tf32", False, "TF32 in float32 products of NVIDIA GPUs: faster, 10 bits")
    _flag(g, "num_threads", None, "CPU threads of torch", type=int)
    _flag(g, "checkpointing_steps", 500, "Updates between checkpoints")
    _flag(g, "checkpoints_total_limit", None, "Keep only so many", type=int)
    _flag(g, "resume_from_checkpoint", None, "latest, a folder name in output_dir, or a path")
    _flag(g, "validation_prompt", None, "Of the sample grids; None: there are none")
    _flag(g, "num_validation_images", 4, "Images of a grid")
    _flag(g, "validation_steps", 100, "Updates between sample grids; 0: none")
    _flag(g, "validation_num_inference_steps", 50, "DDIM steps for them")
    _flag(g, "validation_guidance_scale", 7.5, "Guidance for them")
    _flag(g, "validation_seed", 0, "Of their noise")
    _flag(g, "logging_steps", 10, "Updates between logged losses, means since the last time")
    _flag(g, "report_to", "none", "Trackers, with commas between them: tensorboard, wandb, ...; all: those installed")
    _flag(g, "logging_dir", "logs", "Of the trackers, inside output_dir")
    _flag(g, "max_bad_steps", 20, "Stop after so many updates in a row whose gradient is not finite; one is left out")
    g = parser.add_argument_group("upload of a LoRaD to the Hugging Face Hub")
    _flag(g, "push_to_hub", False, "Upload adapter, sample grid and a model card when done")
    _flag(g, "hub_model_id", None, "Repository; None: the name of output_dir, in the account of the token")
    _flag(g, "hub_token", None, "Token with the right to write; None: that of `hf auth login`")
    _flag(g, "hub_private", False, "Make the repository private, if it is new")
    _flag(g, "hub_license", None, "Licence that the card names, e.g. apache-2.0")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Flags of the script, checked; `input_args` instead of the command line in tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in (_add_model_flags, _add_data_flags, _add_optimiser_flags, _add_machine_flags):
        add(parser)
    args = parser.parse_args(input_args)
    check_args(args)
    return args


AT_LEAST = {
    1: "rank num_class_images class_batch_size class_num_inference_steps resolution train_batch_size "
    "gradient_accumulation_steps num_train_epochs num_threads checkpointing_steps checkpoints_total_limit "
    "num_validation_images validation_num_inference_steps logging_steps max_bad_steps",
    0: "max_train_steps prior_loss_weight class_guidance_scale lr_warmup_steps adam_weight_decay validation_steps "
    "validation_guidance_scale seed adam_beta1 adam_beta2 min_timestep",
}


def check_args(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: names the flag, its value and what is expected.
    """
    rules = [(n, low) for low, names in AT_LEAST.items() for n in names.split()]
    for name, low in rules:
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise ValueError(f"--{name} is {value}, expected at least {low}.")
    for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}, expected more than 0.")
    if args.max_train_steps is not None and args.num_train_epochs is not None:
        raise ValueError("--max_train_steps and --num_train_epochs are both given. Leave one out.")
    check_data_flags(args)
    tracker_names(args.report_to)
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam needs bitsandbytes, which is not installed: pip install bitsandbytes.")
    if args.push_to_hub and args.method != "lorad":
        raise ValueError(f"--push_to_hub is for --method lorad, not {args.method}. Use `hf upload` when it is done.")
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written to ({error}). Choose another.") from error


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
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    set_num_threads(args.num_threads)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if received := DreamBoothTrainer(args).train():
        sys.exit(128 + received)


if __name__ == "__main__":
    main(parse_args())
