"""Which layers and how much: ScaleCrafter's tables by their counts, the rule by the presets it extends."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_wadi.downstream.scalecrafter import read_factors
from diffusers_wadi.downstream.scalecrafter._convolutions import spread, wideable
from diffusers_wadi.downstream.scalecrafter._presets import PRESETS, preset_settings, rule_settings

SIZES = [(1024, 1024), (1280, 1280), (1024, 2048), (2048, 2048)]  # height, width


@pytest.fixture(scope="module")
def names():
    """The widened layers of a UNet with Stable Diffusion's modules: 2 resnets a block, 4 levels."""
    with torch.device("meta"):
        return list(wideable(UNet2DConditionModel(cross_attention_dim=768)))


def test_every_3x3_convolution_but_the_first_and_last_is_there(names):
    assert len(names) == 50
    assert not {"conv_in", "conv_out"} & set(names)
    assert not [name for name in names if "shortcut" in name or "proj" in name]


@pytest.mark.parametrize("name, counts", [("sd15", [39, 39, 39, 39]), ("sd21", [39, 39, 39, 40])])
def test_the_presets_cover_the_published_number_of_layers(names, name, counts):
    assert [len(spread(names, preset_settings(name, *size).factors)) for size in SIZES] == counts


def test_the_weak_and_the_dispersed_layers_are_as_many_as_published(names):
    weak = {key: [len(spread(names, preset_settings(key, *size).weak_factors)) for size in SIZES] for key in PRESETS}
    assert weak == {"sd15": [0, 0, 27, 27], "sd21": [0, 0, 34, 34]}
    for key in PRESETS:
        assert len(spread(names, dict.fromkeys(preset_settings(key, 2048, 2048).dispersed, 1.0))) == 23


def test_factors_of_the_large_presets(names):
    sd15 = spread(names, preset_settings("sd15", 2048, 2048).factors)
    assert sd15["down_blocks.1.downsamplers.0.conv"] == sd15["up_blocks.2.upsamplers.0.conv"] == 2
    assert sd15["down_blocks.2.resnets.1.conv2"] == sd15["up_blocks.1.resnets.2.conv1"] == 3
    assert sd15["mid_block.resnets.0.conv1"] == sd15["up_blocks.0.upsamplers.0.conv"] == 4
    sd21 = spread(names, preset_settings("sd21", 2048, 2048).factors)
    assert sd21["down_blocks.2.resnets.0.conv1"] == 3 and sd21["down_blocks.2.downsamplers.0.conv"] == 4
    assert sd21["up_blocks.3.resnets.2.conv2"] == 2 and "down_blocks.1.resnets.0.conv1" not in sd21


def test_even_factors_and_how_long_they_hold(names):
    """Of 50 steps 30 and 35, and 20, 30 and 37; sizes of two by four and more come down."""
    for key, shares in (("sd15", [0.6, 0.7, 0.7, 0.7]), ("sd21", [0.4, 0.6, 0.74, 0.74])):
        settings = [preset_settings(key, *size) for size in SIZES]
        assert [each.until for each in settings] == shares
        assert [each.progressive for each in settings] == [False, False, True, True]
        assert [set(each.factors.values()) for each in settings[:2]] == [{2.0}, {2.5}]
        assert settings[2].factors == preset_settings("sd15", 2048, 2048).factors


@pytest.mark.parametrize("size", SIZES)
def test_the_rule_meets_the_presets_of_stable_diffusion_15(names, size):
    rule, preset = rule_settings(512, 4, *size), preset_settings("sd15", *size)
    assert spread(names, rule.factors) == spread(names, preset.factors)
    assert rule.source == "rule" and preset.source == "sd15"
    if size[1] == 2048:
        assert spread(names, rule.weak_factors) == spread(names, preset.weak_factors)
        assert rule.progressive and preset.progressive and rule.until == preset.until
    if size == (2048, 2048):
        assert set(rule.dispersed) == set(preset.dispersed)


def test_the_rule_between_the_presets_and_at_small_sizes():
    assert set(rule_settings(512, 4, 768, 512).factors.values()) == {1.5}
    assert rule_settings(512, 4, 2048, 1024).factors == rule_settings(512, 4, 1024, 2048).factors
    assert rule_settings(512, 4, 512, 512).factors == rule_settings(512, 4, 256, 512).factors == {}
    assert rule_settings(64, 2, 128, 128).factors == {"down_blocks.1": 2, "up_blocks.0": 2, "mid_block": 2}


def test_a_preset_without_that_size_says_which_there_are():
    with pytest.raises(ValueError, match=r"1000x1024.*1024x1024, 1280x1280, 2048x1024, 2048x2048"):
        preset_settings("sd15", 1024, 1000)
    with pytest.raises(ValueError, match="'sdxl'.*'sd15', 'sd21'"):
        preset_settings("sdxl", 1024, 1024)


def test_names_of_blocks_spread_and_the_longest_wins(names):
    factors = spread(names, {"mid_block.resnets.0.conv1": 3.0, "mid_block": 2.0})
    assert factors["mid_block.resnets.0.conv1"] == 3 and factors["mid_block.resnets.1.conv2"] == 2
    assert len(factors) == 4


def test_an_unknown_layer_is_named_with_the_nearest(names):
    with pytest.raises(ValueError, match=r"'down_block\.1'.*down_blocks\.1"):
        spread(names, {"down_block.1": 2.0})
    with pytest.raises(ValueError, match="conv_in and conv_out are never widened"):
        spread(names, {"conv_in": 2.0})


def test_files_of_factors(tmp_path, names):
    path = tmp_path / "factors.txt"
    path.write_text("down_blocks.1.resnets.0.conv1:2.0\n\nmid_block.resnets.0.conv2:2.5\n")
    assert read_factors(path) == {"down_blocks.1.resnets.0.conv1": 2.0, "mid_block.resnets.0.conv2": 2.5}
    for wrong in ("mid_block=2", "mid_block:two", ":2.0", "mid_block:0.5", "mid_block:nan"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="mid_block|line 1"):
            read_factors(path)
