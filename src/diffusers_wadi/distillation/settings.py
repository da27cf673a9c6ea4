"""The flags of a run as its checkpoints keep them, and which of them may be others when it is resumed."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
SETTINGS_FILE = "settings.json"
SECRET = {"hub_token"}
PROMPTS = "SHA-256 of the prompts"  # not a flag, but kept with them
# Where things lie, how much is shown and kept, how long and at which rates, and how the machine computes the same thing.
# Every other flag says what is trained; a new flag belongs there until it is named here. Prompts are compared by what
# they are, and weights by their shapes, not by where they come from.
MAY_DIFFER = frozenset(
    """
    pretrained_teacher_model base_model_name_or_path output_dir adapter_dtype init_student revision variant
    train_prompts dataset_name dataset_config_name dataset_split streaming caption_column shapes_captions
    max_train_samples skip_bad_lines keep_repeated_prompts precompute_text_embeddings text_cache_dir text_batch_size text_encoder_dtype
    embedding_dtype
    logging_dir report_to logging_steps resume_from_checkpoint dry_run
    checkpointing_steps checkpoints_total_limit validation_steps validation_prompts num_validation_images
    validation_seed push_to_hub hub_model_id hub_private hub_license
    max_train_steps num_train_epochs max_bad_steps learning_rate fake_learning_rate warmup_learning_rate
    max_grad_norm lr_scheduler lr_warmup_steps
    train_batch_size gradient_accumulation_steps warmup_sample_batch_size
    gradient_checkpointing torch_compile channels_last attention allow_tf32 num_threads
    """.split()
)


def plain_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as JSON can hold them, without tokens."""
    return json.loads(json.dumps({k: v for k, v in sorted(vars(args).items()) if k not in SECRET}, default=str))


def save_settings(settings: dict[str, Any], folder: Path) -> None:
    """Write what :func:`plain_settings` returned into a checkpoint."""
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_settings(folder: Path, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare the flags of the run that wrote a checkpoint with those of the run that goes on from it.

    Flags that only one of the two runs knows, of another version of the script, are passed over.

    Args:
        folder: the checkpoint; one without the file (of an older version) passes.
        settings: of this run.

    Returns:
        name -> (checkpoint's, this run's) of those that differ and may.

    Raises:
        ValueError: others differ; all of them are named with both values.
    """
    file = folder / SETTINGS_FILE
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    different = {k: (saved[k], settings[k]) for k in sorted(saved.keys() & settings.keys()) if saved[k] != settings[k]}
    wrong = [f"{_shown(k)} {was} (now {now})" for k, (was, now) in different.items() if k not in MAY_DIFFER]
    if wrong:
        raise ValueError(
            f"{folder} was written by a run with {', '.join(wrong)}. Resume with the former values, or start a new run "
            "in another --output_dir."
        )
    return different


def _shown(name: str) -> str:
    return name if name == PROMPTS else f"--{name}"
