"""`benchmarks/drawing.py`: the same noise whatever the batches, and the adapter on or off for every kind of pipeline."""

import sys
from pathlib import Path

import numpy as np
import pytest

from diffusers_wadi import bundled_checkpoint, one_step_pipeline_class

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from drawing import draw, seconds_per_image

sys.path.pop(0)

CAPTIONS = [
    "a red heart on a white background",
    "a blue ring on a black background",
    "a green star on a gray background",
]
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.mark.parametrize("backbone", ["stable-diffusion", "pixart"])
def test_batches_do_not_matter_and_the_adapter_does(backbone):
    model = bundled_checkpoint(backbone)
    pipe = one_step_pipeline_class(model).from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    at_once = draw(pipe, CAPTIONS, adapter=True, **ONE_STEP).astype(int)
    in_parts = draw(pipe, CAPTIONS, adapter=True, batch_size=2, **ONE_STEP)
    last = draw(pipe, CAPTIONS[2:], adapter=True, first_seed=2, **ONE_STEP)
    assert np.abs(at_once - in_parts).max() <= 1 and np.abs(at_once[2:] - last).max() <= 1
    off = draw(pipe, CAPTIONS, adapter=False, **ONE_STEP)
    assert all(np.abs(at_once - off).max(axis=(1, 2, 3)) > 20)
    again = draw(pipe, CAPTIONS, adapter=True, **ONE_STEP)
    assert np.abs(at_once - again).max() <= 1


def test_the_warm_up_is_not_counted():
    calls = []
    assert seconds_per_image(lambda: calls.append(1), rounds=3) < 1 and len(calls) == 4
