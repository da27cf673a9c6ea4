"""The requests of the page without a server: limits, files with their settings, times in plain sight."""

import os
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from diffusers_wadi import cli
from diffusers_wadi.demo.engine import Engine
from diffusers_wadi.demo.outputs import Outputs
from diffusers_wadi.demo.requests import ALL_LAYERS, AS_IT_IS, LARGEST_SEED, PATH, Requests
from diffusers_wadi.demo.settings import DemoSettings

PROMPT = "red blue"


@pytest.fixture(scope="module")
def requests(adapter_folder):
    settings = DemoSettings(model=str(adapter_folder), device="cpu", max_prompt=40, max_steps=5)
    return Requests(Engine.load(settings), settings)


def test_every_file_says_how_it_was_made(requests, adapter_folder, tmp_path):
    shown, said = requests.generate(f"  {PROMPT}\n", 7, 2)
    assert [caption for _, caption in shown] == ["seed 7", "seed 8"] and "per image · 2 in" in said
    first = Image.open(shown[0][0])
    assert first.format == "PNG" and first.text["prompt"] == PROMPT and first.text["seed"] == "7"
    assert first.text["size"] == "64x64" and first.text["software"].startswith("diffusers-wadi ")
    assert (
        cli.main(
            [
                "generate",
                PROMPT,
                "--seed",
                "7",
                "--model",
                str(adapter_folder),
                "--device",
                "cpu",
                "-o",
                f"{tmp_path}/x.png",
            ]
        )
        == 0
    )
    again = Image.open(tmp_path / "x.png")
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(first, dtype=int)).max() <= 1
    assert {key: first.text[key] for key in again.text} == again.text  # the same notes, and further ones


def test_the_path_and_the_comparison(requests):
    path = requests.strength_path(PROMPT, 0)
    assert [caption for _, caption in path] == [
        "0 · teacher",
        "0.25",
        "0.5",
        "0.75",
        "1 · student",
        "1.25",
        "1.5",
    ]
    at_one, said = requests.at_strength(PROMPT, 0, 1)
    assert np.array_equal(Image.open(at_one[0][0]), Image.open(path[PATH.index(1.0)][0])) and "per image" in said
    shown, said = requests.compare(PROMPT, 0, 3, 2)
    assert shown[0][1].startswith("3 steps · ") and shown[1][1].startswith("1 step · ")
    assert (
        said.startswith("teacher, 3 steps **")
        and "student, 1 step **" in said
        and "times** as fast" in said
        and Image.open(shown[0][0]).text["steps"] == "3"
    )


def test_high_resolution_keeps_to_sizes_that_fit(requests):
    shown, said = requests.high_resolution(PROMPT, 0, 1.6, 1, 1)
    assert [Image.open(path).size for path, _ in shown] == [(96, 96)] * 2
    assert "plain" in said and "96x96, trained at 64x64" in said
    with pytest.raises(ValueError, match="the size is 5; expected 1 to 4"):
        requests.high_resolution(PROMPT, 0, 5, 1, 1)


def test_inspect_shows_a_figure_of_the_layers(requests):
    path, summary, table = requests.inspect("self-attention")
    assert (
        Image.open(path).height > 300 and "directions by" in summary and "attn1.to_q" in table and "attn2" not in table
    )
    assert "attn2" in requests.inspect(ALL_LAYERS)[2]
    with pytest.raises(ValueError, match="no layers of kind 'nonsense'; choose one of all layers, "):
        requests.inspect("nonsense")


@pytest.mark.parametrize(
    "values, message",
    [
        (("", 0, 1), "there is no prompt"),
        ((None, 0, 1), "there is no prompt"),
        (("x" * 41, 0, 1), "41 characters, and at most 40"),
        ((PROMPT, -1, 1), "the seed is -1; expected 0 to"),
        ((PROMPT, LARGEST_SEED + 1, 1), "the seed is"),
        ((PROMPT, None, 1), "the seed is None; expected a number"),
        ((PROMPT, "seven", 1), "the seed is 'seven'"),
        ((PROMPT, 1.5, 1), "expected a whole number"),
        ((PROMPT, float("nan"), 1), "the seed is nan"),
        ((PROMPT, 0, 5), "the number of images is 5; expected 1 to 4"),
        ((PROMPT, 0, 0), "the number of images is 0"),
    ],
)
def test_a_request_beyond_the_limits_draws_nothing(requests, monkeypatch, values, message):
    monkeypatch.setattr(Engine, "_run", lambda *args, **call: pytest.fail("it drew"))
    with pytest.raises(ValueError, match=message):
        requests.generate(*values)


def test_limits_of_the_other_tabs(requests, monkeypatch):
    monkeypatch.setattr(Engine, "_run", lambda *args, **call: pytest.fail("it drew"))
    for call, message in (
        (lambda: requests.at_strength(PROMPT, 0, 3), "the strength is 3; expected 0 to 2"),
        (lambda: requests.compare(PROMPT, 0, 6, 2), "the number of steps is 6; expected 1 to 5"),
        (lambda: requests.compare(PROMPT, 0, 2, 0), "the guidance is 0"),
        (lambda: requests.high_resolution(PROMPT, 0, 2, -1, 1), "the strength is -1"),
        (lambda: requests.control(PROMPT, 0, None, AS_IT_IS, 1), "there is no picture"),
        (lambda: requests.control(PROMPT, 0, Image.new("L", (9, 9)), "nonsense", 1), "no detector 'nonsense'"),
        (lambda: requests.control(PROMPT, 0, Image.new("L", (9, 9)), AS_IT_IS, 1), "no ControlNet"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_drawing_becomes_a_condition_of_the_models_size(requests):
    board = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    board.paste((255, 255, 255, 255), (100, 50, 200, 150))
    condition = Image.open(requests.condition({"background": None, "layers": [], "composite": board}, AS_IT_IS))
    assert condition.size == (64, 64) and condition.mode == "RGB"
    # The middle 200x200 of it: the square is a half of the picture each way, on black.
    share = (np.asarray(condition) > 127).mean()
    assert abs(share - 0.25) < 0.02 and condition.getpixel((2, 2)) == (0, 0, 0)


def test_detectors_are_offered_where_they_are_installed(requests, monkeypatch):
    def edges(image, low_threshold=100, output_type="pil"):
        return image.convert("L").point(lambda value: 255 * (value > low_threshold))

    package, processor = ModuleType("controlnet_aux"), ModuleType("controlnet_aux.processor")
    processor.MODELS, processor.MODEL_PARAMS = {"edges": {"class": lambda: edges, "checkpoint": False}}, {}
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", None)
    assert requests.detectors() == [AS_IT_IS]
    monkeypatch.setitem(sys.modules, "controlnet_aux", package)
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", processor)
    assert requests.detectors() == [AS_IT_IS, "edges"]
    ramp = Image.linear_gradient("L")
    seen = np.asarray(Image.open(requests.condition(ramp, "edges")).convert("L"))
    assert set(np.unique(seen)) == {0, 255} and len(np.unique(Image.open(requests.condition(ramp, AS_IT_IS)))) > 50


def test_old_files_are_forgotten():
    outputs = Outputs(kept=60)
    old, new = (outputs.write(Image.new("RGB", (8, 8)), {"seed": str(i)}) for i in range(2))
    os.utime(old, (time.time() - 61,) * 2)
    third = outputs.write(Image.new("RGB", (8, 8)), {"seed": "3"})
    folder = outputs.folder
    assert sorted(folder.iterdir()) == sorted(Path(path) for path in (new, third))
    del outputs
    assert not folder.exists()
