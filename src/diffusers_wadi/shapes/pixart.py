"""A complete PixArt-alpha in miniature for Shapes World, of stock diffusers and transformers classes.

The images and latents are those of :mod:`.models`, and so is the VAE. About 3.5 M parameters without it.
"""

import re
import string

import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from .models import TEXT_WIDTH, teacher_scheduler
from .scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 16  # the longest caption has 14 words; the end mark is one more


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose every Shapes World word is one token. Other words fall apart into characters."""
    words = ["a", "on", "background", *SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *re.split(r"\W+", " ".join(RELATIONS))]
    characters = string.ascii_lowercase + string.digits + string.punctuation
    # Log-probabilities: a word has to be likelier than its characters one by one, whatever its length.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    pieces += [(f"▁{word}", -1.0) for word in dict.fromkeys(words)]
    pieces += [(character, -10.0) for character in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=120)


def build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder of two layers for `tokenizer`, with random weights."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=24,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",  # as T5 v1.1, which PixArt-alpha uses
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def build_transformer() -> PixArtTransformer2DModel:
    """An epsilon-prediction transformer for 8x8x4 latents, one token a latent, initialised as PixArt-alpha (DiT).

    It has the 8 output channels of PixArt-alpha, whose learned variance nothing here uses: those 4 stay at 0.
    """
    heads, head_size = 5, 32
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=1,
        num_attention_heads=heads,
        attention_head_dim=head_size,
        cross_attention_dim=heads * head_size,
        num_layers=6,
        caption_channels=TEXT_WIDTH,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    # Every block starts without the text, and the whole as eps = 0.
    for layer in [block.attn2.to_out[0] for block in transformer.transformer_blocks] + [transformer.proj_out]:
        nn.init.zeros_(layer.weight)
    return transformer


def build_pipeline(
    vae: AutoencoderKL, text_encoder: T5EncoderModel, tokenizer: T5Tokenizer, transformer: PixArtTransformer2DModel
) -> PixArtAlphaPipeline:
    """An ordinary `PixArtAlphaPipeline` around the parts. Call it with `use_resolution_binning=False`.

    The schedule is that of the Stable Diffusion teacher: PixArt's own has less signal at its end than 8x8 latents need.
    """
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=teacher_scheduler(),
    )


def tokenize(tokenizer: T5Tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (n, 16), padded and cut; padding counts for nothing, so the pipeline's 120 mean the same."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
