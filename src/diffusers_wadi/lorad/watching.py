"""Whether the numbers of a tensor are still those that they were, without reading them again.

Version counters do not tell: a write through `.data` (diffusers' `EMAModel.copy_to`, PEFT's merging, users' loops) leaves
them as they are. Comparing the numbers would read every weight at every call, and on a GPU make the host wait for it.

So the memory itself is asked. torch can mark a storage as copy-on-write, and the first write through any tensor takes the
mark away, whoever makes it and by whatever name for that memory. The mark is set here with no second owner, so nothing is
ever copied. It is refused where somebody may hold the bare address: memory of another library, a mapped file, an array
of NumPy, an alias. On a CPU such memory is compared by checksums; elsewhere it cannot be watched. Whoever asks for the
address counts as writing, once: an address kept as a number and written to later (a captured CUDA graph that trains
these weights, say) is beyond this.
"""

import ctypes
import functools
import itertools
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Place", "Watch", "places", "release", "watch"]

Place = tuple
"""What a tensor is but for its numbers: address of the storage's record, offset, shape, strides, dtype."""

_PART = 1 << 22  # bytes for one thread to sum up
_lock = threading.Lock()  # marking one storage twice at the same time would break it
_times = itertools.count()


class Watch(Protocol):
    """Put up over a tensor by `watch`."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether the numbers are as they were. `tensor` has to be in the same place, of a storage never freed since."""


def places(tensors: Iterable[Tensor]) -> list[Place]:
    """Equal for two looks at these tensors unless their memory, or what is seen of it, was exchanged.

    An address means the same storage as long as one knows that the storage is alive, or holds a `StorageWeakRef`.
    """
    return [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype) for t in tensors]


def watch(tensor: Tensor) -> Watch | None:
    """Watch over the numbers of a tensor from now on; None where nothing would tell of a change."""
    with _lock:
        mark = _mark(tensor)
    if mark is not None:
        return _Marked(mark, mark.since)
    return _Summed(_checksum(tensor)) if tensor.device.type == "cpu" else None


def release(tensor: Tensor) -> None:
    """Take the mark away: the storage of a tensor that has it cannot be resized."""
    if hasattr(torch._C, "_is_cow_tensor") and torch._C._is_cow_tensor(tensor):
        tensor.data_ptr()  # which counts as a write


class _Mark:
    """Since when a storage has its mark. A new time tells those who watched before of a write in between."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = StorageWeakRef(storage)  # keeps the address from being given to another storage
        self.since = next(_times)


_marks: WeakValueDictionary[int, _Mark] = WeakValueDictionary()


class _Marked:
    def __init__(self, mark: _Mark, since: int) -> None:
        self.mark, self.since = mark, since

    def holds(self, tensor: Tensor) -> bool:
        return torch._C._is_cow_tensor(tensor) and self.mark.since == self.since


class _Summed:
    def __init__(self, checksum: tuple[int, ...]) -> None:
        self.checksum = checksum

    def holds(self, tensor: Tensor) -> bool:
        return _checksum(tensor) == self.checksum


def _mark(tensor: Tensor) -> _Mark | None:
    storage = tensor.untyped_storage()
    mark = _marks.get(storage._cdata)
    if torch._C._is_cow_tensor(tensor) and mark is not None:
        return mark
    if not _markable(tensor, storage):
        return None
    if not _set_mark(tensor):
        return None
    if mark is None:
        mark = _marks[storage._cdata] = _Mark(storage)
    else:
        mark.since = next(_times)
    return mark


def _markable(tensor: Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether this tensor alone sees the storage, and all of it: nobody else, NumPy say, has the address by an alias."""
    owners = torch._C._storage_Use_Count(storage._cdata)  # the tensor, and the `storage` here
    alone = owners <= 2 and tensor._use_count() == 1  # what DLPack has handed out shares the tensor itself
    return alone and storage.nbytes() == tensor.nbytes and _tells_of_writes(tensor.device.type)


def _set_mark(tensor: Tensor) -> bool:
    try:
        with torch.no_grad():
            torch._lazy_clone(tensor)  # the clone is dropped, the mark stays
    except RuntimeError:  # memory that is not torch's own
        return False
    return torch._C._is_cow_tensor(tensor)


@functools.cache
def _tells_of_writes(device_type: str) -> bool:
    """Try on a small tensor that reading leaves the mark and writing, through `.data` too, takes it away."""
    # Elsewhere kernels may write past the mark, as those of MPS do.
    if device_type not in ("cpu", "cuda") or not hasattr(torch._C, "_is_cow_tensor"):
        return False
    tensor = nn.Parameter(torch.ones(4, device=device_type), requires_grad=False)
    if not _set_mark(tensor):
        return False
    tensor.data.sum()
    kept = torch._C._is_cow_tensor(tensor)
    tensor.data.add_(1)
    return kept and not torch._C._is_cow_tensor(tensor)


def _checksum(tensor: Tensor) -> tuple[int, ...]:
    """CRC-32 of every part of the storage that a tensor on the CPU spans: any one number's change shows for certain."""
    size = tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())))
    # By address: `numpy()` would make the storage unresizable, and `data_ptr()` count as a write.
    start = torch._C._data_address(tensor) + tensor.element_size() * tensor.storage_offset()
    memory = (ctypes.c_char * size).from_address(start) if tensor.numel() else b""
    whole = memoryview(memory).cast("B")
    parts = [whole[start : start + _PART] for start in range(0, len(whole), _PART)]
    threads = min(len(parts), torch.get_num_threads())
    if threads < 2:
        return tuple(map(zlib.crc32, parts))
    with ThreadPoolExecutor(threads) as pool:
        return tuple(pool.map(zlib.crc32, parts))
