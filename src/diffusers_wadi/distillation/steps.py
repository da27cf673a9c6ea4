"""One update of a distillation run, put together from the losses.

An update is: (``fake_updates_per_step`` - 1) updates of the fake on fresh images, one of the student, one of the fake
on the images that the student was just trained on, made before its update (the release's order).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from . import data, losses
from .networks import WaDiNetworks
from .regression import RegressionPairs


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

    def update(self) -> Tensor:
        """Average over processes, clip, step, forget the gradients. Returns the norm before clipping."""
        if self.accelerator.num_processes > 1:
            # The UNet is not wrapped in DDP: it runs several roles per backward pass; only adapters have gradients.
            for parameter in self.parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
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
    return optimizer_class(
        parameters, lr=rate, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon
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
        # Every process draws its own noise.
        self.generator = torch.Generator().manual_seed(args.seed * 65_537 + rank)
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
        for name in ("student", "fake", "warmup"):
            trainee = getattr(self, name)
            parts[f"{name}_optimizer"] = trainee and trainee.optimizer
            parts[f"{name}_lr_scheduler"] = trainee and trainee.lr_scheduler
        return parts

    def use_given_rates(self) -> dict[str, tuple[float, float]]:
        """Let the flags' learning rates hold after a checkpoint; returns name -> (checkpoint's, now) where changed."""
        trainees = {"student": self.student, "fake": self.fake, "warmup": self.warmup}
        former = {name: trainee.use_given_rate() for name, trainee in trainees.items() if trainee is not None}
        return {name: (rate, trainees[name].rate) for name, rate in former.items() if rate is not None}

    def draw_noise(self, count: int) -> Tensor:
        """(count, C, H, W), from the run's own CPU generator, so that it is the same on every device."""
        return torch.randn(count, *self.latent_shape, generator=self.generator).to(self.accelerator.device)

    def draw_timesteps(self, count: int, low: int, high: int) -> Tensor:
        """(count,) integers from ``low`` to ``high``, both included."""
        return torch.randint(low, high + 1, (count,), generator=self.generator).to(self.accelerator.device)

    def batches(self) -> range:
        """The batches that make up one update."""
        return range(self.args.gradient_accumulation_steps)

    def one_step_images(self) -> tuple[Tensor, Tensor]:
        """x0 of fresh noise and the next prompts, and these prompts' embeddings."""
        text = self.embeddings.at(self.order.next_batch())
        x0 = losses.student_x0(self.networks.student, self.draw_noise(text.shape[0]), text, self.schedule)
        return x0, text

    def student_loss(self, x0: Tensor, text: Tensor) -> tuple[Tensor, losses.Logs]:
        """Score distillation at freshly drawn timesteps and noise."""
        args = self.args
        t = self.draw_timesteps(x0.shape[0], args.min_timestep, args.max_timestep)
        return losses.vsd_loss(
            x0,
            text,
            self.embeddings.empty,
            self.networks.teacher,
            self.networks.fake,
            self.schedule,
            t,
            self.draw_noise(x0.shape[0]),
            args.guidance_scale,
            args.fake_guidance_scale,
            args.score_weighting,
        )

    def fake_loss(self, x0: Tensor, text: Tensor) -> tuple[Tensor, losses.Logs]:
        """Denoising of the student's images, some of them without their captions."""
        args = self.args
        dropping = (args.proportion_empty_prompts, args.empty_prompts_per, self.generator)
        text = data.drop_prompts(text, self.embeddings.empty, *dropping)
        t = self.draw_timesteps(x0.shape[0], args.fake_min_timestep, args.fake_max_timestep)
        noise = self.draw_noise(x0.shape[0])
        return losses.fake_score_loss(self.networks.fake, x0, text, self.schedule, t, noise, args.fake_loss_weighting)

    def pair_loss(self) -> tuple[Tensor, losses.Logs]:
        """Regression onto the next of the teacher's samples."""
        index = self.pair_order.next_batch()
        text = self.embeddings.at(self.pairs.prompt[index])
        x0 = losses.student_x0(
            self.networks.student, self.pairs.noise[index].to(self.accelerator.device), text, self.schedule
        )
        target = self.pairs.target[index].to(self.accelerator.device)
        return losses.regression_loss(x0, target, self.args.regression_loss, self.args.huber_delta)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a batch's share of the update."""
        self.accelerator.backward(loss / self.args.gradient_accumulation_steps)

    def student_update(self) -> tuple[list[tuple[Tensor, Tensor]], losses.Logs]:
        """Update the student; returns the detached images with their prompts, and logs."""
        images, logs = [], {}
        for _ in self.batches():
            x0, text = self.one_step_images()
            loss, logs = self.student_loss(x0, text)
            self.backward(loss)
            images.append((x0.detach(), text))
            if self.args.regression_weight > 0:
                loss, more = self.pair_loss()
                self.backward(self.args.regression_weight * loss)
                logs |= more
        return images, logs | {"student_grad": self.student.update()}

    def fake_update(self, images: list[tuple[Tensor, Tensor]]) -> losses.Logs:
        """Update the fake on ``images``."""
        logs = {}
        for x0, text in images:
            loss, logs = self.fake_loss(x0, text)
            self.backward(loss)
        return logs | {"fake_grad": self.fake.update()}

    def fresh_fake_update(self) -> losses.Logs:
        """Update the fake on fresh images of the student, which itself stays as it is."""
        with torch.no_grad():
            images = [self.one_step_images() for _ in self.batches()]
        return self.fake_update(images)

    def vsd_update(self) -> losses.Logs:
        """One step of score distillation, see the module's docstring."""
        for _ in range(self.args.fake_updates_per_step - 1):
            self.fresh_fake_update()
        images, logs = self.student_update()
        logs |= self.fake_update(images)
        self.student.lr_scheduler.step()
        self.fake.lr_scheduler.step()
        return logs

    def warmup_update(self) -> losses.Logs:
        """One step of the regression warm start."""
        logs = {}
        for _ in self.batches():
            loss, logs = self.pair_loss()
            self.backward(loss)
        logs |= {"student_grad": self.warmup.update()}
        self.warmup.lr_scheduler.step()
        return logs
