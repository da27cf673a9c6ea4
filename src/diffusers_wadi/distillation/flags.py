"""What the command lines of the training scripts have in common: flags, their checks, and how a run starts."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import SchedulerType

from .._files import writable_folder
from .distributed import set_num_threads
from .monitoring import tracker_names

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIXED_PRECISION = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# piecewise_constant wants rules of its own, for which there is no flag.
LR_SCHEDULES = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)


def add_flag(group, name: str, default: Any, help: str, **kwargs: Any) -> None:
    """Add `--name` to a parser or group, its type taken from `default` and the default shown in its help.

    False makes a switch, True a pair of switches (`--name`, `--no-name`); with a default of None give `type=`, or it is text.
    """
    if default is True:
        kwargs.setdefault("action", argparse.BooleanOptionalAction)
    elif default is False:
        kwargs.setdefault("action", "store_true")
    elif "type" not in kwargs and default is not None:
        kwargs["type"] = type(default)
    group.add_argument(f"--{name}", default=default, help=f"{help} (default: %(default)s)", **kwargs)


def add_adam_flags(group, weight_decay: float, weight_decay_help: str) -> None:
    """Adam's two betas, decay and epsilon."""
    add_flag(group, "adam_beta1", 0.9, "Adam")
    add_flag(group, "adam_beta2", 0.999, "Adam")
    add_flag(group, "adam_weight_decay", weight_decay, weight_decay_help)
    add_flag(group, "adam_epsilon", 1e-8, "Adam")


def add_schedule_flags(group, help: str) -> None:
    """How the learning rate goes."""
    add_flag(group, "lr_scheduler", "constant", help, choices=LR_SCHEDULES)
    add_flag(group, "lr_warmup_steps", 0, "Steps of its linear increase")


def add_state_flags(group, checkpointing_steps: int) -> None:
    """Checkpoints, logs and what a run does about broken updates."""
    add_flag(group, "num_threads", None, "CPU threads of torch", type=int)
    add_flag(group, "checkpointing_steps", checkpointing_steps, "Updates between checkpoints")
    add_flag(group, "checkpoints_total_limit", None, "Keep only so many", type=int)
    add_flag(group, "resume_from_checkpoint", None, "latest, a folder name in output_dir, or a path")
    add_flag(
        group, "logging_steps", 10, "Updates between logged losses, of which the means since the last time are logged"
    )
    add_flag(
        group, "report_to", "none", "Trackers, with commas between them: tensorboard, wandb, ...; all: those installed"
    )
    add_flag(group, "logging_dir", "logs", "Of the trackers, inside output_dir")
    add_flag(
        group,
        "max_bad_steps",
        20,
        "Stop after so many updates in a row whose loss or gradient is not finite; one is skipped",
    )


def add_hub_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """Upload of `what` to the Hugging Face Hub."""
    g = parser.add_argument_group(f"upload of the {what} to the Hugging Face Hub")
    add_flag(g, "push_to_hub", False, f"Upload {what}, sample grid and a model card when done")
    add_flag(g, "hub_model_id", None, "Repository; None: the name of output_dir, in the account of the token")
    add_flag(g, "hub_token", None, "Token with the right to write; None: that of `hf auth login`")
    add_flag(g, "hub_private", False, "Make the repository private, if it is new")
    add_flag(g, "hub_license", None, "Licence that the card names, e.g. apache-2.0")


def check_numbers(
    args: argparse.Namespace, at_least: Mapping[int, str], positive: str = "", fractions: str = "", below_1: str = ""
) -> None:
    """Refuse numbers that are out of range; flags that are None pass.

    Args:
        args: the parsed flags.
        at_least: lowest value -> names of flags, with spaces between them; the other arguments are such names too.
        positive: more than 0.
        fractions: from 0 to 1.
        below_1: from 0 to below 1.

    Raises:
        ValueError: names the flag, its value and what is expected.
    """
    rules = [(names, lambda v, low=low: v >= low, f"at least {low}") for low, names in at_least.items()]
    rules.append((positive, lambda v: v > 0, "more than 0"))
    rules.append((fractions, lambda v: 0 <= v <= 1, "from 0 to 1"))
    rules.append((below_1, lambda v: 0 <= v < 1, "from 0 to below 1"))
    for names, holds, expectation in rules:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise ValueError(f"--{name} is {value}, expected {expectation}.")


def check_packages(report_to: str, use_8bit_adam: bool = False) -> None:
    """Refuse trackers and 8-bit optimisers that are not installed.

    Raises:
        ValueError: names the flag and the package.
    """
    tracker_names(report_to)
    if use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam needs bitsandbytes, which is not installed: pip install bitsandbytes.")


def check_output_dir(folder: str | Path) -> None:
    """Make `folder` and write a file in it, so that hours of training are not lost at the first checkpoint.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        writable_folder(folder)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to ({error}). Choose another folder.") from error


def begin(num_threads: int | None, allow_tf32: bool = False) -> None:
    """Set up logging, threads and TF32 of this process."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    set_num_threads(num_threads)
    if allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
