"""Which requests are drawn together, in which order, and what becomes of errors: with a pipeline that tests hold back."""

import asyncio
import gc
import logging
import multiprocessing
import os
import threading
import time
import weakref
from concurrent.futures import Future

import pytest
import torch
from fake_pipeline import PATIENCE, FakePipeline, shows
from PIL import Image

from diffusers_wadi.serving import ImageBatcher, QueueFullError, pixels, worker
from diffusers_wadi.serving.waiting import Waiting, WaitingRoom

FOREVER = 10_000.0


def batcher_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("image-batcher")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    others = set(batcher_threads())  # an engine that tests of the demo share, in the same process
    yield
    for thread in own_threads(others):
        thread.join(PATIENCE)
    assert not own_threads(others)


def own_threads(others):
    return [thread for thread in batcher_threads() if thread not in others]


def result(future):
    return future.result(PATIENCE)


def held(**options):
    """(pipeline, batcher) whose first request, "p0", is being drawn until `pipe.go` is set."""
    pipe = FakePipeline(held=True)
    batcher = ImageBatcher(pipe, **options)
    first = batcher.submit("p0", 0)
    assert pipe.entered.wait(PATIENCE) and first.running()
    return pipe, batcher


def let_go(pipe, batcher):
    """The calls after the first one, when everything is done."""
    pipe.go.set()
    batcher.close()
    return pipe.calls[1:]


def test_each_gets_its_own():
    pipe, batcher = held()
    futures = {(f"p{i}", 3 * i): batcher.submit(f"p{i}", 3 * i) for i in range(1, 20)}
    assert [len(call) for call in let_go(pipe, batcher)] == [8, 8, 3]
    for (prompt, seed), future in futures.items():
        assert shows(result(future), prompt, seed)
    assert future.batch_size == 3 and future.seconds > 0
    assert len(pipe.threads) == 1


def test_equal_settings_are_drawn_together_and_none_has_to_wait_for_ever():
    pipe, batcher = held(max_batch_size=2)
    settings = {"a": {}, "b": {"height": 16, "width": 8}, "c": {"width": 8, "height": 16}}
    futures = [batcher.submit(name, 0, **settings[name[0]]) for name in ("a1", "b1", "a2", "a3", "c1", "a4", "a5")]
    assert let_go(pipe, batcher) == [["a1", "a2"], ["b1", "c1"], ["a3", "a4"], ["a5"]]
    assert [result(future).size for future in futures] == [(8, 8), (8, 16), (8, 8), (8, 8), (8, 16), (8, 8), (8, 8)]


def test_what_may_differ_within_a_batch():
    pipe, batcher = held()
    small, large = Image.new("RGB", (8, 8)), Image.new("RGB", (16, 16))
    negative = [batcher.submit("p1", seed, negative_prompt=f"n{seed}") for seed in (4, 5)]
    batcher.submit("p2", 0, negative_prompt=None)
    for image in (small, large, small.copy()):
        batcher.submit("p3", 0, image=image)
    assert let_go(pipe, batcher) == [["p1", "p1"], ["p2"], ["p3", "p3"], ["p3"]]
    assert [result(future).getpixel((0, 0))[0] for future in negative] == [4, 5]


def test_a_job_has_the_pipeline_to_itself_in_its_turn():
    pipe, batcher = held()
    batcher.submit("a1", 0)
    done = [batcher.run(lambda: (len(pipe.calls), threading.current_thread())), batcher.run(max, 1, 2)]
    failed = batcher.run(lambda: 1 / 0)
    batcher.submit("b1", 0, height=16)
    batcher.submit("a2", 0)
    assert let_go(pipe, batcher) == [["a1", "a2"], ["b1"]]
    assert result(done[0]) == (2, *pipe.threads) and result(done[1]) == 2
    with pytest.raises(ZeroDivisionError):
        result(failed)


def test_max_wait_ends_when_the_batch_is_full_or_others_come_or_it_is_over():
    pipe = FakePipeline()
    with ImageBatcher(pipe, max_batch_size=3, max_wait=FOREVER) as batcher:
        full = [batcher.submit("a", seed) for seed in range(3)]
        assert [result(future).size for future in full] == [(8, 8)] * 3 and pipe.calls == [["a"] * 3]
        first = batcher.submit("a", 0)
        other = batcher.submit("b", 0, height=16)
        assert result(first) and pipe.calls[1:] == [["a"]] and not other.done()
    assert result(other).size == (8, 16)
    with ImageBatcher(pipe, max_wait=0.05) as batcher:
        assert shows(result(batcher.submit("p7", 1)), "p7", 1)


def test_as_many_wait_as_may():
    pipe, batcher = held(max_waiting=3)
    futures = [batcher.submit("p1", seed) for seed in range(3)]
    with pytest.raises(QueueFullError, match="max_waiting=3 requests are waiting already; try again later"):
        batcher.submit("p1", 3)
    with pytest.raises(QueueFullError):
        batcher.run(print)
    assert futures[1].cancel()
    again = batcher.submit("p1", 3)
    assert let_go(pipe, batcher) == [["p1"] * 3] and shows(result(again), "p1", 3)


def test_only_what_waits_can_be_cancelled():
    pipe, batcher = held(max_batch_size=2)
    futures = [batcher.submit(f"p{i}", 0) for i in range(1, 5)]
    assert futures[0].cancel() and futures[2].cancel()
    assert let_go(pipe, batcher) == [["p2", "p4"]]
    assert shows(result(futures[1]), "p2", 0) and not futures[1].cancel()
    assert batcher.statistics().images == 3


def test_one_may_be_cancelled_at_the_last_moment():
    room, futures = WaitingRoom(None), [Future() for _ in range(2)]
    for future in futures:
        room.put(Waiting("key", future, None))
    taken = room.take(lambda key: 8 * futures[0].cancel(), 0)
    assert [request.future for request in taken] == futures[1:]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_error_reaches_its_own_request_alone(error):
    pipe, batcher = held()

    def fail(prompts):
        if "bad" in prompts:
            raise error("too long")

    pipe.fail = fail
    futures = [batcher.submit(prompt, 0) for prompt in ("p1", "bad", "p2")]
    assert let_go(pipe, batcher) == [["p1", "bad", "p2"], ["p1"], ["bad"], ["p2"]]
    assert shows(result(futures[0]), "p1", 0) and shows(result(futures[2]), "p2", 0)
    with pytest.raises(error, match="too long"):
        result(futures[1])
    assert batcher.statistics().failed == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), MemoryError(), RuntimeError("can't allocate memory: you tried")]
)
def test_out_of_memory_halves_the_batch_and_is_remembered(error, monkeypatch):
    said = []
    monkeypatch.setattr(worker, "_logger", logging.getLogger("serving-test"))
    monkeypatch.setattr(worker._logger, "warning", said.append)
    pipe, batcher = held()

    def fail(prompts):
        if len(prompts) > 2:
            raise error

    pipe.fail = fail
    futures = [batcher.submit("a", seed) for seed in range(12)]
    others = [batcher.submit("b", seed, height=16) for seed in range(4)]
    sizes = [len(call) for call in let_go(pipe, batcher)]
    assert sizes == [8, 4, 2, 2, 4, 2, 2] + [2, 2] + [4, 2, 2]
    assert all(shows(result(future), "a", seed) for seed, future in enumerate(futures))
    assert [result(future).size for future in others] == [(8, 16)] * 4
    assert said[0] == "8 images at once ran out of memory; from now on at most 4 of these settings"


def test_one_image_that_is_too_large_is_an_error():
    pipe = FakePipeline()
    pipe.fail = lambda prompts: torch.empty(10**15)
    with ImageBatcher(pipe) as batcher, pytest.raises(RuntimeError, match="can't allocate memory"):
        result(batcher.submit("p1", 0))


def test_the_next_batch_is_enqueued_while_the_device_computes_and_not_the_one_after(monkeypatch):
    started, ready = [threading.Semaphore(0) for _ in range(2)]

    class Event:
        def synchronize(self):
            assert ready.acquire(timeout=PATIENCE)

    def start(*args):
        drawn = pixels.start_drawing(*args)
        started.release()
        return pixels.PendingImages(drawn.pixels, drawn.finite, Event())

    monkeypatch.setattr(worker, "start_drawing", start)
    pipe = FakePipeline()
    batcher = ImageBatcher(pipe, max_batch_size=1)
    futures = [batcher.submit(f"p{i}", i) for i in range(4)]
    for _ in range(worker.IN_FLIGHT):
        assert started.acquire(timeout=PATIENCE)
    assert not started.acquire(timeout=0.05) and not any(future.done() for future in futures)
    ready.release()
    assert started.acquire(timeout=PATIENCE)
    for _ in range(3):
        ready.release()
    batcher.close()
    assert all(shows(result(future), f"p{i}", i) for i, future in enumerate(futures))


def test_an_error_of_the_device_reaches_the_whole_batch(monkeypatch):
    def start(*args):
        return pixels.PendingImages(*[None] * 2, 0)  # of which 0.synchronize() is an AttributeError

    monkeypatch.setattr(worker, "start_drawing", start)
    with ImageBatcher(FakePipeline(), max_batch_size=2, max_wait=FOREVER) as batcher:
        futures = [batcher.submit("p1", seed) for seed in range(6)]
        assert all(isinstance(future.exception(PATIENCE), AttributeError) for future in futures)


def test_closing_draws_what_waits_or_cancels_it():
    pipe, batcher = held()
    waiting = batcher.submit("p1", 0)
    threading.Timer(0, pipe.go.set).start()
    batcher.close()
    assert shows(waiting.result(0), "p1", 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed and takes no more requests"):
            batcher.submit("p1", 0)
        batcher.close()
    pipe, batcher = held()
    with pytest.raises(KeyError), batcher:
        waiting = batcher.submit("p1", 0)
        threading.Timer(0.05, pipe.go.set).start()
        raise KeyError
    assert waiting.cancelled() and pipe.calls == [["p0"]]


def test_one_that_is_dropped_draws_what_waits_and_ends():
    pipe, batcher = held()
    futures = [batcher.submit("p1", 1), batcher.submit("p2", 2, height=16)]
    del batcher
    pipe.go.set()
    assert shows(result(futures[0]), "p1", 1) and result(futures[1]).size == (8, 16)


def test_a_callback_may_ask_again_and_close():
    pipe = FakePipeline()
    batcher, futures, done = ImageBatcher(pipe), [], threading.Event()

    def again(_):
        futures.append(batcher.submit("p2", 2))
        batcher.close()
        done.set()

    batcher.submit("p1", 1).add_done_callback(again)
    assert done.wait(PATIENCE) and shows(result(futures[0]), "p2", 2)


def test_from_many_threads():
    pipe, answers = FakePipeline(), []
    with ImageBatcher(pipe, max_batch_size=4) as batcher:

        def ask(client):
            for i in range(10):
                prompt, seed = f"p{client}", 100 * client + i
                answers.append(
                    shows(batcher.submit(prompt, seed, height=8 * (1 + i % 2)).result(PATIENCE), prompt, seed)
                )

        threads = [threading.Thread(target=ask, args=(client,)) for client in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [True] * 80
    statistics = batcher.statistics()
    assert statistics.images == 80 == sum(size * count for size, count in statistics.batch_sizes.items())


def test_from_asyncio():
    pipe, batcher = held()

    async def ask():
        tasks = [asyncio.create_task(batcher.generate(f"p{i}", i)) for i in range(1, 7)]
        await asyncio.sleep(0)
        assert batcher.statistics().waiting == 6
        tasks[2].cancel()
        await asyncio.sleep(0)
        pipe.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    images = asyncio.run(ask())
    assert isinstance(images.pop(2), asyncio.CancelledError)
    assert all(shows(image, f"p{i}", i) for image, i in zip(images, (1, 2, 4, 5, 6)))
    assert let_go(pipe, batcher) == [["p1", "p2", "p4", "p5", "p6"]]


def test_statistics():
    pipe, batcher = held()
    batcher.submit("p1", 0)
    time.sleep(0.01)
    now = batcher.statistics()
    assert (now.images, now.waiting, now.images_per_second, now.mean_batch_size) == (0, 1, 0, 0)
    for seed in range(4):
        batcher.submit("p1", seed)
    let_go(pipe, batcher)
    then = batcher.statistics()
    assert (then.images, then.failed, then.waiting, then.batch_sizes) == (6, 0, 0, {1: 1, 5: 1})
    assert 0.01 <= then.longest_wait and 0 < then.mean_wait < then.longest_wait and then.mean_batch_size == 3
    assert 0.01 < then.busy_seconds < PATIENCE and then.images_per_second == 6 / then.busy_seconds


@pytest.mark.parametrize(
    "arguments, settings, error, message",
    [
        ((["a", "b"], 0), {}, TypeError, "prompt is a list; expected one text"),
        (("a", 0.5), {}, TypeError, "float"),
        (("a", 2**64), {}, ValueError, "seed is 18446744073709551616; expected -9223372036854775808 to"),
        (("a", 0), {"heigth": 8}, TypeError, "FakePipeline takes no 'heigth'"),
        (("a", 0), {"kwargs": 8}, TypeError, "takes no 'kwargs'"),
        (("a", 0), {"generator": None}, TypeError, "generator is set by the batcher; leave it out"),
        (
            ("a", 0),
            {"height": torch.ones(1)},
            TypeError,
            "height is a Tensor, which a batch of several requests cannot",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_refused_at_once(arguments, settings, error, message):
    with ImageBatcher(FakePipeline()) as batcher, pytest.raises(error, match=message):
        batcher.submit(*arguments, **settings)


@pytest.mark.parametrize("options", [{"max_batch_size": 0}, {"max_wait": -1}, {"max_waiting": 0}])
def test_numbers_that_cannot_be(options):
    with pytest.raises(ValueError, match="expected at least 1, 0 seconds, and 1 or None"):
        ImageBatcher(FakePipeline(), **options)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ZeroGPU forks, which this system does not")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("used", [False, True])
def test_a_forked_process_has_threads_of_its_own(used):
    """As on ZeroGPU, where requests run in processes that are forked from the one that loaded the model."""
    pipe = FakePipeline()
    batcher = ImageBatcher(pipe)
    if used:
        result(batcher.submit("p1", 1))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def child():
        images = [batcher.submit(f"p{i}", i) for i in range(3)]
        answers.put([shows(result(future), f"p{i}", i) for i, future in enumerate(images)])
        batcher.close()

    process = context.Process(target=child, daemon=True)
    process.start()
    assert answers.get(timeout=PATIENCE) == [True] * 3
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert shows(result(batcher.submit("p9", 9)), "p9", 9)
    batcher.close()


def test_fewer_images_than_prompts_reach_everybody_as_an_error():
    pipe, batcher = held()
    futures = [batcher.submit(f"p{i}", i) for i in (1, 2)]
    real = pipe.__class__.__call__

    def one_less(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        found.images = found.images[:-1]
        return found

    pipe.__class__ = type("OneLess", (FakePipeline,), {"__call__": one_less})
    let_go(pipe, batcher)
    for future in futures:
        with pytest.raises(RuntimeError, match="1 images for 2 prompts"):
            result(future)


def leave(_):
    raise SystemExit(1)


def test_a_callback_that_leaves_takes_nobody_with_it(caplog):
    pipe, batcher = held()
    futures = [batcher.submit(f"p{i}", i) for i in (1, 2)]
    futures[0].add_done_callback(leave)
    job = batcher.run(lambda: "done")
    job.add_done_callback(leave)
    last = batcher.submit("p3", 3)
    let_go(pipe, batcher)
    assert shows(result(futures[1]), "p2", 2) and result(job) == "done" and shows(result(last), "p3", 3)


def test_an_error_keeps_nothing_of_the_attempt_alive():
    class Large:
        pass

    seen = []

    def fail(prompts):
        computed = Large()
        seen.append(weakref.ref(computed))
        raise ValueError("no")

    pipe = FakePipeline()
    pipe.fail = fail
    gc.disable()
    try:
        with ImageBatcher(pipe) as batcher:
            futures = [batcher.submit("p1", 1), batcher.run(fail, ["p2"])]
            assert all("no" in str(future.exception(PATIENCE)) for future in futures)
        assert len(seen) == 2 and not any(reference() for reference in seen)
    finally:
        gc.enable()


def test_what_nobody_can_join_does_not_wait():
    pipe = FakePipeline()
    with ImageBatcher(pipe, max_wait=FOREVER) as batcher:
        assert result(batcher.run(lambda: 1)) == 1


def test_tensors_of_one_size_are_drawn_together():
    pipe, batcher = held()
    futures = [batcher.submit(f"p{i}", i, image=torch.zeros(3, 8, 8)) for i in (1, 2)]
    other = batcher.submit("p3", 3, image=torch.zeros(3, 8, 16))
    assert [len(call) for call in let_go(pipe, batcher)] == [2, 1]
    assert all(result(future) for future in (*futures, other))
