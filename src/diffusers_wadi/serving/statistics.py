"""What a batcher has done so far, for whoever runs it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BatcherStatistics", "Tally"]


@dataclass(frozen=True)
class BatcherStatistics:
    """Of one `ImageBatcher` since it was made.

    Args:
        images: drawn.
        failed: requests that ended in an error.
        batch_sizes: batches that were drawn, by the number of their images.
        waiting: requests that wait now.
        mean_wait, longest_wait: seconds between a request and the start of its batch.
        busy_seconds: in which there was something to draw; batches that overlap count once.
    """

    images: int
    failed: int
    batch_sizes: dict[int, int]
    waiting: int
    mean_wait: float
    longest_wait: float
    busy_seconds: float

    @property
    def images_per_second(self) -> float:
        """While it was busy; 0 before the first image."""
        return self.images / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def mean_batch_size(self) -> float:
        """0 before the first batch."""
        return self.images / sum(self.batch_sizes.values()) if self.batch_sizes else 0.0


class Tally:
    """Counts for `BatcherStatistics`, from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batch_sizes: Counter[int] = Counter()
        self._failed, self._waits, self._wait_sum, self._longest = 0, 0, 0.0, 0.0
        self._busy, self._busy_until = 0.0, 0.0

    def started(self, arrivals: Sequence[float]) -> float:
        """Note how long they waited; returns the time now."""
        now = time.monotonic()
        waits = [now - arrived for arrived in arrivals]
        with self._lock:
            self._waits += len(waits)
            self._wait_sum += sum(waits)
            self._longest = max(self._longest, *waits)
        return now

    def drawn(self, count: int, started: float) -> float:
        """Note a batch that has just become ready; returns the seconds that it kept the device to itself."""
        with self._lock:
            now = time.monotonic()
            own = now - max(started, self._busy_until)
            self._busy, self._busy_until = self._busy + own, now
            self._batch_sizes[count] += 1
        return own

    def failure(self) -> None:
        with self._lock:
            self._failed += 1

    def snapshot(self, waiting: int) -> BatcherStatistics:
        with self._lock:
            images = sum(size * count for size, count in self._batch_sizes.items())
            mean = self._wait_sum / self._waits if self._waits else 0.0
            sizes = dict(sorted(self._batch_sizes.items()))
            return BatcherStatistics(images, self._failed, sizes, waiting, mean, self._longest, self._busy)
