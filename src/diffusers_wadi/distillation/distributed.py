"""Several processes: what is refused, and the modules that torch's DistributedDataParallel wraps."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .networks import WaDiNetworks

# What `accelerate launch` sets, and its name there.
_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def refuse_sharding() -> None:
    """Called before anything is loaded.

    Raises:
        ValueError: the launcher asks for a strategy that splits or replaces the model.
    """
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise ValueError(
                f"The launcher asks for {name} ({variable}={os.environ[variable]}). Three roles share one frozen base "
                "here, which it would split or wrap as one model; only the adapters have gradients, so there is little "
                "to split. Use plain data parallelism: `accelerate launch --multi_gpu`, or `accelerate config` again."
            )


def set_num_threads(number: int | None) -> None:
    """CPU threads of torch, None: as it is. To be called before an `Accelerator` is made.

    Without the variable accelerate gives each of several CPU processes a thread for every core.
    """
    if number is not None:
        os.environ["OMP_NUM_THREADS"] = str(number)
        torch.set_num_threads(number)


class RoleModule(nn.Module):
    """One role as a module that owns the role's trained parameters alone, and whose forward pass calls the network.

    DistributedDataParallel averages the gradients of what a module owns: so it can wrap several roles of one base,
    and takes no note of frozen weights.
    """

    def __init__(self, networks: WaDiNetworks, role: str):
        super().__init__()
        self.role = role
        self._networks = networks
        self.parameters_of_role = nn.ParameterList(networks.role_state(role).values())

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps of the role, (B, C, H, W)."""
        return self._networks.predict(self.role, x_t, t, text)


def data_parallel(accelerator: Accelerator, networks: WaDiNetworks, role: str) -> nn.Module:
    """``role`` as a ``Predict`` for training: backward passes through it average its gradients over all processes."""
    module = RoleModule(networks, role)
    return accelerator.prepare_model(module) if accelerator.num_processes > 1 else module


def averaging(module: nn.Module, wanted: bool) -> AbstractContextManager:
    """Around forward and backward: gradients are averaged if ``wanted``, else only added up in this process."""
    if wanted or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
