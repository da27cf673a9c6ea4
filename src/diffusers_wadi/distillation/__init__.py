"""Distillation of a one-step student: losses, the one base in three roles, prompts, checkpoints, and the run itself.

The names below know neither of flags nor of accelerate; :mod:`~diffusers_wadi.distillation.trainer`, which
`training/train_wadi.py` calls, puts them together.
"""

from .adapters import AdapterSpec
from .backbones import Backbone, load_backbone
from .checkpoint import find_checkpoint, list_checkpoints
from .data import PromptEmbeddings, PromptOrder
from .losses import (
    NoiseSchedule,
    fake_score_loss,
    guided_prediction,
    regression_loss,
    sid_loss,
    student_x0,
    vsd_gradient,
    vsd_loss,
)
from .networks import WaDiNetworks
from .prompt_store import PromptStore, write_prompts
from .regression import RegressionPairs, ddim_sample, make_pairs
from .text_encoders import CLIPEncoder, T5Encoder

__all__ = [
    "AdapterSpec",
    "Backbone",
    "CLIPEncoder",
    "NoiseSchedule",
    "PromptEmbeddings",
    "PromptOrder",
    "PromptStore",
    "RegressionPairs",
    "T5Encoder",
    "WaDiNetworks",
    "ddim_sample",
    "fake_score_loss",
    "find_checkpoint",
    "guided_prediction",
    "list_checkpoints",
    "load_backbone",
    "make_pairs",
    "regression_loss",
    "sid_loss",
    "student_x0",
    "vsd_gradient",
    "vsd_loss",
    "write_prompts",
]
