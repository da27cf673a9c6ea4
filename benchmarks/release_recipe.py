"""The training step of the authors' release, re-enacted from its description for comparison; nothing else uses it.

What makes it what it is: three full networks; a forward hook on each adapted Linear, which comes after the layer has
computed an output that is thrown away; the rotation built anew in every pass and every intermediate of it left to
autograd; conditional and unconditional predictions in passes of their own; numbers for the log fetched at every step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STUDENT_PARTS = ("down_blocks", "mid_block", "up_blocks")
NOT_IN_FAKE = ("proj_in", "proj_out", "time_emb_proj")


def hook_rotations(unet: nn.Module, rank: int, left_out: tuple[str, ...] = ()) -> list[nn.Parameter]:
    """Put LoRaD on every Linear inside the blocks, as forward hooks; returns the angles' factors."""
    factors = []
    for name, layer in unet.named_modules():
        inside = any(part in name for part in STUDENT_PARTS) and not any(part in name for part in left_out)
        if isinstance(layer, nn.Linear) and inside and layer.in_features % 2 == 0:
            A = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
            B = nn.Parameter(torch.empty(rank, layer.in_features // 2, device=layer.weight.device))
            nn.init.xavier_uniform_(B)
            layer.register_forward_hook(rotating_hook(A, B))
            factors += [A, B]
    return factors


def rotating_hook(A: nn.Parameter, B: nn.Parameter) -> Callable:
    """Replaces a layer's output by that with the rotated weight."""

    def hook(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        theta = torch.remainder(A @ B + math.pi, 2 * math.pi) - math.pi
        cos, sin = torch.cos(theta), torch.sin(theta)
        even, odd = layer.weight[:, 0::2], layer.weight[:, 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(1)
        return F.linear(inputs[0], turned.to(inputs[0].dtype), layer.bias)

    return hook


class ReleaseStep:
    """One step: student by score distillation, then fake on the same images.

    Args:
        unet: the teacher, in the precision of the base weights.
        student_rank, fake_rank: of LoRaD.
        alphas_cumprod: (T,) of the teacher's schedule.
        autocast: context of the forward passes of student and fake.
        gradient_checkpointing: really on, which the release only meant to have.
    """

    guidance_scale, empty_share, terminal = 1.5, 0.1, 0.0047

    def __init__(
        self,
        unet: nn.Module,
        student_rank: int,
        fake_rank: int,
        alphas_cumprod: Tensor,
        autocast: Callable[[], AbstractContextManager],
        scaler: torch.amp.GradScaler | None = None,
        gradient_checkpointing: bool = False,
    ):
        self.teacher, self.student, self.fake = unet, copy.deepcopy(unet), copy.deepcopy(unet)
        self.autocast, self.scaler = autocast, scaler
        self.student_factors = hook_rotations(self.student, student_rank)
        self.fake_factors = hook_rotations(self.fake, fake_rank, NOT_IN_FAKE)
        for network in (self.student, self.fake):
            for parameter in network.parameters():
                parameter.requires_grad_(False)
            if gradient_checkpointing:
                network.train()
                network.enable_gradient_checkpointing()
        self.optimizers = [
            torch.optim.AdamW(factors, lr=rate, weight_decay=0.0)
            for factors, rate in ((self.student_factors, 1e-4), (self.fake_factors, 1e-2))
        ]
        self.dtype = next(unet.parameters()).dtype
        self.alphas_cumprod = alphas_cumprod.to(next(unet.parameters()).device, self.dtype)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with self.autocast():
            return network(x.to(self.dtype), t, text.to(self.dtype), return_dict=False)[0].float()

    def guided(self, network: nn.Module, x: Tensor, t: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        with torch.no_grad():
            uncond = self.predict(network, x, t, empty)
            cond = self.predict(network, x, t, text)
        return uncond + self.guidance_scale * (cond - uncond)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise

    def update(self, loss: Tensor, which: int, factors: list[nn.Parameter]) -> None:
        optimizer = self.optimizers[which]
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(factors, 1.0)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad()

    def step(self, text: Tensor, empty: Tensor, latent_shape: tuple[int, int, int]) -> dict[str, float]:
        """text (B, L, D), empty (1, L, D)."""
        count, device = len(text), text.device
        empty, last = empty.expand_as(text), torch.full((count,), len(self.alphas_cumprod) - 1, device=device)
        z = torch.randn(count, *latent_shape, device=device)
        eps = self.predict(self.student, z, last, text)
        x0 = ((z - (1 - self.terminal) ** 0.5 * eps) / self.terminal**0.5).to(self.dtype)

        t, noise = (
            torch.randint(20, 981, (count,), device=device),
            torch.randn(x0.shape, device=device, dtype=self.dtype),
        )
        x_t = self.noised(x0.detach(), noise, t)
        difference = self.guided(self.teacher, x_t, t, text, empty) - self.guided(self.fake, x_t, t, text, empty)
        gradient = torch.nan_to_num((1 - self.alphas_cumprod[t]).view(-1, 1, 1, 1) * difference)
        student_loss = 0.5 * F.mse_loss(x0.float(), (x0 - gradient).detach().float())
        self.update(student_loss, 0, self.student_factors)
        logs = {"student_loss": student_loss.item(), "gradient": gradient.norm().item()}

        t, noise = torch.randint(0, len(self.alphas_cumprod), (count,), device=device), torch.randn_like(x0)
        dropped = empty if torch.rand(()).item() < self.empty_share else text
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1).sqrt()
        eps = self.predict(self.fake, self.noised(x0.detach(), noise, t), t, dropped)
        fake_loss = F.mse_loss((alpha * eps).float(), (alpha * noise).float())
        self.update(fake_loss, 1, self.fake_factors)
        return logs | {"fake_loss": fake_loss.item(), "fake_eps": eps.norm().item()}
