"""`ImageBatcher`: a pipeline that takes single requests from any number of threads and draws them in batches."""

from __future__ import annotations

import asyncio
import inspect
import operator
import os
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

from diffusers_wadi.serving.statistics import BatcherStatistics
from diffusers_wadi.serving.waiting import Alone, Waiting, WaitingRoom
from diffusers_wadi.serving.worker import ImageFuture, ImageRequest, Worker

__all__ = ["ImageBatcher", "ImageFuture"]

OF_EACH_IMAGE = ("negative_prompt", "image")  # may differ within a batch; the pipeline takes a list of them
OWN = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt")
LOWEST_SEED, HIGHEST_SEED = -(2**63), 2**64 - 1  # what torch.Generator takes


class ImageBatcher:
    """Draws the requests of any number of threads, or of asyncio, in batches of one text-to-image pipeline.

    One thread owns the pipeline. It takes the request that has waited longest with others of equal settings; a second
    one waits for the pixels and makes PIL images of them, while the first enqueues the next batch. Threads start with
    the first request and end with `close`, with this object or with the process, whichever is first.

    Every image has a generator of its own on the CPU, seeded with its seed, so it does not depend on what else is in its
    batch, but for the last bits: kernels may round differently at another batch size, which moves a pixel by 1 of 255
    now and then.

    A batch that fails is drawn again one by one, so that an error reaches its own request alone; one that runs out of
    memory is halved, and later batches of these settings stay as small.

    Args:
        pipe: a diffusers text-to-image pipeline with or without ControlNet, on its device. As long as this object is
            open it is to be used by `run` alone.
        max_batch_size: images at once. Default 8.
        max_wait: seconds that a request may wait for others of its settings while nothing else is to be drawn. Default
            0: takes what is there; batches then form while the batch before is drawn.
        max_waiting: requests that may wait; further ones are refused. Default 1024; None: any number.

    Raises:
        ValueError: a number that is too small.

    Examples:
        ::

            with ImageBatcher(pipe) as batcher:
                futures = [batcher.submit("a red heart on a white background", seed) for seed in range(20)]
                images = [future.result() for future in futures]
    """

    def __init__(
        self, pipe: Any, max_batch_size: int = 8, max_wait: float = 0.0, max_waiting: int | None = 1024
    ) -> None:
        if max_batch_size < 1 or max_wait < 0 or (max_waiting is not None and max_waiting < 1):
            raise ValueError(
                f"max_batch_size={max_batch_size}, max_wait={max_wait}, max_waiting={max_waiting}; expected at least 1, "
                "0 seconds, and 1 or None"
            )
        self.pipe = pipe
        self._known = inspect.signature(type(pipe).__call__).parameters
        self._limits = (max_batch_size, max_wait, max_waiting)
        self._worker = self._new_worker()

    def submit(self, prompt: str, seed: int, **settings: Any) -> ImageFuture:
        """Ask for one image.

        Args:
            prompt: text.
            seed: of its noise, -2^63 to 2^64 - 1.
            **settings: further arguments of the pipeline's call, such as `height` and `width`; what is left out has the
                pipeline's default. Requests with equal ones are drawn together; `negative_prompt`, and `image` of one
                size (of a ControlNet), may differ.

        Returns:
            A future of a PIL image. `cancel()` takes the request back as long as it waits. When it is done `batch_size`
            says with how many others it was drawn, and `seconds` its share of that time. A callback of it must not wait
            for another one.

        Raises:
            TypeError: an argument that the pipeline does not have, that the batcher sets, or that cannot be shared; a prompt
                that is no text, a seed that is no whole number.
            ValueError: a seed out of range.
            QueueFullError: too many wait.
            RuntimeError: it is closed.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt is a {type(prompt).__name__}; expected one text, and a request for each")
        seed = operator.index(seed)
        if not LOWEST_SEED <= seed <= HIGHEST_SEED:
            raise ValueError(f"seed is {seed}; expected {LOWEST_SEED} to {HIGHEST_SEED}")
        self._refuse_unsuitable(settings)
        own = {name: settings.pop(name) for name in OF_EACH_IMAGE if settings.get(name) is not None}
        key = (_frozen(settings), tuple((name, _size(value)) for name, value in own.items()))
        future = ImageFuture()
        self._room().put(Waiting(key, future, ImageRequest(prompt, seed, own, settings)))
        return future

    async def generate(self, prompt: str, seed: int, **settings: Any) -> Any:
        """The image that `submit` promises, for `await`; the event loop goes on meanwhile. Cancelling takes it back."""
        return await asyncio.wrap_future(self.submit(prompt, seed, **settings))

    def run(self, function: Callable[..., Any], *args: Any) -> Future:
        """Call `function(*args)` in the thread that owns the pipeline, alone, when all who came before had their turn.

        For what changes the pipeline, such as the scale of an adapter, and undoes it. From the function itself, `run`
        and `submit` must not be waited for.

        Raises:
            QueueFullError, RuntimeError: as `submit`.
        """
        future: Future = Future()
        self._room().put(Waiting(Alone(), future, (function, args)))
        return future

    def statistics(self) -> BatcherStatistics:
        """What has been done since it was made, and how many wait."""
        return self._worker.tally.snapshot(len(self._worker.room))

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, and return when those that wait are drawn; with `cancel` only those begun are."""
        self._worker.stop(cancel)

    def __enter__(self) -> ImageBatcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(cancel=kind is not None)

    def _new_worker(self) -> Worker:
        max_batch_size, max_wait, max_waiting = self._limits
        worker = Worker(self.pipe, WaitingRoom(max_waiting), max_batch_size, max_wait)
        # A worker does not know of this object, so what is dropped without `close` ends when nobody waits any more.
        weakref.finalize(self, worker.room.close, False).atexit = False
        return worker

    def _room(self) -> WaitingRoom:
        """The waiting room of this process, with a thread that takes from it."""
        if self._worker.process != os.getpid():  # forked, as by ZeroGPU; the threads were left behind
            self._worker = self._new_worker()
        self._worker.start()
        return self._worker.room

    def _refuse_unsuitable(self, settings: dict[str, Any]) -> None:
        for name in settings:
            if name in OWN:
                raise TypeError(f"{name} is set by the batcher; leave it out")
            if name not in self._known or self._known[name].kind is inspect.Parameter.VAR_KEYWORD:
                raise TypeError(f"{type(self.pipe).__name__} takes no {name!r}; expected an argument of its call")


def _size(value: Any) -> tuple | None:
    """Of a picture, as PIL, NumPy or torch have it; None for what has none."""
    size = getattr(value, "shape", getattr(value, "size", None))
    return None if size is None else tuple(size)


def _frozen(value: Any, name: str = "settings") -> Hashable:
    """`value` as something that can be compared with that of another request."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, name) for item in value)
    if isinstance(value, dict):
        return frozenset((key, _frozen(item, key)) for key, item in value.items())
    raise TypeError(
        f"{name} is a {type(value).__name__}, which a batch of several requests cannot share; expected a number, a text, "
        "or lists and dicts of them. What needs the pipeline to itself goes through `run`."
    )
