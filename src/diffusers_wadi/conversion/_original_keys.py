"""The names that tensors of a Stable Diffusion model have in a checkpoint of the original code.

Written from the structure of the two models: the original UNet numbers its input and output blocks through, where
diffusers counts levels and layers, and the original autoencoder counts the decoder's levels from the image upwards.
What is written with these names is read back through diffusers' own conversion before a file is made of it.
"""

from __future__ import annotations

import re
from typing import Any

import torch

StateDict = dict[str, torch.Tensor]

_UNET_PREFIX = "model.diffusion_model."
_VAE_PREFIX = "first_stage_model."
_CLIP_PREFIX = "cond_stage_model.transformer."
_OPEN_CLIP_PREFIX = "cond_stage_model.model."

_UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
_SAMPLER = {"downsamplers": "downsample", "upsamplers": "upsample"}
_VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
_OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
_OPEN_CLIP_ENDS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet_to_original(state: StateDict, config: Any) -> StateDict:
    """A `UNet2DConditionModel` of Stable Diffusion 1.x or 2.x under `model.diffusion_model.`.

    Raises:
        ValueError: a tensor that the original model has no place for.
    """
    per_level = config["layers_per_block"]
    if not isinstance(per_level, int):
        raise ValueError(f"layers_per_block {per_level} differs by level, which the original UNet cannot say")
    with_attention = {key.split(".attentions.")[0] for key in state if ".attentions." in key}
    return {_UNET_PREFIX + _unet_name(key, per_level + 1, with_attention): value for key, value in state.items()}


def _unet_name(key: str, stride: int, with_attention: set[str]) -> str:
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
    if found:
        side, level, part, index, tail = found[1], int(found[2]), found[3], int(found[4]), found[5]
        last = stride - 1
        if part == "downsamplers":
            return f"input_blocks.{1 + level * stride + last}.0.{tail.replace('conv.', 'op.')}"
        if part == "upsamplers":
            place = 2 if f"up_blocks.{level}" in with_attention else 1
            return f"output_blocks.{level * stride + last}.{place}.{tail}"
        block = (
            f"input_blocks.{1 + level * stride + index}"
            if side == "down"
            else f"output_blocks.{level * stride + index}"
        )
        return f"{block}.1.{tail}" if part == "attentions" else f"{block}.0.{_renamed(tail, _UNET_RESNET)}"
    found = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key)
    if found:
        index, tail = 2 * int(found[2]), found[3]
        if found[1] == "attentions":
            return f"middle_block.{index + 1}.{tail}"
        return f"middle_block.{index}.{_renamed(tail, _UNET_RESNET)}"
    return _renamed(key, _UNET_ENDS)


def vae_to_original(state: StateDict, config: Any) -> StateDict:
    """An `AutoencoderKL` under `first_stage_model.`; its attention projections become 1x1 convolutions again.

    Raises:
        ValueError: a tensor that the original model has no place for.
    """
    levels, renamed = len(config["block_out_channels"]), {}
    for key, value in state.items():
        name = _vae_name(key, levels)
        if ".mid.attn_1." in name and value.ndim == 2:
            value = value[:, :, None, None]
        renamed[_VAE_PREFIX + name] = value
    return renamed


def _vae_name(key: str, levels: int) -> str:
    pattern = r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
    found = re.fullmatch(pattern, key)
    if found:
        side, part, index, tail = found[1], found[3], found[4], found[5]
        level = f"down.{found[2]}" if side == "encoder" else f"up.{levels - 1 - int(found[2])}"
        if part == "resnets":
            return f"{side}.{level}.block.{index}.{tail.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{side}.{level}.{_SAMPLER[part]}.{tail}"
    found = re.fullmatch(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key)
    if found:
        side, index, tail = found[1], int(found[3]) + 1, found[4]
        if found[2] == "resnets":
            return f"{side}.mid.block_{index}.{tail}"
        return f"{side}.mid.attn_{index}.{_renamed(tail, _VAE_ATTENTION)}"
    return key.replace("conv_norm_out.", "norm_out.")


def clip_to_original(state: StateDict) -> StateDict:
    """The text encoder of Stable Diffusion 1.x under `cond_stage_model.transformer.`."""
    return {f"{_CLIP_PREFIX}text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}


def open_clip_to_original(state: StateDict) -> StateDict:
    """The text encoder of Stable Diffusion 2.x under `cond_stage_model.model.`, as OpenCLIP names it.

    Raises:
        ValueError: a tensor that the original model has no place for.
    """
    state, renamed = {key.removeprefix("text_model."): value for key, value in state.items()}, {}
    for key, value in state.items():
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", key)
        if not found:
            renamed[_OPEN_CLIP_PREFIX + _renamed(key, _OPEN_CLIP_ENDS)] = value
            continue
        layer, tail = f"{_OPEN_CLIP_PREFIX}transformer.resblocks.{found[1]}.", found[2]
        projection = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", tail)
        if not projection:
            renamed[layer + _renamed(tail, _OPEN_CLIP_LAYER)] = value
        elif projection[1] == "q":
            parts = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            renamed[f"{layer}attn.in_proj_{projection[2]}"] = torch.cat(parts)
    return renamed


def _renamed(key: str, table: dict[str, str]) -> str:
    for start, new in table.items():
        if key.startswith(start):
            return new + key.removeprefix(start)
    raise ValueError(
        f"the tensor {key} has no place in the original Stable Diffusion layout; models of versions 1.x and 2.x have one"
    )
