"""Tiled decoding whose tiles share their group statistics, so that no tile has a brightness of its own.

Stock tiling (`vae.enable_tiling()`) normalises each tile by itself. Here all tiles go through the decoder in step, one
layer after the other, and each GroupNorm outside attention takes its mean and variance from all of them. Overlaps count
as often as they are there; attention stays within its tile, which is what saves its memory.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import Tensor, nn


def enable_synced_tiling(pipe: Any, storage_device: str | torch.device | None = None) -> None:
    r"""
    Decode large images in tiles with shared group statistics, in the place of stock tiling, whose tile sizes it takes
    (`vae.tile_latent_min_size`, `vae.tile_overlap_factor`). Off again by `disable_synced_tiling`.

    Args:
        pipe (`DiffusionPipeline` or `AutoencoderKL`):
            The pipeline, or its autoencoder.
        storage_device (`str` or `torch.device`, *optional*):
            Where tiles wait for their turn, by default where they are computed. "cpu" keeps no more than one tile's
            layer on an accelerator, for the price of the transfers.

    Raises:
        TypeError: the autoencoder is no `AutoencoderKL`.
    """
    vae = _vae_of(pipe)
    vae.enable_tiling()
    vae._synced_tiles_storage = None if storage_device is None else torch.device(storage_device)
    # On this autoencoder alone, where `decode` finds it before the class's own. A copied one takes its copy along.
    vae.tiled_decode = types.MethodType(_tiled_decode, vae)


def disable_synced_tiling(pipe: Any) -> None:
    r"""Undo `enable_synced_tiling`; the autoencoder then decodes whole images."""
    vae = _vae_of(pipe)
    if "tiled_decode" in vae.__dict__:
        del vae.tiled_decode, vae._synced_tiles_storage
        vae.disable_tiling()


def pooled_group_norm(norm: nn.GroupNorm, tiles: list[Tensor]) -> list[Tensor]:
    """Group normalisation with one mean and variance for all tiles, (batch, channels, height, width) each.

    On tiles that do not overlap it equals the normalisation of the whole. Computed in float32 at least.
    """
    scale, shift = _pooled_affine(norm, tiles)
    return [_normalised(tile, scale, shift) for tile in tiles]


def _pooled_affine(norm: nn.GroupNorm, tiles: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (batch, channels, 1, 1), by which the pooled normalisation acts. One tile is at work at a time."""
    work, device = torch.promote_types(norm.weight.dtype, torch.float32), norm.weight.device

    def grouped() -> Iterator[Tensor]:  # (batch, groups, values)
        return (tile.to(device, work).unflatten(1, (norm.num_groups, -1)).flatten(2) for tile in tiles)

    count = sum(tile[0].numel() for tile in tiles) / norm.num_groups
    mean = sum(group.sum(2) for group in grouped()) / count
    variance = sum((group - mean[..., None]).square().sum(2) for group in grouped()) / count
    width = norm.num_channels // norm.num_groups
    scale = norm.weight.to(work) * (variance + norm.eps).rsqrt().repeat_interleave(width, 1)
    shift = norm.bias.to(work) - mean.repeat_interleave(width, 1) * scale
    return scale[..., None, None], shift[..., None, None]


def _normalised(tile: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (tile * scale + shift).to(tile.dtype)


class _InStep:
    """Tiles that go through a decoder together; `values` are replaced one by one, so that old ones can be freed."""

    def __init__(self, values: list[Tensor], device: torch.device, storage: torch.device | None) -> None:
        self.values, self.device, self.storage = values, device, storage or device

    def each(self, layer: Callable[[Tensor], Tensor]) -> None:
        for i, value in enumerate(self.values):
            self.values[i] = layer(value.to(self.device)).to(self.storage)

    def copy(self) -> _InStep:
        return _InStep(list(self.values), self.device, self.storage)

    def normalise(self, norm: nn.GroupNorm, then: Callable[[Tensor], Tensor]) -> None:
        scale, shift = _pooled_affine(norm, self.values)
        self.each(lambda value: then(_normalised(value, scale, shift)))


def _through_resnet(tiles: _InStep, block: ResnetBlock2D) -> None:
    """As the forward of `ResnetBlock2D` without a time embedding."""
    inner = tiles.copy()
    inner.normalise(block.norm1, lambda x: block.conv1(block.nonlinearity(x)))
    inner.normalise(block.norm2, lambda x: block.conv2(block.dropout(block.nonlinearity(x))))
    for i, added in enumerate(inner.values):
        x = tiles.values[i].to(tiles.device)
        x = x if block.conv_shortcut is None else block.conv_shortcut(x)
        tiles.values[i] = ((x + added.to(tiles.device)) / block.output_scale_factor).to(tiles.storage)
        inner.values[i] = None


def _through_decoder(decoder: nn.Module, tiles: _InStep) -> None:
    tiles.each(decoder.conv_in)
    middle = decoder.mid_block
    _through_resnet(tiles, middle.resnets[0])
    for attention, resnet in zip(middle.attentions, middle.resnets[1:]):
        if attention is not None:
            tiles.each(attention)
        _through_resnet(tiles, resnet)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            _through_resnet(tiles, resnet)
        for upsampler in block.upsamplers or ():
            tiles.each(upsampler)
    tiles.normalise(decoder.conv_norm_out, lambda x: decoder.conv_out(decoder.conv_act(x)))


def _tiled_decode(vae: AutoencoderKL, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
    """In the place of `AutoencoderKL.tiled_decode`: the same tiles, decoded in step, blended by the same functions."""
    size, overlap = vae.tile_latent_min_size, vae.tile_overlap_factor
    stride, blend = int(size * (1 - overlap)), int(vae.tile_sample_min_size * overlap)
    rows, columns = range(0, z.shape[2], stride), range(0, z.shape[3], stride)
    tiles = [z[:, :, i : i + size, j : j + size] for i in rows for j in columns]
    together = _InStep(tiles, z.device, vae._synced_tiles_storage)
    if vae.post_quant_conv is not None:
        together.each(vae.post_quant_conv)
    _through_decoder(vae.decoder, together)
    decoded = [together.values[k : k + len(columns)] for k in range(0, len(tiles), len(columns))]
    image = _joined(vae, decoded, blend, vae.tile_sample_min_size - blend).to(z.device)
    return DecoderOutput(sample=image) if return_dict else (image,)


def _joined(vae: AutoencoderKL, decoded: list[list[Tensor]], blend: int, kept: int) -> Tensor:
    lines = []
    for i, row in enumerate(decoded):
        line = []
        for j, tile in enumerate(row):
            if i > 0:
                tile = vae.blend_v(decoded[i - 1][j], tile, blend)
            if j > 0:
                tile = vae.blend_h(row[j - 1], tile, blend)
            line.append(tile[:, :, :kept, :kept])
        lines.append(torch.cat(line, dim=3))
    return torch.cat(lines, dim=2)


def _vae_of(pipe: Any) -> AutoencoderKL:
    vae = getattr(pipe, "vae", pipe)
    known = isinstance(vae, AutoencoderKL) and all(type(b) is UpDecoderBlock2D for b in vae.decoder.up_blocks)
    if not known:
        raise TypeError(
            f"synced tiling walks through the decoder of an AutoencoderKL made of UpDecoderBlock2D, and this {type(vae).__name__} "
            "is something else; use vae.enable_tiling()"
        )
    return vae
