"""Taking a model out of its offloading, to change its adapters or its weights, and putting it back.

Model offload (`enable_model_cpu_offload`) needs none of this: its weights are real tensors, and adapters move with
the model. Sequential offload holds weights on the meta device, and group offload keeps lists of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, group_offloading
from safetensors.torch import load_file

from diffusers_wadi.lorad.offload import is_read_from_disk

GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")  # diffusers' names


@contextmanager
def offloading_paused(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside the block the weights of these models are real tensors, on the CPU or wherever they are stored.

    Raises:
        ValueError: a model is dispatched to the disk (`device_map`), from where its weights cannot be changed.
    """
    with ExitStack() as restoring:
        for model in models:
            restoring.callback(pause_offloading(model), model)
        yield


def pause_offloading(model: torch.nn.Module) -> Callable[[torch.nn.Module], None]:
    """Take one model out of its offloading; what is returned does to another one, or the same, what was done to it.

    Raises:
        ValueError: see `offloading_paused`.
    """
    again = [resume for pause in (_pause_sequential, _pause_group) if (resume := pause(model)) is not None]

    def resume_on(other: torch.nn.Module) -> None:
        for resume in again:
            resume(other)

    return resume_on


def _pause_sequential(model: torch.nn.Module) -> Callable[..., Any] | None:
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    hooks = [hook for hook in hooks if getattr(hook, "offload", False) is True]
    if not hooks:
        return None
    # accelerate is slow to import, and where it was not used there are no hooks.
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    if any(is_read_from_disk(hook) for hook in hooks):
        raise ValueError(
            f"this {type(model).__name__} is dispatched to the disk, where its weights cannot be changed. Load adapters "
            "and fuse before that, or load the pipeline without device_map."
        )
    device = hooks[0].execution_device
    remove_hook_from_module(model, recurse=True)
    # As DiffusionPipeline.enable_sequential_cpu_offload does, whose hooks these are.
    return lambda on=model: cpu_offload(on, device, offload_buffers=len(on._parameters) > 0)


def _pause_group(model: torch.nn.Module) -> Callable[..., Any] | None:
    top = group_offloading._get_top_level_group_offload_hook(model)
    if top is None:
        return None
    for group in _groups(model):
        if group.offload_to_disk_path:
            _take_from_disk(group)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in GROUP_HOOKS:
        registry.remove_hook(name, recurse=True)

    def resume(on: torch.nn.Module = model) -> None:
        if top.config.offload_to_disk_path is not None:
            _unshare(on)
        group_offloading._apply_group_offloading(on, top.config)

    return resume


def _unshare(model: torch.nn.Module) -> None:
    """Give tensors memory of their own, in order: safetensors, of which the groups on the disk are, holds no others."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _groups(model: torch.nn.Module) -> list[Any]:
    registries = [module._diffusers_hook for module in model.modules() if hasattr(module, "_diffusers_hook")]
    hooks = [registry.get_hook("group_offloading") for registry in registries]
    return list({id(hook.group): hook.group for hook in hooks if hook is not None}.values())


def _take_from_disk(group: Any) -> None:
    """Fill the tensors of a group, and remove its file: diffusers would read from it again whatever has changed since."""
    path = Path(group.safetensors_file_path)
    stored = load_file(path)
    for key, tensor in group.key_to_tensor.items():
        tensor.data = stored[key]
    path.unlink()
