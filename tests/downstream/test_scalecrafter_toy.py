"""The behaviour itself on a model trained here: one disc at 16x16 becomes several at 32x32, and fewer with ScaleCrafter."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from scipy import ndimage

from diffusers_wadi.downstream.scalecrafter._convolutions import restore, wideable, widen

SIDE = 16
STEPS = 1500


def discs(count, generator):
    """Images (count, 1, 16, 16) in -1..1 with one soft disc near the middle of each."""
    centre = SIDE / 2 + 2 * torch.rand(count, 2, 1, 1, generator=generator) - 1
    radius = 3 + torch.rand(count, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    distance = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2).sqrt()
    return 2 * torch.sigmoid(2 * (radius - distance))[:, None] - 1


def trained():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=4,
        add_attention=False,
    )
    scheduler = DDIMScheduler(clip_sample=False)
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / STEPS) + 1e-5
        x, t = discs(32, generator), torch.randint(0, 1000, (32,), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        loss = F.mse_loss(unet(scheduler.add_noise(x, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unet.eval(), scheduler


@torch.no_grad()
def blobs(unet, scheduler, side, factor=1.0, images=64, steps=20, until=0.6):
    """Connected parts of at least six pixels per image; the first `until` of the steps are dilated."""
    x = torch.randn(images, 1, side, side, generator=torch.Generator().manual_seed(2))
    scheduler.set_timesteps(steps)
    layers = {
        name: layer for name, layer in wideable(unet).items() if not name.startswith(("down_blocks.0", "up_blocks.2"))
    }
    for i, t in enumerate(scheduler.timesteps):
        restore(unet)
        if factor > 1 and i < until * steps:
            for layer in layers.values():
                widen(layer, factor)
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    restore(unet)
    counts = []
    for image in x[:, 0].numpy():
        labels, number = ndimage.label(image > 0)
        counts.append((np.bincount(labels.ravel(), minlength=1)[1:] >= 6).sum())
    return float(np.mean(counts))


@pytest.mark.slow
def test_at_twice_the_size_fewer_discs_are_repeated_with_it_than_without():
    unet, scheduler = trained()
    counts = {
        "trained size": blobs(unet, scheduler, SIDE),
        "twice, without": blobs(unet, scheduler, 2 * SIDE),
        "twice, with": blobs(unet, scheduler, 2 * SIDE, factor=2.0),
    }
    print(counts)
    assert counts["trained size"] == pytest.approx(1, abs=0.1)
    assert counts["twice, without"] > 1.5
    assert counts["twice, with"] - 1 < 0.6 * (counts["twice, without"] - 1)
