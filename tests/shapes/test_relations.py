"""Relations that the teacher has no word for: exemplars in ReVersion's format, and a judge that says yes and no."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffusers_wadi.shapes import judge_image, render
from diffusers_wadi.shapes.relations import (
    judge_relation,
    prompt_of,
    relation_scenes,
    render_relation,
    write_exemplars,
)
from diffusers_wadi.shapes.scenes import RELATIONS


@pytest.fixture(scope="module")
def scenes():
    return relation_scenes(100, seed=5) + relation_scenes(100, seed=6, relation="beside")


def test_renders_are_called_right(scenes):
    verdicts = [judge_relation(render_relation(s, np.random.default_rng(k)), s) for k, s in enumerate(scenes)]
    assert np.mean([verdict["relation"] for verdict in verdicts]) >= 0.99
    assert np.mean([verdict["scene"] for verdict in verdicts]) >= 0.99


@pytest.mark.parametrize("relation, meanings", [("east of", {"right of"}), ("beside", {"left of", "right of"})])
def test_what_a_relation_means_is_called_right_and_the_rest_wrong(scenes, relation, meanings):
    chosen = [scene for scene in scenes if scene.relation == relation][:50]
    for name in RELATIONS:
        images = [render(replace(s, relation=name), np.random.default_rng(k)) for k, s in enumerate(chosen)]
        verdicts = [judge_relation(image, s)["relation"] for image, s in zip(images, chosen)]
        assert np.mean(verdicts) >= 0.98 if name in meanings else np.mean(verdicts) <= 0.02


def test_every_meaning_is_drawn():
    scene = relation_scenes(1, relation="beside")[0]
    images = [render_relation(scene, np.random.default_rng(k)) for k in range(12)]
    drawn = {
        name for image in images for name in RELATIONS if judge_image(image, replace(scene, relation=name))["relation"]
    }
    assert drawn == {"left of", "right of"}


def test_one_thing_other_things_or_another_background_are_called_wrong(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes[::10]:
        alone = render(replace(scene, items=scene.items[:1], relation=None), rng)
        assert judge_relation(alone, scene) == {"relation": False, "scene": False}
        shape = "ring" if scene.items[0].shape != "ring" else "star"
        other = replace(scene, items=(replace(scene.items[0], shape=shape), scene.items[1]))
        verdict = judge_relation(render_relation(other, rng), scene)
        assert verdict["relation"] and not verdict["scene"]
        background = "gray" if scene.background != "gray" else "white"
        assert not judge_relation(render_relation(replace(scene, background=background), rng), scene)["scene"]


def test_unseen_scenes_share_no_pair_with_the_exemplars(tmp_path):
    exemplars = write_exemplars(tmp_path / "folder", n=10, seed=0)
    seen = {frozenset((item.colour, item.shape) for item in scene.items) for scene in exemplars}
    unseen = relation_scenes(400, seed=1, without=exemplars)
    assert len(seen) > 5 and len(set(unseen)) == 400
    assert not seen & {frozenset((item.colour, item.shape) for item in scene.items) for scene in unseen}
    assert seen & {frozenset((i.colour, i.shape) for i in s.items) for s in relation_scenes(400, seed=0)}


def test_exemplars_are_what_training_reads(tmp_path):
    scenes = write_exemplars(tmp_path / "folder", n=4, seed=3)
    captions = json.loads((tmp_path / "folder" / "text.json").read_text())
    assert sorted(captions) == [f"{k}.png" for k in range(4)]
    for k, scene in enumerate(scenes):
        assert captions[f"{k}.png"][0] == prompt_of(scene, "{}") and captions[f"{k}.png"][0].count("{}") == 1
        image = np.asarray(Image.open(tmp_path / "folder" / f"{k}.png"))
        assert judge_relation(image, scene) == {"relation": True, "scene": True}
    assert "east" not in (tmp_path / "folder" / "text.json").read_text()
    assert prompt_of(scenes[0], "<R>") == captions["0.png"][0].replace("{}", "<R>")


def test_unknown_relations_are_refused():
    with pytest.raises(ValueError, match="'inside', expected one of east of, beside"):
        relation_scenes(1, relation="inside")
