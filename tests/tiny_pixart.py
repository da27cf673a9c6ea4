"""A PixArt-alpha pipeline of a few thousand random weights, in the style of `conftest.components`."""

import string

import torch
from backbones import _TINY_PIXART
from conftest import tiny_vae
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

LINEAR_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def t5_tokenizer() -> T5Tokenizer:
    """Knows single letters and two words."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁red", "▁blue", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(piece, 0.0 if i < 3 else -1.0) for i, piece in enumerate(pieces)], extra_ids=0)


def t5_encoder_model(vocabulary_size: int, width: int = 12) -> T5EncoderModel:
    config = T5Config(vocab_size=vocabulary_size, d_model=width, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def pixart_pipeline(seed: int = 0, **transformer) -> PixArtAlphaPipeline:
    """With the published checkpoint's schedule; `transformer` overrides its configuration."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder_model(len(tokenizer)),
        vae=tiny_vae(),
        transformer=PixArtTransformer2DModel(**{**_TINY_PIXART, **transformer}).eval(),
        scheduler=DPMSolverMultistepScheduler(**LINEAR_BETAS),
    )
