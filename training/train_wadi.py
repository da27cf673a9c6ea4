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
import logging
import os
import sys
from pathlib import Path

from diffusers_wadi._optional import require
from diffusers_wadi.distillation import adapters, losses, objectives
from diffusers_wadi.distillation.flags import (
    DTYPES,
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
from diffusers_wadi.distillation.planning import make_plan
from diffusers_wadi.distillation.trainer import WaDiTrainer

DEFAULT_ROLE_RANKS = {"student": 256, "fake": 32}


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("teacher, output")
    g.add_argument("--pretrained_teacher_model", required=True, help="Folder or Hub id: SD 1.x, 2.x or PixArt-alpha.")
    add_flag(g, "revision", None, "Hub revision of the teacher")
    add_flag(g, "variant", None, "Weights variant of the teacher, e.g. fp16")
    add_flag(
        g,
        "base_model_name_or_path",
        None,
        "Base named in the exported adapter's config; None: the teacher, a folder by its absolute path",
    )
    add_flag(g, "output_dir", "wadi-model", "Where student, checkpoints and samples go")
    add_flag(g, "adapter_dtype", "fp32", "Of the exported student's file; training is fp32", choices=("fp32", "fp16"))
    add_flag(g, "resolution", None, "Image size; None: the teacher's own", type=int)
    add_flag(g, "init_student", None, "LoRaD adapter (folder or file) to start the student from")


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("prompts (from one source) and their text embeddings")
    add_flag(g, "train_prompts", None, "File: .txt (one a line), .json, .jsonl (also JourneyDB's), .csv or .parquet")
    add_flag(g, "dataset_name", None, "Instead: a data set of the Hub, or a folder, for the package datasets")
    add_flag(g, "dataset_config_name", None, "Configuration of the data set")
    add_flag(g, "dataset_split", "train", "Split of the data set")
    add_flag(g, "streaming", False, "Read the data set from the Hub without storing it")
    add_flag(g, "shapes_captions", None, "Instead: this many Shapes World captions", type=int)
    add_flag(g, "caption_column", None, "Column, or key of the objects, that holds the text")
    add_flag(g, "max_train_samples", None, "Only the first so many prompts that remain", type=int)
    add_flag(
        g,
        "keep_repeated_prompts",
        False,
        "Keep every occurrence of a prompt that is repeated: as often as it is given it is drawn",
    )
    add_flag(g, "skip_bad_lines", False, "Leave out records that cannot be read, instead of refusing the source")
    add_flag(
        g,
        "text_encoder_dtype",
        None,
        "Of the text encoder; None: fp32 for CLIP, for T5 as the frozen denoiser",
        choices=tuple(DTYPES),
    )
    add_flag(g, "max_sequence_length", None, "Tokens of T5's text; None: 120, as PixArt's stock pipeline", type=int)
    add_flag(
        g,
        "precompute_text_embeddings",
        False,
        "Encode all prompts once, into files that are mapped, instead of a batch at each step",
    )
    add_flag(g, "text_cache_dir", None, "Where these lie, for this and other runs; None: text_cache in output_dir")
    add_flag(g, "embedding_dtype", "fp32", "Their precision", choices=("fp32", "fp16"))
    add_flag(g, "text_batch_size", 64, "Batch of the text encoder while they are computed")


def _add_role_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("student and fake: what is trained (defaults: authors' release)")
    for role, rank in DEFAULT_ROLE_RANKS.items():
        add_flag(g, f"{role}_adapter", "lorad", f"What the {role} is made of", choices=adapters.KINDS)
        add_flag(g, f"{role}_rank", rank, "Rank of its LoRaD, LoRA or DoRA")
        add_flag(g, f"{role}_alpha", None, "Alpha of its LoRA or DoRA, scaled by alpha / rank; None: rank", type=float)
        add_flag(
            g,
            f"{role}_layers",
            "paper",
            "Which layers: linear (the paper's for LoRaD), linear_conv (Tab. 7), projections (Tab. 2: with 1x1 "
            "convolutions), qkv, qv; paper: projections for a LoRA or DoRA student, else linear",
            choices=adapters.LAYER_SETS,
        )
        add_flag(
            g,
            f"{role}_init",
            "paper",
            "Start: paper: as the teacher; xavier, zero_b (LoRaD) or gaussian (LoRA)",
            choices=sorted({init for inits in adapters.INITS.values() for init in inits}),
        )
    add_flag(g, "student_convolutions", False, "Short for --student_layers linear_conv")


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("method (defaults: authors' release)")
    add_flag(
        g,
        "objective",
        "wadi",
        "Preset of flags, which others given beside it override; what it sets is shown at the start",
        choices=tuple(objectives.OBJECTIVES),
    )
    add_flag(
        g, "score_loss", "vsd", "VSD, or SiD's with gradients through the scores", choices=objectives.SCORE_LOSSES
    )
    add_flag(g, "sid_alpha", 1.0, "alpha of --score_loss sid")
    add_flag(g, "t_init", None, "Timestep of the student's step; None: the last", type=int)
    add_flag(g, "guidance_scale", 1.5, "Guidance of the teacher's score")
    add_flag(
        g, "fake_guidance_scale", None, "Guidance of the fake score; None: the teacher's; 1 saves a pass", type=float
    )
    add_flag(g, "guidance_scale_min", None, "With the next: the teacher's guidance is drawn between them", type=float)
    add_flag(g, "guidance_scale_max", None, "See --guidance_scale_min", type=float)
    add_flag(
        g, "guidance_scale_per", "sample", "Whether it is drawn for samples or batches", choices=("sample", "batch")
    )
    add_flag(g, "fake_training_guidance_scale", 1.0, "Guidance of the prediction that the fake's loss trains")
    add_flag(
        g, "score_weighting", "sigma2", "sigma_t^2, or DMD2's 1/mean|x0 - x0_teacher|", choices=losses.SCORE_WEIGHTINGS
    )
    add_flag(g, "fake_loss_weighting", "alpha2", "Weight of the fake's loss", choices=losses.FAKE_WEIGHTINGS)
    add_flag(
        g, "fake_updates_per_step", 1, "Fake updates per student update; the further ones on fresh images, before it"
    )
    toggle = argparse.BooleanOptionalAction
    add_flag(g, "fake_first", False, "All fake updates before the student's, on fresh images", action=toggle)
    add_flag(g, "min_timestep", 20, "Lowest timestep of the score difference")
    add_flag(g, "max_timestep", 980, "Highest timestep of the score difference, inclusive")
    add_flag(g, "fake_min_timestep", 0, "Lowest timestep of the fake's loss")
    add_flag(g, "fake_max_timestep", None, "Highest timestep of the fake's loss, inclusive; None: T - 1", type=int)
    add_flag(g, "proportion_empty_prompts", 0.1, "How often the fake trains on the empty prompt")
    add_flag(
        g,
        "empty_prompts_per",
        "batch",
        "Whether whole updates' batches or single samples get it",
        choices=("batch", "sample"),
    )
    add_flag(
        g,
        "terminal_alpha_cumprod",
        None,
        "alpha_bar of the student's step. None: the schedule's own (SD: 0.00466), so that the student runs with the "
        "teacher's schedule in stock pipelines; 0.0047 is the release's, 0.4%% less gain. None for PixArt: 0.0047, since "
        "its own 4.04e-5 multiplies errors by 157",
        type=float,
    )


def _add_warmup_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("regression on the teacher's samples (not in the paper; DMD's ODE pairs)")
    add_flag(g, "warmup_regression_steps", 0, "Student updates by regression before score distillation")
    add_flag(
        g, "warmup_regression_pairs", 10_000, "How many (noise, caption, image) examples the teacher makes for it"
    )
    add_flag(g, "warmup_num_inference_steps", 25, "DDIM steps of the teacher for these")
    add_flag(g, "warmup_guidance_scale", 3.0, "Guidance of the teacher for these")
    add_flag(g, "warmup_sample_batch_size", 64, "Batch of the teacher for these")
    add_flag(g, "warmup_learning_rate", 1e-3, "Peak rate of the warm start, decayed to 0 along a cosine")
    add_flag(g, "warmup_lr_warmup_steps", 0, "Linear increase of that rate")
    add_flag(
        g, "fake_warmup_steps", 0, "Updates of the fake alone after it: it starts as the teacher, not as the student"
    )
    add_flag(g, "regression_loss", "mse", "Distance in x0", choices=losses.REGRESSION_LOSSES)
    add_flag(g, "huber_delta", 0.1, "Where --regression_loss huber turns linear")
    add_flag(g, "regression_weight", 0.0, "Weight of the regression loss during score distillation (DMD: 0.25)")


def _add_optimiser_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("optimisation")
    add_flag(g, "train_batch_size", 16, "Batch per process")
    add_flag(g, "gradient_accumulation_steps", 1, "Batches per update")
    add_flag(g, "num_train_epochs", 2, "Passes over the prompts if --max_train_steps is not given")
    add_flag(g, "max_train_steps", None, "Student updates by score distillation", type=int)
    add_flag(g, "learning_rate", 1e-4, "Of the student")
    add_flag(g, "fake_learning_rate", 1e-2, "Of the fake-score network")
    add_schedule_flags(g, "Schedule of both rates")
    add_adam_flags(g, 0.0, "AdamW; it pulls angles to 0, that is to the teacher")
    add_flag(g, "max_grad_norm", 1.0, "Gradient clipping, of each network by itself")
    add_flag(g, "use_8bit_adam", False, "bitsandbytes' AdamW8bit, as in the release's scripts")
    toggle = argparse.BooleanOptionalAction
    add_flag(g, "use_ema", False, "Average the student; the average is validated and exported", action=toggle)
    add_flag(g, "ema_decay", 0.999, "Highest decay of that average; it starts lower")


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("machine, checkpoints, samples")
    add_flag(g, "seed", 0, "Of everything")
    add_flag(
        g,
        "mixed_precision",
        "no",
        "Autocast of the UNet; x0, losses and angles stay fp32",
        choices=("no", "fp16", "bf16"),
    )
    add_flag(
        g, "base_dtype", None, "Of the frozen UNet; None: as mixed_precision, fp32 on the CPU", choices=tuple(DTYPES)
    )
    add_flag(
        g,
        "attention",
        "auto",
        "sdpa: torch's fused attention; plain: matrix products and softmax; auto: plain on a CPU in half precision, else sdpa",
        choices=("auto", "sdpa", "plain"),
    )
    add_flag(g, "gradient_checkpointing", False, "Recompute activations in backward")
    add_flag(g, "allow_tf32", False, "TF32 in float32 products and convolutions of NVIDIA GPUs: faster, 10 bits")
    add_flag(g, "torch_compile", False, "Compile the UNet, once per role")
    add_flag(g, "channels_last", False, "Memory format of the UNet")
    add_state_flags(g, checkpointing_steps=500)
    add_flag(g, "validation_steps", 200, "Updates between sample grids; 0: none")
    add_flag(g, "validation_prompts", None, "Prompts of the grid; None: the first of the training prompts", nargs="+")
    add_flag(g, "num_validation_images", 8, "Images of the grid if --validation_prompts is not given")
    add_flag(g, "validation_seed", 0, "Of the grid's noise")
    add_flag(g, "dry_run", False, "Print the plan (parameters, memory, steps, images, checkpoints) and write nothing")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Flags of the script; `input_args` instead of the command line in tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_data_flags(parser)
    _add_text_flags(parser)
    groups = (_add_method_flags, _add_role_flags, _add_warmup_flags, _add_optimiser_flags, _add_machine_flags)
    for add in groups:
        add(parser)
    add_hub_flags(parser, "student")
    parser.set_defaults(**preset(input_args))
    args = parser.parse_args(input_args)
    check_args(args)
    return args


def preset(input_args: list[str] | None) -> dict:
    """Flag -> value that the objective on the command line sets; {} for "wadi"."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective", default="wadi")
    for role in DEFAULT_ROLE_RANKS:
        first.add_argument(f"--{role}_adapter")
    known, _ = first.parse_known_args(input_args)
    chosen = objectives.OBJECTIVES.get(known.objective, objectives.OBJECTIVES["wadi"])
    return chosen.settings(known.student_adapter, known.fake_adapter)


AT_LEAST = {
    1: "student_rank fake_rank t_init fake_updates_per_step train_batch_size gradient_accumulation_steps num_train_epochs "
    "checkpointing_steps checkpoints_total_limit max_bad_steps logging_steps num_threads text_batch_size shapes_captions "
    "max_sequence_length max_train_samples "
    "warmup_regression_pairs warmup_num_inference_steps warmup_sample_batch_size num_validation_images resolution",
    0: "max_train_steps warmup_regression_steps fake_warmup_steps warmup_lr_warmup_steps regression_weight guidance_scale "
    "fake_guidance_scale guidance_scale_min fake_training_guidance_scale warmup_guidance_scale min_timestep fake_min_timestep lr_warmup_steps adam_weight_decay "
    "validation_steps seed",
}
POSITIVE = "student_alpha fake_alpha learning_rate fake_learning_rate warmup_learning_rate adam_epsilon max_grad_norm huber_delta"
FRACTIONS = "proportion_empty_prompts ema_decay"


def check_args(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: names the flag, its value and what is expected.
    """
    check_numbers(args, AT_LEAST, POSITIVE, FRACTIONS, below_1="adam_beta1 adam_beta2")
    if args.terminal_alpha_cumprod is not None and not 0 < args.terminal_alpha_cumprod < 1:
        raise ValueError(f"--terminal_alpha_cumprod is {args.terminal_alpha_cumprod}, expected between 0 and 1.")
    check_method_flags(args)
    if args.min_timestep > args.max_timestep:
        raise ValueError(f"--min_timestep {args.min_timestep} is above --max_timestep {args.max_timestep}.")
    if args.fake_max_timestep is not None and args.fake_min_timestep > args.fake_max_timestep:
        raise ValueError(
            f"--fake_min_timestep {args.fake_min_timestep} is above --fake_max_timestep {args.fake_max_timestep}."
        )
    check_prompt_flags(args)
    check_packages(args.report_to, args.use_8bit_adam)
    if args.init_student is not None and not Path(args.init_student).exists():
        raise ValueError(f"--init_student {args.init_student} does not exist, expected a LoRaD folder or file.")
    if not args.dry_run:
        check_output_dir(args.output_dir)


def check_method_flags(args: argparse.Namespace) -> None:
    """Refuse adapters and objectives whose flags do not go together."""
    for role, spec in zip(DEFAULT_ROLE_RANKS, adapters.adapter_specs(args)):
        given = getattr(args, f"{role}_rank")
        if spec.owns_network and given != DEFAULT_ROLE_RANKS[role]:
            logging.warning("--%s_adapter %s has no rank: --%s_rank %d does nothing", role, spec.kind, role, given)
        if spec.kind == "householder" and args.adam_weight_decay:
            raise ValueError(
                f"--adam_weight_decay is {args.adam_weight_decay}: torch's householder keeps signs of 1 beside the "
                "vectors that it trains, and any decay turns them to 0. Use 0, or matrix_exp or cayley."
            )
        half_base = args.base_dtype not in (None, "fp32") and args.mixed_precision == "no"
        if spec.kind == "full" and half_base:
            raise ValueError(
                f"--{role}_adapter full trains in fp32, but --base_dtype {args.base_dtype} would call it in that dtype. "
                "Add --mixed_precision fp16 or bf16."
            )
    if args.student_adapter != "lorad" and (args.init_student or args.push_to_hub):
        flag = "--init_student" if args.init_student else "--push_to_hub"
        raise ValueError(f"{flag} is for LoRaD students, --student_adapter is {args.student_adapter}.")
    check_guidance(args)
    if args.t_init is not None and args.terminal_alpha_cumprod is not None:
        raise ValueError(
            f"--terminal_alpha_cumprod {args.terminal_alpha_cumprod} is for the last timestep, --t_init {args.t_init} "
            "takes the schedule's own value. Leave one out."
        )


def check_guidance(args: argparse.Namespace) -> None:
    """Refuse half a range of guidance scales, and --objective pg_sb without one."""
    low, high = args.guidance_scale_min, args.guidance_scale_max
    if (low is None) != (high is None) or (args.objective == "pg_sb" and low is None):
        raise ValueError(
            f"--guidance_scale_min is {low} and --guidance_scale_max {high}: guidance drawn at random (--objective pg_sb) "
            "needs both."
        )
    if low is not None and low > high:
        raise ValueError(f"--guidance_scale_min {low} is above --guidance_scale_max {high}.")


def check_prompt_flags(args: argparse.Namespace) -> None:
    """Refuse none or several sources of prompts, and flags that belong to another one."""
    sources = [
        name for name in ("train_prompts", "dataset_name", "shapes_captions") if getattr(args, name) is not None
    ]
    if len(sources) != 1:
        given = " and ".join(f"--{name}" for name in sources) or "none"
        raise ValueError(f"Give exactly one of --train_prompts, --dataset_name and --shapes_captions, not {given}.")
    if args.dataset_name is None and (args.streaming or args.dataset_config_name):
        raise ValueError("--streaming and --dataset_config_name belong to --dataset_name, which is not given.")
    if args.dataset_name is not None:
        require("datasets", extra="train")
    if args.shapes_captions is not None and args.caption_column is not None:
        raise ValueError("--caption_column does not belong to --shapes_captions.")
    if args.text_cache_dir is not None and not args.precompute_text_embeddings:
        raise ValueError("--text_cache_dir is for --precompute_text_embeddings, which is not given.")


def main(args: argparse.Namespace) -> None:
    """Train with checked flags `args`; the student is in `args.output_dir` afterwards.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped it, after a checkpoint; 130 or 143.
    """
    begin(args.num_threads, args.allow_tf32)
    logging.info("objective %s", objectives.describe(args))
    if args.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            print(make_plan(args))
        return
    if received := WaDiTrainer(args).train():
        sys.exit(128 + received)


if __name__ == "__main__":
    main(parse_args())
