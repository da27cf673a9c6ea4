"""Text embeddings of prompts that were drawn before, for as long as the text encoder stays what it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

MEGABYTE = 2**20


class PromptCache:
    """Results of a pipeline's `encode_prompt`, by all of its arguments, the least recently used thrown away first.

    A result is that of the same call before, to the bit: prompts of one batch are kept together. Everything is thrown away
    when text encoder or tokenizer change: others in their place, parameters exchanged or written to, adapters loaded,
    scaled, fused or switched, tokens added. Only numbers written through `Tensor.data` go unnoticed: call `clear` then.

    Args:
        megabytes: of embeddings kept at most, where they were computed.
    """

    def __init__(self, megabytes: float) -> None:
        self._limit = megabytes * MEGABYTE
        self._entries: OrderedDict[Hashable, tuple] = OrderedDict()
        self._state: list | None = None
        self._seen: list = []  # keeps ids from being given to others
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def clear(self) -> None:
        """Forget all prompts."""
        self._entries.clear()
        self.bytes = 0

    def result(self, pipe: Any, encode: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """`encode(pipe, *args, **kwargs)`, or what it gave before."""
        key = self._key(pipe.text_encoder, args, kwargs)
        if key is None:
            return encode(pipe, *args, **kwargs)
        self._clear_if_changed(pipe.text_encoder, pipe.tokenizer)
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return _copied(self._entries[key])  # since a callback may write into it
        self.misses += 1
        result = encode(pipe, *args, **kwargs)
        self._keep(key, result)
        return result

    def _key(self, encoder: nn.Module | None, args: tuple, kwargs: dict[str, Any]) -> Hashable | None:
        """None for calls that are not to be cached: of given embeddings, for training, with a scale for LoRA."""
        if torch.is_grad_enabled() or encoder is None or encoder.training or kwargs.get("lora_scale") is not None:
            return None
        autocast = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")]
        try:
            key = (_frozen(args), _frozen(sorted(kwargs.items())), *autocast)
            hash(key)
        except TypeError:
            return None
        return key

    def _clear_if_changed(self, encoder: nn.Module, tokenizer: Any) -> None:
        state: list = [id(tokenizer), len(tokenizer), tokenizer.model_max_length]
        state += [getattr(tokenizer, name, None) for name in ("pad_token", "padding_side", "truncation_side")]
        seen: list = [tokenizer]
        _read_state(encoder, state, seen)
        if state != self._state:
            self.clear()
        self._state, self._seen = state, seen

    def _keep(self, key: Hashable, result: tuple) -> None:
        size = _bytes(result)
        if size > self._limit:
            return
        self.bytes += size - _bytes(self._entries.get(key, ()))
        self._entries[key] = _copied(result)
        while self.bytes > self._limit:
            self.bytes -= _bytes(self._entries.popitem(last=False)[1])


def _read_state(model: nn.Module, state: list, seen: list) -> None:
    """Append what changes whenever the model does; its modules are walked by hand, which takes a tenth of the time."""
    stack = [model]
    while stack:
        module = stack.pop()
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    seen.append(tensor)
                    state.append((id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype))
        if module._forward_hooks or module._forward_pre_hooks:
            state.append(object())  # which may do anything: equal to nothing
        if isinstance(module, BaseTunerLayer):
            scaling = dict(getattr(module, "scaling", {}))
            state.append(
                (list(module.merged_adapters), list(module.active_adapters), module.disable_adapters, scaling)
            )
        stack += [child for child in module._modules.values() if child is not None]
    seen.append(model)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, torch.Tensor):  # hashable, but by identity
        raise TypeError("embeddings are given")
    return value


def _copied(result: tuple) -> tuple:
    return tuple(item.clone() if isinstance(item, torch.Tensor) else item for item in result)


def _bytes(result: tuple) -> int:
    return sum(item.nbytes for item in result if isinstance(item, torch.Tensor))
