"""Objectives and adapters learn: on images whose score is known, and on a tiny UNet."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from conftest import SD_BETAS, tiny_unet
from diffusers import DDIMScheduler
from plain_steps import D, L
from wadi_script import train_wadi

from diffusers_wadi.distillation import losses
from diffusers_wadi.distillation.adapters import KINDS, AdapterSpec
from diffusers_wadi.distillation.networks import WaDiNetworks
from diffusers_wadi.distillation.objectives import OBJECTIVES
from diffusers_wadi.distillation.steps import WaDiSteps

SCHEDULE = losses.NoiseSchedule.from_scheduler(DDIMScheduler(**SD_BETAS))
SPREAD, TARGET = 0.5, 2.0


class GaussianNetworks:
    """Images are normal with spread 0.5 around a mean, so that every score is a formula. The teacher's mean is 2."""

    def __init__(self, schedule: losses.NoiseSchedule):
        self.schedule = schedule
        self.means = {role: torch.nn.Parameter(torch.zeros(1)) for role in ("student", "fake")}
        self.means["teacher"] = torch.full((1,), TARGET)

    def predict(self, role, x, t, text):
        if role == "student":  # such that x0 = mean + spread * z
            s = self.schedule
            z = x if s.start is None else x / s.terminal_sigma
            return (x - s.terminal_alpha * (self.means[role] + SPREAD * z)) / s.terminal_sigma
        alpha, sigma = self.schedule.at(t)
        return sigma * (x - alpha * self.means[role]) / (alpha**2 * SPREAD**2 + sigma**2)

    def __getattr__(self, role: str) -> Callable:
        return lambda x, t, text: self.predict(role, x, t, text)

    def role_state(self, role):
        return {"mean": self.means[role]}

    def student_parameters(self):
        return [self.means["student"]]

    def fake_parameters(self):
        return [self.means["fake"]]

    @contextlib.contextmanager
    def frozen(self, role):
        self.means[role].requires_grad_(False)
        yield
        self.means[role].requires_grad_(True)


class NoTexts:
    empty = torch.zeros(1, L, D)

    def __len__(self):
        return 5

    def at(self, indices):
        return self.empty.expand(len(indices), L, D)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_brings_the_student_to_the_teacher(tmp_path, name):
    """150 updates at rates for one number; the fake learns faster, as everywhere. From 2 apart to less than 0.3."""
    rates = "--learning_rate 0.03 --fake_learning_rate 0.1 --lr_scheduler constant"
    if name == "pg_sb":
        rates += " --guidance_scale_min 2 --guidance_scale_max 7"
    given = f"--pretrained_teacher_model t --train_prompts p --output_dir {tmp_path} --train_batch_size 4"
    args = train_wadi.parse_args(f"{given} --objective {name} {rates}".split())
    args.fake_max_timestep = 999 if args.fake_max_timestep is None else args.fake_max_timestep
    schedule = SCHEDULE if args.t_init is None else SCHEDULE.starting_at(args.t_init)
    networks = GaussianNetworks(schedule)
    steps = WaDiSteps(args, Accelerator(cpu=True), networks, schedule, NoTexts(), (4, 8, 8), None, 150)
    for _ in range(150):
        logs = steps.vsd_update()
    assert abs(networks.means["student"].item() - TARGET) < 0.3
    assert abs(networks.means["fake"].item() - networks.means["student"].item()) < 0.3
    assert all(value.isfinite() for value in logs.values())


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_fits_images(kind):
    torch.manual_seed(0)
    networks = WaDiNetworks(tiny_unet(), AdapterSpec(kind, 8), AdapterSpec(rank=2))
    optimiser = torch.optim.Adam(networks.student_parameters(), lr=1e-3 if kind == "full" else 0.01)
    z, text = torch.randn(2, 4, 8, 8), torch.randn(2, L, D)
    with torch.no_grad():
        images = losses.student_x0(networks.teacher, z, text, SCHEDULE)
    target = images + torch.randn_like(images)
    errors = []
    for _ in range(12):
        loss, _ = losses.regression_loss(losses.student_x0(networks.student, z, text, SCHEDULE), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    assert errors[-1] < 0.9 * errors[0]
    assert torch.equal(losses.student_x0(networks.teacher, z, text, SCHEDULE), images)
