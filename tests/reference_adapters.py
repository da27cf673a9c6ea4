"""What each kind of adapter makes of a weight, written out plainly. It imports nothing from the package."""

import math

import torch
from reference import reference_rotated_parameters
from torch import Tensor


def reference_parameters(unet, kind: str, trained: dict[str, Tensor], alpha: float | None = None) -> dict[str, Tensor]:
    """The whole UNet's parameters as an adapter of `kind` with the tensors `trained` leaves them, by plain autograd."""
    if kind == "full":
        return dict(trained)
    if kind == "lorad":
        modules = dict.fromkeys(name.rpartition(".")[0] for name in trained)
        factors = {module: (trained[f"{module}.lorad_A"], trained[f"{module}.lorad_B"]) for module in modules}
        return reference_rotated_parameters(unet, factors)
    parameters = {name: value.detach() for name, value in unet.named_parameters()}
    if kind in ("lora", "dora", "dora_frozen_norm"):
        _add_low_rank(parameters, trained, alpha, kind)
        return parameters
    for name, raw in trained.items():
        weight = f"{name.partition('.turn.')[0]}.weight"
        parameters[weight] = parameters[weight] @ MAPS[kind](raw)
    return parameters


def _add_low_rank(parameters: dict[str, Tensor], trained: dict[str, Tensor], alpha: float | None, kind: str) -> None:
    for name in [name for name in trained if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        down, up = trained[name].flatten(1), trained[f"{module}.lora_B.weight"].flatten(1)
        base = parameters[f"{module}.weight"]
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        sum_ = base.flatten(1) + scale * up @ down
        if kind != "lora":
            # The norm counts as a constant in the gradient (DoRA, Sec. 4.3).
            norm = torch.stack([row.square().sum().sqrt() for row in sum_]).detach()
            length = [row.square().sum().sqrt() for row in base.flatten(1)]
            magnitude = trained.get(f"{module}.lora_magnitude_vector.weight", torch.stack(length))
            sum_ = (magnitude.flatten() / norm)[:, None] * sum_
        parameters[f"{module}.weight"] = sum_.reshape(base.shape)


def _skew(raw: Tensor) -> Tensor:
    lower = raw.tril(-1)
    return lower - lower.T


def exponential(raw: Tensor) -> Tensor:
    """The power series of exp."""
    step = skew = _skew(raw)
    total = torch.eye(len(raw), dtype=raw.dtype) + skew
    for n in range(2, 40):
        step = step @ skew / n
        total = total + step
    return total


def cayley(raw: Tensor) -> Tensor:
    """(I - A/2)^-1 (I + A/2), with the inverse as a matrix."""
    identity, half = torch.eye(len(raw), dtype=raw.dtype), _skew(raw) / 2
    return torch.inverse(identity - half) @ (identity + half)


def householder(raw: Tensor) -> Tensor:
    """One reflection after the other; the diagonal of `raw` holds signs."""
    size = len(raw)
    total = torch.eye(size, dtype=raw.dtype)
    for i in range(size):
        v = torch.cat([torch.zeros(i, dtype=raw.dtype), torch.ones(1, dtype=raw.dtype), raw[i + 1 :, i]])
        total = total @ (torch.eye(size, dtype=raw.dtype) - 2 / v.square().sum() * torch.outer(v, v))
    return total @ torch.diag(torch.tensor([math.copysign(1.0, float(x)) for x in raw.diagonal()], dtype=raw.dtype))


MAPS = {"matrix_exp": exponential, "cayley": cayley, "householder": householder}
