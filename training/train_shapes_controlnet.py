#!/usr/bin/env python
"""Trains a ControlNet on the multi-step Shapes World teacher: diffusers' own `ControlNetModel`, from the teacher's UNet.

    python training/train_shapes_controlnet.py --output_dir shapes-controlnet --condition mask

It writes OUTPUT_DIR/controlnet, which `ControlNetModel.from_pretrained` loads, for the teacher and, unchanged, for the
one-step student. Interrupt it at will: the same command goes on from the last checkpoint.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_wsd_schedule

from diffusers_wadi._files import folder_written_beside, writable_folder, written_beside
from diffusers_wadi.shapes import bundled_checkpoint
from diffusers_wadi.shapes.conditions import CONDITIONS, condition_of, mask_iou
from diffusers_wadi.shapes.renderer import render_scenes
from diffusers_wadi.shapes.scenes import heldout_captions, parse_caption, training_scenes

# Channels of the small network that reads the condition. Half of ControlNet's own: masks of 64 pixels are easy.
EMBEDDING_CHANNELS = (16, 16, 32, 128)
# Flags that may differ when a run goes on; with any other the result would be neither run's.
FREE = ("output_dir", "num_threads", "mixed_precision", "checkpointing_steps", "validation_steps")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", required=True, help="Folder for the checkpoint and the ControlNet.")
    add("--pretrained_teacher_model", help="Folder of a Shapes World pipeline. Default: the bundled teacher.")
    add("--condition", choices=CONDITIONS, default="mask", help="Filled shapes, or their outlines. Default: mask.")
    add("--seed", type=int, default=0, help="Seed of weights, data and noise. Default: 0.")
    add("--num_threads", type=int, help="CPU threads. Default: torch's own choice.")
    add("--mixed_precision", choices=("no", "bf16", "fp16"), default="bf16", help="Autocast. Default: bf16.")
    add("--num_train_images", type=int, default=6144, help="Renders in the training set. Default: 6144.")
    add("--max_train_steps", type=int, default=1300, help="Optimiser steps. Default: 1300.")
    add("--train_batch_size", type=int, default=32, help="Images a step, over all processes. Default: 32.")
    add("--learning_rate", type=float, default=1e-3, help="Peak rate of AdamW. Default: 1e-3.")
    add("--proportion_empty_prompts", type=float, default=0.1, help="Captions dropped, for guidance. Default: 0.1.")
    add(
        "--timestep_sampling",
        choices=("cubic", "uniform"),
        default="cubic",
        help="cubic: t = T (1 - u^3), which draws 46 %% of the steps above 0.9 T, where the layout is decided and where "
        "the one-step student lives. Default: cubic.",
    )
    add(
        "--loss_weighting_power",
        type=float,
        default=0.75,
        help="The epsilon loss at t is weighted by alphas_cumprod[t] ** -POWER, as for the teacher. Default: 0.75.",
    )
    add("--checkpointing_steps", type=int, default=250, help="Steps between checkpoints. Default: 250.")
    add("--validation_steps", type=int, default=450, help="Steps between validations, 0 for none. Default: 450.")
    return parser.parse_args(input_args)


class Teacher:
    """The frozen pipeline, and the training images as latents, captions as tokens and conditions as bytes."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        folder = args.pretrained_teacher_model or bundled_checkpoint() / "teacher"
        self.pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        for model in (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder):
            model.requires_grad_(False)
        # The backward of fused attention is slower on a CPU than all the rest of these small networks together.
        self.pipeline.unet.set_attn_processor(AttnProcessor())
        self.pipeline.unet.to(memory_format=torch.channels_last)
        self.pipeline.set_progress_bar_config(disable=True)
        self.device = device
        scenes = training_scenes(args.num_train_images, seed=args.seed)
        images = render_scenes(scenes, seed=args.seed)
        self.tokens = self.tokenize([scene.caption for scene in scenes])
        self.empty = self.tokenize([""])
        self.conditions = np.stack([condition_of(image, args.condition)[..., 0] for image in images])
        self.latents = self.encode(images)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids (n, L), on the CPU."""
        tokenizer = self.pipeline.tokenizer
        length = tokenizer.model_max_length
        return tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Tensor:
        """Posterior means (n, 4, 8, 8), scaled, float32."""
        vae, batches = self.pipeline.vae, []
        for start in tqdm(range(0, len(images), 256), desc="Encoding", mininterval=5):
            pixels = torch.from_numpy(images[start : start + 256]).to(self.device).permute(0, 3, 1, 2)
            batches.append(vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean)
        return torch.cat(batches) * vae.config.scaling_factor

    def condition(self, index: np.ndarray) -> Tensor:
        """Conditions (n, 3, 64, 64) in [0, 1]."""
        return torch.from_numpy(self.conditions[index]).to(self.device)[:, None].expand(-1, 3, -1, -1).float() / 255

    def eps(self, x_t: Tensor, t: Tensor, states: Tensor, controlnet, condition: Tensor) -> Tensor:
        """The teacher's prediction (n, 4, 8, 8) with the ControlNet's residuals."""
        down, middle = controlnet(x_t, t, states, controlnet_cond=condition, return_dict=False)
        return self.pipeline.unet(
            x_t, t, states, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample


def draw_batch(args: argparse.Namespace, step: int, images: int, timesteps: int) -> dict[str, Tensor]:
    """Indices, noise, timesteps and dropped captions of one step: of its arguments alone, so that a resumed run sees them.

    With several processes all draw the whole batch, and each takes its part.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    n = args.train_batch_size
    u = torch.rand(n, generator=generator)
    u = 1 - u**3 if args.timestep_sampling == "cubic" else u
    return {
        "index": torch.randint(images, (n,), generator=generator),
        "noise": torch.randn(n, 4, 8, 8, generator=generator),
        "t": (u * timesteps).long().clamp(max=timesteps - 1),
        "dropped": torch.rand(n, generator=generator) < args.proportion_empty_prompts,
    }


def batch_loss(teacher: Teacher, controlnet, batch: dict[str, Tensor], power: float) -> Tensor:
    """Epsilon loss, each sample weighted by alphas_cumprod[t] ** -power."""
    device, scheduler, index = teacher.device, teacher.pipeline.scheduler, batch["index"]
    tokens = torch.where(batch["dropped"][:, None], teacher.empty, teacher.tokens[index]).to(device)
    states = teacher.pipeline.text_encoder(tokens)[0]
    noise, t = batch["noise"].to(device), batch["t"].to(device)
    x_t = scheduler.add_noise(teacher.latents[index.to(device)], noise, t)
    prediction = teacher.eps(x_t, t, states, controlnet, teacher.condition(index.numpy()))
    weights = scheduler.alphas_cumprod[batch["t"]].to(device) ** -power
    return ((prediction.float() - noise).square().mean(dim=(1, 2, 3)) * weights).mean()


class Training:
    """ControlNet, optimiser and schedule, with their checkpoint."""

    def __init__(self, args: argparse.Namespace, unet: torch.nn.Module, accelerator: Accelerator):
        torch.manual_seed(args.seed)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING_CHANNELS).train()
        controlnet.set_attn_processor(AttnProcessor())
        controlnet.to(accelerator.device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(controlnet.parameters(), lr=args.learning_rate, weight_decay=1e-3)
        self.accelerator = accelerator
        self.controlnet, self.optimizer = accelerator.prepare(controlnet, optimizer)
        steps = args.max_train_steps
        self.schedule = get_wsd_schedule(
            optimizer, min(100, steps // 10), num_decay_steps=steps // 2, num_training_steps=steps, min_lr_ratio=0.01
        )
        self.path = Path(args.output_dir) / "controlnet.pt"
        self.settings = {name: value for name, value in vars(args).items() if name not in FREE}
        self.step = 0

    @property
    def model(self) -> ControlNetModel:
        return self.accelerator.unwrap_model(self.controlnet)

    def update(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.controlnet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1

    def save(self) -> None:
        state = {"controlnet": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"schedule": self.schedule.state_dict(), "step": self.step, "settings": self.settings}
        if self.accelerator.is_main_process:
            with written_beside(self.path) as temporary:
                torch.save(state, temporary)

    def resume(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"{self.path} was made with --{name} {state['settings'].get(name)}, and now it is {value}. Give the same, "
                    "or another --output_dir."
                )
        self.model.load_state_dict(state["controlnet"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        self.accelerator.print(f"resumed at step {self.step} from {self.path}")


@torch.no_grad()
def validate(teacher: Teacher, controlnet, condition: str, n: int = 32) -> tuple[float, float]:
    """Mean mask IoU of the teacher's first guess at t = T-1 for held-out captions, with the ControlNet and without."""
    captions = heldout_captions(n, seed=4)
    renders = render_scenes([parse_caption(caption) for caption in captions], seed=4)
    given = np.stack([condition_of(image, condition)[..., 0] for image in renders])
    asked = [condition_of(image, "mask") for image in renders]
    pipe, t = teacher.pipeline, torch.full((n,), teacher.pipeline.scheduler.config.num_train_timesteps - 1)
    alpha_bar = pipe.scheduler.alphas_cumprod[-1].to(teacher.device)
    x_t = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(4)).to(teacher.device)
    states, t = pipe.text_encoder(teacher.tokenize(captions).to(teacher.device))[0], t.to(teacher.device)
    cond = torch.from_numpy(given).to(teacher.device)[:, None].expand(-1, 3, -1, -1).float() / 255

    def iou(eps: Tensor) -> float:
        x0 = (x_t - (1 - alpha_bar).sqrt() * eps.float()) / alpha_bar.sqrt()
        images = pipe.image_processor.postprocess(
            pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample, output_type="np"
        )
        return float(np.mean([mask_iou(np.round(i * 255).astype(np.uint8), m) for i, m in zip(images, asked)]))

    return iou(teacher.eps(x_t, t, states, controlnet, cond)), iou(pipe.unet(x_t, t, states).sample)


def train(args: argparse.Namespace, accelerator: Accelerator) -> ControlNetModel:
    """The trained ControlNet, on the CPU in float32."""
    teacher = Teacher(args, accelerator.device)
    training = Training(args, teacher.pipeline.unet, accelerator)
    training.resume()
    rows = slice(accelerator.process_index, None, accelerator.num_processes)
    timesteps = teacher.pipeline.scheduler.config.num_train_timesteps
    bar = tqdm(
        total=args.max_train_steps, initial=training.step, mininterval=5, disable=not accelerator.is_main_process
    )
    while training.step < args.max_train_steps:
        batch = draw_batch(args, training.step, len(teacher.latents), timesteps)
        with accelerator.autocast():
            batch = {name: part[rows] for name, part in batch.items()}
            loss = batch_loss(teacher, training.controlnet, batch, args.loss_weighting_power)
        training.update(loss)
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if training.step % args.checkpointing_steps == 0 or training.step == args.max_train_steps:
            training.save()
        if args.validation_steps and training.step % args.validation_steps == 0:
            with_it, without = validate(teacher, training.model, args.condition)
            accelerator.print(
                f"\nstep {training.step}: mask IoU at t = T-1 {with_it:.3f}, without control {without:.3f}"
            )
    return training.model.to("cpu", torch.float32)


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if args.train_batch_size % accelerator.num_processes:
        raise ValueError(
            f"--train_batch_size {args.train_batch_size} does not divide by {accelerator.num_processes} processes"
        )
    output = writable_folder(args.output_dir)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    controlnet = train(args, accelerator)
    if accelerator.is_main_process:
        with folder_written_beside(output / "controlnet") as staged:
            controlnet.save_pretrained(staged)
        print(f"wrote {output / 'controlnet'}")


if __name__ == "__main__":
    main(parse_args())
