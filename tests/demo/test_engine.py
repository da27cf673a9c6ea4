"""What the demo draws: the right pipeline, adapter and noise, undone whatever happens."""

import copy
import threading

import numpy as np
import pytest
import torch
from conftest import add_random_adapter
from diffusers import ControlNetModel
from PIL import Image

from diffusers_wadi import WaDiControlNetPipeline, WaDiPipeline
from diffusers_wadi.demo.engine import Engine
from diffusers_wadi.demo.settings import DemoSettings
from diffusers_wadi.lorad.layer import LoRaDLayer

PROMPT = "red blue"


def pixels(drawing):
    return np.asarray(drawing.image, dtype=int)


def rng(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(components):
    add_random_adapter(components["unet"])
    made = WaDiPipeline(**components)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def engine(pipe):
    return Engine(pipe, "tiny")


def net(unet):
    plain = copy.deepcopy(unet)
    controlnet = ControlNetModel.from_unet(
        plain, conditioning_embedding_out_channels=(4, 4, 8, 8), load_weights_from_unet=False
    )
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight, std=3)
    return controlnet


def test_images_are_those_of_the_pipeline_by_seed(engine, pipe):
    drawings = engine.draw(PROMPT, 5, count=2)
    assert [drawing.notes["seed"] for drawing in drawings] == ["5", "6"]
    for drawing, seed in zip(drawings, (5, 6)):
        assert np.abs(pixels(drawing) - np.asarray(pipe(PROMPT, generator=rng(seed)).images[0], dtype=int)).max() <= 1
        assert drawing.notes["prompt"] == PROMPT and drawing.notes["model"] == "tiny" and drawing.seconds > 0
    assert np.abs(pixels(drawings[0]) - pixels(drawings[1])).max() > 1


def test_strength_turns_and_is_undone(engine, pipe):
    half, whole = engine.draw_at(PROMPT, 0, [0.5, 1.0])
    pipe.set_adapters("student", 0.5)
    assert np.array_equal(pixels(half), np.asarray(pipe(PROMPT, generator=rng(0)).images[0]))
    pipe.set_adapters("student", 1.0)
    assert np.array_equal(pixels(whole), np.asarray(pipe(PROMPT, generator=rng(0)).images[0]))
    assert np.abs(pixels(half) - pixels(whole)).max() > 1
    assert half.notes["strength"] == "0.5"


def test_the_teacher_has_the_adapter_off_and_the_student_has_not(engine, pipe):
    teacher, student = engine.draw_by_both(PROMPT, 1, 3, 2.0)
    assert np.array_equal(pixels(student), pixels(engine.draw(PROMPT, 1)[0]))
    assert teacher.notes["steps"] == "3" and teacher.notes["guidance_scale"] == "2" and student.notes["steps"] == "1"
    pipe.disable_lora()
    expected = pipe(PROMPT, generator=rng(1), num_inference_steps=3, guidance_scale=2.0).images[0]
    assert np.array_equal(pixels(teacher), np.asarray(expected))


@pytest.mark.parametrize("broken", ["strength", "teacher", "scalecrafter"])
def test_an_error_on_the_way_leaves_nothing_behind(engine, monkeypatch, broken):
    before = [pixels(d) for d in (*engine.draw(PROMPT, 0), *engine.draw_at(PROMPT, 0, [1.0]))]
    with monkeypatch.context() as patch:

        def fail(*args, **call):
            raise RuntimeError("no memory")

        patch.setattr(Engine, "_run", fail)
        calls = {
            "strength": lambda: engine.draw_at(PROMPT, 0, [0.25]),
            "teacher": lambda: engine.draw_by_both(PROMPT, 0, 2, 2.0),
            "scalecrafter": lambda: engine.draw_larger(PROMPT, 0, 128, 1.0, 2.0),
        }
        with pytest.raises(RuntimeError, match="no memory"):
            calls[broken]()
    layers = [module for module in engine.denoiser.modules() if isinstance(module, LoRaDLayer)]
    assert layers and {scale for layer in layers for scale in layer.scaling.values()} == {1.0}
    after = [pixels(d) for d in (*engine.draw(PROMPT, 0), *engine.draw_at(PROMPT, 0, [1.0]))]
    assert all(np.array_equal(one, other) for one, other in zip(before, after))


def test_requests_at_once_do_not_see_one_another(engine):
    work = {
        "draw": lambda: engine.draw(PROMPT, 3),
        "strength": lambda: engine.draw_at(PROMPT, 3, [0.2, 1.0]),
        "both": lambda: engine.draw_by_both(PROMPT, 3, 2, 3.0),
        "larger": lambda: engine.draw_larger(PROMPT, 3, 96, 1.0, 2.0),
    }
    expected = {name: [pixels(d) for d in call()] for name, call in work.items()}
    found, failed = [], []

    def run(name):
        try:
            found.append((name, [pixels(d) for d in work[name]()]))
        except Exception as error:  # a thread would swallow it
            failed.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in list(work) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(found) == 12
    for name, images in found:
        level = 1 if name == "draw" else 0  # which are drawn together, and may then be rounded differently
        assert all(np.abs(one - other).max() <= level for one, other in zip(images, expected[name])), name


def test_scalecrafter_acts_on_its_own_image_only(engine):
    plain, wide = engine.draw_larger(PROMPT, 0, 128, 1.0, 2.0)
    assert plain.image.size == wide.image.size == (128, 128)
    assert np.abs(pixels(plain) - pixels(wide)).max() > 1
    assert "scalecrafter strength" in wide.notes and "scalecrafter strength" not in plain.notes
    assert np.array_equal(pixels(engine.draw_larger(PROMPT, 0, 128, 1.0, 2.0)[0]), pixels(plain))


def test_control_comes_from_either_place(components, pipe):
    condition = Image.new("RGB", (64, 64), "red")
    controlnet = net(components["unet"])
    given = Engine(pipe, "tiny", controlnet, "org/net")
    own = Engine(WaDiControlNetPipeline.from_pipe(pipe, controlnet=controlnet), "whole")
    for engine, name in ((given, "org/net"), (own, "whole")):
        plain, controlled = engine.draw_controlled(PROMPT, 2, condition, 1, "none")
        assert np.array_equal(pixels(plain), pixels(engine.draw(PROMPT, 2)[0]))
        assert np.abs(pixels(plain) - pixels(controlled)).max() > 1
        assert controlled.notes["controlnet"] == name and controlled.notes["scale"] == "1"
    off = given.draw_controlled(PROMPT, 2, condition, 0, "none")
    assert np.array_equal(pixels(off[0]), pixels(off[1]))


def test_what_a_merged_model_cannot_do(base_folder):
    engine = Engine.load(DemoSettings(model=str(base_folder), device="cpu"))
    assert len(engine.draw(PROMPT, 0)) == 1
    with pytest.raises(ValueError, match="no adapter to turn.*wadi extract"):
        engine.draw_at(PROMPT, 0, [1.0])
    with pytest.raises(ValueError, match="no adapter to switch off"):
        engine.draw_by_both(PROMPT, 0, 2, 2.0)
    with pytest.raises(ValueError, match="no ControlNet: start with --controlnet"):
        engine.draw_controlled(PROMPT, 0, Image.new("RGB", (64, 64)), 1, "none")
    with pytest.raises(ValueError, match="nothing says what it was made of"):
        engine.analysis()


def test_an_adapter_is_compared_with_its_base_once(adapter_folder):
    engine = Engine.load(DemoSettings(model=str(adapter_folder), device="cpu"))
    analysis = engine.analysis()
    assert analysis is engine.analysis() and analysis.overall().direction_mean > 0.01 > analysis.overall().norm_mean
