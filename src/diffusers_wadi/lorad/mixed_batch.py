"""Batches in which every sample has its own adapter, by PEFT's means: hooks that hand each layer the names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from diffusers_wadi.lorad.layer import BASE_MODEL, LoRaDLayer

__all__ = ["mixed_adapter_batch"]


@contextmanager
def mixed_adapter_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Inside the block, sample i of every call of `model` is computed with the adapter `adapter_names[i]`.

    For models without a `PeftModel` around them, such as a pipeline's UNet. Where classifier-free guidance doubles the
    batch, double the names as well.

    Args:
        adapter_names: one per sample; "__base__" for the base without adapters.

    Raises:
        ValueError: a name that no LoRaD layer has, or a model in training mode. The layers refuse batches of another
            size, and merged adapters.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call `eval()` first.")
    layers = [m for m in model.modules() if isinstance(m, (LoRaDLayer, AuxiliaryTrainingWrapper))]
    known = {name for layer in layers if isinstance(layer, LoRaDLayer) for name in layer.lorad_A}
    unknown = sorted(set(adapter_names) - known - {BASE_MODEL})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {sorted(known)}, and "
            f"{BASE_MODEL!r} for none."
        )
    hand_over = partial(_hand_over, adapter_names=list(adapter_names))
    handles = [layer.register_forward_pre_hook(hand_over, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_over(module: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]) -> tuple:
    return args, {**kwargs, "adapter_names": adapter_names}
