"""Shapes World: the judge must be right on real renders and must say no to changed ones."""

import numpy as np
import pytest

from diffusers_wadi.shapes import judge_image, parse_caption, render, render_scenes
from diffusers_wadi.shapes.scenes import change_one_attribute, training_scenes

N = 2000


@pytest.fixture(scope="module")
def scenes():
    return training_scenes(N, seed=11)


def test_real_renders_are_called_right(scenes):
    verdicts = [judge_image(image, scene.caption) for image, scene in zip(render_scenes(scenes, seed=12), scenes)]
    assert np.mean([right for verdict in verdicts for right in verdict.values()]) >= 0.99
    assert np.mean([all(verdict.values()) for verdict in verdicts]) >= 0.99


def test_a_changed_attribute_is_called_wrong(scenes):
    rng = np.random.default_rng(13)
    noticed = []
    for scene in scenes:
        changed, name = change_one_attribute(scene, rng)
        verdict = judge_image(render(changed, rng), scene.caption)
        noticed.append(not all(right for key, right in verdict.items() if key.split(".")[-1] == name))
    assert np.mean(noticed) >= 0.99


def test_only_the_changed_attribute_is_called_wrong():
    image = render(
        parse_caption("a large red heart left of a small blue ring on a gray background"), np.random.default_rng(0)
    )
    verdict = judge_image(image, "a large red heart left of a small blue star on a gray background")
    assert [name for name, right in verdict.items() if not right] == ["2.shape"]


def test_the_order_of_the_items_is_free_but_the_relation_is_not():
    image = render(parse_caption("a red heart above a blue ring on a gray background"), np.random.default_rng(0))
    assert all(judge_image(image, "a blue ring below a red heart on a gray background").values())
    verdict = judge_image(image, "a blue ring above a red heart on a gray background")
    assert [name for name, right in verdict.items() if not right] == ["relation"]


@pytest.mark.parametrize("noise", [0, 255])
def test_an_empty_or_noisy_image_shows_nothing(noise):
    image = np.random.default_rng(0).integers(0, noise + 1, (64, 64, 3)).astype(np.uint8)
    verdict = judge_image(image, "a red heart above a blue ring on a gray background")
    assert not any(verdict[name] for name in ("count", "1.shape", "2.shape", "relation", "background"))


def test_blur_and_noise_of_a_decoder_do_not_confuse_it():
    rng = np.random.default_rng(1)
    scenes = training_scenes(200, seed=2)
    rights = []
    for image, scene in zip(render_scenes(scenes, seed=3), scenes):
        x = image.astype(np.float32)
        x = (x + np.roll(x, 1, 0) + np.roll(x, 1, 1) + np.roll(x, -1, 0)) / 4 + rng.normal(0, 6, x.shape)
        rights += judge_image(np.clip(x, 0, 255).astype(np.uint8), scene.caption).values()
    assert np.mean(rights) > 0.98


def test_a_larger_image_is_judged_by_its_own_scale():
    scenes = training_scenes(50, seed=4)
    for image, scene in zip(render_scenes(scenes, seed=5, size=128), scenes):
        assert all(judge_image(image, scene.caption).values()), scene.caption


def test_not_an_image_is_refused():
    with pytest.raises(ValueError, match="float64"):
        judge_image(np.zeros((64, 64, 3)), "a red heart on a white background")
    with pytest.raises(ValueError, match="32, 64"):
        judge_image(np.zeros((32, 64, 3), np.uint8), "a red heart on a white background")
