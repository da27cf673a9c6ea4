"""The batcher with real pipelines: the pixels are those of the pipeline itself."""

import numpy as np
import pytest
import torch
from conftest import add_random_adapter
from diffusers import ControlNetModel
from PIL import Image
from tiny_pixart import LINEAR_BETAS, pixart_pipeline

from diffusers_wadi import WaDiControlNetPipeline, WaDiPipeline, WaDiPixArtPipeline, one_step_scheduler
from diffusers_wadi.serving import ImageBatcher
from diffusers_wadi.serving.pixels import start_drawing

FOREVER = 10_000.0
PROMPTS = ("red blue", "a red", "blue", "r e d")


def rng(seed):
    return torch.Generator().manual_seed(seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(components):
    add_random_adapter(components["unet"])
    return quiet(WaDiPipeline(**components))


def assert_batch_is_as_alone(pipe, requests, **settings):
    """Requests [(prompt, seed, own arguments)], which fill one batch, against calls of the pipeline by itself."""
    with ImageBatcher(pipe, max_batch_size=len(requests), max_wait=FOREVER) as batcher:
        futures = [batcher.submit(prompt, seed, **own, **settings) for prompt, seed, own in requests]
        drawn = [np.asarray(future.result(60), dtype=int) for future in futures]
    assert batcher.statistics().batch_sizes == {len(requests): 1}
    for pixels, (prompt, seed, own) in zip(drawn, requests):
        alone = pipe(prompt, generator=rng(seed), **own, **settings).images[0]
        assert np.abs(pixels - np.asarray(alone, dtype=int)).max() <= 1
    assert all(np.abs(drawn[0] - other).max() > 1 for other in drawn[1:])


def test_stable_diffusion(pipe):
    requests = [(prompt, 10 + i, {"negative_prompt": PROMPTS[-i]}) for i, prompt in enumerate(PROMPTS)]
    settings = {"height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 2.0}
    assert_batch_is_as_alone(pipe, requests, **settings)
    assert_batch_is_as_alone(pipe, [("red", seed, {}) for seed in (3, 4)])


def test_a_controlnet_has_a_condition_of_each(components, pipe):
    controlnet = ControlNetModel.from_unet(
        components["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8), load_weights_from_unet=False
    )
    for parameter in controlnet.parameters():  # of which those that matter are zero at first
        torch.nn.init.normal_(parameter, std=0.5, generator=rng(0))
    controlled = quiet(WaDiControlNetPipeline.from_pipe(pipe, controlnet=controlnet))
    conditions = [Image.frombytes("RGB", (64, 64), np.random.default_rng(i).bytes(3 * 64 * 64)) for i in range(3)]
    assert_batch_is_as_alone(controlled, [("red", 3, {"image": image}) for image in conditions])


def test_pixart():
    parts = pixart_pipeline().components | {"scheduler": one_step_scheduler(LINEAR_BETAS, 0.0047)}
    pipe = quiet(WaDiPixArtPipeline(**parts))
    assert_batch_is_as_alone(pipe, [(prompt, i, {}) for i, prompt in enumerate(PROMPTS)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_rounded_as_the_pipeline_rounds_them(pipe, dtype):
    pipe.to(dtype)
    pixels, finite = start_drawing(pipe, ["red"], [7], {"height": 72}).wait()
    expected = pipe("red", generator=rng(7), height=72).images[0]
    assert pixels.dtype == np.uint8 and np.array_equal(pixels[0], np.asarray(expected)) and finite == [True]


def test_images_that_are_not_finite_are_known(pipe):
    draw = pipe.vae.decode
    pipe.vae.decode = lambda latents, **call: (
        draw(latents, **call)[0] * torch.tensor([1.0, float("nan")])[:, None, None, None],
    )
    assert start_drawing(pipe, ["red", "blue"], [1, 2], {}).wait()[1] == [True, False]


def test_what_is_no_pipeline_of_diffusers():
    class Lists:
        def __call__(self, **call):
            self.images = [Image.new("RGB", (8, 8))]
            return self

    with pytest.raises(TypeError, match="Lists gave a list for output_type='pt'; expected a text-to-image pipeline"):
        start_drawing(Lists(), ["red"], [1], {})
