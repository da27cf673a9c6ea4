"""The losses against the independent implementation in `reference.py`, and their edges."""

import copy

import pytest
import torch
from conftest import SD_BETAS, tiny_unet
from diffusers import DDIMScheduler
from reference import reference_vsd_iteration

from diffusers_wadi import LoRaDConfig, lorad_target_modules, one_step_scheduler
from diffusers_wadi.distillation import losses
from diffusers_wadi.distillation.networks import WaDiNetworks

B, L, D = 3, 5, 16


def sd_schedule(**kwargs) -> losses.NoiseSchedule:
    return losses.NoiseSchedule.from_scheduler(DDIMScheduler(**SD_BETAS), **kwargs)


def make_networks(size: float = 0.1, dtype: torch.dtype = torch.float32) -> WaDiNetworks:
    """A tiny UNet with angles of about `size` in both adapters; 0 is the start of training."""
    torch.manual_seed(0)
    unet = tiny_unet().to(dtype)
    configs = [
        LoRaDConfig(r=r, target_modules=lorad_target_modules(unet, role)) for r, role in ((4, "student"), (2, "fake"))
    ]
    networks = WaDiNetworks(unet, *configs)
    for role in ("student", "fake"):
        for name, parameter in networks.role_state(role).items():
            if name.endswith("lorad_A"):
                torch.nn.init.normal_(parameter.data, std=size) if size else None
            parameter.data = parameter.data.to(dtype)
    return networks


@pytest.fixture
def draws():
    torch.manual_seed(7)
    return {
        "z": torch.randn(B, 4, 8, 8),
        "text": torch.randn(B, L, D),
        "empty": torch.randn(1, L, D),
        "t": torch.tensor([20, 500, 980]),
        "noise": torch.randn(B, 4, 8, 8),
        "fake_t": torch.tensor([0, 300, 999]),
        "fake_noise": torch.randn(B, 4, 8, 8),
    }


def factors_of(networks: WaDiNetworks, role: str) -> dict:
    """Module name -> (A, B), leaf copies."""
    state = {name: p.detach().clone().requires_grad_(True) for name, p in networks.role_state(role).items()}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in state)
    return {module: (state[f"{module}.lorad_A"], state[f"{module}.lorad_B"]) for module in modules}


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To 1e-5 of the largest value."""
    return (one - other).abs().max() <= 1e-5 * other.abs().max()


SETTINGS = {
    "release": {},
    "release terminal": {"terminal": 0.0047},
    "fake unguided, dmd2": {"fake_guidance": 1.0, "guidance": 3.0, "dmd2": True},
    "plain fake loss": {"alpha_weight": False},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_one_iteration_agrees_with_the_reference(draws, setting):
    """In float64, because float32 networks alone differ by more than 1e-5 of the smallest gradients."""
    draws = {name: value.double() if value.is_floating_point() else value for name, value in draws.items()}
    torch.manual_seed(0)
    plain = tiny_unet().double().requires_grad_(False)
    networks = make_networks(size=1.0, dtype=torch.float64)
    student, fake = factors_of(networks, "student"), factors_of(networks, "fake")
    arguments = {**draws, "t": draws["t"].tolist(), "fake_t": draws["fake_t"].tolist(), **setting}
    table = DDIMScheduler(**SD_BETAS).alphas_cumprod
    expected = reference_vsd_iteration(plain, student, fake, table, **arguments)

    schedule = sd_schedule(terminal_alpha_cumprod=setting.get("terminal"))
    x0 = losses.student_x0(networks.student, draws["z"], draws["text"], schedule)
    x0.retain_grad()
    student_loss, _ = losses.vsd_loss(
        x0,
        draws["text"],
        draws["empty"],
        networks.teacher,
        networks.fake,
        schedule,
        draws["t"],
        draws["noise"],
        setting.get("guidance", 1.5),
        setting.get("fake_guidance"),
        "dmd2" if setting.get("dmd2") else "sigma2",
    )
    student_loss.backward()
    kind = "alpha2" if setting.get("alpha_weight", True) else "none"
    given = (x0, draws["text"], schedule, draws["fake_t"], draws["fake_noise"], kind)
    fake_loss, _ = losses.fake_score_loss(networks.fake, *given)
    assert all(parameter.grad is None for parameter in networks.fake_parameters())
    student_grads = [parameter.grad.clone() for parameter in networks.student_parameters()]
    fake_loss.backward()

    assert close(x0.detach(), expected["x0"])
    assert close(x0.grad * x0.numel(), expected["gradient"])
    assert close(student_loss.detach(), expected["student_loss"])
    assert close(fake_loss.detach(), expected["fake_loss"])
    by_name = {"student": [], "fake": []}
    for role in by_name:
        names = list(networks.role_state(role))
        flat = [f"{module}.lorad_{letter}" for module in factors_of(networks, role) for letter in "AB"]
        by_name[role] = [flat.index(name) for name in names]
    for i, index in enumerate(by_name["student"]):
        assert close(student_grads[i], expected["student_grads"][index])
        assert torch.equal(student_grads[i], networks.student_parameters()[i].grad)  # the fake's loss adds nothing
    for i, index in enumerate(by_name["fake"]):
        assert close(networks.fake_parameters()[i].grad, expected["fake_grads"][index])
    trained = {id(p) for p in networks.student_parameters() + networks.fake_parameters()}
    assert all(p.grad is None for p in networks.unet.parameters() if id(p) not in trained)


def test_first_iteration_has_nothing_to_follow(draws):
    """Fake and student start as the teacher, so the score difference is exactly 0."""
    networks = make_networks(size=0)
    x0 = losses.student_x0(networks.student, draws["z"], draws["text"], sd_schedule())
    loss, logs = losses.vsd_loss(
        x0, draws["text"], draws["empty"], networks.teacher, networks.fake, sd_schedule(), draws["t"], draws["noise"]
    )
    assert loss == 0 and logs["score_gap"] == 0


@pytest.mark.parametrize("terminal", [None, 0.0047])
def test_student_x0_is_one_step_of_the_exported_scheduler(terminal):
    """x0 has a spread of about 15 here."""
    scheduler = one_step_scheduler(SD_BETAS, terminal_alpha_cumprod=terminal)
    scheduler.set_timesteps(1)
    z, eps = torch.randn(2, 2, 4, 8, 8)
    x0 = losses.student_x0(lambda *_: eps, z, None, sd_schedule(terminal_alpha_cumprod=terminal))
    assert torch.allclose(x0, scheduler.step(eps, scheduler.timesteps[0], z).prev_sample, rtol=1e-4, atol=1e-3)


def test_student_is_asked_at_the_last_timestep_and_answers_in_float32():
    asked = []

    def student(x, t, text):
        asked.append(t)
        return torch.zeros_like(x, dtype=torch.bfloat16)

    x0 = losses.student_x0(student, torch.randn(2, 4, 8, 8), None, sd_schedule())
    assert asked[0].tolist() == [999, 999] and x0.dtype == torch.float32


def test_schedule_tables():
    schedule = sd_schedule()
    assert schedule.num_timesteps == 1000 and schedule.alphas.dtype == torch.float32
    assert schedule.terminal_alpha**2 == pytest.approx(0.0046601, abs=1e-6)
    assert sd_schedule(terminal_alpha_cumprod=0.0047).terminal_alpha == pytest.approx(0.0685565, abs=1e-7)
    assert sd_schedule(terminal_alpha_cumprod=0.0047).terminal_sigma == pytest.approx(0.9976472, abs=1e-7)
    assert torch.allclose(schedule.alphas**2 + schedule.sigmas**2, torch.ones(1000), atol=1e-6)


def test_schedules_that_cannot_be_distilled_are_refused():
    zero_snr = DDIMScheduler(**SD_BETAS, rescale_betas_zero_snr=True)
    zero_snr.alphas_cumprod[-1] = 0.0
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        losses.NoiseSchedule.from_scheduler(zero_snr)


@pytest.mark.parametrize("scale, batches", [(1.0, [2]), (1.5, [4])])
def test_guidance_is_one_call(scale, batches):
    seen = []

    def predict(x, t, text):
        seen.append(len(x))
        return text.mean(dim=(1, 2)).view(-1, 1, 1, 1).expand_as(x)

    text, empty = torch.full((2, 5, 16), 3.0), torch.full((1, 5, 16), 1.0)
    eps = losses.guided_prediction(predict, torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text, empty, scale)
    assert seen == batches
    assert torch.allclose(eps, torch.full_like(eps, 1 + scale * 2))


def test_score_gradient_survives_infinities():
    eps = torch.randn(1, 4, 8, 8)
    broken = copy.deepcopy(eps)
    broken[0, 0, 0, 0] = float("nan")
    alpha = sigma = torch.full((1, 1, 1, 1), 0.5**0.5)
    zero = torch.zeros_like(eps)
    assert losses.vsd_gradient(zero, zero, broken, zero, alpha, sigma, "sigma2").isfinite().all()
    already_there = losses.vsd_gradient(-eps, zero, eps, zero, alpha, sigma, "dmd2")
    assert already_there.isfinite().all() and already_there.abs().max() < 1e7


def test_unknown_choices_are_refused():
    nothing = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="'x'.*sigma2"):
        losses.vsd_gradient(nothing, nothing, nothing, nothing, nothing, nothing, "x")
    with pytest.raises(ValueError, match="'x'.*alpha2"):
        losses.fake_score_loss(None, nothing, None, sd_schedule(), None, nothing, "x")
    with pytest.raises(ValueError, match="'x'.*huber"):
        losses.regression_loss(nothing, nothing, "x")


def test_regression_losses():
    target, x0 = torch.zeros(2, 4, 8, 8), torch.full((2, 4, 8, 8), 2.0)
    assert losses.regression_loss(x0, target)[0] == 4.0
    assert losses.regression_loss(x0, target, "huber", 0.1)[0] == pytest.approx(2.0 - 0.05)
