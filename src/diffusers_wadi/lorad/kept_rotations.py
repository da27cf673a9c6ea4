"""What a `RotationCache` keeps of every layer, when it keeps it, and what gives way when there is not room for all.

A weight is kept from its second call in a row with nothing changed in between. So nothing is kept of an adapter whose
scale changes at every call, of weights that are in training, or of weights that offloading brings anew for each call.
Not kept either: where a gradient is recorded or the layer is in training mode (what was kept is then freed), under
`torch.compile` and in CUDA graphs, and for quantised or 8-bit weights, whose memory it would take back.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from diffusers_wadi.lorad.rotation import get_rotation_backend
from diffusers_wadi.lorad.watching import Watch, places, release, watch

if TYPE_CHECKING:
    from diffusers_wadi.lorad.layer import TurnedWeightLayer

__all__ = ["DEFAULT_CACHE_MEMORY", "KeptRotations", "RotationCache", "in_pipeline_call"]

DEFAULT_CACHE_MEMORY = 1 << 30
"""1 GiB: more than the 0.54 GB of SD 1.5's student in half precision, and just its 1.07 GB in float32."""

in_pipeline_call: ContextVar[bool] = ContextVar("in_pipeline_call", default=False)

_PLAIN = (Tensor, nn.Parameter)
_WAIT = 8  # calls of a layer that did not find room, before it asks again


class RotationCache:
    """The turned weights of one model's layers; what `enable_lorad_cache` puts up.

    Copies and pickles of it are empty. Threads may share it.

    Args:
        max_memory: bytes. Default 1 GiB. Where it does not hold all layers, those that cost most time per byte are kept:
            high ranks before low ones, small layers before large ones.
        calls_only: serve only inside the calls of a one-step pipeline. Default False.
    """

    def __init__(self, max_memory: int = DEFAULT_CACHE_MEMORY, calls_only: bool = False) -> None:
        self.max_memory = max_memory
        self.calls_only = calls_only
        self._layers: WeakSet[KeptRotations] = WeakSet()
        self._lock = threading.RLock()
        self._clock = itertools.count(1)

    def __reduce__(self) -> tuple:
        return RotationCache, (self.max_memory, self.calls_only)

    @property
    def nbytes(self) -> int:
        """Bytes of the turned weights that are kept now."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries())

    @property
    def num_layers(self) -> int:
        """Layers of which a turned weight is kept now."""
        with self._lock:
            return sum(any(entry.nbytes for entry in kept.entries.values()) for kept in self._layers)

    def clear(self) -> None:
        """Free everything; it fills again in the next calls."""
        with self._lock:
            for kept in self._layers:
                kept.entries.clear()

    def serves(self) -> bool:
        """Whether this call may use it."""
        return self.max_memory > 0 and (not self.calls_only or in_pipeline_call.get())

    def has_room(self, size: int, value: float, since: int) -> bool:
        """Whether `store` would find room."""
        with self._lock:
            return self._to_free(size, value, since) is not None

    def store(self, entry: Entry, rotated: Tensor, watches: list[Watch], value: float, since: int) -> None:
        """Keep a turned weight if there is room, or what is there is of less use.

        Args:
            value: what keeping it saves per byte. since: when its layer was called before; what nobody used since then goes
                first.
        """
        with self._lock:
            others = self._to_free(rotated.nbytes, value, since)
            if others is not None:
                for other in others:
                    other.kept = None
                entry.value, entry.kept = value, (rotated, watches)

    def _to_free(self, size: int, value: float, since: int) -> list[Entry] | None:
        """What has to go to make room; None where that is not enough or worth more."""
        kept = [entry for entry in self._entries() if entry.nbytes]
        free = self.max_memory - sum(entry.nbytes for entry in kept)
        gone = []
        for entry in sorted(kept, key=lambda entry: (entry.used >= since, entry.value)):
            if free >= size or (entry.used >= since and entry.value >= value):
                break
            gone.append(entry)
            free += entry.nbytes
        return gone if free >= size else None

    def _entries(self) -> Iterator[Entry]:
        return (entry for kept in self._layers for entry in kept.entries.values())


class Entry:
    """One turned weight, or only how its layer looked when it was last called."""

    def __init__(self, state: tuple, tensors: list[Tensor], used: int) -> None:
        self.state = state
        self.versions = _versions(tensors)
        self.used = used
        self.storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]  # see `places`
        self.wait = 0
        self.value = 0.0
        self.kept: tuple[Tensor, list[Watch]] | None = None  # in one, since threads read it without a lock

    @property
    def nbytes(self) -> int:
        kept = self.kept
        return 0 if kept is None else kept[0].nbytes


class KeptRotations:
    """One layer's part of a cache; a copy has nothing in it."""

    def __init__(self, cache: RotationCache) -> None:
        self.cache = cache
        self.entries: dict[tuple, Entry] = {}  # by adapters, dtype, device and stream
        with cache._lock:
            cache._layers.add(self)

    def __reduce__(self) -> tuple:
        return KeptRotations, (self.cache,)

    def forget(self, layer: TurnedWeightLayer) -> None:
        """Free what is kept of this layer, and watch over its tensors no more."""
        if self.entries:
            with self.cache._lock:
                self.entries.clear()
            for tensor in _tensors(layer, layer.get_base_layer(), list(layer.lorad_A)):
                release(tensor)

    def forget_moved(self, layer: TurnedWeightLayer) -> None:
        """Free what was made of tensors that this layer no longer has."""
        with self.cache._lock:
            for key, entry in list(self.entries.items()):
                names = [name for name in key[0] if name in layer.lorad_A]
                if entry.state != _state(layer, names, _tensors(layer, layer.get_base_layer(), names)):
                    del self.entries[key]

    def rotated(
        self, layer: TurnedWeightLayer, inner: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        """The weight of the layer turned by these adapters, or None if the layer is to turn it itself.

        Args:
            inner: its base layer. names: of adapters that it has.
            device: of the input that it is to meet. dtype: in which it meets it.
        """
        if torch.is_grad_enabled() or inner.training:
            self.forget(layer)
            return None
        if not self.cache.serves() or type(inner.weight) not in _PLAIN or _is_traced():
            return None
        key = (tuple(names), dtype, device, _stream(device))
        tensors = _tensors(layer, inner, names)
        entry, state = self.entries.get(key), _state(layer, names, tensors)
        if entry is None or entry.state != state:
            return self._notice(key, state, tensors, device)
        last, entry.used = entry.used, next(self.cache._clock)
        if (kept := entry.kept) is None:
            return self._keep(layer, key, entry, tensors, last)
        rotated, watches = kept
        if all([each.holds(tensor) for each, tensor in zip(watches, tensors)]):
            return rotated
        return self._notice(key, state, tensors, device)

    def _notice(self, key: tuple, state: tuple, tensors: list[Tensor], device: torch.device) -> None:
        """Remember how the layer looks, for its next call."""
        usable = key[3] is not None and all(_is_plain(tensor, device) for tensor in tensors)
        with self.cache._lock:
            self.entries.pop(key, None)
            if usable:
                self.entries[key] = Entry(state, tensors, next(self.cache._clock))

    def _keep(
        self, layer: TurnedWeightLayer, key: tuple, entry: Entry, tensors: list[Tensor], since: int
    ) -> Tensor | None:
        """Turn the weight and keep it, if there is room and nothing was written since the call before."""
        if entry.wait:
            entry.wait -= 1
            return None
        names, dtype = list(key[0]), key[1]
        value = _worth(sum(A.shape[1] for A in tensors[1::2]), tensors[0].numel(), dtype)
        versions = _versions(tensors)
        if entry.versions != versions:
            entry.versions = versions
            return None
        if not self.cache.has_room(tensors[0].numel() * dtype.itemsize, value, since):
            entry.wait = _WAIT
            return None
        watches = [watch(tensor) for tensor in tensors]
        if None in watches:
            entry.wait = _WAIT
            return None
        rotated = layer._rotated_weight(names, dict(zip(names, entry.state[0])), dtype)
        if _may_be_triton(rotated) and not all(each.holds(tensor) for each, tensor in zip(watches, tensors)):
            watches = [watch(tensor) for tensor in tensors]  # from here on
        # What others changed meanwhile would otherwise be kept half old, half new.
        now = _tensors(layer, layer.get_base_layer(), names)
        unchanged = entry.state == _state(layer, names, now) and versions == _versions(now)
        if not unchanged or type(rotated) is not Tensor or not all(w.holds(tensor) for w, tensor in zip(watches, now)):
            return None
        if self.entries.get(key) is entry:
            self.cache.store(entry, rotated, watches, value, since)
        return rotated


def _tensors(layer: TurnedWeightLayer, inner: nn.Module, names: list[str]) -> list[Tensor]:
    """What a turned weight is made of: the weight, and A and B of every adapter."""
    found, A, B = [inner.weight], layer.lorad_A, layer.lorad_B
    for name in names:
        found += (A[name], B[name])
    return found


def _state(layer: TurnedWeightLayer, names: list[str], tensors: list[Tensor]) -> tuple:
    """All but the numbers of the tensors that a turned weight depends on."""
    scales = [layer.scaling[name] for name in names]
    return scales, places(tensors), get_rotation_backend(), _matmul_precision()


def _matmul_precision() -> tuple[str, ...]:
    # `torch.get_float32_matmul_precision` refuses to answer once these have been set.
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


def _versions(tensors: list[Tensor]) -> list[int]:
    """Only a hint that a weight is in training: what this misses, `watching` finds."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _is_plain(tensor: Tensor, device: torch.device) -> bool:
    """Whether these are numbers of 16 bits or more on this device."""
    plain = type(tensor) in _PLAIN and tensor.device == device and tensor.is_floating_point()
    return plain and tensor.dtype.itemsize > 1


def _is_traced() -> bool:
    """Whether somebody records or transforms what is computed, to whom a weight out of nowhere means nothing."""
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


def _may_be_triton(rotated: Tensor) -> bool:
    """Whether what made this may have asked for the bare addresses of what it read, which counts as a write."""
    return rotated.is_cuda


def _stream(device: torch.device) -> int | None:
    """The queue that this thread's work goes to; another one would have to wait for this one's, and keeps its own."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None  # a graph would go on reading the memory after it was freed here
    return torch.cuda.current_stream(device).cuda_stream


def _worth(rank: int, numbers: int, dtype: torch.dtype) -> float:
    """What keeping a turned weight saves per byte, for comparison: its product A @ B, its sines, the start of kernels."""
    return (rank + 64 + (1 << 22) / numbers) / dtype.itemsize
