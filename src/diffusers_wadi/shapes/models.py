"""The Shapes World teacher: a complete Stable Diffusion in miniature, of stock diffusers and transformers classes.

64x64 images, 8x8x4 latents, a CLIP text encoder of 24 tokens. About 8 M parameters in all.
"""

import re

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 24
TEXT_WIDTH = 128


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose every Shapes World word is one token. Other words fall apart into letters."""
    words = ["a", "on", "background", *SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *re.split(r"\W+", " ".join(RELATIONS))]
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1) if not chr(c).isupper()]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        parts = [*word[:-1], word[-1] + "</w>"]
        # Right to left: the last part carries the end-of-word mark, so merges of one word never act on another's start.
        while len(parts) > 1:
            pair = (parts[-2], parts[-1])
            parts[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append(parts[-1])
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of two layers for `tokenizer`, with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_vae() -> AutoencoderKL:
    """A VAE with 8x downsampling and 4 latent channels, with random weights."""
    return AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )


def build_unet() -> UNet2DConditionModel:
    """An epsilon-prediction UNet for 8x8x4 latents, cross-attention at every level, with random weights."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        use_linear_projection=True,
    )


def teacher_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with trailing steps so that sampling starts at the last timestep."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """An ordinary `StableDiffusionPipeline` around the parts, without safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=teacher_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (n, 24), padded and cut as the pipeline does."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Gives every latent channel mean 0 and std 1, folded into the VAE's 1x1 convolutions, so `scaling_factor` is 1.

    Exact: the encoder's last convolution makes means and log-variances per channel, the decoder's first one undoes it.
    Stock pipelines know one scaling factor and no shift, and channels of unequal size would not be noised equally.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    out, back = vae.quant_conv, vae.post_quant_conv
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.weight[:channels] /= std[:, None, None, None]
    out.bias[channels:] -= 2 * std.log()
    back.bias += torch.einsum("oi,i->o", back.weight[:, :, 0, 0], mean)
    back.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
    return (latents - mean[:, None, None]) / std[:, None, None]
