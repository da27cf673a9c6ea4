"""Bytes of tensors, counted where they are made and kept: exact, and the same on every device."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Inside the block: the largest sum of bytes of all tensors that were made in it and are alive, in `peak`.

    Args:
        before: tensors that exist already; views of them are not new.
    """

    def __init__(self, *before: torch.Tensor):
        super().__init__()
        self.peak = 0
        self._old = {tensor.untyped_storage()._cdata for tensor in before}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._old:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def bytes_saved(forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """Bytes that `forward` keeps for its backward pass, every storage once and without those of the parameters."""
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
