"""Requests that wait, and which of them are drawn next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Alone", "QueueFullError", "Waiting", "WaitingRoom"]


class QueueFullError(RuntimeError):
    """As many requests wait as may; the sender is to come again later."""


class Alone:
    """Key of a request that nobody can join."""


@dataclass(eq=False)
class Waiting:
    """One request.

    Args:
        key: requests with equal keys can be drawn together.
        future: what it is to result in.
        content: for whoever takes it.
        arrived: by `time.monotonic()`.
    """

    key: Hashable
    future: Future
    content: Any
    arrived: float = field(default_factory=time.monotonic)


class WaitingRoom:
    """In order of arrival; safe for any number of threads that put and one that takes.

    Args:
        max_waiting: how many; None: any number.
    """

    def __init__(self, max_waiting: int | None) -> None:
        self._max_waiting = max_waiting
        self._waiting: list[Waiting] = []
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: Waiting) -> None:
        """Let it in, unless that raises one of these.

        Raises:
            QueueFullError: there is no room.
            RuntimeError: it is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("this batcher is closed and takes no more requests; make another one")
            if len(self._waiting) == self._max_waiting:
                self._forget_cancelled()
            if len(self._waiting) == self._max_waiting:
                raise QueueFullError(f"max_waiting={self._max_waiting} requests are waiting already; try again later")
            self._waiting.append(request)
            self._changed.notify()

    def take(self, limit: Callable[[Hashable], int], max_wait: float) -> list[Waiting] | None:
        """The request that came first, with others of its key, wherever they stand: they delay nobody who came before.

        Waits until there is one. If nothing else is to be done, also for more of the key, until the first has waited
        for `max_wait` seconds. As each turn is that of whoever has waited longest, no key can keep another one waiting.

        Args:
            limit: how many of a key are taken at once.

        Returns:
            Requests whose futures are running and can no longer be cancelled; None: closed, and nobody waits.
        """
        with self._changed:
            while True:
                self._forget_cancelled()
                if not self._waiting:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                first, most = self._waiting[0], limit(self._waiting[0].key)
                same = [request for request in self._waiting if request.key == first.key][:most]
                patience = first.arrived + max_wait - time.monotonic()
                if len(same) == len(self._waiting) < most and patience > 0 and not self._closed:
                    self._changed.wait(patience)
                    continue
                taken = set(same)
                self._waiting = [request for request in self._waiting if request not in taken]
                started = [request for request in same if request.future.set_running_or_notify_cancel()]
                if started:
                    return started

    def close(self, cancel: bool) -> None:
        """Let nobody in any more. Those who wait are still taken, unless they are cancelled."""
        with self._changed:
            self._closed = True
            cancelled, self._waiting = (self._waiting, []) if cancel else ([], self._waiting)
            self._changed.notify_all()
        for request in cancelled:
            request.future.cancel()
            request.future.set_running_or_notify_cancel()  # tells those who wait for the first of several futures

    def _forget_cancelled(self) -> None:
        gone = [request for request in self._waiting if request.future.cancelled()]
        if gone:
            self._waiting = [request for request in self._waiting if request not in gone]
        for request in gone:
            request.future.set_running_or_notify_cancel()
