"""A warm start by regression: (noise, caption, image) triples of the teacher, onto which the student is fitted.

This is not in the WaDi paper. It is DMD's regression on ODE pairs, used before score distillation (and, if wished,
beside it), because a small student far from the teacher's images gets little from the score difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import written_beside
from .data import PromptEmbeddings, PromptOrder
from .losses import Predict, guided_prediction


@dataclass(frozen=True)
class RegressionPairs:
    """M examples of what the teacher draws. noise, target: (M, C, H, W) float32; prompt: (M,) indices."""

    noise: Tensor
    target: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return self.prompt.numel()


@torch.no_grad()
def ddim_sample(
    predict: Predict, noise: Tensor, text: Tensor, empty: Tensor, scheduler, num_steps: int, guidance_scale: float
) -> Tensor:
    """Deterministic DDIM from ``noise`` at t = T - 1 down to x0, (B, C, H, W) float32.

    Args:
        scheduler: a DDIM scheduler with trailing timesteps, e.g. from ``one_step_scheduler``.
    """
    scheduler.set_timesteps(num_steps)
    latents = noise.float()
    for t in scheduler.timesteps.tolist():
        batch_t = torch.full((noise.shape[0],), t, dtype=torch.long, device=noise.device)
        eps = guided_prediction(predict, latents, batch_t, text, empty, guidance_scale)
        latents = scheduler.step(eps, t, latents).prev_sample
    return latents


def make_pairs(
    teacher: Predict,
    embeddings: PromptEmbeddings,
    scheduler,
    latent_shape: tuple[int, int, int],
    count: int,
    num_steps: int = 25,
    guidance_scale: float = 3.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> RegressionPairs:
    """Sample ``count`` pairs; captions in a shuffled order, each once before any repeats."""
    generator = torch.Generator().manual_seed(seed)
    prompt = PromptOrder(len(embeddings), count, seed).next_batch()
    noise = torch.randn(count, *latent_shape, generator=generator)
    target = torch.empty_like(noise)
    for start in progress(range(0, count, batch_size)):
        part = slice(start, start + batch_size)
        text = embeddings.at(prompt[part])
        z = noise[part].to(embeddings.device)
        target[part] = ddim_sample(teacher, z, text, embeddings.empty, scheduler, num_steps, guidance_scale).cpu()
    return RegressionPairs(noise, target, prompt)


def pairs_fingerprint(prompts: str, **settings: Any) -> str:
    """What the pairs depend on, as one string: the settings, and the digest of the prompts in their order."""
    return json.dumps({"prompts": prompts, **settings}, sort_keys=True)


def load_pairs(file: str | Path, fingerprint: str) -> RegressionPairs | None:
    """Pairs cached in ``file``, or ``None`` if there are none or they were made under other settings."""
    if not Path(file).is_file():
        return None
    with safe_open(str(file), framework="pt") as tensors:
        if (tensors.metadata() or {}).get("fingerprint") != fingerprint:
            return None
        return RegressionPairs(*(tensors.get_tensor(name) for name in ("noise", "target", "prompt")))


def save_pairs(pairs: RegressionPairs, file: str | Path, fingerprint: str) -> None:
    """Write ``pairs`` as safetensors, whole or not at all."""
    tensors = {"noise": pairs.noise, "target": pairs.target, "prompt": pairs.prompt}
    with written_beside(Path(file)) as temporary:
        save_file(tensors, str(temporary), metadata={"fingerprint": fingerprint})
