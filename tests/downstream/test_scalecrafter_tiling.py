"""Tiles decoded in step: group statistics of the whole, and fewer seams than stock tiling leaves."""

import copy

import pytest
import torch
from conftest import tiny_vae
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from diffusers_wadi import WaDiPipeline, bundled_checkpoint
from diffusers_wadi.downstream.scalecrafter import _tiling, disable_synced_tiling, enable_synced_tiling
from diffusers_wadi.downstream.scalecrafter._tiling import pooled_group_norm


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return tiny_vae().requires_grad_(False)


def gradient_latents(height=24, width=20):
    """Latents whose level climbs from the left to the right, so that tiles differ in their mean."""
    z = 0.3 * torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(1))
    return z + torch.linspace(-2, 2, width)


def test_pooled_statistics_of_disjoint_tiles_are_those_of_the_whole():
    norm = nn.GroupNorm(3, 6).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 16, 18, dtype=torch.float64) + torch.linspace(0, 5, 18, dtype=torch.float64)
    tiles = [x[..., :7, :5], x[..., :7, 5:], x[..., 7:, :5], x[..., 7:, 5:]]  # of four sizes
    a, b, c, d = pooled_group_norm(norm, tiles)
    whole = torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)
    torch.testing.assert_close(whole, norm(x), atol=1e-6, rtol=0)
    assert not torch.allclose(a, norm(tiles[0]), atol=0.1)


def test_one_tile_decodes_as_the_decoder_does(vae):
    vae = copy.deepcopy(vae)
    z = gradient_latents(8, 8)
    expected = vae.decode(z).sample
    enable_synced_tiling(vae)
    vae.tile_overlap_factor = 0.0
    torch.testing.assert_close(vae.tiled_decode(z).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(24, 20), (9, 16)])
def test_it_is_nearer_to_the_whole_than_stock_tiling(size):
    vae, z = AutoencoderKL.from_pretrained(bundled_checkpoint() / "teacher" / "vae"), gradient_latents(*size)
    vae.requires_grad_(False)
    whole = vae.decode(z).sample
    vae.enable_tiling()
    stock = vae.decode(z).sample
    enable_synced_tiling(vae)
    synced = vae.decode(z).sample
    assert synced.shape == whole.shape
    assert error(synced, whole) < 0.5 * error(stock, whole)


def error(image, whole):
    return (image - whole).abs().mean()


def test_tiles_are_cut_and_blended_as_stock_tiling_does(vae, monkeypatch):
    """With a decoder that only enlarges, in which nothing is shared, both have to be the same picture."""
    vae, z = copy.deepcopy(vae), gradient_latents(23, 20)

    def enlarge(tile, *_):
        return torch.nn.functional.interpolate(tile[:, :3], scale_factor=8).cumsum(3)  # each tile of its own level

    monkeypatch.setattr(vae.decoder, "forward", enlarge)
    monkeypatch.setattr(_tiling, "_through_decoder", lambda decoder, tiles: tiles.each(enlarge))
    vae.enable_tiling()
    stock = vae.decode(z).sample
    enable_synced_tiling(vae)
    torch.testing.assert_close(vae.decode(z).sample, stock)
    assert (stock - enlarge(vae.post_quant_conv(z))).abs().max() > 1  # more than one tile


def test_tiles_may_wait_elsewhere(vae):
    vae, z = copy.deepcopy(vae), gradient_latents()
    enable_synced_tiling(vae)
    expected = vae.decode(z).sample
    enable_synced_tiling(vae, storage_device="cpu")
    assert torch.equal(vae.decode(z).sample, expected)


def test_a_batch_is_normalised_image_by_image(vae):
    vae = copy.deepcopy(vae)
    enable_synced_tiling(vae)
    two = torch.cat([gradient_latents(), -gradient_latents()])
    torch.testing.assert_close(vae.decode(two).sample[1:], vae.decode(two[1:]).sample, atol=1e-5, rtol=1e-5)


def test_copies_and_the_way_back(vae, components):
    pipe = WaDiPipeline(**components)
    z = gradient_latents()
    plain, attributes = pipe.vae.decode(z).sample, set(pipe.vae.__dict__)
    enable_synced_tiling(pipe)
    twin = copy.deepcopy(pipe.vae)
    assert twin.tiled_decode.__self__ is twin
    synced = pipe.vae.decode(z).sample
    assert torch.equal(twin.decode(z).sample, synced) and not torch.equal(synced, plain)
    disable_synced_tiling(pipe)
    assert torch.equal(pipe.vae.decode(z).sample, plain) and set(pipe.vae.__dict__) == attributes
    disable_synced_tiling(pipe)


def test_another_autoencoder_is_refused():
    tiny = AutoencoderTiny(encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)  # fmt: skip
    with pytest.raises(TypeError, match=r"AutoencoderTiny.*vae\.enable_tiling\(\)"):
        enable_synced_tiling(tiny)
