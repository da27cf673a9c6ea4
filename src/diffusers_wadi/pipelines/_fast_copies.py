"""Copies of a pipeline's models that only draw: adapters fused, cast, in another memory layout, compiled.

A copy has modules of its own, and shares the numbers of whatever does not change with the model that it was made of, which
is left as it is: putting that one back undoes all of this to the bit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusers_wadi._adapter_ops import copy_refusal
from diffusers_wadi.lorad.attention_processor import LoRaDAttnProcessor
from diffusers_wadi.lorad.layer import LoRaDLayer
from diffusers_wadi.pipelines._saving import fuse_adapters, has_adapters

TINY_VAES = {"taesd": "madebyollin/taesd"}
"""Short names of tiny autoencoders on the Hub; this one knows the latents of Stable Diffusion 1.x, 2.x and PixArt-alpha."""
REPEATED_BLOCKS = ("BasicTransformerBlock",)
ADAPTER_METHODS = (
    "add_adapter", "set_adapter", "set_adapters", "enable_adapters", "disable_adapters", "delete_adapters", "fuse_lora",
    "unfuse_lora", "unload_lora", "load_lora_adapter", "save_lora_adapter", "active_adapters", "enable_lora", "disable_lora",
    "load_adapter", "delete_adapter",
)  # fmt: skip
FILE_METHODS = ("save_pretrained", "push_to_hub")


def fast_copy(model: nn.Module, fuse: bool = False) -> nn.Module:
    """A copy for inference on the tensors of `model`, but for those of adapted layers, of which it has its own.

    Args:
        model: not offloaded.
        fuse: with the active adapters in the weights and plain modules in the place of adapted ones. Default False.
    """
    # Unfused ones too: the cache of turned weights cannot watch over memory that has two owners.
    own = {id(tensor) for part in _adapted(model) for tensor in _tensors(part)}
    memo = {id(tensor): _alias(tensor) for tensor in _tensors(model) if id(tensor) not in own}
    made = copy.deepcopy(model, memo)
    if fuse:
        fuse_adapters(made)
    return made.requires_grad_(False)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    # A Parameter of its own, since moving or casting a model exchanges the data of its parameters.
    return nn.Parameter(tensor.data, requires_grad=False) if _is_plain(tensor) else tensor


def _is_plain(tensor: torch.Tensor) -> bool:
    """A parameter that is no quantised weight."""
    return type(tensor) is nn.Parameter and type(tensor.data) is torch.Tensor


def _adapted(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) or isinstance(getattr(module, "processor", None), LoRaDAttnProcessor):
            yield module


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of a copy, but for LoRaD's angles and what the model's class keeps in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    layers = [module for module in model.modules() if isinstance(module, LoRaDLayer)]
    angles = {id(p) for layer in layers for p in (*layer.lorad_A.values(), *layer.lorad_B.values())}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            exempt = weight is None or id(weight) in angles or not _is_plain(weight) or not weight.is_floating_point()
            if not exempt and not kept & {*path.split("."), name}:
                weight.data = weight.data.to(dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and not kept & set(path.split(".")):
                module._buffers[name] = buffer.to(dtype)


def to_channels_last(model: nn.Module) -> None:
    """Store the convolutions of a copy with their channels side by side in memory."""
    for weight in model.parameters():
        if weight.ndim == 4 and _is_plain(weight):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def why_not_qkv(model: nn.Module) -> str | None:
    """Why the projections of a copy cannot be joined, None if they can."""
    if not hasattr(model, "fuse_qkv_projections"):
        return f"{type(model).__name__} has no fuse_qkv_projections"
    if has_adapters(model):
        return "adapters act that are not fused"
    others = {
        type(p).__name__ for p in model.attn_processors.values() if type(p) not in (AttnProcessor, AttnProcessor2_0)
    }
    return f"attention runs through {', '.join(sorted(others))}" if others else None


def fuse_qkv(model: nn.Module) -> None:
    """As diffusers' `fuse_qkv_projections`, which keeps the single projections too: here they are parts of the joined one."""
    model.fuse_qkv_projections()
    for attention in model.modules():
        if isinstance(attention, Attention) and attention.fused_projections:
            cross = attention.is_cross_attention
            names = ("to_k", "to_v") if cross else ("to_q", "to_k", "to_v")
            _take_from(attention.to_kv if cross else attention.to_qkv, [getattr(attention, name) for name in names])
    model.requires_grad_(False)


def _take_from(joined: nn.Linear, parts: list[nn.Linear]) -> None:
    sizes = [part.out_features for part in parts]
    for part, weight in zip(parts, joined.weight.data.split(sizes)):
        part.weight.data = weight
    if joined.bias is not None:
        for part, bias in zip(parts, joined.bias.data.split(sizes)):
            part.bias.data = bias


def compile_parts(denoiser: nn.Module, vae: nn.Module | None, how: str, options: Mapping[str, Any]) -> None:
    """Have `torch.compile` take over at the next call: of the repeated blocks of the denoiser, or of it and the decoder."""
    if how == "regional":
        if not getattr(denoiser, "_repeated_blocks", None):
            denoiser._repeated_blocks = list(REPEATED_BLOCKS)
        denoiser.compile_repeated_blocks(**options)
        return
    denoiser.compile(**options)
    if vae is not None:
        vae.decoder.compile(**options)


def uncompile(*models: nn.Module | None) -> None:
    """Undo `compile_parts`."""
    for model in models:
        for module in () if model is None else model.modules():
            module._compiled_call_impl = None


def find_vae(vae: str | nn.Module, stands_for: nn.Module) -> nn.Module:
    """A decoder by name, path or as it is; the pipeline divides latents by its own `scaling_factor`.

    Raises:
        ValueError: it is for other latents than the pipeline's own.
        OSError: it cannot be found.
    """
    found = vae if isinstance(vae, nn.Module) else AutoencoderTiny.from_pretrained(TINY_VAES.get(vae, vae))
    if not callable(getattr(found, "decode", None)) or not hasattr(found, "config"):
        raise TypeError(
            f"vae is a {type(found).__name__}, expected an AutoencoderTiny, another VAE of diffusers or a name"
        )
    for what, read in (("latent channels", lambda model: model.config.latent_channels), ("pixels per latent", _scale)):
        theirs, own = read(found), read(stands_for)
        if theirs != own:
            raise ValueError(
                f"this VAE is for {theirs} {what} and the pipeline's latents have {own}; for Stable Diffusion 1.x, 2.x and "
                f"PixArt-alpha there is vae='taesd' ({TINY_VAES['taesd']})"
            )
    return found


def _scale(vae: nn.Module) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def refuse_what_would_be_lost(model: nn.Module, pipeline_name: str) -> None:
    """Have the methods of a copy that load, change and save say whom to ask."""
    model.draws_only_for = pipeline_name
    for name in (*ADAPTER_METHODS, *FILE_METHODS):
        if hasattr(model, name):
            setattr(
                model, name, functools.partial(_refuse, pipeline_name)
            )  # and not the model, which it would keep alive


def _refuse(pipeline_name: str, *args: Any, **kwargs: Any) -> None:
    raise copy_refusal(pipeline_name)


def carry_settings(source: nn.Module, target: nn.Module) -> None:
    """What a user has switched on a decoder: slicing and tiling."""
    for name in ("use_slicing", "use_tiling"):
        if hasattr(source, name) and hasattr(target, name):
            setattr(target, name, getattr(source, name))
