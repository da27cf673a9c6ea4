"""The two architectures of the Shapes World teacher as `training/train_shapes_teacher.py` trains them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from . import models, pixart
from .scenes import RELATIONS


class UNetTeacher:
    """Stable Diffusion in miniature: UNet and CLIP.

    Args:
        vae: frozen.
        device: where the networks go.
    """

    name = "unet"
    call: dict[str, Any] = {}

    def __init__(self, vae: AutoencoderKL, device: str):
        self.tokenizer = models.build_tokenizer()
        self.text_encoder = models.build_text_encoder(self.tokenizer).to(device)
        self.denoiser = models.build_unet().to(device, memory_format=torch.channels_last)
        self.pipeline = models.build_pipeline(vae, self.text_encoder, self.tokenizer, self.denoiser)
        _plain_attention(self)
        self.relation_ids = torch.tensor([self.tokenizer(name).input_ids[1] for name in RELATIONS], device=device)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids (n, 24)."""
        return models.tokenize(self.tokenizer, captions)

    def states(self, tokens: Tensor) -> Tensor:
        """Last hidden states (n, 24, width)."""
        return self.text_encoder(tokens)[0]

    def eps(self, x_t: Tensor, t: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
        """The prediction (n, 4, 8, 8)."""
        return self.denoiser(x_t, t, states).sample

    def relation_loss(self, states: Tensor, tokens: Tensor) -> Tensor:
        """See :func:`relation_loss`."""
        return relation_loss(states, tokens, self.relation_ids)


class PixArtTeacher:
    """PixArt-alpha in miniature: transformer and T5.

    Args:
        vae: frozen.
        device: where the networks go.
    """

    name = "pixart"
    # Captions of Shapes World need no cleaning, and the bins of aspect ratios are for images of 256 pixels and more.
    call: dict[str, Any] = {
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": pixart.MAX_TOKENS,
    }

    def __init__(self, vae: AutoencoderKL, device: str):
        self.tokenizer = pixart.build_tokenizer()
        self.text_encoder = pixart.build_text_encoder(self.tokenizer).to(device)
        self.denoiser = pixart.build_transformer().to(device)
        self.pipeline = pixart.build_pipeline(vae, self.text_encoder, self.tokenizer, self.denoiser)
        _plain_attention(self)
        self.relation_ids = torch.tensor([self.tokenizer(name).input_ids[0] for name in RELATIONS], device=device)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids (n, 16)."""
        return pixart.tokenize(self.tokenizer, captions)

    def _mask(self, tokens: Tensor) -> Tensor:
        return (tokens != self.tokenizer.pad_token_id).long()

    def states(self, tokens: Tensor) -> Tensor:
        """Last hidden states (n, 16, width)."""
        return self.text_encoder(tokens, attention_mask=self._mask(tokens))[0]

    def eps(self, x_t: Tensor, t: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
        """The prediction (n, 4, 8, 8), without the learned variance."""
        conditions = {"resolution": None, "aspect_ratio": None}
        mask = self._mask(tokens)
        out = self.denoiser(x_t, states, t, added_cond_kwargs=conditions, encoder_attention_mask=mask).sample
        return out[:, : x_t.shape[1]]

    def relation_loss(self, states: Tensor, tokens: Tensor) -> Tensor:
        """See :func:`side_loss`."""
        return side_loss(states, tokens, self.relation_ids, self.tokenizer.pad_token_id)


def _plain_attention(teacher: UNetTeacher | PixArtTeacher) -> None:
    # The backward of fused attention is slower on a CPU than all the rest of these small networks together.
    teacher.denoiser.set_attn_processor(AttnProcessor())
    teacher.text_encoder.set_attn_implementation("eager")


def epsilon_loss(
    teacher: UNetTeacher | PixArtTeacher,
    latents: Tensor,
    states: Tensor,
    tokens: Tensor,
    generator: torch.Generator,
    power: float,
) -> Tensor:
    """Epsilon-prediction loss at uniform timesteps, weighted by alphas_cumprod[t] ** -power.

    Args:
        latents, states, tokens: (n, 4, 8, 8), (n, L, width) and (n, L) of one batch.
        generator: on the CPU, of noise and timesteps.
    """
    scheduler = teacher.pipeline.scheduler
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    alphas = scheduler.alphas_cumprod[timesteps].to(latents.device)
    timesteps = timesteps.to(latents.device)
    prediction = teacher.eps(scheduler.add_noise(latents, noise, timesteps), timesteps, states, tokens)
    return (F.mse_loss(prediction.float(), noise, reduction="none").mean(dim=(1, 2, 3)) * alphas**-power).mean()


TEACHERS = {teacher.name: teacher for teacher in (UNetTeacher, PixArtTeacher)}


def relation_loss(states: Tensor, tokens: Tensor, relation_ids: Tensor) -> Tensor:
    """Cross-entropy of the relation at every later token, read off the first channels of its state.

    Sides are an exclusive or of word order and relation, so neither alone lowers the diffusion loss, and an encoder
    trained by that loss alone forgets which relation it read. Told apart, the second shape's tokens know their side.

    Args:
        states: (n, 24, width) last hidden states of CLIP. tokens: (n, 24). relation_ids: (4,) ids of the relations' first
            words.
    """
    matches = tokens[..., None] == relation_ids  # (n, 24, 4)
    after = matches.any(-1).cumsum(1) > 0
    labels = matches.any(1).int().argmax(-1)[:, None].expand_as(tokens)
    if not after.any():
        return states.new_zeros(())
    return F.cross_entropy(3 * states[..., : len(relation_ids)].float()[after], labels[after])


def side_loss(states: Tensor, tokens: Tensor, relation_ids: Tensor, pad: int) -> Tensor:
    """As :func:`relation_loss`, for an encoder that reads both ways: every token is to know the side of its shape.

    In "A left of B" the tokens up to the relation are "left of" the other, those from it on "right of" it.

    Args:
        states: (n, L, width) last hidden states of T5. tokens: (n, L), padded with ``pad``. relation_ids: (4,), in the
            order of RELATIONS, where each relation stands beside its opposite.
    """
    matches = tokens[..., None] == relation_ids  # (n, L, 4)
    relation = matches.any(1).int().argmax(-1)[:, None]
    second = matches.any(-1).cumsum(1) > 0
    labels = torch.where(second, relation ^ 1, relation)
    counted = matches.any(dim=(1, 2))[:, None] & (tokens != pad)
    if not counted.any():
        return states.new_zeros(())
    return F.cross_entropy(3 * states[..., : len(relation_ids)].float()[counted], labels[counted])
