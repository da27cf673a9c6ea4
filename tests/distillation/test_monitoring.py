"""What is logged: means without waiting, angles, trackers by name."""

import math

import pytest
import torch
from accelerate import Accelerator
from conftest import TARGETS, add_random_adapter, tiny_unet

from diffusers_wadi.distillation.monitoring import Averages, angle_statistics, tracker_names


def test_means_since_the_last_look():
    accelerator, averages = Accelerator(cpu=True), Averages()
    for value in (1.0, 3.0, math.nan, math.inf):
        averages.add({"loss": torch.tensor(value), "broken": torch.tensor(math.nan)})
    averages.add({"other": torch.tensor(5.0)})  # another phase of the run
    means = averages.take(accelerator)
    assert means.pop("broken") != means.get("loss")  # nan
    assert means == {"loss": 2.0, "other": 5.0}
    averages.add({"loss": torch.tensor(7.0)})
    assert averages.take(accelerator) == {"loss": 7.0}
    assert averages.take(accelerator) == {}


def test_angles_of_all_layers_or_of_some():
    unet = add_random_adapter(tiny_unet(), size=3.0)
    angles = [m.get_angles(["student"]).flatten() for m in unet.modules() if hasattr(m, "lorad_A")]
    everything = torch.cat(angles).abs()
    found = angle_statistics(unet, "student", layers=1000)
    assert found["angle"] == pytest.approx(everything.mean().item(), rel=1e-5)
    assert found["beyond_right_angle"] == pytest.approx((everything > math.pi / 2).float().mean().item(), rel=1e-5)
    assert 0 < found["beyond_right_angle"] < 1
    some = angle_statistics(unet, "student", layers=2)
    chosen = torch.cat([angles[0], angles[len(angles) // 2]]).abs()
    assert some["angle"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert angle_statistics(unet, "fake") == {} and angle_statistics(tiny_unet(), "student") == {}
    assert len(angles) > 2 and len(TARGETS) > 2


def test_several_trackers():
    pytest.importorskip("tensorboard")
    assert tracker_names("none") == [] and tracker_names("tensorboard") == ["tensorboard"]
    assert tracker_names("all, tensorboard") == ["all", "tensorboard"]
    with pytest.raises(ValueError, match="names 'nosuch', expected none, all or some of .*tensorboard.*wandb"):
        tracker_names("tensorboard,nosuch")
