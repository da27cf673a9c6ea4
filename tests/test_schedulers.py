import copy

import pytest
import torch
from conftest import SD_BETAS
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_wadi import check_one_step_scheduler, one_step_scheduler

GOOD = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
TRAILING = {**SD_BETAS, "timestep_spacing": "trailing"}


def one_step(scheduler, z, eps):
    scheduler.set_timesteps(1)
    return scheduler.timesteps.tolist(), scheduler.step(eps, scheduler.timesteps[0], z, return_dict=False)[0]


def test_step_is_the_x0_formula_bit_for_bit():
    z, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = one_step_scheduler(SD_BETAS)
    timesteps, x0 = one_step(scheduler, z, eps)
    alpha_bar = scheduler.alphas_cumprod[-1]
    assert timesteps == [999]
    assert torch.equal(x0, (z - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5)


@pytest.mark.parametrize("source", [PNDMScheduler(**SD_BETAS), DDIMScheduler(**SD_BETAS), dict(SD_BETAS)])
def test_made_from_scheduler_or_config(source):
    before = dict(getattr(source, "config", source))
    scheduler = one_step_scheduler(source)
    assert type(scheduler) is DDIMScheduler
    assert scheduler.config.beta_end == 0.012 and scheduler.config.steps_offset == 1
    assert not {key for key in scheduler.config if "prk" in key}  # nothing of PNDM left in a saved config
    assert dict(getattr(source, "config", source)) == before


@pytest.mark.parametrize("betas", [SD_BETAS, {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}])
def test_terminal_alpha_cumprod(betas):
    scheduler = one_step_scheduler(betas, terminal_alpha_cumprod=0.0047)
    assert abs(scheduler.alphas_cumprod[-1].item() - 0.0047) < 1e-6
    assert one_step_scheduler(betas).alphas_cumprod[-1] == DDIMScheduler(**betas).alphas_cumprod[-1]


def test_terminal_alpha_cumprod_out_of_reach():
    with pytest.raises(ValueError, match="between"):
        one_step_scheduler(SD_BETAS, terminal_alpha_cumprod=0.9)
    with pytest.raises(ValueError, match="squaredcos"):
        one_step_scheduler(SD_BETAS | {"beta_schedule": "squaredcos_cap_v2"}, terminal_alpha_cumprod=0.0047)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**SD_BETAS, **GOOD),
        DDIMScheduler(**SD_BETAS, **GOOD | {"set_alpha_to_one": False}),
        DDPMScheduler(**{k: v for k, v in TRAILING.items()}, clip_sample=False),
        LCMScheduler(**SD_BETAS),
        UniPCMultistepScheduler(**TRAILING),
        EulerDiscreteScheduler(**TRAILING),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_accepts_what_gives_x0(scheduler):
    check_one_step_scheduler(scheduler)
    assert getattr(scheduler, "num_inference_steps", None) is None  # tried on a copy


def test_trying_leaves_the_random_stream_alone():
    stochastic = DDPMScheduler(**TRAILING, clip_sample=False)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_one_step_scheduler(stochastic)
    assert torch.equal(torch.rand(3), expected)


class Elsewhere(torch.Tensor):
    """Stands for a tensor on an accelerator: what is here does not combine with it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if len({type(value) for value in args if isinstance(value, torch.Tensor)}) > 1:
            raise RuntimeError("tensors on two devices")
        return super().__torch_function__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo):
        return self.clone()


def test_a_scheduler_that_moved_its_tables_is_tried_here():
    scheduler = DDIMScheduler(**SD_BETAS, **GOOD)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.as_subclass(Elsewhere)
    with pytest.raises(RuntimeError, match="two devices"):  # the stand-in does what a device would
        one_step(copy.deepcopy(scheduler), *torch.randn(2, 1, 4, 8, 8))
    check_one_step_scheduler(scheduler)
    assert type(scheduler.alphas_cumprod) is Elsewhere


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DDIMScheduler(**SD_BETAS, **GOOD | {"timestep_spacing": "leading"}), r"feed \[1\].*t = 999"),
        (DDIMScheduler(**SD_BETAS, **GOOD | {"timestep_spacing": "linspace"}), "t = 999"),
        (DDIMScheduler(**SD_BETAS, **GOOD | {"clip_sample": True}), "misses x0"),
        (DDIMScheduler(**SD_BETAS, **GOOD, thresholding=True), "misses x0"),
        (DDIMScheduler(**SD_BETAS, **GOOD, rescale_betas_zero_snr=True), "zero terminal SNR"),
        (DDIMScheduler(**SD_BETAS | {"prediction_type": "sample"}, **GOOD), "'sample'.* epsilon, v_prediction"),
        (PNDMScheduler(**SD_BETAS), "t = 999"),
        (EulerDiscreteScheduler(**SD_BETAS), "t = 999"),
    ],
)
def test_refuses_with_the_remedy(scheduler, message):
    with pytest.raises(ValueError, match=message) as error:
        check_one_step_scheduler(scheduler)
    assert "Use " in str(error.value)


def test_a_network_that_predicts_v():
    z, v = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = one_step_scheduler(PNDMScheduler(**SD_BETAS | {"prediction_type": "v_prediction"}))
    timesteps, x0 = one_step(scheduler, z, v)
    alpha_bar = scheduler.alphas_cumprod[-1]
    assert timesteps == [999] and scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(x0, alpha_bar**0.5 * z - (1 - alpha_bar) ** 0.5 * v)
    with pytest.raises(ValueError, match="terminal_alpha_cumprod=0.0047 is for a network that predicts 'epsilon'"):
        one_step_scheduler(scheduler, terminal_alpha_cumprod=0.0047)


@pytest.mark.parametrize("setting", [{"prediction_type": "sample"}, {"rescale_betas_zero_snr": True}])
def test_what_cannot_be_repaired_is_refused(setting):
    with pytest.raises(ValueError):
        one_step_scheduler(SD_BETAS | setting)
