"""Updates whose gradient is not finite are left out and counted, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def poisoned_if_broken(loss: Tensor) -> Tensor:
    """``loss``, with a gradient of NaN everywhere if it is not finite itself (else times 1, bit for bit the same).

    A broken loss can have finite gradients, which would pass for an update. On several processes the averaged
    gradient then is NaN for all of them, so that all leave the update out.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


class StepGuard:
    """Steps an optimiser unless the gradient's norm is NaN or infinite.

    A fused optimiser leaves such a step out on the device; for others the host has to know, and waits. With fp16 the
    loss scaler does the leaving out, and finds a good scale by it: some such steps at the start of a run are usual.

    Args:
        optimizer: as accelerate prepared it.
    """

    def __init__(self, optimizer):
        self.optimizer = optimizer
        # A schedule goes on where a step is left out; torch would warn if that is the first one, as often with fp16.
        getattr(optimizer, "optimizer", optimizer)._opt_called = True
        device = optimizer.param_groups[0]["params"][0].device
        self._total, self._in_a_row, self._worst = (torch.zeros((), dtype=torch.long, device=device) for _ in range(3))

    def step(self, norm: Tensor) -> None:
        """One step, or none.

        Args:
            norm: of the whole gradient, before clipping; the same on all processes.
        """
        bad = ~norm.detach().isfinite()
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if getattr(self.optimizer, "scaler", None) is not None:
            self.optimizer.step()
        elif all(group.get("fused") for group in inner.param_groups):  # not so after a checkpoint of the CPU's
            inner.grad_scale, inner.found_inf = None, bad.float()
            self.optimizer.step()
            del inner.grad_scale, inner.found_inf
        elif not bad:
            self.optimizer.step()
        self._total += bad
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        self._worst = torch.maximum(self._worst, self._in_a_row)

    @property
    def counts(self) -> Tensor:
        """(2,): how many steps were left out, and how many in a row at the worst; on the device."""
        return torch.stack([self._total, self._worst])
