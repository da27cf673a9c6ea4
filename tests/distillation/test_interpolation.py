"""Merging two students by their weights."""

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel

from diffusers_wadi.distillation.interpolation import interpolate, main


@pytest.fixture
def pair(tmp_path):
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        tiny_unet().save_pretrained(tmp_path / name)
    return tmp_path / "one", tmp_path / "other", tmp_path / "merged"


def weights(folder) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(folder).state_dict()


def test_interpolated_weights_load_as_a_unet(pair):
    one, other, merged = pair
    main([*map(str, pair), "--weight", "0.25"])
    a, b, c = weights(one), weights(other), weights(merged)
    assert all(torch.allclose(c[name], 0.75 * a[name] + 0.25 * b[name], atol=1e-6) for name in a)
    assert not torch.allclose(a["conv_in.weight"], b["conv_in.weight"])


def test_ends_are_the_students_themselves(pair):
    one, other, merged = pair
    for weight, expected in ((0.0, one), (1.0, other)):
        same = weights(interpolate(one, other, merged, weight))
        assert all(torch.equal(same[name], value) for name, value in weights(expected).items())


def test_what_does_not_fit_is_refused(pair, tmp_path):
    one, _, merged = pair
    tiny_unet(width=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="differ in names or shapes, first .*teacher"):
        interpolate(one, tmp_path / "wide", merged)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        interpolate(one, tmp_path / "nowhere", merged)
    assert not merged.exists()
