"""Small tensors on their way to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` on ``device``, without the host waiting for what the device still has to do.

    A copy from ordinary memory to a CUDA device waits for all work before it; from pinned memory it is one more piece
    of work. torch keeps the pinned copy until that is done.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype)
    return tensor.pin_memory().to(device, dtype, non_blocking=True)
