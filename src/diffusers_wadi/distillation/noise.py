"""Random draws that belong to samples, not to processes.

Noise, timesteps and dropped captions are functions of the seed, of the draw and of a sample's place in the global
batch. So 1 process with batch 8, 2 processes with batch 4, and 1 process with batch 4 and accumulation 2 train on the
same numbers, and no two samples of a run share any.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

WHOLE_BATCH = -1  # the place of a draw that the global batch shares


class SampleDraws:
    """The random stream of a run, in rounds: one for every update of a network and every set of fresh images.

    Within a round a draw is named ("z", "noise", ...), and micro-batch ``m`` of process ``r`` holds the samples
    ``m * world_size * batch_size + r * batch_size`` and following: their places in the data's order. ``micro`` says
    which micro-batch the draws are for.

    Args:
        seed: of the run.
        batch_size: samples of one process and micro-batch.
        rank, world_size: of this process, of how many.
    """

    def __init__(self, seed: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.seed, self.batch_size, self.rank, self.world_size = seed, batch_size, rank, world_size
        self.round = self.micro = 0

    def next_round(self) -> None:
        """From now on, draws of the same name give other numbers."""
        self.round, self.micro = self.round + 1, 0

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """(batch_size, *shape) float32, standard normal, on the CPU."""
        return self._each(name, lambda random: random.standard_normal(shape, dtype=np.float32))

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """(batch_size,) int64 from ``low`` to ``high``, both included, on the CPU."""
        return self._each(name, lambda random: random.integers(low, high, endpoint=True))

    def uniform(self, name: str, per: str = "sample", low: float = 0.0, high: float = 1.0) -> Tensor:
        """(batch_size,) float32 from ``low`` to ``high``, on the CPU.

        Args:
            per: ``"sample"``: each its own; ``"batch"``: one number for the whole global batch of the update.
        """
        if per == "batch":
            value = self._generator(name, WHOLE_BATCH).uniform(low, high)
            return torch.full((self.batch_size,), value, dtype=torch.float32)
        return self._each(name, lambda random: np.float32(random.uniform(low, high)))

    def _each(self, name: str, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
        first = (self.micro * self.world_size + self.rank) * self.batch_size
        return torch.from_numpy(np.stack([draw(self._generator(name, first + i)) for i in range(self.batch_size)]))

    def _generator(self, name: str, place: int) -> np.random.Generator:
        # SeedSequence hashes all of them into 128 bits; + 1, since it takes no negative numbers.
        return np.random.default_rng((self.seed, self.round, zlib.crc32(name.encode()), place + 1))

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands."""
        return {"seed": self.seed, "round": self.round}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` stands.

        Raises:
            ValueError: it belongs to another seed.
        """
        if state["seed"] != self.seed:
            raise ValueError(
                f"The checkpoint's noise has seed={state['seed']}, this run seed={self.seed}. Resume with the same "
                "--seed."
            )
        self.round = state["round"]
