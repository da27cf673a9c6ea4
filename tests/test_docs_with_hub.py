"""The documentation's code that needs weights from the Hub, run on a stand-in Hub with tiny models of the same layout."""

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import add_random_adapter
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from test_readme import PAGES
from tiny_pixart import pixart_pipeline

from diffusers_wadi import save_lorad_adapter

BLOCK = re.compile(r"<!-- test: hub -->\n```python\n(.*?)```", re.DOTALL)
NEEDING = [page for page in PAGES if BLOCK.search(page.read_text())]
# No GPU, and models that were made for 64 pixels.
ELSEWHERE = {'"cuda"': '"cpu"', "torch.float16": "torch.float32", "1024": "128", "(512, 512)": "(64, 64)"}
SD15, AUTHORS = "stable-diffusion-v1-5/stable-diffusion-v1-5", "gudaochangsheng/WaDi"


def rotated(model):
    """As the authors publish a student: all its weights, rotations merged."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        next(tuned.parameters()).add_(0.1)
    return {key: value.contiguous() for key, value in tuned.state_dict().items()}


@pytest.fixture
def published(hub, components, base_folder, adapter_folder, tmp_path, monkeypatch):
    """The repositories that the pages name, and in the working folder what their commands would have trained."""
    monkeypatch.chdir(tmp_path)
    hub.add(SD15, base_folder)
    pixart = pixart_pipeline()
    pixart.save_pretrained("pixart")
    hub.add("PixArt-alpha/PixArt-XL-2-256x256", Path("pixart"))
    Path("authors").mkdir()
    save_file(rotated(components["unet"]), "authors/rotated_unet-sdv1-5.safetensors")
    save_file(rotated(pixart.transformer), "authors/rotated_transformer.safetensors")
    hub.add(AUTHORS, Path("authors"))
    net = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8))
    net.save_pretrained("net")
    hub.add("lllyasviel/control_v11p_sd15_canny", Path("net"))
    Image.effect_noise((80, 64), 64).convert("RGB").save("house.jpg")
    save_lorad_adapter(
        add_random_adapter(components["unet"], "dog"), "dreambooth-dog", "dog", base_model_name_or_path=SD15
    )
    save_lorad_adapter(components["unet"], "wadi-sd15", "dog", base_model_name_or_path=SD15)
    Path("reversion-painted-on").mkdir()
    save_file({"<R>": torch.randn(16)}, "reversion-painted-on/learned_embeds.safetensors")


@pytest.mark.parametrize("page", NEEDING, ids=[page.name for page in NEEDING])
def test_code_that_needs_the_hub_runs(page, published):
    if page.name == "controlnet.md":
        pytest.importorskip("controlnet_aux")
    names: dict = {}
    for code in BLOCK.findall(page.read_text()):
        for here, there in ELSEWHERE.items():
            code = code.replace(here, there)
        exec(compile(code, page.name, "exec"), names)
    assert names


def test_every_block_of_python_is_run():
    for page in PAGES:
        text = page.read_text()
        marked = len(re.findall(r"<!-- test: (?:snippet|hub|demo) -->\n```python\n", text))
        assert text.count("```python\n") == marked, page.name
