"""Latency: what is timed, and what is made of the times."""

import functools
import time

import pytest
import torch

from diffusers_wadi import WaDiPipeline
from diffusers_wadi.evaluation import latency as latency_module
from diffusers_wadi.evaluation import measure_latency
from diffusers_wadi.evaluation.latency import BatchLatency, Latency, device_name


@pytest.fixture
def pipe(components):
    pipe = WaDiPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_whole_calls_are_timed_after_the_warm_up(pipe, monkeypatch):
    calls, stages = [], []
    draw = WaDiPipeline.__call__

    @functools.wraps(draw)
    def call(self, prompt, **options):
        calls.append(prompt)
        time.sleep(0.2 if len(calls) in (1, 2, 4) else 0.0)  # the two to warm up, and one that counts
        return draw(self, prompt, **options)

    monkeypatch.setattr(WaDiPipeline, "__call__", call)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae.decoder):
        part.register_forward_hook(lambda module, *_: stages.append(type(module).__name__))
    found = measure_latency(pipe, ["red", "blue", "red"], 1, 1.0, batch_sizes=[2], warmup=2, repeats=3)
    assert calls == [["red", "blue"], ["red", "red"], ["blue", "red"], ["red", "blue"], ["red", "red"]]
    assert stages == ["CLIPTextModel", "UNet2DConditionModel", "Decoder"] * 5
    (batch,) = found.batches
    assert len(batch.seconds) == 3 and batch.seconds[1] > 0.2 > batch.median > 0
    assert found.dtype == "float32" and "thread" in found.device


def test_the_device_is_waited_for_on_both_sides(pipe, monkeypatch):
    """What a call started on a GPU is part of its time; here the wait stands for it."""
    waits = []
    monkeypatch.setattr(latency_module, "_wait_for", lambda device: waits.append(device) or time.sleep(0.05))
    (batch,) = measure_latency(pipe, ["red"], 1, 1.0, warmup=0, repeats=2).batches
    assert waits == [torch.device("cpu")] * 4 and min(batch.seconds) > 0.05


def test_median_and_quartiles():
    batch = BatchLatency(4, (0.5, 0.1, 0.2, 0.4, 0.3))
    assert batch.median == 0.3 and batch.quartiles == (0.2, 0.4) and batch.images_per_second == pytest.approx(4 / 0.3)
    found = Latency("a device", "float16", (batch,)).as_dict()
    assert found == {
        "device": "a device",
        "dtype": "float16",
        "batches": {
            "4": {
                "median_s": 0.3,
                "q1_s": 0.2,
                "q3_s": 0.4,
                "images_per_s": pytest.approx(13.33, abs=0.01),
                "calls": 5,
            }
        },
    }
    assert Latency("a device", "float16", (batch,)).lines() == [
        "batch 4: 0.3000 s (quartiles 0.2000 to 0.4000 of 5 calls), 13.33 images/s"
    ]


def test_the_device_is_named():
    assert device_name("cpu").endswith("thread" if torch.get_num_threads() == 1 else "threads")
    assert device_name("meta") == "meta"


@pytest.mark.parametrize(
    "wrong", [{"prompts": []}, {"batch_sizes": []}, {"batch_sizes": [1, 0]}, {"warmup": -1}, {"repeats": 1}]
)
def test_numbers_that_are_too_small(pipe, wrong):
    with pytest.raises(ValueError, match="latency takes at least"):
        measure_latency(pipe, **{"prompts": ["red"], "num_inference_steps": 1, "guidance_scale": 1.0} | wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(pipe):
    found = measure_latency(pipe.to("cuda"), ["red"], 1, 1.0, repeats=3)
    assert found.device == torch.cuda.get_device_name() and found.batches[0].median > 0
