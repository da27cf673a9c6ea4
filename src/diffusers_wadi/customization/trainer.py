"""The loop of a DreamBooth run, its checkpoints and its sample grids."""

from __future__ import annotations

import argparse
import logging
import math
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..distillation import checkpoint
from ..distillation.distributed import averaging
from ..distillation.guard import poisoned_if_broken
from ..distillation.monitoring import Averages, memory_gb, tracker_names
from ..distillation.samples import save_grid, send_images
from ..distillation.settings import check_settings, plain_settings, save_settings
from ..distillation.steps import Trainee
from ..distillation.stopping import StopSignals, report_stop
from ..downstream.dreambooth import SubjectImages, dreambooth_loss, noise_target
from . import publishing
from .data import SubjectData
from .model import METHODS, SUBJECT, SubjectModel, check_model

logger = logging.getLogger(__name__)
TRAINED_FILE = "trained.safetensors"
# Beside those of `distillation.settings`: flags with which a run may go on differently.
MAY_DIFFER = frozenset(
    "pretrained_model_name_or_path class_data_dir num_class_images class_batch_size class_num_inference_steps "
    "class_guidance_scale validation_prompt validation_num_inference_steps validation_guidance_scale scale_lr".split()
)


class DreamBoothTrainer:
    """A run. Whatever is wrong with the data, the model or the checkpoint is found here, before the first update.

    Args:
        args: the flags of `training/train_dreambooth_lorad.py`, checked (its `parse_args`).

    Raises:
        ValueError: a model of another kind than Stable Diffusion 1.x or 2.x, a file that is no image, a resolution that
            does not fit, or a checkpoint of a run with other flags.
        OSError: folders or checkpoints that are not there.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.output_dir = args, Path(args.output_dir)
        self.settings = plain_settings(args)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=tracker_names(args.report_to) or None,
            project_config=ProjectConfiguration(args.output_dir, str(self.output_dir / args.logging_dir)),
        )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        resumed = self._find_checkpoint()
        latent_shape = check_model(args)
        set_seed(args.seed)  # the same on all processes, so that their adapters start equal
        self.model = SubjectModel(args, self.accelerator)
        if self.main:
            publishing.prepare(args, self.model.base)
        crop = (latent_shape[1] * self.model.vae_factor, args.center_crop, args.random_flip)
        instances = SubjectImages(args.instance_data_dir, *crop, what="instance images")
        self.data = SubjectData(args, self.accelerator, self.model, instances, latent_shape)
        self._make_trainee()
        self.step = 0
        if resumed:
            self.resume(resumed)

    def _find_checkpoint(self) -> Path | None:
        """The one to resume from, after what a killed run left half done is put in order."""
        if self.main:
            checkpoint.clean_up(self.output_dir)
        self.accelerator.wait_for_everyone()
        wanted = self.args.resume_from_checkpoint
        folder = checkpoint.find_checkpoint(self.output_dir, wanted) if wanted else None
        if folder is not None:
            binding = {name: value for name, value in self.settings.items() if name not in MAY_DIFFER}
            for name, (former, now) in check_settings(folder, binding).items():
                logger.info("--%s is %s, %s when the checkpoint was written", name, now, former)
        return folder

    def _make_trainee(self) -> None:
        args, accelerator = self.args, self.accelerator
        module = self.model.make_trainable()
        self.module = accelerator.prepare_model(module) if accelerator.num_processes > 1 else module
        per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        if args.num_train_epochs is not None:
            self.total_steps = args.num_train_epochs * math.ceil(len(self.data.images[0]) / per_step)
        else:
            self.total_steps = METHODS[args.method][1] if args.max_train_steps is None else args.max_train_steps
        rate = args.learning_rate or METHODS[args.method][0]
        rate *= per_step if args.scale_lr else 1
        schedule = (args.lr_scheduler, args.lr_warmup_steps, self.total_steps)
        self.trainee = Trainee(accelerator, args, list(self.model.parameters.values()), rate, *schedule)

    # --- the loop ---

    def train(self) -> signal.Signals | None:
        """Run to the last step and write the result.

        Returns:
            `None`; the signal, if SIGINT or SIGTERM ended it: with a checkpoint of the last step.
        """
        self._announce()
        averages = Averages()
        bar = tqdm(total=self.total_steps, initial=self.step, desc="steps", disable=not self.main)
        with StopSignals(self.accelerator) as stop, bar:
            while self.step < self.total_steps:
                averages.add(self.update())
                bar.update()
                if received := stop.wanted(look=self._due(self.args.logging_steps)):
                    return self._stop(received)
                self._after_update(averages, bar)
        self.accelerator.wait_for_everyone()
        if self.main:
            self.export()
        self.accelerator.end_training()
        return None

    def _announce(self) -> None:
        count = sum(parameter.numel() for parameter in self.model.parameters.values())
        logger.info("%d trainable parameters, %s, %d steps", count, self._data_in_words(), self.total_steps)
        if self.accelerator.log_with:
            plain = {name: str(value) for name, value in self.settings.items()}
            self.accelerator.init_trackers("train_dreambooth_lorad", config=plain)

    def _data_in_words(self) -> str:
        return " and ".join(f"{len(i)} {kind} images" for i, kind in zip(self.data.images, ("instance", "class")))

    def update(self) -> dict[str, Tensor]:
        """One update of what is trained; returns what is to be logged."""
        count, logs = self.args.gradient_accumulation_steps, []
        self.data.draws.next_round()
        for micro in range(count):
            self.data.draws.micro = micro
            with averaging(self.module, micro == count - 1):
                loss, more = self.loss()
                self.accelerator.backward(poisoned_if_broken(loss) / count)
            logs.append(more)
        norm = self.trainee.update()
        self.trainee.lr_scheduler.step()
        self.step += 1
        return {name: torch.stack([each[name].detach() for each in logs]).mean() for name in logs[0]} | {"grad": norm}

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the next batch."""
        data, scheduler = self.data, self.model.pipe.scheduler
        latents, noise, t = data.next_latents(), data.noise("noise"), data.timesteps()
        with self.accelerator.autocast():
            prediction = self.module(scheduler.add_noise(latents, noise, t), t, data.next_text())
        return dreambooth_loss(prediction, noise_target(scheduler, latents, noise, t), data.prior_loss_weight)

    def _due(self, every: int) -> bool:
        """Whether what is to be done `every` so many updates (0: never) is due now; all of it is at the last."""
        return every > 0 and (self.step == self.total_steps or self.step % every == 0)

    def _after_update(self, averages: Averages, bar: tqdm) -> None:
        if self._due(self.args.logging_steps):
            values = averages.take(self.accelerator) | {"memory_gb": memory_gb(self.device)}
            values |= {"lr": self.trainee.lr_scheduler.get_last_lr()[0], "left_out": self._left_out()}
            bar.set_postfix(loss=f"{values['loss']:.3g}")
            self.accelerator.log(values, step=self.step)
        if self._due(self.args.checkpointing_steps):
            self.save_checkpoint()
        if self.args.validation_prompt and self._due(self.args.validation_steps):
            self.validate()

    def _left_out(self) -> int:
        total, worst = self.trainee.guard.counts.tolist()
        if worst >= self.args.max_bad_steps:
            raise FloatingPointError(
                f"{worst} updates in a row had a loss or gradient that is not finite (--max_bad_steps "
                f"{self.args.max_bad_steps}), up to step {self.step}, and were left out. Resume from a checkpoint with a "
                "lower --learning_rate, or without --mixed_precision fp16."
            )
        return total

    def _stop(self, received: signal.Signals) -> signal.Signals:
        report_stop(received, self.step, self.total_steps, self.save_checkpoint())
        self.accelerator.end_training()
        return received

    def validate(self) -> Path | None:
        """Draw the validation prompt from the same noise each time, into `samples/` and to all trackers."""
        if not self.main:
            return None
        args = self.args
        modes = {model: model.training for model in self.model.trained.values()}
        for model in modes:
            model.eval()
        with self.accelerator.autocast():
            images = [self._validation_image(args.validation_seed + i) for i in range(args.num_validation_images)]
        for model, training in modes.items():
            model.train(training)
        send_images(self.accelerator, images, [args.validation_prompt] * len(images), self.step)
        return save_grid(images, self.output_dir / "samples" / f"step-{self.step:06d}.png")

    def _validation_image(self, seed: int):
        height, width = (side * self.model.vae_factor for side in self.data.latent_shape[1:])
        return self.model.pipe(
            self.args.validation_prompt,
            height=height,
            width=width,
            num_inference_steps=self.args.validation_num_inference_steps,
            guidance_scale=self.args.validation_guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]

    # --- saving ---

    def export(self) -> None:
        """Write what users load into the output folder, and upload it with `--push_to_hub`."""
        files = self.model.write(self.output_dir)
        url = ""
        if self.args.method == "lorad":
            config, trained = self.model.pipe.unet.peft_config[SUBJECT], (self.step, self.trainee.rate)
            url = publishing.publish_subject(
                self.args, config, self.model.base, files, *trained, self._data_in_words()
            )
        logger.info("%s written to %s %s", self.args.method, self.output_dir, url)

    def _parts(self) -> dict[str, Any]:
        optimiser = {"optimizer": self.trainee.optimizer, "lr_scheduler": self.trainee.lr_scheduler}
        return self.data.parts() | optimiser | {"scaler": self.accelerator.scaler, "step": self.step}

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-<step>`, whole or not at all, and remove old ones."""
        folder = self.output_dir / f"checkpoint-{self.step}"
        randoms = gather_object([checkpoint.random_states()])
        if self.main:
            checkpoint.write_folder(folder, lambda partial: self._write_checkpoint(partial, randoms))
            for path in checkpoint.set_aside_later(self.output_dir, self.step):
                logger.info("%s: of an earlier run that went further; 'latest' passes it over", path)
            checkpoint.remove_old_checkpoints(self.output_dir, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return folder

    def _write_checkpoint(self, folder: Path, randoms: list) -> None:
        if self.args.method != "full":  # an adapter is small, and of use by itself
            self.model.write(folder)
        trained = {name: parameter.detach().cpu().contiguous() for name, parameter in self.model.parameters.items()}
        save_file(trained, folder / TRAINED_FILE)
        save_settings(self.settings, folder)
        state = checkpoint.collect_state(self._parts())
        torch.save({"parts": state, "randoms": randoms}, folder / checkpoint.STATE_FILE)

    def resume(self, folder: Path) -> None:
        """Go on from `folder` as if there had been no stop, except for a learning rate that the flags change.

        Raises:
            ValueError: it holds other parameters or parts than this run has; nothing is loaded then.
        """
        saved = torch.load(folder / checkpoint.STATE_FILE, map_location="cpu", weights_only=True)
        tensors, parameters = load_file(folder / TRAINED_FILE), self.model.parameters
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in parameters.items()}:
            raise ValueError(
                f"{folder} holds other parameters than are trained here. Resume with the model it began with."
            )
        checkpoint.restore_state(self._parts(), saved["parts"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        if (former := self.trainee.use_given_rate()) is not None:
            logger.info("learning rate: %g instead of the checkpoint's %g", self.trainee.rate, former)
        self.step = saved["parts"]["step"]
        if self.accelerator.process_index < len(saved["randoms"]):
            checkpoint.set_random_states(saved["randoms"][self.accelerator.process_index])
        logger.info("resumed from %s at step %d", folder, self.step)
