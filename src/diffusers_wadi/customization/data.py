"""What a DreamBooth run is fed: images of the subject and its class as latents, and their two prompts."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..distillation.data import PromptOrder
from ..distillation.noise import SampleDraws
from ..downstream.dreambooth import SubjectImages, draw_class_images, missing_class_images
from .model import SubjectModel

logger = logging.getLogger(__name__)


class SubjectData:
    """Batches of latents, the subject's first, with the prior as many of the class after them.

    Args:
        args: the flags of `training/train_dreambooth_lorad.py`.
        accelerator: for the processes.
        model: untrained still: it draws missing class images and encodes the prompts.
        instances: images of the subject.
        latent_shape: (C, H, W).

    Raises:
        ValueError: timesteps beyond the schedule, or `--cache_latents` of images that are cut at random.
        OSError: class images that are not there, or cannot be written.

    Attributes:
        draws: the random stream of the run.
        text: token ids (1 or 2, L) of the prompts, or states (1 or 2, L, D) if the text encoder is frozen.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: SubjectModel,
        instances: SubjectImages,
        latent_shape: tuple[int, int, int],
    ):
        self.args, self.accelerator, self.model, self.latent_shape = args, accelerator, model, latent_shape
        self._check_timesteps()
        self.images = [instances]
        if args.with_prior_preservation:
            self._draw_class_images(instances.resolution)
            crop = (instances.resolution, args.center_crop, args.random_flip)
            self.images.append(SubjectImages(self.class_folder, *crop, what="class images"))
        place = (accelerator.process_index, accelerator.num_processes)
        self.orders = [PromptOrder(len(images), args.train_batch_size, args.seed, *place) for images in self.images]
        self.draws = SampleDraws(args.seed, args.train_batch_size, *place)
        self.text = self._encode_prompts()
        self._moments = self._encode_all() if args.cache_latents else None

    @property
    def prior_loss_weight(self) -> float | None:
        """None without class images."""
        return self.args.prior_loss_weight if len(self.images) == 2 else None

    @property
    def class_folder(self) -> Path:
        """Where the class images lie."""
        return Path(self.args.class_data_dir or Path(self.args.output_dir) / "class_images")

    def _draw_class_images(self, resolution: int) -> None:
        args, accelerator = self.args, self.accelerator
        missing = missing_class_images(self.class_folder, args.num_class_images)
        accelerator.wait_for_everyone()  # all have seen the same files before the first new one is there
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        if missing:
            logger.info("drawing %d class images into %s", len(missing), self.class_folder)
        with accelerator.autocast():
            draw_class_images(
                self.model.pipe,
                args.class_prompt,
                self.class_folder,
                mine,
                resolution,
                args.class_batch_size,
                args.class_num_inference_steps,
                args.class_guidance_scale,
                args.seed,
                progress=lambda batches: tqdm(batches, desc="class images", disable=not accelerator.is_main_process),
            )
        accelerator.wait_for_everyone()

    @torch.no_grad()
    def _encode_prompts(self) -> Tensor:
        args, tokenizer = self.args, self.model.pipe.tokenizer
        prompts = [args.instance_prompt, args.class_prompt][: len(self.images)]
        for prompt, ids in zip(prompts, tokenizer(prompts).input_ids):
            if len(ids) > tokenizer.model_max_length:
                logger.warning("%r has %d tokens, of which %d count", prompt, len(ids), tokenizer.model_max_length)
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        ids = ids.to(self.accelerator.device)
        return ids if args.train_text_encoder else self.model.pipe.text_encoder(ids)[0]

    @torch.no_grad()
    def _encode_all(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and standard deviation of the latents of every image, subject and class."""
        if not all(images.fixed for images in self.images):
            raise ValueError(
                "--cache_latents is for images that always look the same, but these are cut or mirrored at random. Add "
                "--center_crop and leave --random_flip out."
            )
        moments = []
        for images in self.images:
            rows = [self._encode(images.at(torch.tensor([i]), torch.zeros(1, 3))) for i in range(len(images))]
            moments.append(tuple(torch.cat(parts) for parts in zip(*rows)))
        return moments

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (B, C, H, W) each, not scaled."""
        distribution = self.model.pipe.vae.encode(pixels.to(self.accelerator.device)).latent_dist
        return distribution.mean, distribution.std

    @torch.no_grad()
    def next_latents(self) -> Tensor:
        """(B, C, H, W) of the next images, sampled and scaled."""
        cuts = torch.stack([self._draw(self.draws.uniform, name) for name in ("down", "right", "mirror")], dim=1)
        parts = []
        for kind, cut in enumerate(cuts.split(self.args.train_batch_size)):
            index = self.orders[kind].next_batch()
            if self._moments is None:
                parts.append(self._encode(self.images[kind].at(index, cut)))
            else:
                parts.append(tuple(moment[index.to(moment.device)] for moment in self._moments[kind]))
        mean, std = (torch.cat(each) for each in zip(*parts))
        return (mean + std * self.noise("latents")) * self.model.pipe.vae.config.scaling_factor

    def _draw(self, draw: Callable[[str], Tensor], name: str) -> Tensor:
        """(B, ...) random numbers: of subject and class under names of their own, so that they belong to images."""
        return torch.cat([draw(f"{name} {kind}") for kind in range(len(self.images))])

    def noise(self, name: str) -> Tensor:
        """(B, C, H, W), standard normal."""
        drawn = self._draw(lambda full_name: self.draws.normal(full_name, self.latent_shape), name)
        return drawn.to(self.accelerator.device)

    def timesteps(self) -> Tensor:
        """(B,), uniform from `--min_timestep` to `--max_timestep`."""
        bounds = self.args.min_timestep, self._last_timestep
        return self._draw(lambda name: self.draws.integers(name, *bounds), "t").to(self.accelerator.device)

    @property
    def _last_timestep(self) -> int:
        end = self.model.pipe.scheduler.config.num_train_timesteps - 1
        return end if self.args.max_timestep is None else self.args.max_timestep

    def _check_timesteps(self) -> None:
        end = self.model.pipe.scheduler.config.num_train_timesteps - 1
        if not self.args.min_timestep <= self._last_timestep <= end:
            raise ValueError(
                f"--min_timestep {self.args.min_timestep} and --max_timestep {self._last_timestep} do not lie in this order "
                f"between 0 and the end of the model's schedule, {end}."
            )

    def next_text(self) -> Tensor:
        """A row of `text` for each image of a batch."""
        return self.text.repeat_interleave(self.args.train_batch_size, dim=0)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {f"order_{kind}": order for kind, order in enumerate(self.orders)} | {"draws": self.draws}
