"""Text embeddings computed once and kept on disk, memory-mapped, so that all processes of a machine share them.

The rows lie in shards, ordinary ``.npy`` files. A shard is written under another name, flushed to the disk and renamed,
so a file called ``shard-*.npy`` is whole whenever the power went; a run that was stopped goes on after the last whole
one. The folder's name is a fingerprint of encoder, prompts and dtype: what it holds is never out of date.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .text_encoders import TextEncoder

SHARD_BYTES = 2**27  # what a crash costs at most: 128 MiB, 500 prompts of SD 1.5 in float32


@dataclass(frozen=True)
class CachePlan:
    """What a cache holds: ``count`` rows of ``shape`` (L, D) in ``dtype`` ("float32", "float16")."""

    count: int
    shape: tuple[int, int]
    dtype: str
    shard_bytes: int = SHARD_BYTES

    @property
    def row_bytes(self) -> int:
        """Of one prompt."""
        return self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize

    @property
    def rows_per_shard(self) -> int:
        """At least one."""
        return max(1, self.shard_bytes // self.row_bytes)

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.count // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """The prompts of a shard."""
        return range(shard * self.rows_per_shard, min(self.count, (shard + 1) * self.rows_per_shard))


def cache_folder(parent: str | Path, plan: CachePlan, encoder: str, prompts: str) -> Path:
    """The folder of a cache inside ``parent``; ``encoder`` and ``prompts`` are fingerprints."""
    identity = json.dumps({**asdict(plan), "encoder": encoder, "prompts": prompts}, sort_keys=True)
    return Path(parent) / hashlib.sha256(identity.encode()).hexdigest()[:16]


def shard_file(folder: Path, shard: int) -> Path:
    """Its name; whole if it is there."""
    return folder / f"shard-{shard:06d}.npy"


def check_space(folder: Path, plan: CachePlan) -> None:
    """Refuse a cache that the disk cannot hold, before the first shard is computed.

    Raises:
        ValueError: says how much is needed, how much is free, and what takes less.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(len(plan.rows_of(i)) for i in range(plan.shards) if not shard_file(folder, i).is_file())
    needed, free = missing * plan.row_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"--precompute_text_embeddings needs {needed / 1e9:.1f} GB more in {folder} ({plan.count} prompts of "
            f"{plan.row_bytes / 1e3:.0f} kB), but {free / 1e9:.1f} GB are free. Use --embedding_dtype fp16, another "
            "--text_cache_dir, fewer prompts, or encode at each step."
        )


def fill_cache(
    folder: Path,
    plan: CachePlan,
    prompts: Sequence[str],
    encoder: TextEncoder,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Compute the shards that are not there; process ``rank`` of ``world_size`` every ``world_size``-th one.

    Raises:
        ValueError: an embedding is not finite in the cache's dtype.
        OSError: the disk is full; whole shards stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = [shard for shard in range(rank, plan.shards, world_size) if not shard_file(folder, shard).is_file()]
    for shard in progress(own):
        target = shard_file(folder, shard)
        beside = target.with_suffix(".partial")  # one writer a shard: what a dead run left is written over
        _write_shard(beside, plan, plan.rows_of(shard), prompts, encoder, batch_size)
        os.replace(beside, target)


def _write_shard(
    file: Path, plan: CachePlan, rows: range, prompts: Sequence[str], encoder: TextEncoder, batch_size: int
) -> None:
    values = np.empty((len(rows), *plan.shape), plan.dtype)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        rows_now = encoder(prompts[part.start : part.stop]).float().cpu().numpy()
        with np.errstate(over="ignore"):  # what does not fit into float16 becomes infinite, and is refused below
            values[start : start + len(part)] = rows_now
    if not np.isfinite(values).all():
        raise ValueError(f"Text embeddings are not finite in {plan.dtype}: use --embedding_dtype fp32.")
    with open(file, "wb") as out:
        np.save(out, values)
        out.flush()
        os.fsync(out.fileno())


def wait_for_shards(folder: Path, plan: CachePlan, seconds: float = 0.5) -> None:
    """Until all shards are there. Not a barrier: those of NCCL give up after minutes, and this may take hours."""
    missing = list(range(plan.shards))
    while missing := [shard for shard in missing if not shard_file(folder, shard).is_file()]:
        time.sleep(seconds)


class TextCache:
    """The rows of a finished cache.

    Raises:
        ValueError: a shard is missing or is not as planned.
    """

    def __init__(self, folder: str | Path, plan: CachePlan):
        self.plan = plan
        self._shards = [self._open(shard_file(Path(folder), shard), shard) for shard in range(plan.shards)]

    def _open(self, file: Path, shard: int) -> np.ndarray:
        try:
            values = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} is no whole shard of text embeddings ({error}). Delete it and run again."
            ) from error
        expected = (len(self.plan.rows_of(shard)), *self.plan.shape)
        if values.shape != expected or values.dtype != self.plan.dtype:
            raise ValueError(
                f"{file} holds {values.dtype} {values.shape}, expected {self.plan.dtype} {expected}. Delete it and run "
                "again."
            )
        return values

    def at(self, indices: Tensor) -> Tensor:
        """(B, L, D) rows of the prompts ``indices`` (B,), on the CPU, in the cache's dtype."""
        rows = np.empty((len(indices), *self.plan.shape), self.plan.dtype)
        for place, index in enumerate(indices.tolist()):
            shard, row = divmod(index, self.plan.rows_per_shard)
            rows[place] = self._shards[shard][row]
        return torch.from_numpy(rows)
