"""Shapes World: captions and scenes."""

import numpy as np
import pytest

from diffusers_wadi.shapes import heldout_captions, parse_caption, training_captions
from diffusers_wadi.shapes.scenes import change_one_attribute, is_heldout, training_scenes


def test_a_caption_says_its_scene_and_nothing_else():
    for scene in training_scenes(300, seed=3):
        assert parse_caption(scene.caption) == scene


@pytest.mark.parametrize(
    "caption", ["", "a red heart", "a pink heart on a white background", "a red heart near a blue star on a gray background"]
)  # fmt: skip
def test_a_foreign_caption_is_refused_with_its_text(caption):
    with pytest.raises(ValueError, match="not a Shapes World caption") as error:
        parse_caption(caption)
    assert repr(caption) in str(error.value)


def test_case_and_a_full_stop_do_not_matter():
    assert (
        parse_caption(" A large Red heart on a White background. ").caption
        == "a large red heart on a white background"
    )


def test_held_out_captions_are_never_trained_on():
    heldout = heldout_captions(500, seed=1)
    assert len(set(heldout)) == 500
    assert all(is_heldout(caption) for caption in heldout)
    assert not set(heldout) & set(training_captions(5000, seed=0))


def test_captions_depend_on_the_seed_alone():
    assert training_captions(50, seed=4) == training_captions(50, seed=4)
    assert training_captions(50, seed=4) != training_captions(50, seed=5)


def test_too_many_held_out_captions_are_refused():
    with pytest.raises(ValueError, match="9000"):
        heldout_captions(9000)


def test_a_changed_scene_differs_in_one_stated_attribute():
    rng = np.random.default_rng(0)
    names = set()
    for scene in training_scenes(200, seed=1):
        changed, name = change_one_attribute(scene, rng)
        names.add(name)
        assert changed.caption != scene.caption
        assert (name == "count") == (len(changed.items) != len(scene.items))
    assert names == {"background", "relation", "shape", "colour", "size", "count"}
