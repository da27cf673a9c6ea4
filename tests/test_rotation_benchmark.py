"""`benchmarks/rotation.py`: its contenders compute the same, over the student's layers, and all of it runs."""

import argparse
import sys
from pathlib import Path

import torch

from diffusers_wadi.lorad.rotation import factor_gradients, turn_weight

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import live_bytes
import rotation

sys.path.pop(0)


def test_the_layers_are_those_of_the_student():
    shapes = rotation.layer_shapes(rotation.SIZES["sd15"]["unet"])
    assert sum(shapes.values()) == 182 and sum(256 * (out + size // 2) * n for (out, size), n in shapes.items()) == (
        83_795_968
    )


def test_all_ways_compute_the_same():
    (problem,) = rotation.problems({(48, 64): 1}, 8, torch.float32, torch.device("cpu"))[48, 64]
    turns, gradients = rotation.ways(torch.device("cpu"))
    for name in ("paper", "plain", "chunked"):
        torch.testing.assert_close(turns[name](*problem[:3]), turn_weight(*problem[:3]))
        for mine, theirs in zip(gradients[name](*problem), factor_gradients(problem[0], problem[3], *problem[1:3])):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(turns["copy"](*problem[:3]), problem[0])


def test_bytes_are_counted():
    x = torch.zeros(1000)
    with live_bytes.PeakBytes(x) as counted:
        y = x + 1
        y = y + 1
        del y
        x.view(10, 100).add_(1)
    assert counted.peak == 8000
    weight = torch.zeros(1000, requires_grad=True)
    assert live_bytes.bytes_saved(lambda: (weight * x) * x.view(1000), [weight]) == 4000


def test_everything_is_measured():
    args = argparse.Namespace(quick=True, repeats=1)
    found, table = rotation.run(args, torch.device("cpu"))
    for rows in found["rotation"].values():
        for way in (*rows["turn"].values(), *rows["gradient"].values()):
            assert way["seconds"] > 0 and len(way["extra"]) == len(way["shapes"])
        assert rows["turn"]["copy"]["extra"]["64x64"] == 0
    layers = {row["adapter"]: row for row in found["layers"]}
    assert list(layers) == ["LoRA", "DoRA", "OFT", "LoRaD"]
    assert layers["LoRaD"]["kept"] == 32 * 64 * 4 < layers["LoRA"]["kept"] < layers["DoRA"]["kept"]
    assert layers["LoRA"]["parameters"] == 8 * 128 and layers["LoRaD"]["parameters"] == 8 * (64 + 32)
    assert "| LoRaD |" in table and "chunked : plain" in table
