"""The examples run as they stand on the bundled checkpoint; those of a task's own are run beside its other tests."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import WRITE
from PIL import Image

from diffusers_wadi import WaDiPipeline
from diffusers_wadi.shapes import judge_image

EXAMPLES = Path(__file__).parents[1] / "examples"
ELSEWHERE = {"controlnet.py", "reversion.py", "dreambooth.py", "push_to_hub.py", "strength.py"}
PLAIN = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ELSEWHERE)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return tmp_path

    return run


@pytest.mark.parametrize("name", PLAIN)
def test_an_example_runs_as_it_stands(run, name):
    folder = run(name)
    pictures = [file for file in folder.rglob("*.png") if "one-step" not in file.parts]
    assert pictures and all(np.asarray(Image.open(file)).std() > 5 for file in pictures)
    if name == "generate.py":
        verdict = judge_image(
            Image.open(folder / "image.png"), "a small blue ring above a yellow star on a gray background"
        )
        assert all(verdict.values())


def test_two_halves_are_a_whole(run):
    row = np.asarray(Image.open(run("strength.py") / "strength.png")).astype(int)
    scales = np.split(row, 8, axis=1)
    student, halves, merged = scales[4], scales[6], scales[7]
    assert np.abs(halves - student).max() <= 1 and np.abs(merged - student).max() <= 1
    assert all(np.abs(other - student).max() > 20 for other in scales[:4])


def test_a_student_goes_to_the_hub_and_back(run, hub):
    run("push_to_hub.py", "--repo_id", "me/student", "--base_model", "org/base", "--token", WRITE)
    assert "org/base" in hub.repositories["me/student"].files["README.md"].decode()
    back = WaDiPipeline.from_pretrained("me/student-merged")
    assert back("a red heart on a white background").images[0].size == (64, 64)


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "tour.ipynb", "exec"), names)
    share = int(re.search(r"(\d+)% of the attributes are right", capsys.readouterr().out).group(1))
    assert share >= 80 and names["image"].size == (64, 64)


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"]({path.name})" in listed
