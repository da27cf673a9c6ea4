"""The subject that Shapes World does not have: its judge says yes to renders of it and no to everything else."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffusers_wadi.shapes import subject as world
from diffusers_wadi.shapes.renderer import render
from diffusers_wadi.shapes.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Item, Scene
from diffusers_wadi.shapes.subject import MIN_MATCH, judge_subject, render_prompt, render_subject, subject_prompts

PROMPTS = subject_prompts(40, seed=3)


def test_renders_are_right():
    rng = np.random.default_rng(0)
    for prompt in PROMPTS:
        match, verdict = judge_subject(render_prompt(prompt, rng), prompt)
        assert match > 0.75 and all(verdict.values()), (prompt.text(), match, verdict)


def test_prompts_are_in_the_words_of_the_world():
    assert {prompt.background for prompt in PROMPTS} == set(BACKGROUNDS)
    assert {prompt.relation for prompt in PROMPTS} == {None, *RELATIONS}
    words = set(" ".join([*COLOURS, *SHAPES, *BACKGROUNDS, *RELATIONS, "a on background", world.SUBJECT]).split())
    assert all(set(prompt.text().split()) <= words for prompt in PROMPTS)
    assert not any(prompt.other and prompt.other.colour in world.SUBJECT_COLOURS for prompt in PROMPTS)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_of_the_world_is_taken_for_the_subject(shape, background):
    prompt = world.SubjectPrompt(background)
    for colour in COLOURS:
        image = render(Scene((Item(shape, colour),), background), np.random.default_rng(1))
        match, verdict = judge_subject(image, prompt)
        assert match < MIN_MATCH and verdict["background"] and verdict["count"], (shape, colour, match, verdict)


def halves_of(outline, size=64):
    """Left and right half of a shape of the world, in the subject's colours, on white."""
    mask = world.shape_mask(outline, 32, 32, 18, size)
    left, right = mask.copy(), mask.copy()
    left[:, size // 2 :] = right[:, : size // 2] = 0
    image = np.full((size, size, 3), 250.0, dtype=np.float32)
    for coverage, colour in zip((left, right), world.SUBJECT_COLOURS.values()):
        image = world._paint(image, coverage, colour)
    return np.round(image).astype(np.uint8)


@pytest.mark.parametrize("outline", SHAPES)
def test_the_outline_has_to_be_right(outline):
    assert judge_subject(halves_of(outline), world.SubjectPrompt("white"))[0] < MIN_MATCH


def test_colours_have_to_be_on_their_sides():
    image = render_subject(32, 32, 16)
    prompt = world.SubjectPrompt("white")
    assert judge_subject(image, prompt)[0] > MIN_MATCH > judge_subject(image[:, ::-1], prompt)[0]
    one = np.where((image == world.SUBJECT_COLOURS[world.RIGHT])[..., :].all(-1, keepdims=True), 250, image)
    assert judge_subject(one.astype(np.uint8), prompt)[0] < MIN_MATCH


def test_what_is_said_beside_the_subject_has_to_hold():
    rng = np.random.default_rng(2)
    pairs = [prompt for prompt in PROMPTS if prompt.relation]
    for prompt in pairs:
        image = render_prompt(prompt, rng)
        others = {
            "background": replace(prompt, background=next(b for b in BACKGROUNDS if b != prompt.background)),
            "relation": replace(prompt, relation=next(r for r in RELATIONS if r != prompt.relation)),
            "shape": replace(
                prompt, other=Item(next(s for s in SHAPES if s != prompt.other.shape), prompt.other.colour)
            ),
            "count": replace(prompt, relation=None, other=None),
        }
        for attribute, other in others.items():
            match, verdict = judge_subject(image, other)
            assert match > MIN_MATCH and not verdict[attribute], (prompt.text(), attribute)


def test_without_the_subject_the_rest_can_be_right():
    prompt = world.SubjectPrompt("gray", "left of", Item("circle", "green"))
    scene = Scene((Item("star", "yellow"), Item("circle", "green")), "gray", "left of")
    match, verdict = judge_subject(render(scene, np.random.default_rng(0)), prompt)
    assert match < MIN_MATCH and all(verdict.values()), verdict


def test_instance_images(tmp_path):
    files = world.save_instance_images(tmp_path)
    images = [np.asarray(Image.open(file)) for file in files]
    assert len(images) == 6 and all(image.shape == (64, 64, 3) for image in images)
    fits = [world.find_subject(image) for image in images]
    assert all(fit.match > 0.8 for fit in fits)
    assert max(fit.radius for fit in fits) > 1.7 * min(fit.radius for fit in fits)
    assert np.std([fit.x for fit in fits]) > 1
