import numpy as np
import pytest

from diffusers_wadi.shapes import parse_caption, render_scenes, training_captions
from diffusers_wadi.shapes.counting import count_objects

CAPTIONS = training_captions(100, seed=5)


@pytest.mark.parametrize("size", [64, 128])
def test_renders_are_counted_right_at_any_size(size):
    images = render_scenes([parse_caption(caption) for caption in CAPTIONS], seed=3, size=size)
    counts = [count_objects(image, caption) for image, caption in zip(images, CAPTIONS)]
    assert np.mean([count.right for count in counts]) >= 0.99
    assert np.mean([count.repeated for count in counts]) <= 0.01


def test_repeated_objects_are_counted_at_the_trained_size():
    caption = "a small green heart on a black background"
    image = render_scenes([parse_caption(caption)], seed=0)[0]
    count = count_objects(np.tile(image, (2, 2, 1)), caption)
    assert (count.found, count.expected, count.repeated, count.right) == (4, 1, 3, False)


def test_another_colour_is_wrong_but_no_repetition():
    pair = "a small green heart left of a large red square on a black background"
    image = render_scenes([parse_caption(pair)], seed=0)[0]
    count = count_objects(image, "a small green heart on a black background")
    assert (count.found, count.expected, count.repeated) == (2, 1, 0)


def test_an_image_that_is_no_rgb_array_is_refused():
    with pytest.raises(ValueError, match=r"uint8 RGB image .* float64 \(64, 64, 3\)"):
        count_objects(np.zeros((64, 64, 3)), "a red heart on a white background")
