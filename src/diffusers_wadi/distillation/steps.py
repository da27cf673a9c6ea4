"""One update of a distillation run, put together from the losses.

An update is: (``fake_updates_per_step`` - 1) updates of the fake on fresh images, one of the student, one of the fake
on the images that the student was just trained on, made before its update (the release's order). With ``fake_first``
(SiD-LSG) all updates of the fake come before, on fresh images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from . import data, losses
from .distributed import averaging, data_parallel
from .guard import StepGuard, poisoned_if_broken
from .networks import FAKE, STUDENT, WaDiNetworks
from .noise import SampleDraws
from .regression import RegressionPairs
from .transfer import sent


class Trainee:
    """The parameters of one network with their optimiser, schedule and gradient clipping.

    Args:
        rate: peak learning rate, which the schedule multiplies.
        lr_scheduler, warmup_steps, total_steps: of diffusers' ``get_scheduler``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: argparse.Namespace,
        parameters: list[nn.Parameter],
        rate: float,
        lr_scheduler: str,
        warmup_steps: int,
        total_steps: int,
    ):
        self.accelerator = accelerator
        self.parameters = parameters
        self.max_grad_norm = args.max_grad_norm
        self.rate = rate
        optimizer = make_optimizer(args, parameters, rate)
        self.lr_scheduler = get_scheduler(lr_scheduler, optimizer, None, warmup_steps, max(1, total_steps))
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.guard = StepGuard(self.optimizer)

    def update(self) -> Tensor:
        """Clip, step, forget the gradients. Returns the norm before clipping."""
        self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.guard.step(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def use_given_rate(self) -> float | None:
        """Replace the peak rate that a checkpoint brought by ``rate``, at the schedule's present point.

        Returns:
            The checkpoint's rate; ``None`` if that is ``rate``, and then nothing is touched.
        """
        (group,) = self.optimizer.param_groups
        former = group["initial_lr"]
        if former == self.rate:
            return None
        schedule = self.lr_scheduler
        lr = self.rate * schedule.lr_lambdas[0](schedule.last_epoch)
        group.update(initial_lr=self.rate, lr=lr)
        schedule.base_lrs, schedule._last_lr = [self.rate], [lr]
        return former


def make_optimizer(args: argparse.Namespace, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW (Adam at the default weight decay of 0), or bitsandbytes' 8-bit one."""
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    betas = (args.adam_beta1, args.adam_beta2)
    # Fused, so that a step that is not finite can be left out without the host waiting to know.
    fused = {} if args.use_8bit_adam or not parameters[0].is_cuda else {"fused": True}
    return optimizer_class(
        parameters, lr=rate, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon, **fused
    )


class WaDiSteps:
    """The updates of student and fake, with the random streams and orders they draw from.

    Args:
        args: the flags of `training/train_wadi.py`.
        accelerator: for backward, half precision and averaging over processes.
        networks, schedule, embeddings: the three roles, the teacher's noise schedule, the training prompts.
        latent_shape: (C, H, W).
        pairs: the teacher's samples; ``None`` without regression.
        vsd_steps: how many updates by score distillation there will be (for the learning rate's schedule).
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        networks: WaDiNetworks,
        schedule: losses.NoiseSchedule,
        embeddings: data.PromptEmbeddings,
        latent_shape: tuple[int, int, int],
        pairs: RegressionPairs | None,
        vsd_steps: int,
    ):
        self.args, self.accelerator, self.networks, self.schedule = args, accelerator, networks, schedule
        self.embeddings, self.latent_shape, self.pairs = embeddings, latent_shape, pairs
        rank, count = accelerator.process_index, accelerator.num_processes
        self.draws = SampleDraws(args.seed, args.train_batch_size, rank, count)
        # For training; under no_grad the roles are called as they are.
        self.student_network = data_parallel(accelerator, networks, STUDENT)
        self.fake_network = data_parallel(accelerator, networks, FAKE)
        self.order = data.PromptOrder(len(embeddings), args.train_batch_size, args.seed, rank, count)
        self.pair_order = None
        if pairs is not None:
            self.pair_order = data.PromptOrder(len(pairs), args.train_batch_size, args.seed, rank, count)
        self._make_trainees(vsd_steps)

    def _make_trainees(self, vsd_steps: int) -> None:
        args, both = self.args, (self.accelerator, self.args)
        student, fake = self.networks.student_parameters(), self.networks.fake_parameters()
        schedule = (args.lr_scheduler, args.lr_warmup_steps, vsd_steps)
        self.student = Trainee(*both, student, args.learning_rate, *schedule)
        self.fake = Trainee(*both, fake, args.fake_learning_rate, *schedule)
        self.warmup = None
        if args.warmup_regression_steps:
            schedule = ("cosine", args.warmup_lr_warmup_steps, args.warmup_regression_steps)
            self.warmup = Trainee(*both, student, args.warmup_learning_rate, *schedule)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside the adapters and the generators."""
        parts = {"order": self.order, "pair_order": self.pair_order, "scaler": self.accelerator.scaler}
        parts["draws"] = self.draws
        for name in ("student", "fake", "warmup"):
            trainee = getattr(self, name)
            parts[f"{name}_optimizer"] = trainee and trainee.optimizer
            parts[f"{name}_lr_scheduler"] = trainee and trainee.lr_scheduler
        return parts

    def trainees(self) -> dict[str, Trainee]:
        """Those that this run updates: ``student``, ``fake`` and, before score distillation, ``warmup``."""
        return {
            name: trainee for name in ("student", "fake", "warmup") if (trainee := getattr(self, name)) is not None
        }

    def use_given_rates(self) -> dict[str, tuple[float, float]]:
        """Let the flags' learning rates hold after a checkpoint; returns name -> (checkpoint's, now) where changed."""
        trainees = self.trainees()
        former = {name: trainee.use_given_rate() for name, trainee in trainees.items()}
        return {name: (rate, trainees[name].rate) for name, rate in former.items() if rate is not None}

    def draw_noise(self, name: str) -> Tensor:
        """(B, C, H, W), drawn on the CPU, so that it is the same on every device."""
        return sent(self.draws.normal(name, self.latent_shape), self.accelerator.device)

    def draw_timesteps(self, name: str, low: int, high: int) -> Tensor:
        """(B,) integers from ``low`` to ``high``, both included."""
        return sent(self.draws.integers(name, low, high), self.accelerator.device)

    def batches(self) -> Iterator[bool]:
        """For every batch of one update, whether it is the last. What is drawn meanwhile belongs to that batch."""
        count = self.args.gradient_accumulation_steps
        self.draws.next_round()
        for micro in range(count):
            self.draws.micro = micro
            yield micro == count - 1

    def one_step_images(self, student: losses.Predict) -> tuple[Tensor, Tensor]:
        """x0 of fresh noise and the next prompts, and these prompts' embeddings."""
        text = self.embeddings.at(self.order.next_batch())
        return losses.student_x0(student, self.draw_noise("z"), text, self.schedule), text

    def guidance_scale(self) -> float | Tensor:
        """The teacher's: a number, or drawn for every sample, (B,)."""
        args = self.args
        if args.guidance_scale_min is None:
            return args.guidance_scale
        bounds = (args.guidance_scale_min, args.guidance_scale_max)
        return sent(self.draws.uniform("guidance", args.guidance_scale_per, *bounds), self.accelerator.device)

    def student_loss(self, x0: Tensor, text: Tensor) -> tuple[Tensor, losses.Logs]:
        """The loss of the score at freshly drawn timesteps and noise."""
        args = self.args
        t, noise = self.draw_timesteps("t", args.min_timestep, args.max_timestep), self.draw_noise("noise")
        networks = self.networks
        common = (x0, text, self.embeddings.empty, networks.teacher, networks.fake, self.schedule, t, noise)
        scales = (self.guidance_scale(), args.fake_guidance_scale)
        if args.score_loss == "sid":
            return losses.sid_loss(*common, *scales, args.sid_alpha)
        return losses.vsd_loss(*common, *scales, args.score_weighting)

    def fake_loss(self, x0: Tensor, text: Tensor) -> tuple[Tensor, losses.Logs]:
        """Denoising of the student's images, some of them without their captions."""
        args, empty = self.args, self.embeddings.empty
        dropped = self.draws.uniform("drop", args.empty_prompts_per) < args.proportion_empty_prompts
        text = torch.where(sent(dropped.view(-1, 1, 1), text.device), empty, text)
        t = self.draw_timesteps("fake_t", args.fake_min_timestep, args.fake_max_timestep)
        noise, weighting = self.draw_noise("fake_noise"), args.fake_loss_weighting
        guidance = (args.fake_training_guidance_scale, empty)
        return losses.fake_score_loss(self.fake_network, x0, text, self.schedule, t, noise, weighting, *guidance)

    def pair_loss(self) -> tuple[Tensor, losses.Logs]:
        """Regression onto the next of the teacher's samples."""
        index = self.pair_order.next_batch()
        text = self.embeddings.at(self.pairs.prompt[index])
        x0 = losses.student_x0(
            self.student_network, sent(self.pairs.noise[index], self.accelerator.device), text, self.schedule
        )
        target = sent(self.pairs.target[index], self.accelerator.device)
        return losses.regression_loss(x0, target, self.args.regression_loss, self.args.huber_delta)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a batch's share of the update."""
        self.accelerator.backward(poisoned_if_broken(loss) / self.args.gradient_accumulation_steps)

    def student_update(self) -> tuple[list[tuple[Tensor, Tensor]], losses.Logs]:
        """Update the student; returns the detached images with their prompts, and logs."""
        images, logs, paired = [], [], self.args.regression_weight > 0
        for last in self.batches():
            with averaging(self.student_network, last and not paired), self._fake_as_constant():
                x0, text = self.one_step_images(self.student_network)
                loss, more = self.student_loss(x0, text)
                self.backward(loss)
            images.append((x0.detach(), text))
            if paired:
                with averaging(self.student_network, last):
                    loss, regression = self.pair_loss()
                    self.backward(self.args.regression_weight * loss)
                more |= regression
            logs.append(more)
        return images, _mean(logs) | {"student_grad": self.student.update()}

    def _fake_as_constant(self):
        # SiD's gradient goes through the fake to its input; VSD never differentiates it.
        return self.networks.frozen(FAKE) if self.args.score_loss == "sid" else nullcontext()

    def fake_update(self, images: list[tuple[Tensor, Tensor]]) -> losses.Logs:
        """Update the fake on ``images``."""
        logs = []
        for (x0, text), last in zip(images, self.batches()):
            with averaging(self.fake_network, last):
                loss, more = self.fake_loss(x0, text)
                self.backward(loss)
            logs.append(more)
        return _mean(logs) | {"fake_grad": self.fake.update()}

    def fresh_fake_update(self) -> losses.Logs:
        """Update the fake on fresh images of the student, which itself stays as it is."""
        with torch.no_grad():
            images = [self.one_step_images(self.networks.student) for _ in self.batches()]
        return self.fake_update(images)

    def vsd_update(self) -> losses.Logs:
        """One step of score distillation, see the module's docstring."""
        fresh = self.args.fake_updates_per_step - (0 if self.args.fake_first else 1)
        fake_logs = [self.fresh_fake_update() for _ in range(fresh)]
        images, logs = self.student_update()
        logs |= fake_logs[-1] if self.args.fake_first else self.fake_update(images)
        self.student.lr_scheduler.step()
        self.fake.lr_scheduler.step()
        return logs

    def warmup_update(self) -> losses.Logs:
        """One step of the regression warm start."""
        logs = []
        for last in self.batches():
            with averaging(self.student_network, last):
                loss, more = self.pair_loss()
                self.backward(loss)
            logs.append(more)
        logs = _mean(logs) | {"student_grad": self.warmup.update()}
        self.warmup.lr_scheduler.step()
        return logs


def _mean(logs: list[losses.Logs]) -> losses.Logs:
    """Of the batches of an update."""
    return {name: torch.stack([each[name] for each in logs]).mean() for name in logs[0]}
