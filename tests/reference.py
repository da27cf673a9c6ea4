"""The mathematics of this package a second time, as plainly as it can be written. It imports nothing from the package.

Slow on purpose: loops and numbers instead of tensor tricks, so that a mistake here and the same mistake in the library
are unlikely to meet.
"""

import math

import torch
from torch import Tensor

# --- LoRaD ---


def reference_rotate(weight: Tensor, theta: Tensor) -> Tensor:
    """Every pair of neighbouring columns of every row times its own 2x2 rotation matrix, one pair at a time."""
    turned = torch.zeros_like(weight)
    rows, columns = weight.shape
    for i in range(rows):
        for j in range(columns // 2):
            angle = float(theta[i, j])
            matrix = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            first, second = float(weight[i, 2 * j]), float(weight[i, 2 * j + 1])
            turned[i, 2 * j] = matrix[0][0] * first + matrix[0][1] * second
            turned[i, 2 * j + 1] = matrix[1][0] * first + matrix[1][1] * second
    return turned


def reference_lorad_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """LoRaD by ordinary autograd: the block-diagonal rotation of every row is built as a matrix and multiplied."""
    theta = A @ B
    rows = []
    for i in range(weight.shape[0]):
        cos, sin = torch.cos(theta[i]), torch.sin(theta[i])
        blocks = [torch.stack([torch.stack([c, -s]), torch.stack([s, c])]) for c, s in zip(cos, sin)]
        rows.append(torch.block_diag(*blocks) @ weight[i])
    y = x @ torch.stack(rows).T
    return y if bias is None else y + bias


def reference_parameter_count(model: torch.nn.Module, chosen, r: int) -> int:
    """r times (outputs + half the inputs), over the Linear weights whose name `chosen` accepts; read off the tensors."""
    total = 0
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and chosen(name):
            outputs, inputs = module.weight.shape
            total += r * outputs + r * inputs // 2
    return total


# --- VSD ---


def reference_rotated_parameters(
    unet: torch.nn.Module, factors: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The UNet's parameters with the weights of some modules turned by A @ B, column by column, by plain autograd."""
    parameters = {name: value.detach() for name, value in unet.named_parameters()}
    for module, (A, B) in factors.items():
        weight, theta, columns = parameters[f"{module}.weight"], A @ B, []
        for j in range(theta.shape[1]):
            first, second, cos, sin = weight[:, 2 * j], weight[:, 2 * j + 1], theta[:, j].cos(), theta[:, j].sin()
            columns += [first * cos - second * sin, first * sin + second * cos]
        parameters[f"{module}.weight"] = torch.stack(columns, dim=1)
    return parameters


def reference_vsd_iteration(
    unet: torch.nn.Module,
    student: dict[str, tuple[Tensor, Tensor]],
    fake: dict[str, tuple[Tensor, Tensor]],
    alphas_cumprod: Tensor,
    z: Tensor,
    text: Tensor,
    empty: Tensor,
    t: list[int],
    noise: Tensor,
    fake_t: list[int],
    fake_noise: Tensor,
    guidance: float = 1.5,
    fake_guidance: float = 1.5,
    terminal: float | None = None,
    dmd2: bool = False,
    alpha_weight: bool = True,
) -> dict:
    """One iteration of the authors' release on a plain UNet, sample by sample: x0, score gradient, losses, gradients.

    `student` and `fake` map module names to (A, B) with requires_grad. Nothing is batched, no adapter is switched.
    """
    a = [float(value) for value in alphas_cumprod]
    count = z.shape[0]

    def predict(factors, x, step, words):
        parameters = reference_rotated_parameters(unet, factors)
        return torch.func.functional_call(unet, parameters, (x[None], step, words[None])).sample[0]

    def guided(factors, x, step, words, scale):
        without, with_words = predict(factors, x, step, empty[0]), predict(factors, x, step, words)
        return without + scale * (with_words - without)

    end = a[-1] if terminal is None else terminal
    x0 = [
        (z[i] - math.sqrt(1 - end) * predict(student, z[i], len(a) - 1, text[i])) / math.sqrt(end)
        for i in range(count)
    ]
    pulls = []
    for i in range(count):
        signal, noise_level = math.sqrt(a[t[i]]), math.sqrt(1 - a[t[i]])
        with torch.no_grad():
            x_t = signal * x0[i] + noise_level * noise[i]
            real = guided({}, x_t, t[i], text[i], guidance)
            imitated = guided(fake, x_t, t[i], text[i], fake_guidance)
            if dmd2:
                clean_real = (x_t - noise_level * real) / signal
                clean_fake = (x_t - noise_level * imitated) / signal
                pulls.append((clean_fake - clean_real) / (x0[i] - clean_real).abs().mean())
            else:
                pulls.append(noise_level**2 * (real - imitated))
    pull = torch.stack(pulls)
    images = torch.stack(x0)
    # The loss 1/2 mean((x0 - sg(x0 - pull))^2) has the gradient pull / numel in x0 and the value 1/2 mean(pull^2).
    student_grads = torch.autograd.grad(
        (images * pull).sum() / images.numel(), [p for ab in student.values() for p in ab]
    )
    terms = []
    for i in range(count):
        signal, noise_level = math.sqrt(a[fake_t[i]]), math.sqrt(1 - a[fake_t[i]])
        error = (
            predict(fake, signal * x0[i].detach() + noise_level * fake_noise[i], fake_t[i], text[i]) - fake_noise[i]
        )
        terms.append(((signal if alpha_weight else 1.0) * error) ** 2)
    fake_loss = torch.stack(terms).mean()
    fake_grads = torch.autograd.grad(fake_loss, [p for ab in fake.values() for p in ab])
    return {
        "x0": images.detach(),
        "gradient": pull,
        "student_loss": 0.5 * (pull**2).mean(),
        "fake_loss": fake_loss.detach(),
        "student_grads": student_grads,
        "fake_grads": fake_grads,
    }
