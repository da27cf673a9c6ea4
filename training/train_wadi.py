"""Distil a Stable Diffusion teacher into a one-step student by score distillation with LoRaD (WaDi).

One frozen UNet carries two LoRaD adapters: `student` (the one-step generator) and `fake` (the score of its images);
with both off it is the teacher. No images are needed, only prompts. Defaults are those of the authors' release.

    accelerate launch training/train_wadi.py --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_prompts prompts.txt --mixed_precision fp16 --output_dir wadi-sd15

    python training/train_wadi.py --pretrained_teacher_model TEACHER --shapes_captions 20000 --student_rank 32 \
        --fake_rank 8 --train_batch_size 32 --max_train_steps 4000 --validation_steps 250 --output_dir wadi-shapes

The output folder gets the student (`pytorch_lorad_weights.safetensors`, `adapter_config.json`), the one-step
scheduler, sample grids in `samples/`, and `checkpoint-N/` folders for `--resume_from_checkpoint latest`.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
from pathlib import Path

import torch
from diffusers.optimization import SchedulerType

from diffusers_wadi.distillation import losses
from diffusers_wadi.distillation.trainer import DTYPES, WaDiTrainer


def _flag(group, name: str, default, help: str, **kwargs) -> None:
    if default is False:
        kwargs = {"action": "store_true"}
    elif "type" not in kwargs and default is not None:
        kwargs["type"] = type(default)
    group.add_argument(f"--{name}", default=default, help=f"{help} (default: %(default)s)", **kwargs)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("teacher, prompts, output")
    g.add_argument("--pretrained_teacher_model", required=True, help="Folder or Hub id of the SD teacher pipeline.")
    _flag(g, "revision", None, "Hub revision of the teacher")
    _flag(g, "variant", None, "Weights variant of the teacher, e.g. fp16")
    _flag(
        g,
        "base_model_name_or_path",
        None,
        "Base named in the exported adapter's config; None: the teacher, a folder by its absolute path",
    )
    _flag(g, "output_dir", "wadi-model", "Where student, checkpoints and samples go")
    _flag(g, "adapter_dtype", "fp32", "Of the exported student's file; training is fp32", choices=("fp32", "fp16"))
    _flag(g, "train_prompts", None, "Prompts: .txt, one per line, or .json, a list of strings")
    _flag(g, "shapes_captions", None, "Instead of a file: this many Shapes World captions", type=int)
    _flag(g, "max_cached_prompts", 20_000, "With more prompts, text is encoded at each step instead of once")
    _flag(g, "embedding_dtype", "fp32", "Precision of the cached text embeddings", choices=("fp32", "fp16"))
    _flag(g, "text_batch_size", 64, "Batch of the text encoder while the cache is filled")
    _flag(g, "resolution", None, "Image size; None: the teacher's own", type=int)
    _flag(g, "init_student", None, "LoRaD adapter (folder or file) to start the student from")


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("method (defaults: authors' release)")
    _flag(g, "guidance_scale", 1.5, "Guidance of the teacher's score")
    _flag(
        g, "fake_guidance_scale", None, "Guidance of the fake score; None: the teacher's; 1 saves a pass", type=float
    )
    _flag(g, "student_rank", 256, "LoRaD rank of the student")
    _flag(g, "student_convolutions", False, "Turn the student's convolutions too (the paper's Linear + Conv)")
    _flag(g, "fake_rank", 32, "LoRaD rank of the fake-score network")
    _flag(
        g, "score_weighting", "sigma2", "sigma_t^2, or DMD2's 1/mean|x0 - x0_teacher|", choices=losses.SCORE_WEIGHTINGS
    )
    _flag(g, "fake_loss_weighting", "alpha2", "Weight of the fake's loss", choices=losses.FAKE_WEIGHTINGS)
    _flag(
        g, "fake_updates_per_step", 1, "Fake updates per student update; the further ones on fresh images, before it"
    )
    _flag(g, "min_timestep", 20, "Lowest timestep of the score difference")
    _flag(g, "max_timestep", 980, "Highest timestep of the score difference, inclusive")
    _flag(g, "fake_min_timestep", 0, "Lowest timestep of the fake's loss")
    _flag(g, "fake_max_timestep", None, "Highest timestep of the fake's loss, inclusive; None: T - 1", type=int)
    _flag(g, "proportion_empty_prompts", 0.1, "How often the fake trains on the empty prompt")
    _flag(
        g, "empty_prompts_per", "batch", "Whether whole batches or single samples get it", choices=("batch", "sample")
    )
    _flag(
        g,
        "terminal_alpha_cumprod",
        None,
        "alpha_bar of the student's step. None: the schedule's own (SD: 0.00466), so that the student runs with the "
        "teacher's schedule in stock pipelines; 0.0047 is the release's, 0.4%% less gain",
        type=float,
    )


def _add_warmup_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("regression on the teacher's samples (not in the paper; DMD's ODE pairs)")
    _flag(g, "warmup_regression_steps", 0, "Student updates by regression before score distillation")
    _flag(g, "warmup_regression_pairs", 10_000, "How many (noise, caption, image) examples the teacher makes for it")
    _flag(g, "warmup_num_inference_steps", 25, "DDIM steps of the teacher for these")
    _flag(g, "warmup_guidance_scale", 3.0, "Guidance of the teacher for these")
    _flag(g, "warmup_sample_batch_size", 64, "Batch of the teacher for these")
    _flag(g, "warmup_learning_rate", 1e-3, "Peak rate of the warm start, decayed to 0 along a cosine")
    _flag(g, "warmup_lr_warmup_steps", 0, "Linear increase of that rate")
    _flag(
        g, "fake_warmup_steps", 0, "Updates of the fake alone after it: it starts as the teacher, not as the student"
    )
    _flag(g, "regression_loss", "mse", "Distance in x0", choices=losses.REGRESSION_LOSSES)
    _flag(g, "huber_delta", 0.1, "Where --regression_loss huber turns linear")
    _flag(g, "regression_weight", 0.0, "Weight of the regression loss during score distillation (DMD: 0.25)")


def _add_optimiser_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("optimisation")
    _flag(g, "train_batch_size", 16, "Batch per process")
    _flag(g, "gradient_accumulation_steps", 1, "Batches per update")
    _flag(g, "num_train_epochs", 2, "Passes over the prompts if --max_train_steps is not given")
    _flag(g, "max_train_steps", None, "Student updates by score distillation", type=int)
    _flag(g, "learning_rate", 1e-4, "Of the student")
    _flag(g, "fake_learning_rate", 1e-2, "Of the fake-score network")
    # piecewise_constant wants rules of its own, for which there is no flag.
    kinds = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    _flag(g, "lr_scheduler", "constant", "Schedule of both rates", choices=kinds)
    _flag(g, "lr_warmup_steps", 0, "Steps of its linear increase")
    _flag(g, "adam_beta1", 0.9, "Adam")
    _flag(g, "adam_beta2", 0.999, "Adam")
    _flag(g, "adam_weight_decay", 0.0, "AdamW; it pulls angles to 0, that is to the teacher")
    _flag(g, "adam_epsilon", 1e-8, "Adam")
    _flag(g, "max_grad_norm", 1.0, "Gradient clipping, of each network by itself")
    _flag(g, "use_8bit_adam", False, "bitsandbytes' AdamW8bit, as in the release's scripts")
    _flag(g, "use_ema", False, "Average the student's factors; the average is validated and exported")
    _flag(g, "ema_decay", 0.999, "Highest decay of that average; it starts lower")


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("machine, checkpoints, samples")
    _flag(g, "seed", 0, "Of everything")
    _flag(
        g,
        "mixed_precision",
        "no",
        "Autocast of the UNet; x0, losses and angles stay fp32",
        choices=("no", "fp16", "bf16"),
    )
    _flag(
        g, "base_dtype", None, "Of the frozen UNet; None: as mixed_precision, fp32 on the CPU", choices=tuple(DTYPES)
    )
    _flag(
        g,
        "attention",
        "auto",
        "sdpa: torch's fused attention; plain: matrix products and softmax; auto: plain on the CPU, else sdpa",
        choices=("auto", "sdpa", "plain"),
    )
    _flag(g, "gradient_checkpointing", False, "Recompute activations in backward")
    _flag(g, "torch_compile", False, "Compile the UNet, once per role")
    _flag(g, "channels_last", False, "Memory format of the UNet")
    _flag(g, "num_threads", None, "CPU threads of torch", type=int)
    _flag(g, "checkpointing_steps", 500, "Updates between checkpoints")
    _flag(g, "checkpoints_total_limit", None, "Keep only so many", type=int)
    _flag(g, "resume_from_checkpoint", None, "latest, a folder name in output_dir, or a path")
    _flag(g, "validation_steps", 200, "Updates between sample grids; 0: none")
    _flag(g, "validation_prompts", None, "Prompts of the grid; None: the first of the training prompts", nargs="+")
    _flag(g, "num_validation_images", 8, "Images of the grid if --validation_prompts is not given")
    _flag(g, "validation_seed", 0, "Of the grid's noise")
    _flag(g, "logging_steps", 10, "Updates between logged losses")
    _flag(g, "report_to", "none", "Tracker: none (none is required to be installed), tensorboard, wandb, comet_ml")
    _flag(g, "logging_dir", "logs", "Of the tracker, inside output_dir")


def _add_hub_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("upload of the student to the Hugging Face Hub")
    _flag(g, "push_to_hub", False, "Upload student, scheduler, sample grid and a model card when done")
    _flag(g, "hub_model_id", None, "Repository; None: the name of output_dir, in the account of the token")
    _flag(g, "hub_token", None, "Token with the right to write; None: that of `hf auth login`")
    _flag(g, "hub_private", False, "Make the repository private, if it is new")
    _flag(g, "hub_license", None, "Licence that the card names, e.g. apache-2.0")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Flags of the script; `input_args` instead of the command line in tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_data_flags(parser)
    for add in (_add_method_flags, _add_warmup_flags, _add_optimiser_flags, _add_machine_flags, _add_hub_flags):
        add(parser)
    args = parser.parse_args(input_args)
    check_args(args)
    return args


AT_LEAST = {
    1: "student_rank fake_rank fake_updates_per_step train_batch_size gradient_accumulation_steps num_train_epochs "
    "checkpointing_steps checkpoints_total_limit logging_steps num_threads text_batch_size shapes_captions "
    "warmup_regression_pairs warmup_num_inference_steps warmup_sample_batch_size num_validation_images resolution",
    0: "max_train_steps warmup_regression_steps fake_warmup_steps warmup_lr_warmup_steps regression_weight guidance_scale "
    "fake_guidance_scale warmup_guidance_scale min_timestep fake_min_timestep lr_warmup_steps adam_weight_decay "
    "validation_steps max_cached_prompts seed",
}
POSITIVE = "learning_rate fake_learning_rate warmup_learning_rate adam_epsilon max_grad_norm huber_delta"
FRACTIONS = "proportion_empty_prompts adam_beta1 adam_beta2 ema_decay"


def check_args(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: names the flag, its value and what is expected.
    """
    rules = [
        (n, lambda v, low=low: v >= low, f"at least {low}") for low, names in AT_LEAST.items() for n in names.split()
    ]
    rules += [(n, lambda v: v > 0, "more than 0") for n in POSITIVE.split()]
    rules += [(n, lambda v: 0 <= v <= 1, "from 0 to 1") for n in FRACTIONS.split()]
    rules += [("terminal_alpha_cumprod", lambda v: 0 < v < 1, "between 0 and 1")]
    for name, holds, expectation in rules:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"--{name} is {value}, expected {expectation}.")
    if args.min_timestep > args.max_timestep:
        raise ValueError(f"--min_timestep {args.min_timestep} is above --max_timestep {args.max_timestep}.")
    if args.fake_max_timestep is not None and args.fake_min_timestep > args.fake_max_timestep:
        raise ValueError(
            f"--fake_min_timestep {args.fake_min_timestep} is above --fake_max_timestep {args.fake_max_timestep}."
        )
    if (args.train_prompts is None) == (args.shapes_captions is None):
        raise ValueError("Give prompts by exactly one of --train_prompts and --shapes_captions.")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise ValueError(f"--report_to {args.report_to}: that package is not installed. Install it or use none.")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam needs bitsandbytes, which is not installed: pip install bitsandbytes.")
    if args.init_student is not None and not Path(args.init_student).exists():
        raise ValueError(f"--init_student {args.init_student} does not exist, expected a LoRaD folder or file.")
    check_output_dir(Path(args.output_dir))


def check_output_dir(folder: Path) -> None:
    """Make `folder` and write a file in it, so that hours of training are not lost at the first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to ({error}). Choose another folder.") from error


def main(args: argparse.Namespace) -> None:
    """Train with checked flags `args`; the student is in `args.output_dir` afterwards."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    WaDiTrainer(args).train()


if __name__ == "__main__":
    main(parse_args())
