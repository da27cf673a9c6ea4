"""The training run of `training/train_wadi.py`: set up, loop, validate, save, resume. Needs the extra ``train``."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from ..loaders import load_lorad_adapter, save_lorad_adapter
from ..lorad import LoRaDConfig, lorad_target_modules
from ..schedulers import one_step_scheduler
from . import checkpoint, data, losses, publishing, regression
from .networks import FAKE, STUDENT, WaDiNetworks
from .samples import latents_grid
from .steps import WaDiSteps

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_prompts(args: argparse.Namespace) -> list[str]:
    """The training prompts, without repetitions."""
    if args.shapes_captions is None:
        return data.read_prompts(args.train_prompts)
    from diffusers_wadi.shapes.captions import training_captions

    return data.clean_prompts(training_captions(args.shapes_captions, args.seed))


def lorad_config(unet: nn.Module, role: str, rank: int, convolutions: bool = False) -> LoRaDConfig:
    """LoRaD of ``rank`` on the paper's layers for ``role``; with ``convolutions`` on its "Linear + Conv"."""
    return LoRaDConfig(r=rank, target_modules=lorad_target_modules(unet, role=role, convolutions=convolutions))


class WaDiTrainer:
    """A distillation run.

    Args:
        args: the flags of `training/train_wadi.py`, checked (its `parse_args`).

    Raises:
        ValueError: the teacher is not an epsilon-prediction model, or a checkpoint does not fit the flags.
        FileNotFoundError: the checkpoint to resume from is not there.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.output_dir = Path(args.output_dir)
        resumed = args.resume_from_checkpoint and checkpoint.find_checkpoint(
            self.output_dir, args.resume_from_checkpoint
        )
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, str(self.output_dir / args.logging_dir)),
        )
        self.device = self.accelerator.device
        if self.device.type == "mps" and args.mixed_precision == "bf16":
            raise ValueError("--mixed_precision bf16 does not work on MPS. Use fp16 or no.")
        if self.accelerator.is_main_process:
            publishing.prepare(args)
        set_seed(args.seed)  # the same on all processes, so that their adapters start equal
        self._load_schedule()
        self._load_prompts()
        self._load_networks()
        pairs = self._regression_pairs()
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

    def _from_teacher(self, component_class, subfolder: str, **kwargs):
        teacher, revision = self.args.pretrained_teacher_model, self.args.revision
        return component_class.from_pretrained(teacher, subfolder=subfolder, revision=revision, **kwargs)

    def _model_from_teacher(self, model_class, subfolder: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        name = "dtype" if model_class is CLIPTextModel else "torch_dtype"  # transformers and diffusers differ
        model = self._from_teacher(model_class, subfolder, variant=self.args.variant, **{name: dtype})
        return model.requires_grad_(False).eval().to(self.device)

    def _load_schedule(self) -> None:
        args = self.args
        scheduler = self._from_teacher(DDIMScheduler, "scheduler")
        self.schedule = losses.NoiseSchedule.from_scheduler(scheduler, args.terminal_alpha_cumprod, self.device)
        self.teacher_scheduler = one_step_scheduler(scheduler)
        self.student_scheduler = one_step_scheduler(scheduler, terminal_alpha_cumprod=args.terminal_alpha_cumprod)
        highest = self.schedule.num_timesteps - 1
        if args.fake_max_timestep is None:
            args.fake_max_timestep = highest
        for name in ("max_timestep", "fake_min_timestep", "fake_max_timestep"):
            if getattr(args, name) > highest:
                raise ValueError(f"--{name} is {getattr(args, name)}, the teacher's schedule ends at {highest}.")

    def _load_prompts(self) -> None:
        args = self.args
        prompts = load_prompts(args)
        logger.info("%d prompts", len(prompts))
        encoder = self._model_from_teacher(CLIPTextModel, "text_encoder")
        encode = data.clip_encoder(self._from_teacher(CLIPTokenizer, "tokenizer"), encoder)
        caching = (args.max_cached_prompts, args.text_batch_size, DTYPES[args.embedding_dtype])
        self.embeddings = data.PromptEmbeddings(prompts, encode, *caching, self.device)
        self.validation_prompts = args.validation_prompts or prompts[: args.num_validation_images]
        self.validation_text = encode(self.validation_prompts).float()

    def _load_networks(self) -> None:
        args = self.args
        unet = self._model_from_teacher(UNet2DConditionModel, "unet", self._base_dtype())
        self.vae = self._model_from_teacher(AutoencoderKL, "vae")
        self.latent_shape = self._latent_shape(unet)
        student = self._student_config(unet)
        fake = lorad_config(unet, FAKE, args.fake_rank)
        self.networks = WaDiNetworks(unet, student, fake, self.accelerator.autocast)
        unet.to(self.device)
        # On a CPU the backward of fused attention takes longer than all the rest of a small UNet.
        if args.attention == "plain" or (args.attention == "auto" and self.device.type == "cpu"):
            unet.set_attn_processor(AttnProcessor())
        if args.channels_last:
            unet.to(memory_format=torch.channels_last)
        if args.gradient_checkpointing:
            self.networks.enable_gradient_checkpointing()
        if args.torch_compile:
            self.networks.compile()

    def _student_config(self, unet: nn.Module) -> LoRaDConfig | None:
        """Of a fresh student; ``None`` if ``--init_student`` has put one into ``unet``."""
        args = self.args
        if args.init_student is None:
            return lorad_config(unet, STUDENT, args.student_rank, args.student_convolutions)
        load_lorad_adapter(unet, args.init_student, adapter_name=STUDENT)
        rank = unet.peft_config[STUDENT].r
        if rank != args.student_rank:
            raise ValueError(
                f"--init_student {args.init_student} has rank {rank}, --student_rank is {args.student_rank}. "
                f"Pass --student_rank {rank}."
            )
        return None

    def _base_dtype(self) -> torch.dtype:
        if self.args.base_dtype is not None:
            return DTYPES[self.args.base_dtype]
        half = self.args.mixed_precision != "no" and self.device.type != "cpu"
        return DTYPES[self.args.mixed_precision] if half else torch.float32

    def _latent_shape(self, unet: nn.Module) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = self.args.resolution or unet.config.sample_size * factor
        if size % factor:
            raise ValueError(f"--resolution is {size}, expected a multiple of {factor}, the VAE's factor.")
        return unet.config.in_channels, size // factor, size // factor

    def _vsd_steps(self) -> int:
        args = self.args
        if args.max_train_steps is not None:
            return args.max_train_steps
        per_step = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return args.num_train_epochs * math.ceil(len(self.embeddings) / per_step)

    def _regression_pairs(self) -> regression.RegressionPairs | None:
        """Out of the cache in the output folder, or sampled now, by the main process."""
        args, file = self.args, self.output_dir / "regression_pairs.safetensors"
        if not args.warmup_regression_steps and not args.regression_weight:
            return None
        settings = {
            "count": args.warmup_regression_pairs,
            "num_steps": args.warmup_num_inference_steps,
            "guidance_scale": args.warmup_guidance_scale,
            "seed": args.seed,
        }
        fixed = {"teacher": args.pretrained_teacher_model, "latent_shape": self.latent_shape}
        fingerprint = regression.pairs_fingerprint(self.embeddings.prompts, **settings, **fixed)
        with self.accelerator.main_process_first():
            pairs = regression.load_pairs(file, fingerprint)
            if pairs is None:
                pairs = regression.make_pairs(
                    self.networks.teacher,
                    self.embeddings,
                    self.teacher_scheduler,
                    self.latent_shape,
                    batch_size=args.warmup_sample_batch_size,
                    progress=lambda batches: tqdm(batches, desc="teacher's samples"),
                    **settings,
                )
                regression.save_pairs(pairs, file, fingerprint)
        return pairs

    # --- the loop ---

    def train(self) -> None:
        """Run to the last step and export the student."""
        self._announce()
        main = self.accelerator.is_main_process
        with tqdm(total=self.total_steps, initial=self.step, desc="steps", disable=not main) as bar:
            while self.step < self.total_steps:
                logs = self.update()
                bar.update()
                self._after_update(logs, bar)
        self.accelerator.wait_for_everyone()
        if main:
            self.export()
        self.accelerator.end_training()

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
        if self.args.report_to != "none":
            plain = {name: str(value) for name, value in vars(self.args).items() if name != "hub_token"}
            self.accelerator.init_trackers("train_wadi", config=plain)
        if self.args.validation_steps and self.step == 0 and self.accelerator.is_main_process:
            self.validate()

    def _after_update(self, logs: losses.Logs, bar: tqdm) -> None:
        args, last = self.args, self.step == self.total_steps
        if last or self.step % args.logging_steps == 0:
            self._log(logs, bar)
        if last or self.step % args.checkpointing_steps == 0:
            self.save_checkpoint()
        if args.validation_steps and (last or self.step % args.validation_steps == 0):
            if self.accelerator.is_main_process:
                self.validate()

    def _log(self, logs: losses.Logs, bar: tqdm) -> None:
        values = {name: float(value) for name, value in logs.items()}
        bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        self.accelerator.log(values, step=self.step)
        broken = [name for name, value in values.items() if name.endswith("loss") and not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"{broken[0]} is {values[broken[0]]} at step {self.step}. Resume from a checkpoint with lower "
                "--learning_rate and --fake_learning_rate, or start again without --mixed_precision fp16."
            )

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

    @torch.no_grad()
    def validate(self) -> Path:
        """Write a grid of one-step images of fixed prompts and noise; no training stream is touched."""
        generator = torch.Generator().manual_seed(self.args.validation_seed)
        noise = torch.randn(len(self.validation_prompts), *self.latent_shape, generator=generator).to(self.device)
        with self.averaged_student():
            x0 = losses.student_x0(self.networks.student, noise, self.validation_text, self.schedule)
        file = self.output_dir / "samples" / f"step-{self.step:06d}.png"
        file.parent.mkdir(exist_ok=True)
        latents_grid(self.vae, x0).save(file)
        return file

    # --- saving ---

    def save_adapter(self, folder: Path, role: str, base: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Write the adapter of ``role`` in the native format; it names ``base``, by default the teacher."""
        base = base or checkpoint.lasting_name(self.args.pretrained_teacher_model)
        save_lorad_adapter(self.networks.unet, folder, role, base_model_name_or_path=base, dtype=dtype)

    def export(self) -> None:
        """The student (its average if one is kept) and its scheduler into the output folder."""
        args = self.args
        with self.averaged_student():
            self.save_adapter(self.output_dir, STUDENT, args.base_model_name_or_path, DTYPES[args.adapter_dtype])
        self.student_scheduler.save_pretrained(self.output_dir / "scheduler")
        trained = (self.networks.unet.peft_config[STUDENT], self.step, len(self.embeddings), self.validation_prompts)
        logger.info("student written to %s %s", self.output_dir, publishing.publish_student(args, *trained))

    def _parts(self) -> dict:
        return self.steps.parts() | {"ema": self.ema, "step": self.step}

    def save_checkpoint(self) -> Path:
        """Write ``checkpoint-<step>`` and remove old ones."""
        folder = self.output_dir / f"checkpoint-{self.step}"
        # Every process's generators, gathered by the main one: a single writer can rename the folder when it is whole.
        randoms = gather_object([[checkpoint.random_states(), self.steps.generator.get_state()]])
        if self.accelerator.is_main_process:
            checkpoint.write_folder(folder, lambda partial: self._write_checkpoint(partial, randoms))
            checkpoint.remove_old_checkpoints(self.output_dir, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return folder

    def _write_checkpoint(self, folder: Path, randoms: list) -> None:
        self.save_adapter(folder / STUDENT, STUDENT)
        self.save_adapter(folder / FAKE, FAKE)
        if self.ema is not None:
            with self.averaged_student():
                self.save_adapter(folder / "student_ema", STUDENT)
        state = checkpoint.collect_state(self._parts())
        torch.save({"parts": state, "randoms": randoms}, folder / checkpoint.STATE_FILE)

    def resume(self, folder: Path) -> None:
        """Go on from ``folder`` as if there had been no stop, except for learning rates that the flags change."""
        saved = checkpoint.load_checkpoint(folder, self.networks, self._parts())
        if self.ema is not None:
            self.ema.to(self.device)  # its load_state_dict keeps the tensors where the file was read to, on the CPU
        for name, (former, rate) in self.steps.use_given_rates().items():
            logger.info("learning rate of %s: %g instead of the checkpoint's %g", name, rate, former)
        self.step = saved["parts"]["step"]
        rank, randoms = self.accelerator.process_index, saved["randoms"]
        if rank < len(randoms):
            checkpoint.set_random_states(randoms[rank][0])
            self.steps.generator.set_state(randoms[rank][1])
        logger.info("resumed from %s at step %d", folder, self.step)
