"""The training objectives that the paper compares, as presets of the flags of `training/train_wadi.py`.

An objective is made of a loss of the score (:func:`~diffusers_wadi.distillation.losses.vsd_loss` or
:func:`~diffusers_wadi.distillation.losses.sid_loss`), the fake's loss
(:func:`~diffusers_wadi.distillation.losses.fake_score_loss`) and the order in which
:class:`~diffusers_wadi.distillation.steps.WaDiSteps` takes them; flags choose each. To add one, write its loss there,
name it in :data:`SCORE_LOSSES`, and put its settings here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler

from .losses import NoiseSchedule

SCORE_LOSSES = ("vsd", "sid")


@dataclass(frozen=True)
class Objective:
    """Where an objective comes from, and the flags in which it differs from the script's defaults.

    Attributes:
        source: what it follows.
        flags: of the objective itself.
        student, fake: what these are made of there and how fast they learn: flags that hold together, so that they
            are left out if the user chooses another adapter.
    """

    source: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)
    fake: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, student_adapter: str | None = None, fake_adapter: str | None = None) -> dict[str, Any]:
        """Flag -> value.

        Args:
            student_adapter, fake_adapter: as the user gave them; ``None``: not at all.
        """
        chosen = dict(self.flags)
        for name, given, flags in (
            ("student_adapter", student_adapter, self.student),
            ("fake_adapter", fake_adapter, self.fake),
        ):
            if given in (None, flags.get(name)):
                chosen |= flags
        return chosen


_SWIFTBRUSH = {
    "flags": {"guidance_scale": 4.5, "num_train_epochs": 3, "use_ema": True, "ema_decay": 0.9999},
    "student": {"student_adapter": "full", "learning_rate": 1e-6},
    "fake": {
        "fake_adapter": "lora",
        "fake_rank": 64,
        "fake_alpha": 108.0,
        "fake_layers": "qv",
        "fake_learning_rate": 1e-3,
    },
}

OBJECTIVES: dict[str, Objective] = {
    "wadi": Objective("WaDi, the authors' release: the script's defaults"),
    "swiftbrush": Objective("SwiftBrush, its code", **_SWIFTBRUSH),
    # The bounds of its guidance have no default: the paper's are not known to us.
    "pg_sb": Objective("PG-SB (SNOOPI): SwiftBrush with guidance drawn at random for both scores", **_SWIFTBRUSH),
    "dmd2": Objective(
        "DMD2 without images (neither regression nor GAN), its code",
        flags={
            "guidance_scale": 1.75,
            "fake_guidance_scale": 1.0,
            "score_weighting": "dmd2",
            "fake_loss_weighting": "none",
            "fake_updates_per_step": 10,
            "proportion_empty_prompts": 0.0,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 50,  # of ten fake updates each: its 500 iterations
            "adam_weight_decay": 0.01,
            "max_grad_norm": 10.0,
        },
        student={"student_adapter": "full", "learning_rate": 1e-5},
        fake={"fake_adapter": "full", "fake_learning_rate": 1e-5},
    ),
    "sid_lsg": Objective(
        "SiD-LSG, its code; all guidance scales 1.5, as the WaDi paper reproduced it",
        flags={
            "score_loss": "sid",
            "t_init": 625,
            "fake_first": True,
            "guidance_scale": 1.5,
            "fake_training_guidance_scale": 1.5,
            "fake_loss_weighting": "sum",
            "max_timestep": 979,
            "fake_min_timestep": 20,
            "fake_max_timestep": 979,
            "empty_prompts_per": "sample",
            "adam_beta1": 0.0,
            "max_grad_norm": float("inf"),
            "use_ema": True,
            "ema_decay": 0.993,  # half of it after 50,000 images, in batches of 512
        },
        student={"student_adapter": "full", "learning_rate": 1e-6},
        fake={"fake_adapter": "full", "fake_learning_rate": 1e-6},
    ),
}


def describe(args: argparse.Namespace) -> str:
    """The objective that the flags name, its source, and what its preset is about, as the flags stand."""
    chosen = OBJECTIVES[args.objective]
    flags = {**chosen.flags, **chosen.student, **chosen.fake}
    given = {name: (getattr(args, name), value) for name, value in flags.items()}
    shown = [f"--{n} {now}" + ("" if now == value else f" (preset {value})") for n, (now, value) in given.items()]
    return f"{args.objective} ({chosen.source}): {' '.join(shown) or 'no flag changed'}"


def start_scheduler(scheduler, schedule: NoiseSchedule) -> EulerDiscreteScheduler:
    """A stock scheduler whose single step is that of a student that starts below T - 1 (SiD-LSG).

    It draws sigma z / alpha, hands the network sigma z at t = ``schedule.start``, and returns x0: Euler's method on a
    schedule that ends there.

    Args:
        scheduler: the teacher's, of diffusers, of any class.
        schedule: with ``start`` set.
    """
    config, last = scheduler.config, schedule.start
    beta_end = float(scheduler.betas[last])
    betas = {"beta_start": config.beta_start, "beta_end": beta_end, "beta_schedule": config.beta_schedule}
    if config.beta_schedule not in ("linear", "scaled_linear") or config.trained_betas is not None:
        betas = {"trained_betas": scheduler.betas[: last + 1].tolist()}
    made = EulerDiscreteScheduler(
        num_train_timesteps=last + 1,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
        **betas,
    )
    error = (made.alphas_cumprod[-1].sqrt() - torch.tensor(schedule.terminal_alpha)).abs()
    if error > 1e-4:
        raise ValueError(
            f"The schedule cut off at t = {last} ends with alpha {float(made.alphas_cumprod[-1].sqrt()):.6f} instead of "
            f"{schedule.terminal_alpha:.6f}; the student could not be run as it was trained. Leave --t_init out."
        )
    return made
