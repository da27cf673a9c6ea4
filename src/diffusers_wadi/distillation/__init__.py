"""Distillation of a one-step student: losses, the one base in three roles, prompts and checkpoints.

The training scripts in ``training/`` put these together; nothing here knows of flags or of accelerate.
"""

from .checkpoint import find_checkpoint, list_checkpoints
from .data import PromptEmbeddings, PromptOrder, clip_encoder, read_prompts
from .losses import (
    NoiseSchedule,
    fake_score_loss,
    guided_prediction,
    regression_loss,
    student_x0,
    vsd_gradient,
    vsd_loss,
)
from .networks import WaDiNetworks
from .regression import RegressionPairs, ddim_sample, make_pairs

__all__ = [
    "NoiseSchedule",
    "PromptEmbeddings",
    "PromptOrder",
    "RegressionPairs",
    "WaDiNetworks",
    "clip_encoder",
    "ddim_sample",
    "fake_score_loss",
    "find_checkpoint",
    "guided_prediction",
    "list_checkpoints",
    "make_pairs",
    "read_prompts",
    "regression_loss",
    "student_x0",
    "vsd_gradient",
    "vsd_loss",
]
