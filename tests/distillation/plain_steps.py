"""One update of `WaDiSteps` in float64 beside the same update by the plain implementations."""

import torch
from accelerate import Accelerator
from conftest import SD_BETAS, tiny_unet
from diffusers import DDIMScheduler
from reference_adapters import reference_parameters
from wadi_script import train_wadi

from diffusers_wadi.distillation import losses
from diffusers_wadi.distillation.adapters import adapter_specs
from diffusers_wadi.distillation.networks import WaDiNetworks
from diffusers_wadi.distillation.steps import Trainee, WaDiSteps

B, L, D, PROMPTS = 2, 5, 16, 7
SHAPE = (4, 8, 8)
TABLE = [float(value) for value in DDIMScheduler(**SD_BETAS).alphas_cumprod]


class Embeddings:
    """Random texts in place of encoded prompts."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.texts = torch.randn(PROMPTS, L, D, generator=generator).double()
        self.empty = torch.randn(1, L, D, generator=generator).double()

    def __len__(self) -> int:
        return PROMPTS

    def at(self, indices: torch.Tensor) -> torch.Tensor:
        return self.texts[indices]


def plain_unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_unet().double().requires_grad_(False)


def disturb(networks: WaDiNetworks, dtype: torch.dtype = torch.float64, size: float = 0.2) -> None:
    """Move every role away from the teacher, and into `dtype`."""
    generator = torch.Generator().manual_seed(11)
    for role in ("student", "fake"):
        for name, parameter in networks.role_state(role).items():
            noise = size * torch.randn(parameter.shape, generator=generator).to(dtype)
            if ".turn." in name:
                noise = noise.tril(-1)  # Householder's diagonal holds signs
            parameter.data = parameter.data.to(dtype) + noise


def make_steps(tmp_path, *flags: str) -> WaDiSteps:
    """A run in float64 whose trainees keep their gradients in `taken` instead of following them."""
    given = f"--pretrained_teacher_model t --train_prompts p --output_dir {tmp_path} --train_batch_size {B}"
    args = train_wadi.parse_args([*given.split(), *(str(flag) for flag in flags)])
    args.fake_max_timestep = 999 if args.fake_max_timestep is None else args.fake_max_timestep
    networks = WaDiNetworks(plain_unet(), *adapter_specs(args))
    disturb(networks)
    schedule = losses.NoiseSchedule.from_scheduler(DDIMScheduler(**SD_BETAS), args.terminal_alpha_cumprod)
    if args.t_init is not None:
        schedule = schedule.starting_at(args.t_init)
    steps = WaDiSteps(args, Accelerator(cpu=True), networks, schedule, Embeddings(), SHAPE, None, 10)
    steps.taken = []
    for name in ("student", "fake"):
        trainee = getattr(steps, name)
        trainee.update = lambda name=name, trainee=trainee: take(steps.taken, name, trainee)
    return steps


def take(taken: list, name: str, trainee: Trainee) -> torch.Tensor:
    taken.append((name, [parameter.grad.clone() for parameter in trainee.parameters]))
    trainee.optimizer.zero_grad(set_to_none=True)
    return torch.zeros(())


class PlainRole:
    """A role of `networks` on a plain UNet: `predict` for one sample, and leaves to differentiate by."""

    def __init__(self, networks: WaDiNetworks, role: str):
        self.unet, self.kind, self.leaves, alpha = plain_unet(), None, {}, None
        if role != "teacher":
            spec = networks.specs[role]
            self.kind, alpha = spec.kind, spec.alpha
            state = networks.role_state(role)
            self.leaves = {name: value.detach().clone().requires_grad_(True) for name, value in state.items()}
        self.parameters = dict(self.unet.named_parameters())
        if self.kind:
            self.parameters = reference_parameters(self.unet, self.kind, self.leaves, alpha)

    def predict(self, x, t, words):
        return torch.func.functional_call(self.unet, self.parameters, (x[None], t, words[None])).sample[0]

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(self.leaves.values()), retain_graph=True))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To 1e-5 of the largest value."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def assert_gradients(taken: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(taken) == len(expected)
    assert any(gradient.any() for gradient in expected)
    assert all(close(one, other) for one, other in zip(taken, expected))
