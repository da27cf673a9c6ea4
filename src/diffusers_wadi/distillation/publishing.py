"""A trained student on the Hub: the repository before the training, the files and a model card after it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._adapter_files import ADAPTER_CONFIG_NAME, LORAD_WEIGHT_NAME
from .._hub import UploadOptions, ensure_repository, publish, refuse_local_base
from ..lorad import LoRaDConfig
from ..model_card import CardDetails, adapter_card
from .checkpoint import lasting_name

FILES = (LORAD_WEIGHT_NAME, ADAPTER_CONFIG_NAME, "scheduler/scheduler_config.json")
# Card -> flag. What the table of the card says of the training.
SETTINGS = {
    "Guidance of the teacher": "guidance_scale",
    "Rank of the fake-score adapter": "fake_rank",
    "Batch per process": "train_batch_size",
    "Learning rate": "learning_rate",
    "Learning rate of the fake score": "fake_learning_rate",
    "Regression steps before": "warmup_regression_steps",
    "Precision": "mixed_precision",
    "Seed": "seed",
}


def prepare(args: argparse.Namespace) -> None:
    """With `--push_to_hub`, make the repository now: a wrong token is not to be found out after days of training.

    Raises:
        ValueError: the exported adapter would name a folder of this machine as its base.
        OSError: the Hub cannot be reached, or refuses.
    """
    if not args.push_to_hub:
        return
    try:
        refuse_local_base(_base(args))
    except ValueError as error:
        raise ValueError(f"--push_to_hub: {error} The flag is --base_model_name_or_path.") from None
    ensure_repository(_options(args), Path(args.output_dir))


def publish_student(args: argparse.Namespace, config: LoRaDConfig, steps: int, prompts: int, shown: list[str]) -> str:
    """With `--push_to_hub`, upload the exported student with its scheduler, newest sample grid and card.

    Args:
        args: the flags.
        config: of the student.
        steps: updates of the student.
        prompts: how many there were in training.
        shown: the prompts of the sample grid.

    Returns:
        URL of the commit, "" without `--push_to_hub`.
    """
    if not args.push_to_hub:
        return ""
    folder = Path(args.output_dir)
    grids = sorted((folder / "samples").glob("step-*.png"))
    details = CardDetails(
        steps=steps,
        data=_data(args, prompts),
        training={name: getattr(args, flag) for name, flag in SETTINGS.items()},
        license=args.hub_license,
        samples=grids[-1] if grids else None,
        prompts=shown,
    )
    options = _options(args)
    card = adapter_card(options.name(folder), config, _base(args), LORAD_WEIGHT_NAME, details)
    return publish(folder, FILES, options, card, details)


def _options(args: argparse.Namespace) -> UploadOptions:
    return UploadOptions(repo_id=args.hub_model_id, token=args.hub_token, private=args.hub_private or None)


def _base(args: argparse.Namespace) -> str:
    return args.base_model_name_or_path or lasting_name(args.pretrained_teacher_model)


def _data(args: argparse.Namespace, prompts: int) -> str:
    source = "captions of Shapes World" if args.shapes_captions else "prompts"
    return f"{prompts} {source}, no images"
