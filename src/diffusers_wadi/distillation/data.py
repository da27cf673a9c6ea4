"""Prompts in training: their embeddings, and an order that can be resumed. Score distillation needs no images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .text_cache import TextCache
from .text_encoders import TextEncoder
from .transfer import sent


class PromptEmbeddings:
    """Text embeddings of the training prompts: encoded at each use, in one batch, or read from a cache.

    Args:
        prompts: the training prompts, e.g. a :class:`~diffusers_wadi.distillation.prompt_store.PromptStore`.
        encoder: with a ``cache`` it is asked for the empty prompt only, and not kept.
        cache: of the embeddings of ``prompts``, in their order.
        device: where :meth:`at` puts what it returns.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encoder: TextEncoder,
        cache: TextCache | None = None,
        device: str | torch.device = "cpu",
    ):
        self.prompts = prompts
        self.device = torch.device(device)
        self.empty = encoder([""]).float().to(self.device)  # (1, L, D)
        self._cache = cache
        self._encoder = encoder if cache is None else None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def cached(self) -> bool:
        """Whether the embeddings are read from a cache."""
        return self._cache is not None

    def at(self, indices: Tensor) -> Tensor:
        """(B, L, D) float32 embeddings of the prompts ``indices`` (B,)."""
        if self._cache is not None:
            return sent(self._cache.at(indices), self.device).float()
        return self._encoder([self.prompts[i] for i in indices.tolist()]).to(self.device, torch.float32)


class PromptOrder:
    """An endless shuffled order over ``size`` items, a new permutation each epoch, resumable at any batch.

    The order is a function of ``seed`` and ``size`` alone, and processes cut their parts out of one global batch: the
    k-th update sees the same items as a set from 1 process with batch 8, from 2 with batch 4 and from 1 with batch 4 and
    accumulation 2, in this order by rank or by accumulated batch. So the state is two numbers, and a run may be resumed
    with another number of processes. Batches run over the end of an epoch: no item is ever left out.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if size < 1:
            raise ValueError(f"There are {size} items to draw from, expected at least 1.")
        self.size, self.seed = size, seed
        self._global_batch = batch_size * world_size
        self._part = slice(rank * batch_size, (rank + 1) * batch_size)
        self.epoch = self.position = 0
        self._permutation = self._shuffle(0)

    def _shuffle(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.size, generator=generator)

    def next_batch(self) -> Tensor:
        """(batch_size,) indices of this process."""
        taken = []
        missing = self._global_batch
        while missing:
            piece = self._permutation[self.position : self.position + missing]
            taken.append(piece)
            missing -= piece.numel()
            self.position += piece.numel()
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._permutation = self._shuffle(self.epoch)
        return torch.cat(taken)[self._part]

    def state_dict(self) -> dict[str, int]:
        """Where the order stands."""
        return {"size": self.size, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` stands.

        Raises:
            ValueError: it belongs to another number of items or another seed.
        """
        for name in ("size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The checkpoint's data order has {name}={state[name]}, this run {name}={getattr(self, name)}. "
                    "Resume with the same prompts and --seed."
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._permutation = self._shuffle(self.epoch)
