"""Shapes World: the renderer."""

import numpy as np
import pytest

from diffusers_wadi.shapes import heldout_captions, judge_image, parse_caption, render, render_scenes
from diffusers_wadi.shapes.renderer import shape_mask
from diffusers_wadi.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, training_scenes


def test_a_circle_covers_the_area_of_a_circle():
    assert shape_mask("circle", 32, 32, 20).sum() == pytest.approx(np.pi * 19**2, rel=0.02)


def test_a_square_covers_the_area_of_a_square():
    assert shape_mask("square", 32, 32, 20).sum() == pytest.approx(34**2, rel=0.04)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_is_coverage_and_moves_with_its_centre(shape):
    mask = shape_mask(shape, 30, 30, 12)
    assert mask.dtype == np.float32 and mask.min() == 0 and mask.max() == 1
    np.testing.assert_array_equal(np.roll(mask, (3, 4), axis=(0, 1)), shape_mask(shape, 34, 33, 12))


def test_colours_are_the_palette():
    image = render(parse_caption("a large red circle on a gray background"), np.random.default_rng(0))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert tuple(image[0, 0]) == BACKGROUNDS["gray"]
    assert tuple(image[32, 32]) == COLOURS["red"]


def test_the_seed_and_the_index_decide_an_image():
    scenes = [parse_caption("a blue star on a white background")] * 3
    first = render_scenes(scenes, seed=1)
    np.testing.assert_array_equal(first, render_scenes(scenes, seed=1))
    np.testing.assert_array_equal(first[:2], render_scenes(scenes[:2], seed=1))
    assert (first[0] != first[1]).any()
    assert (first != render_scenes(scenes, seed=2)).any()


def test_the_relation_places_the_first_item():
    for relation, axis, sign in (("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1), ("below", 0, 1)):
        image = render(
            parse_caption(f"a red circle {relation} a blue circle on a white background"), np.random.default_rng(3)
        )
        red = np.argwhere((image == COLOURS["red"]).all(-1)).mean(0)
        blue = np.argwhere((image == COLOURS["blue"]).all(-1)).mean(0)
        assert sign * (red - blue)[axis] > 25


def test_a_larger_image_shows_the_same_scene():
    scene = parse_caption("a large green heart on a black background")
    small, large = (render(scene, np.random.default_rng(5), size) for size in (64, 128))
    shrunk = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 1.5


def test_shapes_stay_inside_the_image():
    for seed, scene in enumerate(training_scenes(300, seed=6)):
        image = render(scene, np.random.default_rng(seed)).astype(int)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        foreign = np.abs(border - BACKGROUNDS[scene.background]).max(axis=-1) > 100
        assert foreign.sum() <= 3, scene.caption  # no more than the tip of a star


def test_the_mean_of_the_images_of_a_caption_is_none_of_them():
    """What a caption leaves open blurs the mean, which is what an untrained network draws in one step."""
    verdicts = []
    for caption in heldout_captions(60, seed=7):
        images = [render(parse_caption(caption), np.random.default_rng([8, i])) for i in range(32)]
        verdicts.append(judge_image(np.mean(images, axis=0).round().astype(np.uint8), caption))
    assert np.mean([right for verdict in verdicts for right in verdict.values()]) < 0.85
    assert np.mean([all(verdict.values()) for verdict in verdicts]) < 0.4
