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
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
Logs = dict[str, Tensor]

SCORE_WEIGHTINGS = ("sigma2", "dmd2")
FAKE_WEIGHTINGS = ("alpha2", "none", "sum")
REGRESSION_LOSSES = ("mse", "huber")


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_t and sigma_t of an epsilon-prediction teacher, and those by which the student's x0 is computed.

    Attributes:
        alphas, sigmas: (T,) float32.
        terminal_alpha, terminal_sigma: at the student's timestep, for the student only.
        start: the student's timestep; ``None``: T - 1.
    """

    alphas: Tensor
    sigmas: Tensor
    terminal_alpha: float
    terminal_sigma: float
    start: int | None = None

    @classmethod
    def from_scheduler(
        cls, scheduler, terminal_alpha_cumprod: float | None = None, device: str | torch.device = "cpu"
    ) -> NoiseSchedule:
        """Read the tables of a diffusers scheduler.

        Args:
            scheduler: anything with ``alphas_cumprod``. What its network predicts does not matter here: a ``Predict``
                is an epsilon prediction (:meth:`~diffusers_wadi.distillation.backbones.Backbone.eps` converts v).
            terminal_alpha_cumprod: alpha_bar of the student's step; ``None`` takes the schedule's own (0.00466 for
                Stable Diffusion), so that the student runs unchanged in stock pipelines. The authors' release
                hard-codes 0.0047.
            device: where the tables live.

        Raises:
            ValueError: no signal left at t = T - 1.
        """
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

    def starting_at(self, t_init: int) -> NoiseSchedule:
        """The same with the student at timestep ``t_init`` in place of T - 1 (SiD-LSG: 625), at the schedule's own values.

        Raises:
            ValueError: no timestep of the schedule.
        """
        if not 0 < t_init < self.num_timesteps:
            raise ValueError(f"t_init is {t_init}, expected a timestep from 1 to {self.num_timesteps - 1}.")
        if t_init == self.num_timesteps - 1:
            return self
        ends = float(self.alphas[t_init]), float(self.sigmas[t_init])
        return replace(self, terminal_alpha=ends[0], terminal_sigma=ends[1], start=t_init)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of timesteps ``t`` (B,), each (B, 1, 1, 1)."""
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise, (B, C, H, W) float32."""
        alpha, sigma = self.at(t)
        return alpha * x0 + sigma * noise


def student_x0(student: Predict, noise: Tensor, text: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The one-step image: x0 = (z - sigma_T eps(z, T - 1, c)) / alpha_T, float32 (SwiftBrush; authors' release).

    From a schedule that starts elsewhere, x0 = (x - sigma eps(x, t, c)) / alpha with x = sigma z: noise added to an
    empty image (SiD-LSG). At T - 1, where sigma is 0.998, SwiftBrush and DMD2 leave z as it is.
    """
    last = schedule.num_timesteps - 1
    x = noise if schedule.start is None else schedule.terminal_sigma * noise
    start = last if schedule.start is None else schedule.start
    t = torch.full((noise.shape[0],), start, dtype=torch.long, device=noise.device)
    eps = _wide(student(x, t, text))
    return (x - schedule.terminal_sigma * eps) / schedule.terminal_alpha


def guided_prediction(
    predict: Predict, x_t: Tensor, t: Tensor, text: Tensor, empty: Tensor, scale: float | Tensor
) -> Tensor:
    """Classifier-free guidance eps_0 + scale (eps_c - eps_0) in one batched call; at scale 1 only eps_c is computed.

    Args:
        text, empty: (B, L, D) and (1, L, D) embeddings of the captions and of the empty prompt.
        scale: one for all, or (B,), one for each sample.
    """
    if isinstance(scale, Tensor):
        scale = scale.to(x_t).view(-1, 1, 1, 1)
    elif scale == 1.0:
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
    guidance_scale: float | Tensor = 1.5,
    fake_guidance_scale: float | Tensor | None = None,
    weighting: str = "sigma2",
) -> tuple[Tensor, Logs]:
    """Variational score distillation: half the mean square to sg(x0 - g), whose gradient is g / numel.

    WaDi's release and SwiftBrush (weighting ``"sigma2"``), PG-SB (the same with a (B,) of drawn guidance scales for both
    scores), DMD2 without images (weighting ``"dmd2"``, fake unguided).

    Args:
        x0: (B, C, H, W), the student's output with its graph; no gradient goes through teacher or fake.
        t, noise: timesteps (B,) and noise (B, C, H, W) at which the two scores are compared.
        guidance_scale: of the teacher, one or (B,); ``fake_guidance_scale`` (default ``None``: the same) of the fake.
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
    return loss, logs | {"score_grad": gradient.square().mean().sqrt()}  # root mean square of the score's gradient


def sid_loss(
    x0: Tensor,
    text: Tensor,
    empty: Tensor,
    teacher: Predict,
    fake: Predict,
    schedule: NoiseSchedule,
    t: Tensor,
    noise: Tensor,
    guidance_scale: float | Tensor = 1.5,
    fake_guidance_scale: float | Tensor | None = None,
    sid_alpha: float = 1.0,
) -> tuple[Tensor, Logs]:
    """The generator's loss of SiD-LSG (score identity distillation with long-short guidance), summed per sample.

    With f the clean images that teacher and fake see in x_t, both guided, it is
    (f_teacher - f_fake) . ((f_teacher - x0) - sid_alpha (f_teacher - f_fake)) / max(mean|x0 - f_teacher|, 1e-5).
    Gradients go through x0 and through the inputs of both networks; freeze the fake's weights around it.

    Args:
        x0, text, empty, t, noise: as in :func:`vsd_loss`.
        guidance_scale: of the teacher (kappa 4); ``fake_guidance_scale`` (kappa 2 = kappa 3; default ``None``: the same).
        sid_alpha: alpha of the paper; 1 leaves (f_teacher - f_fake) . (f_fake - x0).
    """
    fake_scale = guidance_scale if fake_guidance_scale is None else fake_guidance_scale
    alpha, sigma = schedule.at(t)
    x_t = schedule.add_noise(x0, noise, t)
    teacher_eps = guided_prediction(teacher, x_t, t, text, empty, guidance_scale)
    fake_eps = guided_prediction(fake, x_t, t, text, empty, fake_scale)
    seen_teacher = (x_t - sigma * teacher_eps) / alpha
    with torch.no_grad():
        distance = (x0 - seen_teacher).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-5)
    gap = sigma / alpha * (fake_eps - teacher_eps)  # seen_teacher - seen_fake, without its cancellation
    terms = gap * ((seen_teacher - x0) - sid_alpha * gap) / distance
    loss = terms.sum() / x0.shape[0]
    logs = {"sid_loss": loss.detach(), "score_gap": (teacher_eps - fake_eps).detach().abs().mean()}
    return loss, logs | {"x0_std": x0.detach().std()}


def fake_score_loss(
    fake: Predict,
    x0: Tensor,
    text: Tensor,
    schedule: NoiseSchedule,
    t: Tensor,
    noise: Tensor,
    weighting: str = "alpha2",
    guidance_scale: float = 1.0,
    empty: Tensor | None = None,
) -> tuple[Tensor, Logs]:
    """Denoising loss that makes the fake the score of the student's images, on detached ``x0``.

    Args:
        weighting: ``"alpha2"``: mean of (alpha_t eps - alpha_t noise)^2 (authors' release, SwiftBrush);
            ``"none"``: the plain mean square (the paper's algorithm, DMD2); ``"sum"``: the plain sum of squares of each
            sample (SiD-LSG).
        guidance_scale: of the prediction that is trained (SiD-LSG's kappa 1), with gradients through both halves.
            Default 1.0: the captions' alone.
        empty: (1, L, D), needed for another guidance scale.
    """
    if weighting not in FAKE_WEIGHTINGS:
        raise ValueError(f"fake loss weighting {weighting!r} is unknown, expected one of {FAKE_WEIGHTINGS}.")
    x_t = schedule.add_noise(x0.detach(), noise, t)
    residual = guided_prediction(fake, x_t, t, text, empty, guidance_scale) - noise
    if weighting == "alpha2":
        residual = schedule.at(t)[0] * residual
    loss = residual.square().sum() / x0.shape[0] if weighting == "sum" else residual.square().mean()
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
