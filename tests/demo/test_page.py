"""The page for models that cannot do everything, and for one with a ControlNet; not started."""

import pytest
from diffusers import ControlNetModel, UNet2DConditionModel

pytest.importorskip("gradio", reason="the demo needs gradio")

from diffusers_wadi import bundled_checkpoint  # noqa: E402
from diffusers_wadi.demo import page, texts  # noqa: E402
from diffusers_wadi.demo.engine import Engine  # noqa: E402
from diffusers_wadi.demo.requests import Requests  # noqa: E402
from diffusers_wadi.demo.settings import DemoSettings  # noqa: E402


def built(**settings):
    """(texts on the page, names of its public calls)"""
    settings = DemoSettings(device="cpu", **settings)
    blocks = page.build(Requests(Engine.load(settings), settings))
    said = {block.value for block in blocks.blocks.values() if block.get_block_name() == "markdown"}
    calls = {fn.api_name for fn in blocks.fns.values() if fn.api_visibility == "public"}
    (generate,) = [fn for fn in blocks.fns.values() if fn.api_name == "generate" and fn.api_visibility == "public"]
    assert generate.concurrency_limit == settings.at_once == 16
    return said, calls


def test_a_merged_model(base_folder):
    said, calls = built(model=str(base_folder))
    assert {texts.NO_ADAPTER, texts.NO_SOURCES} <= said and texts.SHAPES_GRAMMAR not in said
    assert any(texts.NO_CONTROLNET in text and "WADI_CONTROLNET" in text for text in said)
    assert calls == {"generate", "condition", "high_resolution"}


def test_a_transformer():
    said, calls = built(model=str(bundled_checkpoint("pixart")))
    assert {texts.NO_TRANSFORMER_CONTROLNET, texts.NO_UNET} <= said
    assert calls == {"generate", "strength", "strength_path", "compare", "inspect"}


def test_with_a_controlnet(base_folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(base_folder, subfolder="unet")
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8)).save_pretrained(tmp_path)
    said, calls = built(model=str(base_folder), controlnet=str(tmp_path))
    assert "control" in calls and not any("No ControlNet is loaded" in text for text in said)
