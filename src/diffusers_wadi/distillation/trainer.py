"""The training run of `training/train_wadi.py`: set up, loop, validate, save, resume. Needs the extra ``train``."""

from __future__ import annotations

import argparse
import logging
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, gather_object, set_seed
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import nn

from ..loaders import load_lorad_adapter
from . import checkpoint, exporting, losses, publishing, setup
from .adapters import AdapterSpec, adapter_specs
from .distributed import refuse_sharding
from .flags import DTYPES
from .monitoring import RunLog, tracker_names
from .networks import FAKE, STUDENT, WaDiNetworks
from .objectives import start_scheduler
from .samples import GridPainter, save_grid, send_images
from .settings import PROMPTS, check_settings, plain_settings, save_settings
from .steps import WaDiSteps
from .stopping import StopSignals, report_stop

logger = logging.getLogger(__name__)
WAIT = timedelta(hours=12)


class WaDiTrainer:
    """A distillation run.

    Args:
        args: the flags of `training/train_wadi.py`, checked (its `parse_args`).

    Raises:
        ValueError: a teacher of a kind that is not known here, prompts that cannot be read, or a checkpoint that does not
            fit the flags.
        FileNotFoundError: the checkpoint to resume from is not there.
    """

    def __init__(self, args: argparse.Namespace):
        refuse_sharding()
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.settings = plain_settings(args)  # before set-up fills in what depends on the teacher
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=tracker_names(args.report_to) or None,
            project_config=ProjectConfiguration(args.output_dir, str(self.output_dir / args.logging_dir)),
            # The main process reads prompts and draws the teacher's samples while the others wait; NCCL's limit is 10 min.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
        )
        self.device = self.accelerator.device
        resumed = self._find_checkpoint()
        if self.device.type == "mps" and args.mixed_precision == "bf16":
            raise ValueError("--mixed_precision bf16 does not work on MPS. Use fp16 or no.")
        if self.accelerator.is_main_process:
            publishing.prepare(args)
        set_seed(args.seed)  # the same on all processes, so that their adapters start equal
        self.backbone = setup.make_backbone(args, self.device)
        self.schedule = setup.load_schedule(args, self.backbone)
        if args.t_init is not None:
            self.schedule = self.schedule.starting_at(args.t_init)
        self.latent_shape = self.backbone.latent_shape(args.resolution)
        self._load_prompts()
        self._load_networks()
        pairs = setup.regression_pairs(
            args, self.accelerator, self.backbone, self.networks.teacher, self.embeddings, self.latent_shape
        )
        self.warmup_steps = args.warmup_regression_steps + args.fake_warmup_steps
        self.total_steps = self.warmup_steps + self._vsd_steps()
        self.steps = WaDiSteps(
            args,
            self.accelerator,
            self.networks,
            self.schedule,
            self.embeddings,
            self.latent_shape,
            pairs,
            self._vsd_steps(),
        )
        student = self.networks.student_parameters()
        self.ema = EMAModel(student, decay=args.ema_decay) if args.use_ema else None
        self.step = 0
        if resumed:
            self.resume(resumed)

    # --- set-up ---

    def _find_checkpoint(self) -> Path | None:
        """The one to resume from, after what a killed run left half done is put in order."""
        if self.accelerator.is_main_process:
            checkpoint.clean_up(self.output_dir)
        self.accelerator.wait_for_everyone()
        wanted = self.args.resume_from_checkpoint
        folder = checkpoint.find_checkpoint(self.output_dir, wanted) if wanted else None
        if folder is not None:
            changed = check_settings(folder, self.settings)
            for name, (former, now) in changed.items():
                logger.info("--%s is %s, %s when the checkpoint was written", name, now, former)
        return folder

    def _load_prompts(self) -> None:
        args = self.args
        self.embeddings, encode = setup.make_embeddings(args, self.accelerator, self.backbone)
        self.settings[PROMPTS] = self.embeddings.prompts.digest
        self.validation_prompts = args.validation_prompts or self.embeddings.prompts[: args.num_validation_images]
        self._validation_text = encode(self.validation_prompts).float()

    def _load_networks(self) -> None:
        args = self.args
        model = self.backbone.load_denoiser(setup.base_dtype(args, self.device))
        if setup.plain_attention(args, self.device):
            model.set_attn_processor(AttnProcessor())
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        student, fake = adapter_specs(args)
        made_of = self._given_student(model, student), fake
        self.networks = WaDiNetworks(model, *made_of, self.accelerator.autocast, self.backbone.eps)
        if args.gradient_checkpointing:
            self.networks.enable_gradient_checkpointing()
        if args.torch_compile:
            self.networks.compile()

    @cached_property
    def painter(self) -> GridPainter:
        """Of sample grids; loads the VAE."""
        args, student = self.args, self.networks.network(STUDENT)
        made_of = (self.backbone, student, self.backbone.load_vae(), self._student_scheduler(), self._validation_text)
        return GridPainter(*made_of, self.latent_shape, args.validation_seed, args.train_batch_size)

    def _given_student(self, model: nn.Module, student: AdapterSpec) -> AdapterSpec | None:
        """``student``; ``None`` if ``--init_student`` has put one into ``model``."""
        args = self.args
        if args.init_student is None:
            return student
        load_lorad_adapter(model, args.init_student, adapter_name=STUDENT, component=self.backbone.subfolder)
        rank = model.peft_config[STUDENT].r
        if rank != args.student_rank:
            raise ValueError(
                f"--init_student {args.init_student} has rank {rank}, --student_rank is {args.student_rank}. "
                f"Pass --student_rank {rank}."
            )
        return None

    def _student_scheduler(self):
        if self.schedule.start is not None:
            return start_scheduler(self.backbone.scheduler, self.schedule)
        return self.backbone.student_scheduler(self.args.terminal_alpha_cumprod)

    def _vsd_steps(self) -> int:
        args = self.args
        if args.max_train_steps is not None:
            return args.max_train_steps
        per_step = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return args.num_train_epochs * math.ceil(len(self.embeddings) / per_step)

    # --- the loop ---

    def train(self) -> signal.Signals | None:
        """Run to the last step and export the student.

        Returns:
            ``None`` if it came to that; the signal, if SIGINT or SIGTERM ended it: with a checkpoint of the last step.
        """
        self._announce()
        log = RunLog(self.args, self.accelerator, self.networks, self.steps.trainees(), self.total_steps, self.step)
        with StopSignals(self.accelerator) as stop, log.bar:
            while self.step < self.total_steps:
                log.add(self.update())
                if received := stop.wanted(look=self._due(self.args.logging_steps)):
                    return self._stop(received)
                self._after_update(log)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.export()
        self.accelerator.end_training()
        return None

    def update(self) -> losses.Logs:
        """The next update: of the warm start first, then of the fake alone, then of score distillation."""
        if self.step < self.args.warmup_regression_steps:
            logs = self.steps.warmup_update()
        elif self.step < self.warmup_steps:
            logs = self.steps.fresh_fake_update()
        else:
            logs = self.steps.vsd_update()
        self.step += 1
        if self.ema is not None:
            self.ema.step(self.networks.student_parameters())
        return logs

    def _announce(self) -> None:
        sizes = [sum(p.numel() for p in role.parameters) for role in (self.steps.student, self.steps.fake)]
        logger.info("trainable parameters: student %d, fake %d; %d steps", *sizes, self.total_steps)
        if self.accelerator.log_with:
            plain = {name: str(value) for name, value in self.settings.items()}
            self.accelerator.init_trackers("train_wadi", config=plain)
        if self.args.validation_steps and self.accelerator.is_main_process:
            self.painter  # noqa: B018 (what cannot be loaded is to show now)
        if self.args.validation_steps and self.step == 0:
            self.validate()

    def _due(self, every: int) -> bool:
        """Whether what is to be done ``every`` so many updates (0: never) is due now; all of it is at the last."""
        return every > 0 and (self.step == self.total_steps or self.step % every == 0)

    def _after_update(self, log: RunLog) -> None:
        if self._due(self.args.logging_steps):
            log.report(self.step)
        with log.paused():
            if self._due(self.args.checkpointing_steps):
                self.save_checkpoint()
            if self._due(self.args.validation_steps):
                self.validate()

    def _stop(self, received: signal.Signals) -> signal.Signals:
        report_stop(received, self.step, self.total_steps, self.save_checkpoint())
        self.accelerator.end_training()
        return received

    @contextmanager
    def averaged_student(self) -> Iterator[None]:
        """The EMA weights in place of the student's inside the block, if an average is kept."""
        if self.ema is None:
            yield
            return
        parameters = self.networks.student_parameters()
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def validate(self) -> Path | None:
        """Draw fixed prompts and noise through the one-step pipeline, into `samples/` and to all trackers.

        Returns:
            The grid's file; ``None`` in processes other than the main one.
        """
        if not self.accelerator.is_main_process:
            return None
        eager = torch.compiler.set_stance("force_eager") if self.args.torch_compile else nullcontext()
        # A student of float32 weights over a half-precision base is called under autocast, as in training.
        precision = self.accelerator.autocast() if self.networks.owns_network(STUDENT) else nullcontext()
        with self.averaged_student(), self.networks.selected(STUDENT), eager, precision:
            images = self.painter.images()
        send_images(self.accelerator, images, self.validation_prompts, self.step)
        return save_grid(images, self.output_dir / "samples" / f"step-{self.step:06d}.png")

    # --- saving ---

    def export(self) -> None:
        """The student (its average if one is kept) and its scheduler into the output folder."""
        args = self.args
        base = args.base_model_name_or_path or checkpoint.lasting_name(args.pretrained_teacher_model)
        naming = (self.output_dir, self.backbone.subfolder, base, DTYPES[args.adapter_dtype])
        with self.averaged_student():
            written = exporting.export_role(self.networks, STUDENT, *naming)
        self._student_scheduler().save_pretrained(self.output_dir / "scheduler")
        config = exporting.adapter_config(self.networks, STUDENT)
        trained = (config, self.step, len(self.embeddings), self.validation_prompts)
        url = publishing.publish_student(args, *trained)
        logger.info("student written to %s: %s %s", self.output_dir, ", ".join(written), url)

    def _parts(self) -> dict:
        return self.steps.parts() | {"ema": self.ema, "step": self.step}

    def save_checkpoint(self) -> Path:
        """Write ``checkpoint-<step>`` and remove old ones."""
        folder, main = self.output_dir / f"checkpoint-{self.step}", self.accelerator.is_main_process
        # Every process's generators, gathered by the main one: a single writer can rename the folder when it is whole.
        randoms = gather_object([checkpoint.random_states()])
        if main:
            checkpoint.write_folder(folder, lambda partial: self._write_checkpoint(partial, randoms))
            for path in checkpoint.set_aside_later(self.output_dir, self.step):
                logger.info("%s: of an earlier run that went further; 'latest' passes it over", path)
            checkpoint.remove_old_checkpoints(self.output_dir, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return folder

    def _write_checkpoint(self, folder: Path, randoms: list) -> None:
        base = checkpoint.lasting_name(self.args.pretrained_teacher_model)
        for role in (STUDENT, FAKE):
            checkpoint.save_role(self.networks, role, folder / role, base)
        if self.ema is not None:
            with self.averaged_student():
                checkpoint.save_role(self.networks, STUDENT, folder / "student_ema", base)
        save_settings(self.settings, folder)
        state = checkpoint.collect_state(self._parts())
        torch.save({"parts": state, "randoms": randoms}, folder / checkpoint.STATE_FILE)

    def resume(self, folder: Path) -> None:
        """Go on from ``folder`` as if there had been no stop, except for learning rates that the flags change."""
        check_settings(folder, self.settings)  # again, now that the prompts are among them
        saved = checkpoint.load_checkpoint(folder, self.networks, self._parts())
        if self.ema is not None:
            self.ema.to(self.device)  # its load_state_dict keeps the tensors where the file was read to, on the CPU
        for name, (former, rate) in self.steps.use_given_rates().items():
            logger.info("learning rate of %s: %g instead of the checkpoint's %g", name, rate, former)
        self.step = saved["parts"]["step"]
        rank, randoms = self.accelerator.process_index, saved["randoms"]
        if rank < len(randoms):
            checkpoint.set_random_states(randoms[rank])
        logger.info("resumed from %s at step %d", folder, self.step)
