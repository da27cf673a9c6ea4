"""A stock scheduler set up for one step, and the test that a scheduler will do.

With sigma = sqrt(1 - alphas_cumprod[T-1]) and alpha = sqrt(alphas_cumprod[T-1]) the one-step generator is
x0 = (z - sigma * eps(z, T-1)) / alpha (paper, one-step generator), or x0 = alpha * z - sigma * v for a network that
predicts v. DDIM does exactly this if it starts at t = T-1 and ends at alphas_cumprod = 1, so no scheduler class of our
own has to stand in a saved checkpoint.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler

__all__ = ["check_one_step_scheduler", "one_step_scheduler"]

ONE_STEP_SETTINGS: dict[str, Any] = {
    "timestep_spacing": "trailing",  # the last of T timesteps first; "leading" would feed t = 1
    "set_alpha_to_one": True,  # end at clean data, not at alphas_cumprod[0]
    "clip_sample": False,  # latents are not in [-1, 1]
    "thresholding": False,
    "steps_offset": 1,  # StableDiffusionPipeline rewrites other values with a warning; trailing ignores it
}

PREDICTIONS = {"epsilon": "(z - sigma * eps) / alpha", "v_prediction": "alpha * z - sigma * v"}

REMEDY = "Use `pipe.scheduler = diffusers_wadi.one_step_scheduler(pipe.scheduler)`."


def one_step_scheduler(
    config_or_scheduler: Mapping[str, Any] | Any, terminal_alpha_cumprod: float | None = None
) -> DDIMScheduler:
    """A `DDIMScheduler` whose single step feeds t = T-1 and returns x0 = (z - sigma * eps) / alpha.

    Args:
        config_or_scheduler: a scheduler, or its config; its betas, number of timesteps and prediction type are kept.
        terminal_alpha_cumprod: wanted alphas_cumprod[T-1], met to 1e-6 by solving for `beta_end`; of a network that
            predicts epsilon only. The authors' release uses 0.0047 with Stable Diffusion, whose own schedule gives
            0.00466, and with PixArt-alpha, whose own gives 4.04e-5. Only for one-step use: it changes the other
            timesteps as well. Default None keeps the schedule.

    Returns:
        A new scheduler; the argument is left as it is.

    Raises:
        ValueError: the result would not do (see `check_one_step_scheduler`), or `terminal_alpha_cumprod` cannot be
            reached by `beta_end`.
    """
    config = getattr(config_or_scheduler, "config", config_or_scheduler)
    known = inspect.signature(DDIMScheduler.__init__).parameters
    settings = {key: value for key, value in dict(config).items() if key in known} | ONE_STEP_SETTINGS
    if terminal_alpha_cumprod is not None:
        _refuse_other_than_epsilon(settings, terminal_alpha_cumprod)
        settings["beta_end"] = _solve_beta_end(DDIMScheduler(**settings), terminal_alpha_cumprod)
    scheduler = DDIMScheduler(**settings)
    check_one_step_scheduler(scheduler)
    return scheduler


def _refuse_other_than_epsilon(settings: Mapping[str, Any], wanted: float) -> None:
    prediction = settings.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ValueError(
            f"terminal_alpha_cumprod={wanted} is for a network that predicts 'epsilon'; this scheduler has "
            f"prediction_type={prediction!r}, which depends on the schedule's own value. Leave terminal_alpha_cumprod out."
        )


def _solve_beta_end(scheduler: DDIMScheduler, wanted: float) -> float:
    """Bisection in float64: the product of (1 - beta) falls as `beta_end` grows."""
    config = scheduler.config
    exponents = {"linear": 1.0, "scaled_linear": 0.5}
    if config.beta_schedule not in exponents or config.trained_betas is not None:
        raise ValueError(
            f"terminal_alpha_cumprod needs beta_schedule 'linear' or 'scaled_linear' and no trained_betas; this config "
            f"has {config.beta_schedule!r}. Leave terminal_alpha_cumprod out."
        )
    power, steps = exponents[config.beta_schedule], config.num_train_timesteps

    def terminal(beta_end: float) -> float:
        ends = config.beta_start**power, beta_end**power
        betas = torch.linspace(*ends, steps, dtype=torch.float64) ** (1 / power)
        return torch.log1p(-betas).sum().exp().item()

    low, high = config.beta_start, 0.999
    if not terminal(high) < wanted < terminal(low):
        raise ValueError(
            f"terminal_alpha_cumprod={wanted} is out of reach for beta_start={config.beta_start}: expected a value "
            f"between {terminal(high):.3g} and {terminal(low):.3g}"
        )
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if terminal(middle) > wanted else (low, middle)
    return (low + high) / 2


def check_one_step_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose single step is not x0 = (z - sigma * eps) / alpha at t = T-1 (v: alpha * z - sigma * v).

    The scheduler is tried on a copy, not judged by its class: DDIM, DDPM, LCM, UniPC, DPM-Solver++ or Euler pass once
    they are set to "trailing" spacing. The tolerance of 1 % lets those through that leave 0.1 % of eps in x0 (Euler,
    `set_alpha_to_one=False`).

    Raises:
        ValueError: with what is wrong and the remedy.
    """
    name = type(scheduler).__name__
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"{name} has prediction_type={prediction!r}; one-step LoRaD models predict one of {', '.join(PREDICTIONS)}. "
            "Use the scheduler of the model's own checkpoint."
        )
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ValueError(f"{name} has no alphas_cumprod, so it cannot drive a one-step model. {REMEDY}")
    if scheduler.config.get("rescale_betas_zero_snr", False) or not alphas[-1] > 0:
        raise ValueError(
            f"{name} has zero terminal SNR, and x0 = (z - sigma * eps) / alpha divides by alpha = 0. Use a config with "
            f"rescale_betas_zero_snr=False."
        )
    fed, error = _try_one_step(scheduler)
    last = scheduler.config.num_train_timesteps - 1
    if fed != [last]:
        raise ValueError(f"{name} would feed {fed} at one step; the model knows only t = {last}. {REMEDY}")
    if not error < 1e-2:
        raise ValueError(f"one step of {name} misses x0 = {PREDICTIONS[prediction]} by {error:.1%}. {REMEDY}")


def _try_one_step(scheduler: Any) -> tuple[list[int] | str, float]:
    """The timesteps fed at one step and the relative error of the result against the formula."""
    # Stochastic schedulers draw noise, which must not shift the seeds of whoever asked.
    with torch.random.fork_rng(devices=[]):
        return _trial_step(_copy_on_cpu(scheduler))


def _copy_on_cpu(scheduler: Any) -> Any:
    # Some schedulers move their tables to the accelerator when they are used; the trial's numbers are here.
    trial = copy.deepcopy(scheduler)
    for name, value in vars(trial).items():
        if isinstance(value, torch.Tensor):
            setattr(trial, name, value.cpu())
    return trial


def _trial_step(trial: Any) -> tuple[list[int] | str, float]:
    try:
        trial.set_timesteps(1)
    except Exception as error:  # e.g. PNDM, which cannot do fewer than a few steps
        return f"nothing ({type(error).__name__}: {error})", float("inf")
    fed = [round(t) for t in trial.timesteps.tolist()]
    alpha, sigma = trial.alphas_cumprod[-1].sqrt(), (1 - trial.alphas_cumprod[-1]).sqrt()
    # Fixed numbers of about unit size; clipping or thresholding of x0 shows, since x0 is some 15 times as large.
    noise, output = torch.linspace(-1.5, 1.5, 16).reshape(1, 4, 2, 2), torch.linspace(1, -0.5, 16).reshape(1, 4, 2, 2)
    sample = noise * trial.init_noise_sigma
    result = trial.step(output, trial.timesteps[0], sample, return_dict=False)[0]
    velocity = trial.config.get("prediction_type", "epsilon") == "v_prediction"
    expected = alpha * noise - sigma * output if velocity else (noise - sigma * output) / alpha
    return fed, ((result - expected).norm() / expected.norm()).item()
