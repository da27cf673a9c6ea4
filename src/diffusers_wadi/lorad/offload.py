"""Weights that are elsewhere between calls: accelerate's sequential offload and diffusers' group offload.

Both bring a module's weights to the computing device when that module is called. LoRaD reads the weight of its base
layer without calling it, and nobody calls a `ParameterDict`, so a LoRaD layer has to run these hooks itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["is_offloaded", "onloaded"]

_GROUP_OFFLOADING = "group_offloading"  # diffusers' name for its hook


def is_offloaded(*modules: nn.Module) -> bool:
    """Whether one of these modules has its weights elsewhere until its hook is run."""
    return any(_accelerate_hook(module) or _group_hook(module) for module in modules)


@contextmanager
def onloaded(*modules: nn.Module, changed: nn.Module | None = None) -> Iterator[None]:
    """Inside the block the weights of these modules are on the computing device.

    Args:
        modules: the base layer and the dictionaries of factors; those without a hook are left alone.
        changed: one of them whose `weight` the block changes in place. Default None: no weight is changed.

    Raises:
        ValueError: the weight to change lies on a disk, from where it would come back unchanged.
    """
    if changed is not None:
        _refuse_disk(changed)
    hooks = [(module, hook) for module in modules for hook in _hooks(module, changed)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
        if changed is not None and (hook := _accelerate_hook(changed)):
            hook.weights_map["weight"].copy_(changed.weight.data)  # what the next call is loaded from
    finally:
        for module, hook in reversed(hooks):
            hook.post_forward(module, None)


def _hooks(module: nn.Module, changed: nn.Module | None) -> list[Any]:
    # A group's weights are real tensors between calls, changed where they are.
    group = None if changed is not None else _group_hook(module)
    return [hook for hook in (_accelerate_hook(module), group) if hook is not None]


def _accelerate_hook(module: nn.Module) -> Any:
    # Of the object itself: a module takes long to say that it has no such attribute, and every layer asks in every call.
    hook = vars(module).get("_hf_hook")
    return hook if getattr(hook, "offload", False) is True else None


def _group_hook(module: nn.Module) -> Any:
    registry = vars(module).get("_diffusers_hook")
    return None if registry is None else registry.get_hook(_GROUP_OFFLOADING)


def _refuse_disk(module: nn.Module) -> None:
    hook, group = _accelerate_hook(module), getattr(_group_hook(module), "group", None)
    if (hook is not None and is_read_from_disk(hook)) or getattr(group, "offload_to_disk_path", None):
        raise ValueError(
            f"the weight of this {type(module).__name__} is offloaded to a disk and cannot be changed there. Fuse or "
            "unfuse before the offload is switched on."
        )


def is_read_from_disk(hook: Any) -> bool:
    """Whether accelerate's offloading hook reads its weights from files, instead of from tensors that it keeps."""
    kept = getattr(hook.weights_map, "dataset", hook.weights_map)
    return not isinstance(kept, dict) or any(device.type == "meta" for device in hook.original_devices.values())
