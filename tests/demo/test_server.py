"""The page on a server: by requests of gradio_client, as programs use it."""

import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")
gradio_client = pytest.importorskip("gradio_client", reason="requests to the demo need gradio_client")

from demo_server import pixels, running_page  # noqa: E402

from diffusers_wadi.demo import LOOPBACK  # noqa: E402
from diffusers_wadi.shapes import judge_image  # noqa: E402

PROMPT = "a large red heart on a white background"
DOCS = Path(__file__).parents[2] / "docs" / "demo.md"


@pytest.fixture(scope="module")
def page():
    return running_page()


@pytest.fixture(scope="module")
def client(page, tmp_path_factory):
    return gradio_client.Client(page.local_url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


def paths(images):
    return [entry["image"] for entry in images]


def test_it_listens_on_this_machine_alone_and_asks_no_other(page):
    assert page.server_name == LOOPBACK and page.share_url is None
    with urllib.request.urlopen(page.local_url) as answer:
        text = answer.read().decode()
    assert "fonts.googleapis" not in text and json.dumps(page.config).count("googleapis") == 0


def test_the_documented_request(page):
    (code,) = re.findall(r"<!-- test: demo -->\n```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code.replace("http://127.0.0.1:7860", page.local_url), DOCS.name, "exec"), names)
    assert len(names["images"]) == 4 and "per image" in names["said"]


def test_generate(client):
    images, said = client.predict(PROMPT, 2, 2, api_name="/generate")
    assert all(judge_image(pixels(paths(images)[0]), PROMPT).values())
    assert [Image.open(path).text["seed"] for path in paths(images)] == ["2", "3"] and "per image" in said
    assert Image.open(paths(images)[0]).text["prompt"] == PROMPT


def test_the_other_tabs(client, tmp_path):
    images, _ = client.predict(PROMPT, 2, 2, 1, 2.5, api_name="/high_resolution")
    assert [Image.open(path).size for path in paths(images)] == [(128, 128)] * 2
    Image.new("RGB", (80, 80), "white").save(tmp_path / "white.png")
    board = {name: gradio_client.handle_file(tmp_path / "white.png") for name in ("background", "composite")}
    condition = client.predict(board | {"layers": []}, "none: the image is the condition", api_name="/condition")
    assert np.unique(pixels(condition)).tolist() == [255]


@pytest.mark.parametrize(
    "values, api_name, message",
    [
        (("x" * 301, 0, 1), "/generate", "The prompt has 301 characters"),
        ((PROMPT, 0, 99), "/generate", "99"),
        ((PROMPT, -5, 1), "/generate", "-5"),
        ((PROMPT, "seed", 1), "/generate", None),
        (({"not": "text"}, [], None), "/generate", None),
        ((PROMPT, 0, 1e9, 1, 1), "/high_resolution", "4"),
        (("nonsense",), "/inspect", None),
    ],
)
def test_a_bad_request_gets_a_message(client, values, api_name, message):
    with pytest.raises(Exception) as raised:
        client.predict(*values, api_name=api_name)
    assert "Traceback" not in str(raised.value) and (message or "") in str(raised.value)


def test_it_goes_on_after_them(client):
    images, _ = client.predict(PROMPT, 2, 1, api_name="/generate")
    assert all(judge_image(pixels(paths(images)[0]), PROMPT).values())
