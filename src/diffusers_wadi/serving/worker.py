"""The threads behind `ImageBatcher`: one that owns the pipeline, and others that make images of its pixels."""

from __future__ import annotations

import atexit
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image

from diffusers_wadi.serving.pixels import PendingImages, start_drawing
from diffusers_wadi.serving.statistics import Tally
from diffusers_wadi.serving.waiting import Alone, Waiting, WaitingRoom

__all__ = ["ImageFuture", "ImageRequest", "Worker"]

NAME = "image-batcher"
IN_FLIGHT = 2  # batches whose pixels are not all images yet: one on the device, one behind it
FINISHERS = 2  # threads that make images
_logger = logging.get_logger(__name__)
_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    # A thread that was still in the middle of a batch when the interpreter is taken down would crash the process.
    for worker in list(_workers):
        worker.stop(cancel=True)


class ImageFuture(Future):
    """Future of a PIL image.

    Attributes:
        seconds: its share of the time in which its batch was drawn; None before.
        batch_size: images in that batch; None before.
    """

    seconds: float | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class ImageRequest:
    """Content of one `Waiting`: what differs within a batch (`own`: arguments by name), and what does not (`shared`)."""

    prompt: str
    seed: int
    own: dict[str, Any]
    shared: dict[str, Any]


class Worker:
    """Takes from the room what can be drawn together and draws it, until the room is closed and empty."""

    def __init__(self, pipe: Any, room: WaitingRoom, max_batch_size: int, max_wait: float) -> None:
        self.room = room
        self.tally = Tally()
        self.process = os.getpid()
        self._pipe = pipe
        self._max_batch_size, self._max_wait = max_batch_size, max_wait
        self._smaller: dict[Hashable, int] = {}  # by settings, of which larger batches ran out of memory
        self._in_flight = threading.BoundedSemaphore(IN_FLIGHT)
        self._finishers = ThreadPoolExecutor(FINISHERS, f"{NAME}-pixels")
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def start(self) -> None:
        """Start the thread that owns the pipeline, at the first call."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=NAME, daemon=True)
                self._thread.start()
                _workers.add(self)

    def stop(self, cancel: bool) -> None:
        """Close the room; returns when the threads have ended, unless it is one of them that asks."""
        if self.process != os.getpid():  # the threads are those of the process that this one was forked from
            return
        self.room.close(cancel)
        if self._thread is not None and not threading.current_thread().name.startswith(NAME):
            self._thread.join()

    def _work(self) -> None:
        while (taken := self.room.take(self._limit, self._max_wait)) is not None:
            if isinstance(taken[0].content, ImageRequest):
                started = self.tally.started([request.arrived for request in taken])
                self._draw(taken, started)
            else:
                self._run(taken[0])
            del taken  # else the last images lived until the next request
        self._finishers.shutdown()

    def _limit(self, key: Hashable) -> int:
        return 1 if isinstance(key, Alone) else self._smaller.get(key, self._max_batch_size)

    def _run(self, job: Waiting) -> None:
        function, args = job.content
        try:
            result = function(*args)
        except BaseException as error:
            _settle(job.future.set_exception, _without_frames(error))
        else:
            _settle(job.future.set_result, result)

    def _draw(self, batch: list[Waiting], started: float) -> None:
        self._in_flight.acquire()
        try:
            pending = self._enqueue(batch)
        except BaseException as error:  # whatever it is, somebody waits for it
            self._in_flight.release()
            if len(batch) == 1:
                self._fail(batch, error)
                return
            parts = self._parts(batch, error)
        else:
            self._finish_beside(batch, pending, started)
            return
        for part in parts:  # here, where the error no longer holds the memory of the attempt
            self._draw(part, started)

    def _finish_beside(self, *what: Any) -> None:
        try:
            self._finishers.submit(self._finish, *what)
        except RuntimeError:  # the interpreter is being taken down
            self._finish(*what)

    def _enqueue(self, batch: list[Waiting]) -> PendingImages:
        requests = [waiting.content for waiting in batch]
        call = dict(requests[0].shared)
        for name in requests[0].own:
            call[name] = [request.own[name] for request in requests]
        prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
        return start_drawing(self._pipe, prompts, seeds, call)

    def _parts(self, batch: list[Waiting], error: BaseException) -> list[list[Waiting]]:
        if not _is_out_of_memory(error):
            return [[request] for request in batch]
        traceback.clear_frames(error.__traceback__)  # which hold what was computed
        half = len(batch) // 2
        self._smaller[batch[0].key] = half
        _logger.warning(f"{len(batch)} images at once ran out of memory; from now on at most {half} of these settings")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [batch[first : first + half] for first in range(0, len(batch), half)]

    def _finish(self, batch: list[Waiting], pending: PendingImages, started: float) -> None:
        try:
            pixels, _ = pending.wait()
            if len(pixels) != len(batch):
                raise RuntimeError(f"the pipeline gave {len(pixels)} images for {len(batch)} prompts")
            images = [Image.fromarray(image) for image in pixels]
            seconds = self.tally.drawn(len(batch), started) / len(batch)
        except BaseException as error:
            self._fail(batch, error)
            return
        finally:
            self._in_flight.release()
        for request, image in zip(batch, images):
            request.future.seconds, request.future.batch_size = seconds, len(batch)
            _settle(request.future.set_result, image)

    def _fail(self, batch: list[Waiting], error: BaseException) -> None:
        error = _without_frames(error)
        for request in batch:
            self.tally.failure()
            _settle(request.future.set_exception, error)


def _settle(settle: Callable[[Any], None], value: Any) -> None:
    """Give a future what it promised. Its callbacks run in here, and must not end the thread that others wait for."""
    try:
        settle(value)
    except BaseException as error:  # such as SystemExit; of an Exception the future itself takes care
        _logger.error(f"a callback of a request raised {type(error).__name__}: {error}")


def _without_frames(error: BaseException) -> BaseException:
    """The error without the variables of the frames it came through: what was computed, and the futures themselves."""
    trace = error.__traceback__
    traceback.clear_frames(trace)
    return error.with_traceback(None if trace is None else trace.tb_next)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
