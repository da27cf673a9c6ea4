"""Learn a relation as one token `<R>` from a few images that show it (ReVersion), for one-step generators too.

Only the row of `<R>` in the text encoder's token table trains, on the multi-step model. Defaults are the authors' recipe.

    accelerate launch training/train_reversion.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir painted_on --validation_prompts "a cat <R> a stone" --output_dir reversion-painted-on

The folder of images holds a `text.json`, {image's name: ["a dog {} a wall", ...]}. The output folder gets
`learned_embeds.safetensors`, which `pipe.load_textual_inversion(output_dir)` reads into the model and into its one-step
students, sample grids in `samples/`, and `checkpoint-N/` folders for `--resume_from_checkpoint latest`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_wadi.distillation import checkpoint
from diffusers_wadi.distillation.flags import (
    MIXED_PRECISION,
    add_adam_flags,
    add_flag,
    add_schedule_flags,
    add_state_flags,
    begin,
    check_numbers,
    check_output_dir,
    check_packages,
)
from diffusers_wadi.distillation.guard import StepGuard, poisoned_if_broken
from diffusers_wadi.distillation.monitoring import Averages, memory_gb, tracker_names
from diffusers_wadi.distillation.noise import SampleDraws
from diffusers_wadi.distillation.samples import save_grid, send_images
from diffusers_wadi.distillation.settings import SETTINGS_FILE, plain_settings, save_settings
from diffusers_wadi.distillation.stopping import StopSignals, report_stop
from diffusers_wadi.downstream import reversion

logger = logging.getLogger(__name__)
# Flags by which a resumed run may differ from the one that wrote the checkpoint: places, lengths, what is shown, memory.
MAY_DIFFER = frozenset(
    """pretrained_model_name_or_path revision variant train_data_dir output_dir logging_dir report_to logging_steps
    max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_prompts validation_steps
    num_validation_images validation_num_inference_steps validation_guidance_scale validation_seed attention
    gradient_checkpointing num_threads max_bad_steps""".split()
)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("model, images, words")
    g.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Folder or Hub id: Stable Diffusion 1.x or 2.x"
    )
    add_flag(g, "revision", None, "Hub revision of the model")
    add_flag(g, "variant", None, "Weights variant of the model, e.g. fp16")
    g.add_argument("--train_data_dir", required=True, help="Folder of images that show the relation, with text.json")
    add_flag(g, "output_dir", "reversion", "Where the embedding, checkpoints and samples go")
    add_flag(g, "resolution", None, "Image size; None: the model's own", type=int)
    add_flag(g, "center_crop", False, "Cut the middle out of images instead of squeezing them to a square")
    add_flag(g, "placeholder_token", "<R>", "What the relation is called in prompts")
    add_flag(g, "initializer_token", "and", "Word whose row it starts from; one token")
    add_flag(
        g,
        "positive_words",
        None,
        "Words to steer towards, or a text file of them; None: the paper's 56 prepositions. Those of several tokens are left out",
        nargs="+",
    )


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("method (defaults: the authors' recipe)")
    add_flag(g, "importance_sampling", True, "Draw noisy timesteps more often")
    add_flag(g, "importance_alpha", 0.5, "How much more: p(t) ~ 1 - alpha cos(pi t / T)")
    add_flag(g, "denoise_loss_weight", 1.0, "Weight of the denoising loss")
    add_flag(g, "steer_loss_weight", 0.01, "Weight of the contrastive steering loss; 0: without")
    add_flag(g, "num_positives", 4, "Positive words drawn for each sample")
    add_flag(g, "temperature", 0.07, "Of the steering loss")
    add_flag(
        g, "max_embedding_norm", None, "Not in the paper: shrink the row to this norm when it is longer", type=float
    )


def _add_optimiser_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("optimisation")
    add_flag(g, "train_batch_size", 2, "Batch per process")
    add_flag(g, "gradient_accumulation_steps", 4, "Batches per update")
    add_flag(g, "max_train_steps", 3000, "Updates")
    add_flag(g, "learning_rate", 2.5e-4, "Before --scale_lr")
    add_flag(g, "scale_lr", True, "Multiply it by batch, accumulation and processes: 2e-3 with the defaults")
    add_schedule_flags(g, "Schedule of the rate")
    add_adam_flags(g, 1e-2, "AdamW")
    add_flag(g, "max_grad_norm", None, "Gradient clipping; None: without", type=float)


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("machine, checkpoints, samples")
    add_flag(g, "seed", 2023, "Of everything")
    add_flag(
        g,
        "mixed_precision",
        "no",
        "UNet in that precision; losses and the row stay fp32",
        choices=tuple(MIXED_PRECISION),
    )
    add_flag(g, "gradient_checkpointing", False, "Recompute the UNet's activations in backward")
    add_flag(
        g,
        "attention",
        "auto",
        "auto: plain on the CPU at up to 16x16 latents, else sdpa",
        choices=("auto", "sdpa", "plain"),
    )
    add_state_flags(g, checkpointing_steps=1000)
    add_flag(
        g, "validation_prompts", None, "Prompts with the placeholder to draw with the multi-step model", nargs="+"
    )
    add_flag(g, "num_validation_images", 4, "Images of each")
    add_flag(g, "validation_steps", 500, "Updates between sample grids; 0: none")
    add_flag(g, "validation_num_inference_steps", 50, "DDIM steps of these")
    add_flag(g, "validation_guidance_scale", 7.5, "Guidance of these")
    add_flag(g, "validation_seed", 0, "Of their noise")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Flags of the script; `input_args` instead of the command line in tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in (_add_data_flags, _add_method_flags, _add_optimiser_flags, _add_machine_flags):
        add(parser)
    args = parser.parse_args(input_args)
    check_args(args)
    return args


AT_LEAST = {
    1: """resolution num_positives train_batch_size gradient_accumulation_steps max_train_steps num_threads
checkpointing_steps checkpoints_total_limit num_validation_images validation_num_inference_steps logging_steps max_bad_steps""",
    0: "denoise_loss_weight steer_loss_weight lr_warmup_steps adam_weight_decay seed validation_steps validation_guidance_scale",
}
POSITIVE = "temperature learning_rate adam_epsilon max_grad_norm max_embedding_norm"


def check_args(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: names the flag, its value and what is expected.
        FileNotFoundError: images or captions are missing; see `RelationImages`.
    """
    check_numbers(args, AT_LEAST, POSITIVE, "importance_alpha", below_1="adam_beta1 adam_beta2")
    for prompt in args.validation_prompts or []:
        if args.placeholder_token not in prompt:
            raise ValueError(
                f"--validation_prompts: {prompt!r} does not hold {args.placeholder_token}, which it is to show."
            )
    check_packages(args.report_to)
    reversion.RelationImages(args.train_data_dir, size=8)  # refuses what is wrong with it
    check_output_dir(args.output_dir)


def positive_words(args: argparse.Namespace) -> list[str]:
    """Those of `--positive_words`, which may name a file, or the paper's."""
    words = args.positive_words or list(reversion.POSITIVE_WORDS)
    if len(words) == 1 and Path(words[0]).is_file():
        words = Path(words[0]).read_text(encoding="utf-8").split()
    return words


class ReversionTrainer:
    """One run.

    Args:
        args: the flags, checked (`parse_args`).

    Raises:
        ValueError: a model that has no textual inversion, a placeholder or initializer that cannot be used, captions cut
            off before the placeholder, too few positive words, or a checkpoint of a run with other flags.
        FileNotFoundError: the checkpoint to resume from is not there.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.output_dir, self.step = args, Path(args.output_dir), 0
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=tracker_names(args.report_to) or None,
            project_config=ProjectConfiguration(args.output_dir, str(self.output_dir / args.logging_dir)),
        )
        self.device, self.dtype = self.accelerator.device, MIXED_PRECISION[args.mixed_precision]
        set_seed(args.seed)
        self._load_models()
        self._load_images()
        self._load_words()
        self._make_optimizer()
        self.settings = plain_settings(args) | {"exemplars": self._digest()}
        self._resume()

    # --- set-up ---

    def _load_models(self) -> None:
        args = self.args
        name, hub = args.pretrained_model_name_or_path, {"revision": args.revision}
        weights = hub | {"variant": args.variant}
        reversion.refuse_other_models(DiffusionPipeline.load_config(name, **hub), name)
        self.scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **hub)
        self.tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **hub)
        self.text_encoder = CLIPTextModel.from_pretrained(
            name, subfolder="text_encoder", dtype=torch.float32, **weights
        )
        self.embedding = reversion.add_placeholder(
            self.tokenizer, self.text_encoder, args.placeholder_token, args.initializer_token
        )
        self.vae = AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=torch.float32, **weights)
        self.unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=self.dtype, **weights)
        for model in (self.vae, self.unet):
            model.requires_grad_(False).eval().to(self.device)
        self.text_encoder.eval()
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        # On a CPU the backward of fused attention takes longer than all the rest of a small UNet; plain attention of a
        # large one would take gigabytes.
        small = self.device.type == "cpu" and self.unet.config.sample_size <= 16
        if args.attention == "plain" or (args.attention == "auto" and small):
            self.unet.set_attn_processor(AttnProcessor())
            self.text_encoder.set_attn_implementation("eager")

    @torch.no_grad()
    def _load_images(self) -> None:
        """Every image's posterior under the VAE, once: they are few, and never augmented."""
        args = self.args
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = args.resolution or self.unet.config.sample_size * factor
        if size % factor:
            raise ValueError(f"--resolution is {size}, expected a multiple of {factor}.")
        self.images = reversion.RelationImages(args.train_data_dir, size, args.center_crop)
        self.images.check_tokens(self.tokenizer, args.placeholder_token)
        posteriors = [self.vae.encode(pixels[None].to(self.device)).latent_dist for pixels in self.images.pixels]
        scale = self.vae.config.scaling_factor
        self.means = scale * torch.cat([posterior.mean for posterior in posteriors])
        self.stds = scale * torch.cat([posterior.std for posterior in posteriors])
        self.vae.to(self.dtype)

    def _load_words(self) -> None:
        args, tokenizer = self.args, self.tokenizer
        words = (*reversion.STOP_WORDS, *reversion.POSITIVE_WORDS, *positive_words(args))
        self.stop = reversion.stop_ids(tokenizer, words)
        at_least = args.num_positives if args.steer_loss_weight else 0
        self.positives = reversion.positive_ids(tokenizer, positive_words(args), at_least)
        steps = self.scheduler.config.num_train_timesteps
        alpha = args.importance_alpha if args.importance_sampling else 0.0
        self.probabilities = reversion.importance_probabilities(steps, alpha)

    def _make_optimizer(self) -> None:
        args, world = self.args, self.accelerator.num_processes
        batch = args.train_batch_size * args.gradient_accumulation_steps * world
        rate = args.learning_rate * (batch if args.scale_lr else 1)
        betas = (args.adam_beta1, args.adam_beta2)
        adam = {"betas": betas, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
        self.row = self.embedding.row
        self.model, self.optimizer = self.accelerator.prepare(
            self.text_encoder, torch.optim.AdamW([self.row], lr=rate, **adam)
        )
        steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
        self.lr_scheduler = get_scheduler(args.lr_scheduler, self.optimizer.optimizer, **steps)
        self.guard = StepGuard(self.optimizer)
        self.draws = SampleDraws(args.seed, args.train_batch_size, self.accelerator.process_index, world)

    # --- the loop ---

    def train(self) -> int:
        """Run to the last step and write the embedding.

        Returns:
            0; the number of the signal, if SIGINT or SIGTERM ended it: with a checkpoint of the last step.
        """
        args, averages = self.args, Averages()
        if self.accelerator.log_with:
            self.accelerator.init_trackers("train_reversion", config={k: str(v) for k, v in self.settings.items()})
        hidden = not self.accelerator.is_main_process
        bar = tqdm(total=args.max_train_steps, initial=self.step, desc="steps", disable=hidden)
        with StopSignals(self.accelerator) as stop, bar:
            while self.step < args.max_train_steps:
                averages.add(self.update())
                bar.update()
                if self._due(args.logging_steps):
                    self._report(bar, averages)
                if received := stop.wanted(look=self._due(args.logging_steps)):
                    report_stop(received, self.step, args.max_train_steps, self.save_checkpoint())
                    self.accelerator.end_training()
                    return received
                if self._due(args.checkpointing_steps):
                    self.save_checkpoint()
                if self._due(args.validation_steps) and args.validation_prompts:
                    self.validate()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            logger.info("wrote %s", self.export(self.output_dir))
        self.accelerator.end_training()
        return 0

    def update(self) -> dict[str, Tensor]:
        """One step of the row, over all micro-batches; returns losses and norms."""
        args, logs = self.args, {}
        self.draws.next_round()
        for micro in range(args.gradient_accumulation_steps):
            self.draws.micro = micro
            last = micro == args.gradient_accumulation_steps - 1
            with self.accelerator.no_sync(self.model) if not last else nullcontext():
                loss, found = self.losses()
                self.accelerator.backward(poisoned_if_broken(loss) / args.gradient_accumulation_steps)
            for name, value in found.items():
                logs[name] = logs.get(name, 0) + value.detach() / args.gradient_accumulation_steps
        if args.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_([self.row], args.max_grad_norm)
        else:
            self.accelerator.unscale_gradients()
            norm = self.row.grad.norm()
        self.guard.step(norm)
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        if args.max_embedding_norm is not None:
            self.row.data *= (args.max_embedding_norm / self.row.data.norm()).clamp(max=1)
        self.step += 1
        return logs | {"grad": norm, "embedding_norm": self.row.detach().norm()}

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Of one micro-batch: what is trained on, and its parts."""
        args, draws, n = self.args, self.draws, self.args.train_batch_size
        index = draws.integers("image", 0, len(self.images) - 1)
        ids = self._caption_ids(index, draws.uniform("caption")).to(self.device)
        timesteps = reversion.timesteps_at(draws.uniform("timestep"), self.probabilities).to(self.device)
        posterior, noise = (draws.normal(name, self.means.shape[1:]).to(self.device) for name in ("latents", "noise"))
        index = index.to(self.device)
        latents = self.means[index] + self.stds[index] * posterior
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        with self.accelerator.autocast():
            states = self.model(ids)[0]
            prediction = self.unet(noisy.to(self.dtype), timesteps, states.to(self.dtype)).sample
        target = reversion.training_target(self.scheduler, latents, noise, timesteps)
        denoise = F.mse_loss(prediction.float(), target.float())
        loss, parts = args.denoise_loss_weight * denoise, {"denoise_loss": denoise}
        if args.steer_loss_weight:
            keys = draws.normal("positives", (len(self.positives),))
            chosen = self.positives[keys.argsort(1)[:, : args.num_positives]].reshape(n * args.num_positives)
            parts["steer_loss"] = steer = self._steering(chosen.to(self.device), ids)
            loss = loss + args.steer_loss_weight * steer
        return loss, parts

    def _caption_ids(self, index: Tensor, uniform: Tensor) -> Tensor:
        drawn = zip((self.images.templates[i] for i in index.tolist()), uniform.tolist())
        # float32 rounds the last of [0, 1) up to 1.
        templates = [choices[min(int(u * len(choices)), len(choices) - 1)] for choices, u in drawn]
        captions = [template.replace("{}", self.args.placeholder_token) for template in templates]
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def _steering(self, positives: Tensor, ids: Tensor) -> Tensor:
        marks = (self.embedding.token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        table = self.embedding.table
        negatives = reversion.negative_ids(ids, self.stop, *marks)
        return reversion.steering_loss(self.row, table(positives), table(negatives), self.args.temperature)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step == self.args.max_train_steps or self.step % every == 0)

    def _report(self, bar: tqdm, averages: Averages) -> None:
        values = averages.take(self.accelerator)
        values |= {"lr": self.lr_scheduler.get_last_lr()[0], "memory_gb": memory_gb(self.device)}
        left_out, in_a_row = self.guard.counts.tolist()
        bar.set_postfix({name: f"{value:.3g}" for name, value in values.items() if name.endswith("loss")})
        self.accelerator.log(values | {"left_out": left_out}, step=self.step)
        if in_a_row >= self.args.max_bad_steps:
            raise FloatingPointError(
                f"{in_a_row} updates in a row had a loss or gradient that is not finite (--max_bad_steps "
                f"{self.args.max_bad_steps}), up to step {self.step}. Use a lower --learning_rate or another --mixed_precision."
            )

    @torch.no_grad()
    def validate(self) -> Path | None:
        """Draw the validation prompts with the multi-step model into `samples/` and to the trackers."""
        args = self.args
        if not self.accelerator.is_main_process:
            return None
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler.config, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        prompts = [prompt for prompt in args.validation_prompts for _ in range(args.num_validation_images)]
        seeds = [torch.Generator().manual_seed(args.validation_seed + i) for i in range(len(prompts))]
        call = {
            "num_inference_steps": args.validation_num_inference_steps,
            "guidance_scale": args.validation_guidance_scale,
        }
        size = self.means.shape[-1] * pipe.vae_scale_factor
        with self.accelerator.autocast():
            images = [
                pipe(prompt, generator=seed, height=size, width=size, **call).images[0]
                for prompt, seed in zip(prompts, seeds)
            ]
        send_images(self.accelerator, images, prompts, self.step)
        return save_grid(images, self.output_dir / "samples" / f"step-{self.step:06d}.png")

    # --- saving ---

    def export(self, folder: Path) -> Path:
        """`learned_embeds.safetensors` into `folder`."""
        return reversion.save_learned_embedding(
            folder / reversion.EMBEDDING_FILE, self.args.placeholder_token, self.row
        )

    def _parts(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler, "draws": self.draws}
        return parts | {"scaler": self.accelerator.scaler, "row": self.row.detach().cpu(), "step": self.step}

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-<step>`, whole or not at all, and remove old ones."""
        folder = self.output_dir / f"checkpoint-{self.step}"
        if self.accelerator.is_main_process:
            checkpoint.write_folder(folder, self._write_checkpoint)
            checkpoint.set_aside_later(self.output_dir, self.step)
            checkpoint.remove_old_checkpoints(self.output_dir, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return folder

    def _write_checkpoint(self, folder: Path) -> None:
        self.export(folder)
        save_settings(self.settings, folder)
        torch.save({"parts": checkpoint.collect_state(self._parts())}, folder / checkpoint.STATE_FILE)

    def _resume(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint.clean_up(self.output_dir)
        self.accelerator.wait_for_everyone()
        wanted = self.args.resume_from_checkpoint
        folder = checkpoint.find_checkpoint(self.output_dir, wanted) if wanted else None
        if folder is None:
            return
        refuse_changes(folder, self.settings)
        saved = torch.load(folder / checkpoint.STATE_FILE, map_location="cpu", weights_only=True)["parts"]
        checkpoint.restore_state(self._parts(), saved)
        self.row.data.copy_(saved["row"])
        self.step = saved["step"]
        logger.info("resumed from %s at step %d", folder, self.step)

    def _digest(self) -> str:
        """Of images and captions, by which a resumed run is known to have the same."""
        found = hashlib.sha256(self.images.pixels.numpy().tobytes())
        found.update(json.dumps([self.images.names, self.images.templates]).encode())
        return found.hexdigest()


def refuse_changes(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of a run that trained something else.

    Raises:
        ValueError: names all flags that differ, with both values.
    """
    saved = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    wrong = [
        f"{name} {saved[name]} (now {settings[name]})"
        for name in sorted(saved.keys() & settings.keys() - MAY_DIFFER)
        if saved[name] != settings[name]
    ]
    if wrong:
        raise ValueError(
            f"{folder} was written by a run with {', '.join(wrong)}. Resume with the former values, or start a new run "
            "in another --output_dir."
        )


def main(args: argparse.Namespace) -> None:
    """Train with checked flags `args`; the embedding is in `args.output_dir` afterwards.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped it, after a checkpoint; 130 or 143.
    """
    begin(args.num_threads)
    if received := ReversionTrainer(args).train():
        sys.exit(128 + received)


if __name__ == "__main__":
    main(parse_args())
