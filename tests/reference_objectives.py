"""The losses that the paper compares, sample by sample, from their sources. It imports nothing from the package.

A network is a function (x (C, H, W), t, words (L, D)) -> eps (C, H, W); `a` is the table of alphas_cumprod.
"""

import math

import torch
from torch import Tensor


def guided(network, x, t, words, empty, scale):
    without, with_words = network(x, t, empty), network(x, t, words)
    return without + scale * (with_words - without)


def one_step(student, z: Tensor, words: Tensor, a: list[float], start: int | None = None) -> Tensor:
    """SwiftBrush's and DMD2's x0; with `start` that of SiD-LSG, whose input is noise of that timestep on an empty image."""
    signal, spread = math.sqrt(a[-1 if start is None else start]), math.sqrt(1 - a[-1 if start is None else start])
    x = z if start is None else spread * z
    return (x - spread * student(x, len(a) - 1 if start is None else start, words)) / signal


def student_loss(
    name: str,
    x0: list[Tensor],
    teacher,
    fake,
    a,
    words,
    empty,
    t,
    noise,
    scales: list[float],
    fake_scales: list[float],
) -> Tensor:
    """A scalar whose gradient is the objective's."""
    parts = []
    for i, image in enumerate(x0):
        signal, spread = math.sqrt(a[t[i]]), math.sqrt(1 - a[t[i]])
        x_t = signal * image + spread * noise[i]
        if name != "sid_lsg":
            x_t = x_t.detach()
        real = guided(teacher, x_t, t[i], words[i], empty, scales[i])
        imitated = guided(fake, x_t, t[i], words[i], empty, fake_scales[i])
        clean_real, clean_fake = (x_t - spread * real) / signal, (x_t - spread * imitated) / signal
        if name == "sid_lsg":
            difference = clean_real - clean_fake
            weight = 1 / max(float((image - clean_real).abs().mean()), 1e-5)
            parts.append((difference * ((clean_real - image) - 1.0 * difference)).sum() * weight / len(x0))
            continue
        if name == "dmd2":
            pull = (clean_fake - clean_real) / (image - clean_real).abs().mean()
        else:
            pull = spread**2 * (real - imitated)
        parts.append((image * pull.detach()).sum() / (len(x0) * image.numel()))
    return torch.stack(parts).sum()


def fake_loss(name: str, x0: list[Tensor], fake, a, words, empty, t, noise) -> Tensor:
    """The fake's loss on images, which are constants here. `words` hold the empty prompt where it was dropped."""
    parts = []
    for i, image in enumerate(x0):
        signal, spread = math.sqrt(a[t[i]]), math.sqrt(1 - a[t[i]])
        x_t = (signal * image + spread * noise[i]).detach()
        if name == "sid_lsg":
            error = guided(fake, x_t, t[i], words[i], empty, 1.5) - noise[i]
            parts.append((error**2).sum() / len(x0))
            continue
        weight = 1.0 if name == "dmd2" else signal
        error = weight * fake(x_t, t[i], words[i]) - weight * noise[i]
        parts.append((error**2).mean() / len(x0))
    return torch.stack(parts).sum()
