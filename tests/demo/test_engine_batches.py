"""Requests of many people at once: plain ones are drawn together, and nobody notices."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import add_random_adapter

from diffusers_wadi import WaDiPipeline
from diffusers_wadi.demo.engine import Engine
from diffusers_wadi.lorad.layer import LoRaDLayer

PATIENCE = 30  # seconds after which a test that hangs fails


def pixels(drawing):
    return np.asarray(drawing.image, dtype=int)


@pytest.fixture
def engine(components):
    add_random_adapter(components["unet"])
    # So that the images of two prompts differ by far more than rounding.
    components["text_encoder"].final_layer_norm.weight.data.mul_(20)
    made = Engine(WaDiPipeline(**components), "tiny", max_batch=8)
    yield made
    made.close()


@contextmanager
def busy(engine, waiting):
    """Nothing is drawn inside the block, which ends when so many wait."""
    go = threading.Event()
    engine._batcher.run(go.wait, PATIENCE)
    try:
        yield
        end = time.monotonic() + PATIENCE
        while engine._batcher.statistics().waiting < waiting:
            assert time.monotonic() < end
            time.sleep(0.001)
    finally:
        go.set()


def test_plain_requests_make_one_batch_and_each_gets_its_own(engine):
    asked = [("red", 3, 2), ("blue", 3, 1), ("a red", 5, 3)]
    alone = [engine.draw(*request) for request in asked]
    before = engine._batcher.statistics().batch_sizes
    with ThreadPoolExecutor(3) as people:
        with busy(engine, waiting=6):
            answers = [people.submit(engine.draw, *request) for request in asked]
        together = [answer.result(PATIENCE) for answer in answers]
    after = engine._batcher.statistics().batch_sizes
    assert after == before | {6: 1}
    for (prompt, seed, count), mine, expected in zip(asked, together, alone):
        assert [drawing.notes["seed"] for drawing in mine] == [str(seed + i) for i in range(count)]
        assert all(drawing.notes["prompt"] == prompt and drawing.notes["size"] == "64x64" for drawing in mine)
        assert all(np.abs(pixels(one) - pixels(other)).max() <= 1 for one, other in zip(mine, expected))
    assert len({drawing.seconds for answer in together for drawing in answer}) == 1  # each its share
    assert np.abs(pixels(together[0][0]) - pixels(together[1][0])).max() > 5


def test_what_switches_the_adapter_has_its_turn_between_them(engine):
    plain, turned = engine.draw("red", 3), engine.draw_at("red", 3, [0.3])
    with ThreadPoolExecutor(3) as people:
        with busy(engine, waiting=3):
            answers = [
                people.submit(engine.draw, "red", 3),
                people.submit(engine.draw_at, "red", 3, [0.3]),
                people.submit(engine.draw, "red", 3),
            ]
        first, strength, second = [answer.result(PATIENCE)[0] for answer in answers]
    assert np.array_equal(pixels(strength), pixels(turned[0]))
    assert all(np.abs(pixels(one) - pixels(plain[0])).max() <= 1 for one in (first, second))
    assert np.abs(pixels(strength) - pixels(plain[0])).max() > 1
    layers = [module for module in engine.denoiser.modules() if isinstance(module, LoRaDLayer)]
    assert layers and {scale for layer in layers for scale in layer.scaling.values()} == {1.0}


def test_the_error_of_one_is_not_that_of_the_others(engine, monkeypatch):
    draw = WaDiPipeline.__call__

    def call(self, prompt, **options):
        if "bad" in prompt:
            raise ValueError("no such thing")
        return draw(self, prompt, **options)

    alone = engine.draw("red", 3)
    monkeypatch.setattr(WaDiPipeline, "__call__", call)
    with ThreadPoolExecutor(3) as people:
        with busy(engine, waiting=5):
            answers = [people.submit(engine.draw, prompt, 3, 2) for prompt in ("red", "bad")]
            answers.append(people.submit(engine.draw, "blue", 3))
        with pytest.raises(ValueError, match="no such thing"):
            answers[1].result(PATIENCE)
        assert np.array_equal(pixels(answers[0].result(PATIENCE)[0]), pixels(alone[0]))
        assert answers[2].result(PATIENCE)[0].notes["prompt"] == "blue"


def test_it_ends_when_it_is_closed_or_forgotten(components):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("image-batcher")]

    before = threads()
    engines = [Engine(WaDiPipeline(**components), "tiny") for _ in range(2)]
    assert all(engine.draw("red", 0) for engine in engines)
    mine = [thread for thread in threads() if thread not in before]
    assert len(mine) >= 2
    engines[0].close()
    with pytest.raises(RuntimeError, match="closed"):
        engines[0].draw("red", 0)
    engines.clear()
    for thread in mine:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in mine)
