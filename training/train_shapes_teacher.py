#!/usr/bin/env python
"""Trains the Shapes World teacher from nothing: VAE, then text encoder and denoiser together. CPU or one GPU.

    python training/train_shapes_teacher.py --output_dir shapes-teacher --seed 0
    python training/train_shapes_teacher.py --output_dir shapes-pixart --denoiser pixart --pretrained_vae shapes-teacher/pipeline

It writes an ordinary diffusers pipeline folder to OUTPUT_DIR/pipeline. Interrupt it at will: the same command goes on
from the last checkpoint. `training/README.md` has the command of the bundled teacher, with wall time and machine.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm
from transformers import get_wsd_schedule

from diffusers_wadi._optional import require
from diffusers_wadi.shapes import judge_image
from diffusers_wadi.shapes.models import build_vae, standardise_latents
from diffusers_wadi.shapes.renderer import render_scenes
from diffusers_wadi.shapes.scenes import heldout_captions, training_scenes
from diffusers_wadi.shapes.teachers import TEACHERS, epsilon_loss


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=None
    )
    add = parser.add_argument
    add("--output_dir", required=True, help="Folder for checkpoints, sample grids and the pipeline.")
    add("--seed", type=int, default=0, help="Seed of weights, data and noise. Default: 0.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: cuda where there is one.")
    add("--num_threads", type=int, help="CPU threads. Default: torch's own choice.")
    add("--mixed_precision", choices=("no", "bf16"), default="bf16", help="Autocast of both stages. Default: bf16.")
    add("--num_train_images", type=int, default=40000, help="Renders in the training set. Default: 40000.")
    add("--pretrained_vae", help="Folder of a VAE, or of a pipeline with one, to take instead of training it.")
    add("--vae_steps", type=int, default=6000, help="Optimiser steps of the VAE. Default: 6000.")
    add("--vae_batch_size", type=int, default=16, help="Images a step. Default: 16.")
    add("--vae_learning_rate", type=float, default=1.5e-3, help="Peak rate of AdamW. Default: 1.5e-3.")
    add("--kl_weight", type=float, default=4e-4, help="Weight of the KL term against L1 + MSE. Default: 4e-4.")
    add(
        "--kl_warmup_steps",
        type=int,
        default=2500,
        help="VAE steps at 1/40 of that weight. At the full weight from the start the colours collapse into one axis "
        "before they are told apart. Default: 2500.",
    )
    add(
        "--denoiser",
        choices=tuple(TEACHERS),
        default="unet",
        help="unet: Stable Diffusion in miniature, with CLIP; pixart: PixArt-alpha in miniature, with T5. Default: unet.",
    )
    add("--unet_steps", type=int, default=9000, help="Optimiser steps of denoiser and text encoder. Default: 9000.")
    add("--unet_batch_size", type=int, default=64, help="Latents a step. Default: 64.")
    add("--unet_learning_rate", type=float, default=8e-4, help="Peak rate of AdamW. Default: 8e-4.")
    add("--proportion_empty_prompts", type=float, default=0.1, help="Captions dropped, for guidance. Default: 0.1.")
    add(
        "--loss_weighting_power",
        type=float,
        default=0.75,
        help="The epsilon loss at t is weighted by alphas_cumprod[t] ** -POWER: 0 is the plain loss, 1 the v-prediction "
        "loss. The one-step student lives at the last timestep, where the plain loss hardly looks. Default: 0.75.",
    )
    add(
        "--relation_loss_weight",
        type=float,
        default=0.1,
        help="Weight of a classification of the relation from the text states that follow it. Without it the encoder "
        "makes 'left of' and 'right of' one: each alone says nothing about any side. Default: 0.1.",
    )
    add("--ema_decay", type=float, default=0.999, help="Decay of the averaged weights that are saved. Default: 0.999.")
    add("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints. Default: 500.")
    add("--validation_steps", type=int, default=1500, help="Steps between sample grids. Default: 1500.")
    return parser.parse_args(input_args)


# --- small helpers -----------------------------------------------------------------------------------------------------


def save_atomically(state: dict, path: Path) -> None:
    """A checkpoint is whole or absent: written beside, then renamed."""
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


def save_grid(images: np.ndarray, path: Path, columns: int = 8) -> None:
    """uint8 images (n, h, w, 3) as one PNG, `columns` a row."""
    rows = len(images) // columns
    n, h, w, _ = images[: rows * columns].shape
    grid = images[:n].reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    Image.fromarray(grid).save(path)


def to_pixels(images: np.ndarray, device: str) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float32 (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.mixed_precision == "bf16")


def batch_indices(step: int, batch_size: int, n: int, seed: int) -> torch.Tensor:
    """Indices of step `step`: depends on its arguments alone, so that a resumed run sees the same data."""
    return torch.from_numpy(np.random.default_rng([seed, step]).integers(n, size=batch_size))


class Stage:
    """Optimiser, schedule, random state and checkpoint of one training stage."""

    def __init__(
        self, name: str, args: argparse.Namespace, modules: dict[str, torch.nn.Module], lr: float, steps: int
    ):
        self.name, self.modules, self.steps = name, modules, steps
        self.path = Path(args.output_dir) / f"{name}.pt"
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-3, fused=True)
        self.schedule = get_wsd_schedule(
            self.optimizer,
            min(200, steps // 10),
            num_decay_steps=steps // 3,
            num_training_steps=steps,
            min_lr_ratio=0.01,
        )
        self.ema = EMAModel(self.parameters, decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.step = 0

    def step_optimizer(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.step(self.parameters)
        self.step += 1

    def save(self) -> None:
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        state |= {"ema": self.ema.state_dict(), "generator": self.generator.get_state(), "step": self.step}
        save_atomically(state, self.path)

    def resume(self, device: str) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=device, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        lr_lambdas = self.schedule.lr_lambdas  # built for this run's number of steps; only the position is resumed
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.lr_lambdas = lr_lambdas
        self.ema.load_state_dict(state["ema"])
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]
        print(f"{self.name}: resumed at step {self.step} from {self.path}")


# --- stage 1: the VAE --------------------------------------------------------------------------------------------------


def vae_loss(vae, pixels: torch.Tensor, generator: torch.Generator, kl_weight: float) -> torch.Tensor:
    """L1 + MSE of the reconstruction, and the KL divergence to a unit Gaussian per latent element."""
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
    error = vae.decode(posterior.mean + posterior.std * noise).sample.float() - pixels
    kl = 0.5 * (posterior.mean.float().pow(2) + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return error.abs().mean() + error.pow(2).mean() + kl_weight * kl


def train_vae(args: argparse.Namespace, images: np.ndarray):
    """Trains the VAE and returns it with averaged weights, frozen."""
    torch.manual_seed(args.seed)
    vae = build_vae().to(args.device)
    vae.set_attn_processor(AttnProcessor())
    stage = Stage("vae", args, {"vae": vae}, args.vae_learning_rate, args.vae_steps)
    stage.resume(args.device)
    progress = tqdm(total=stage.steps, initial=stage.step, desc="VAE", mininterval=5)
    while stage.step < stage.steps:
        pixels = to_pixels(images[batch_indices(stage.step, args.vae_batch_size, len(images), args.seed)], args.device)
        kl_weight = args.kl_weight / 40 if stage.step < args.kl_warmup_steps else args.kl_weight
        with autocast(args):
            loss = vae_loss(vae, pixels, stage.generator, kl_weight)
        stage.step_optimizer(loss)
        progress.update()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if stage.step % args.checkpointing_steps == 0 or stage.step == stage.steps:
            stage.save()
    stage.ema.copy_to(stage.parameters)
    return vae.eval().requires_grad_(False)


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    """The VAE of `--pretrained_vae`, frozen, in float32. Its latents are taken as they are: made by this script before."""
    folder = Path(args.pretrained_vae)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(args.device)
    vae.set_attn_processor(AttnProcessor())
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae, images: np.ndarray, args: argparse.Namespace) -> torch.Tensor:
    """Posterior means (n, 4, 8, 8), float32."""
    batches = [images[i : i + 256] for i in range(0, len(images), 256)]
    with autocast(args):
        means = [vae.encode(to_pixels(b, args.device)).latent_dist.mean for b in tqdm(batches, desc="Encoding")]
    return torch.cat(means).float()


# --- stage 2: text encoder and denoiser ------------------------------------------------------------------------------------


def train_denoiser(args: argparse.Namespace, vae, latents: torch.Tensor, captions: list[str]):
    """Trains denoiser and text encoder together on latents; returns the pipeline with averaged weights."""
    torch.manual_seed(args.seed + 1)
    teacher = TEACHERS[args.denoiser](vae, args.device)
    modules = {args.denoiser: teacher.denoiser, "text": teacher.text_encoder}
    stage = Stage(args.denoiser, args, modules, args.unet_learning_rate, args.unet_steps)
    stage.resume(args.device)
    tokens, empty = teacher.tokenize(captions), teacher.tokenize([""])[0]
    progress = tqdm(total=stage.steps, initial=stage.step, desc=args.denoiser, mininterval=5)
    while stage.step < stage.steps:
        index = batch_indices(stage.step, args.unet_batch_size, len(latents), args.seed + 1)
        dropped = torch.rand(len(index), generator=stage.generator) < args.proportion_empty_prompts
        batch_tokens = torch.where(dropped[:, None], empty, tokens[index]).to(args.device)
        batch = latents[index.to(latents.device)]
        with autocast(args):
            states = teacher.states(batch_tokens)
            loss = epsilon_loss(teacher, batch, states, batch_tokens, stage.generator, args.loss_weighting_power)
            loss = loss + args.relation_loss_weight * teacher.relation_loss(states, batch_tokens)
        stage.step_optimizer(loss)
        progress.update()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if stage.step % args.checkpointing_steps == 0 or stage.step == stage.steps:
            stage.save()
        if stage.step % args.validation_steps == 0:
            stage.ema.store(stage.parameters)
            stage.ema.copy_to(stage.parameters)
            validate(teacher, args, stage.step)
            stage.ema.restore(stage.parameters)
    stage.ema.copy_to(stage.parameters)
    return teacher.pipeline


def validate(teacher, args: argparse.Namespace, step: int) -> None:
    """A grid of 64 held-out captions at 25 steps and guidance 3, and how many attributes the judge finds right."""
    captions = heldout_captions(64, seed=1)
    teacher.pipeline.set_progress_bar_config(disable=True)
    with autocast(args):
        images = teacher.pipeline(
            captions,
            **teacher.call,
            num_inference_steps=25,
            guidance_scale=3.0,
            output_type="np",
            generator=torch.Generator().manual_seed(args.seed),
        ).images
    images = np.round(images * 255).astype(np.uint8)
    verdicts = [judge_image(image, caption) for image, caption in zip(images, captions)]
    right = np.mean([ok for verdict in verdicts for ok in verdict.values()])
    related = np.mean([verdict["relation"] for verdict in verdicts if "relation" in verdict])
    whole = np.mean([all(verdict.values()) for verdict in verdicts])
    save_grid(images, Path(args.output_dir) / f"samples-{step:06d}.png")
    print(
        f"\nstep {step}: {right:.1%} of attributes right, {whole:.1%} of captions wholly right, {related:.1%} of relations",
        flush=True,
    )


def save_pipeline(pipeline, folder: Path) -> None:
    """fp16 weights of stock classes, whole or absent: the folder is written beside and renamed."""
    beside = folder.with_name(folder.name + ".tmp")
    pipeline.to(torch.float16).save_pretrained(beside)
    # Loaded without a dtype, diffusers' models come as float32 but transformers' as their config says: make these agree.
    for path in beside.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # the folder of `--pretrained_vae`, which is nobody else's business
        if path.parent.name == "text_encoder":
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    if folder.exists():
        os.replace(folder, folder.with_name(f"{folder.name}.replaced-{os.getpid()}"))
    os.replace(beside, folder)


def check_args(args: argparse.Namespace) -> None:
    """Refuses, before hours of training, what would stop it later.

    Raises:
        ValueError: a flag that has to be at least 1 is not; with its name and value.
        ImportError: scipy, which the judge of the validation needs, is missing.
    """
    for name in ("num_train_images", "vae_steps", "vae_batch_size", "unet_steps", "unet_batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least 1.")
    if args.pretrained_vae is not None and not Path(args.pretrained_vae).is_dir():
        raise ValueError(f"--pretrained_vae {args.pretrained_vae} is no folder.")
    for name in ("checkpointing_steps", "validation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least 1; a huge number means never.")
    require("scipy.ndimage", extra="train")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise PermissionError(f"--output_dir {output} is not writable. Choose a folder that this user may write to.")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    scenes = training_scenes(args.num_train_images, args.seed)
    images = render_scenes(scenes, args.seed)
    vae = train_vae(args, images) if args.pretrained_vae is None else load_vae(args)
    latents = encode_images(vae, images, args)
    print("Latents: std of each channel", [round(x, 3) for x in latents.std(dim=(0, 2, 3)).tolist()])
    if args.pretrained_vae is None:
        latents = standardise_latents(vae, latents)
    pipeline = train_denoiser(args, vae, latents, [scene.caption for scene in scenes])
    save_pipeline(pipeline, output / "pipeline")
    print(f"Wrote {output / 'pipeline'}")


if __name__ == "__main__":
    main(parse_args())
