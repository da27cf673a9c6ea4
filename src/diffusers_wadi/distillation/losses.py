"""The losses of score distillation with one step: tensors in, ``(loss, logs)`` out.

Notation: z ~ N(0, I) latent noise; alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]);
T = number of training timesteps; eps predictions of the teacher, of the fake-score network and of the student.
A ``Predict`` is ``(x_t (B, C, H, W), t (B,), text (B, L, D)) -> eps (B, C, H, W)``, e.g. a role of
:class:`~diffusers_wadi.distillation.networks.WaDiNetworks`.

Everything here runs in float32 (or wider), whatever the networks run in: at t = T - 1 the student's prediction is
divided by alpha_T = 0.068, which multiplies every rounding error by 14.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
Logs = dict[str, Tensor]

SCORE_WEIGHTINGS = ("sigma2", "dmd2")
FAKE_WEIGHTINGS = ("alpha2", "none")
REGRESSION_LOSSES = ("mse", "huber")


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_t and sigma_t of an epsilon-prediction teacher, and those by which the student's x0 is computed.

    Attributes:
        alphas, sigmas: (T,) float32.
        terminal_alpha, terminal_sigma: at t = T - 1, for the student only.
    """

    alphas: Tensor
    sigmas: Tensor
    terminal_alpha: float
    terminal_sigma: float

    @classmethod
    def from_scheduler(
        cls, scheduler, terminal_alpha_cumprod: float | None = None, device: str | torch.device = "cpu"
    ) -> NoiseSchedule:
        """Read the tables of a diffusers scheduler.

        Args:
            scheduler: anything with ``alphas_cumprod`` and ``config.prediction_type``.
            terminal_alpha_cumprod: alpha_bar of the student's step; ``None`` takes the schedule's own (0.00466 for
                Stable Diffusion), so that the student runs unchanged in stock pipelines. The authors' release
                hard-codes 0.0047.
            device: where the tables live.

        Raises:
            ValueError: not epsilon-prediction, or no signal left at t = T - 1.
        """
        kind = scheduler.config.prediction_type
        if kind != "epsilon":
            raise ValueError(
                f"The teacher predicts {kind!r}, but the losses are written for 'epsilon' (Stable Diffusion 1.5, "
                "2.1-base, PixArt-alpha). Use an epsilon-prediction teacher."
            )
        alphas_cumprod = scheduler.alphas_cumprod.double()
        terminal = float(alphas_cumprod[-1]) if terminal_alpha_cumprod is None else terminal_alpha_cumprod
        if not 0.0 < terminal < 1.0:
            raise ValueError(
                f"alphas_cumprod at the last timestep is {terminal}, expected a value between 0 and 1: x0 is a "
                "division by its root. Use a schedule without rescale_betas_zero_snr, or set terminal_alpha_cumprod."
            )
        alphas, sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        return cls(alphas.float().to(device), sigmas.float().to(device), terminal**0.5, (1 - terminal) ** 0.5)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.alphas.numel()

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of timesteps ``t`` (B,), each (B, 1, 1, 1)."""
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise, (B, C, H, W) float32."""
        alpha, sigma = self.at(t)
        return alpha * x0 + sigma * noise


def student_x0(student: Predict, noise: Tensor, text: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The one-step image: x0 = (z - sigma_T eps(z, T - 1, c)) / alpha_T, float32 (SwiftBrush; authors' release)."""
    t = torch.full((noise.shape[0],), schedule.num_timesteps - 1, dtype=torch.long, device=noise.device)
    eps = _wide(student(noise, t, text))
    return (noise - schedule.terminal_sigma * eps) / schedule.terminal_alpha


def guided_prediction(predict: Predict, x_t: Tensor, t: Tensor, text: Tensor, empty: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance eps_0 + scale (eps_c - eps_0) in one batched call; at scale 1 only eps_c is computed.

    Args:
        text, empty: (B, L, D) and (1, L, D) embeddings of the captions and of the empty prompt.
    """
    if scale == 1.0:
        return _wide(predict(x_t, t, text))
    texts = torch.cat([empty.expand_as(text), text])
    both = _wide(predict(torch.cat([x_t, x_t]), torch.cat([t, t]), texts))
    uncond, cond = both.chunk(2)
    return uncond + scale * (cond - uncond)


def vsd_gradient(
    x0: Tensor, x_t: Tensor, teacher_eps: Tensor, fake_eps: Tensor, alpha: Tensor, sigma: Tensor, weighting: str
) -> Tensor:
    """The direction in which x0 is too little like the teacher's images, (B, C, H, W).

    Args:
        alpha, sigma: of the timesteps of ``x_t``, (B, 1, 1, 1).
        weighting: ``"sigma2"``: sigma_t^2 (eps_teacher - eps_fake) (authors' release, SwiftBrush); ``"dmd2"``:
            (x0_fake - x0_teacher) / mean|x0 - x0_teacher|, the mean over each sample (DMD, Eq. 8; DMD2).
    """
    gap = teacher_eps - fake_eps
    if weighting == "sigma2":
        return torch.nan_to_num(sigma**2 * gap)
    if weighting != "dmd2":
        raise ValueError(f"score weighting {weighting!r} is unknown, expected one of {SCORE_WEIGHTINGS}.")
    x0_teacher = (x_t - sigma * teacher_eps) / alpha
    distance = (x0 - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    # 1e-5 keeps a sample that already equals the teacher's from an infinite weight (SiD-LSG has the same floor).
    return torch.nan_to_num(sigma / alpha * gap / distance.clamp_min(1e-5))


def vsd_loss(
    x0: Tensor,
    text: Tensor,
    empty: Tensor,
    teacher: Predict,
    fake: Predict,
    schedule: NoiseSchedule,
    t: Tensor,
    noise: Tensor,
    guidance_scale: float = 1.5,
    fake_guidance_scale: float | None = None,
    weighting: str = "sigma2",
) -> tuple[Tensor, Logs]:
    """Variational score distillation: half the mean square to sg(x0 - g), whose gradient is g / numel.

    Args:
        x0: (B, C, H, W), the student's output with its graph; no gradient goes through teacher or fake.
        t, noise: timesteps (B,) and noise (B, C, H, W) at which the two scores are compared.
        guidance_scale: of the teacher; ``fake_guidance_scale`` (default ``None``: the same) of the fake.
        weighting: see :func:`vsd_gradient`.
    """
    fake_scale = guidance_scale if fake_guidance_scale is None else fake_guidance_scale
    with torch.no_grad():
        x_t = schedule.add_noise(x0, noise, t)
        teacher_eps = guided_prediction(teacher, x_t, t, text, empty, guidance_scale)
        fake_eps = guided_prediction(fake, x_t, t, text, empty, fake_scale)
        gradient = vsd_gradient(x0, x_t, teacher_eps, fake_eps, *schedule.at(t), weighting)
    # The value and gradient of F.mse_loss(x0, x0 - gradient) / 2, without its cancellation: x0 starts around 15, where
    # float32 keeps only the first digits of a small score difference.
    loss = 0.5 * gradient.square().mean() + (gradient * (x0 - x0.detach())).mean()
    logs = {"vsd_loss": loss.detach(), "score_gap": (teacher_eps - fake_eps).abs().mean(), "x0_std": x0.detach().std()}
    return loss, logs


def fake_score_loss(
    fake: Predict,
    x0: Tensor,
    text: Tensor,
    schedule: NoiseSchedule,
    t: Tensor,
    noise: Tensor,
    weighting: str = "alpha2",
) -> tuple[Tensor, Logs]:
    """Denoising loss that makes the fake the score of the student's images, on detached ``x0``.

    Args:
        weighting: ``"alpha2"``: mean of (alpha_t eps - alpha_t noise)^2 (authors' release, SwiftBrush);
            ``"none"``: the plain mean square (the paper's algorithm, DMD2).
    """
    if weighting not in FAKE_WEIGHTINGS:
        raise ValueError(f"fake loss weighting {weighting!r} is unknown, expected one of {FAKE_WEIGHTINGS}.")
    x_t = schedule.add_noise(x0.detach(), noise, t)
    residual = _wide(fake(x_t, t, text)) - noise
    if weighting == "alpha2":
        residual = schedule.at(t)[0] * residual
    loss = residual.square().mean()
    return loss, {"fake_loss": loss.detach()}


def regression_loss(x0: Tensor, target: Tensor, kind: str = "mse", huber_delta: float = 0.1) -> tuple[Tensor, Logs]:
    """Distance of the one-step output to the teacher's many-step output from the same noise (DMD's ODE pairs).

    Args:
        kind: ``"mse"`` or ``"huber"`` (linear beyond ``huber_delta``, divided by it so that slopes stay near 1).
    """
    if kind == "mse":
        loss = F.mse_loss(x0, target)
    elif kind == "huber":
        loss = F.huber_loss(x0, target, delta=huber_delta) / huber_delta
    else:
        raise ValueError(f"regression loss {kind!r} is unknown, expected one of {REGRESSION_LOSSES}.")
    return loss, {"regression_loss": loss.detach()}


def _wide(eps: Tensor) -> Tensor:
    """float32, or float64 if it is that already."""
    return eps.to(torch.promote_types(eps.dtype, torch.float32))
