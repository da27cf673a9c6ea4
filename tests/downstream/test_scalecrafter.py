"""ScaleCrafter on pipelines: enabling, undoing, schedules, and everything that a UNet may be wrapped in."""

import copy
import math
import runpy
from pathlib import Path

import pytest
import torch
from conftest import SD_BETAS, add_random_adapter
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from peft import LoraConfig
from PIL import Image
from tiny_pixart import pixart_pipeline

from diffusers_wadi import WaDiPipeline, WaDiPixArtPipeline
from diffusers_wadi.downstream.scalecrafter import (
    disable_scalecrafter,
    enable_scalecrafter,
    scalecrafter,
    scalecrafter_settings,
)
from diffusers_wadi.downstream.scalecrafter._convolutions import wideable
from diffusers_wadi.downstream.scalecrafter._presets import preset_settings

CONVOLUTIONS = ["conv1", "conv2", "conv"]


@pytest.fixture(autouse=True)
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def warnings(monkeypatch):
    """What is warned of, as a list of texts."""
    said = []
    for module in ("_pipeline", "_state"):
        monkeypatch.setattr(f"diffusers_wadi.downstream.scalecrafter.{module}._logger.warning", said.append)
    return said


@pytest.fixture
def pipe(components):
    """Trained, so to say, at 64x64: latents of 8x8 and two levels."""
    pipe = WaDiPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predict(unet, size=(16, 16), t=999, batch=1):
    z = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(3))
    text = torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return unet(z, t, text).sample


def traces(unet):
    """All that widening may touch, and the weights."""
    modules = {
        name: (set(m.__dict__), getattr(m, "dilation", 0), getattr(m, "padding", 0), *map(len, hooks(m)))
        for name, m in unet.named_modules()
    }
    return modules, {name: value.clone() for name, value in unet.state_dict().items()}


def hooks(module):
    return module._forward_hooks, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs


def assert_untouched(unet, before):
    modules, weights = traces(unet)
    assert modules == before[0]
    assert weights.keys() == before[1].keys() and all(torch.equal(weights[k], before[1][k]) for k in weights)


def test_enabled_it_changes_the_output_and_disabled_nothing_is_left(pipe):
    expected, before = predict(pipe.unet), traces(pipe.unet)
    pipe.enable_scalecrafter(160, 160, dispersed=True)
    assert not torch.equal(predict(pipe.unet), expected)
    assert pipe.unet.state_dict().keys() == before[1].keys()
    pipe.disable_scalecrafter()
    assert torch.equal(predict(pipe.unet), expected)
    assert_untouched(pipe.unet, before)
    pipe.disable_scalecrafter()


def test_the_context_manager_undoes_after_an_exception(pipe):
    expected, before = predict(pipe.unet), traces(pipe.unet)
    with pytest.raises(KeyboardInterrupt), scalecrafter(pipe, 160, 128, strength=0.7):
        assert not torch.equal(predict(pipe.unet), expected)
        raise KeyboardInterrupt
    assert_untouched(pipe.unet, before)


def test_factors_of_one_change_nothing(pipe, warnings):
    expected = predict(pipe.unet)
    for options in ({"factors": {"mid_block": 1.0, "up_blocks": 1}}, {"height": 128, "width": 128, "strength": 0.0}):
        enable_scalecrafter(pipe, **options)
        assert torch.equal(predict(pipe.unet), expected)
        assert "nothing to widen" in warnings[-1]


@pytest.mark.parametrize("size", [(64, 64), (64, 32)])
def test_at_the_trained_size_or_below_there_is_nothing_to_do(pipe, warnings, size):
    pipe.enable_scalecrafter(128, 128)
    pipe.enable_scalecrafter(*size)
    assert "nothing to widen" in warnings[-1]
    assert all(m.dilation == (1, 1) for m in wideable(pipe.unet).values())


def test_the_rule_is_told_and_strength_and_own_factors_go_over_it(pipe, warnings):
    own = {"up_blocks.0.upsamplers": 3.0, "mid_block.resnets.0": 1.0}
    pipe.enable_scalecrafter(128, 192, strength=0.5, factors=own)
    assert "192x128" in warnings[0] and "extrapolated" in warnings[0]  # width x height
    layers = wideable(pipe.unet)
    dilation = {name: module.dilation[0] for name, module in layers.items()}
    assert dilation["up_blocks.0.upsamplers.0.conv"] == 3
    assert dilation["mid_block.resnets.0.conv1"] == 1
    assert dilation["mid_block.resnets.1.conv1"] == 2  # 1 + 0.5 (3 - 1)
    assert dilation["down_blocks.0.resnets.0.conv1"] == 1
    assert scalecrafter_settings(pipe, 128, 192).source == "rule"


def test_enabling_again_replaces(pipe):
    pipe.enable_scalecrafter(128, 128, factors={"down_blocks.0": 2.5})
    pipe.enable_scalecrafter(factors={"mid_block": 2.0})
    again = predict(pipe.unet)
    pipe.disable_scalecrafter()
    with scalecrafter(pipe, factors={"mid_block": 2.0}):
        assert torch.equal(predict(pipe.unet), again)


def test_a_failed_enabling_leaves_the_former_in_place(pipe):
    pipe.enable_scalecrafter(128, 128)
    expected = predict(pipe.unet)
    with pytest.raises(ValueError, match="mid_blok"):
        pipe.enable_scalecrafter(128, 128, factors={"mid_blok": 2.0})
    assert torch.equal(predict(pipe.unet), expected)


def test_images_of_any_shape_and_batch(pipe):
    for height, width in ((128, 128), (72, 200), (152, 88)):
        with scalecrafter(pipe, height, width):
            images = pipe(["red", "blue"], height=height, width=width, output_type="np").images
            single = pipe("red", height=height, width=width, output_type="np", generator=seeded()).images
        assert images.shape == (2, height, width, 3)
        plain = pipe("red", height=height, width=width, output_type="np", generator=seeded()).images
        assert abs(single - plain).max() > 1e-4


def seeded():
    return torch.Generator().manual_seed(0)


def test_another_size_than_enabled_is_warned_of_once(pipe, warnings):
    pipe.enable_scalecrafter(128, 128)
    warnings.clear()
    predict(pipe.unet)
    assert not warnings
    predict(pipe.unet, (8, 8))
    predict(pipe.unet, (8, 8))
    assert len(warnings) == 1 and "16x16" in warnings[0] and "8x8" in warnings[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"height": 130, "width": 128}, "height has to be a multiple of 8 pixels, but is 130; 128 would do"),
        ({"height": 128}, "width has to be a multiple of 8 pixels, but is None"),
        ({}, "needs the height and width"),
        ({"height": 128, "width": 128, "preset": "sd15"}, "no settings for 'sd15' at width x height 128x128"),
        ({"height": 128, "width": 128, "preset": "sdxl"}, "no preset 'sdxl'"),
        ({"height": 128, "width": 128, "strength": -1}, "strength has to be at least 0"),
        ({"height": 128, "width": 128, "until": 0}, "until is a share"),
        ({"factors": {"mid_block": 0.5}}, "'mid_block' has to be a number of at least 1, but is 0.5"),
        ({"factors": {"up_blocks.0.resnet": 2}}, r"no 3x3 convolution .* nearest are up_blocks\.0\.resnets"),
        ({"factors": {"mid_block": 2}, "dispersed": ("up_blocks.0",)}, "up_blocks.0.resnets.0.conv1.* would not be"),
        ({"factors": {"mid_block": 2}, "dispersed": True}, "dispersed=True needs height and width"),
        ({"height": 128, "width": 128, "noise_damped": True}, "noise_damped=True on a one-step model.*no|none"),
    ],
)
def test_what_cannot_be_done_says_why_and_what_could(pipe, options, message):
    before = traces(pipe.unet)
    with pytest.raises(ValueError, match=message):
        pipe.enable_scalecrafter(**options)
    assert_untouched(pipe.unet, before)


def test_a_preset_that_names_layers_which_the_unet_lacks(pipe):
    with pytest.raises(ValueError, match=r"blocks\.2' is no 3x3 convolution"):
        pipe.enable_scalecrafter(1024, 1024, preset="sd15")


def test_a_transformer_has_nothing_to_widen():
    pipe = WaDiPixArtPipeline(**pixart_pipeline().components)
    with pytest.raises(ValueError, match="3x3 convolutions of a UNet, and WaDiPixArtPipeline has a transformer"):
        pipe.enable_scalecrafter(128, 128)


def test_a_stock_stable_diffusion_15_gets_its_preset(components, warnings):
    with torch.device("meta"):
        components["unet"] = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    pipe = StableDiffusionPipeline(**components)
    enable_scalecrafter(pipe, 1280, 1280)
    widened = [m for m in wideable(pipe.unet).values() if list(m.dilation) == [3, 3] and len(m._forward_hooks) == 1]
    assert len(widened) == 39 and not warnings
    assert scalecrafter_settings(pipe, 1024, 2048) == preset_settings("sd15", 1024, 2048)  # height, width
    pipe.unet.register_to_config(cross_attention_dim=1024)
    assert scalecrafter_settings(pipe, 1024, 1024) == preset_settings("sd21", 1024, 1024)
    enable_scalecrafter(pipe, 768, 768)
    assert "extrapolated" in warnings[0]
    disable_scalecrafter(pipe)
    assert all(m.dilation == (1, 1) for m in wideable(pipe.unet).values())


# ---- schedules of several steps


def dilations(unet, times):
    layer = unet.mid_block.resnets[0].conv1
    seen = []
    for t in times:
        predict(unet, t=torch.tensor(t))
        seen.append(layer.dilation[0])
    return seen


def test_the_first_steps_are_dilated_and_the_last_are_not(pipe):
    pipe.enable_scalecrafter(128, 128)
    for first in (981, 980):  # with the schedulers' offset and without
        times = [first - 20 * i for i in range(50)]
        assert dilations(pipe.unet, times[25:35]) == [2] * 5 + [1] * 5  # 30 of 50 by the rule
    assert dilations(pipe.unet, [999]) == [2]
    pipe.enable_scalecrafter(128, 128, until=1.0)
    assert dilations(pipe.unet, [1]) == [2]


@pytest.mark.parametrize("count", [35, 50])
def test_large_sizes_come_down_step_by_step(pipe, count):
    pipe.enable_scalecrafter(256, 256, until=count / 50)
    steps = range(0, 50, 4)
    expected = [max(math.ceil(4 * (count - i) / count), 2) if i < count else 1 for i in steps]
    assert dilations(pipe.unet, [999 - 20 * i for i in steps]) == expected
    assert set(expected) >= {2, 3, 4}


@pytest.mark.parametrize("until", [None, 1.0])
def test_one_step_has_the_full_factors_even_if_they_are_not_whole(pipe, until):
    pipe.enable_scalecrafter(256, 256, strength=0.5, factors={"mid_block": 1.25}, until=until)
    predict(pipe.unet, (32, 32))
    applied = pipe.unet._scalecrafter.applied
    assert applied["mid_block.resnets.0.conv1"] == 1.25 and applied["up_blocks.0.resnets.0.conv1"] == 2.5


def test_the_multi_step_teacher_runs_with_it(components):
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False)
    pipe = StableDiffusionPipeline(**{**components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    enable_scalecrafter(pipe, 128, 128)
    call = {"height": 128, "width": 128, "num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent"}
    wide = pipe("red", generator=seeded(), **call).images
    disable_scalecrafter(pipe)
    assert not torch.allclose(pipe("red", generator=seeded(), **call).images, wide)


# ---- what the UNet may be wrapped in


@pytest.mark.parametrize("factor", [2.0, 2.5])
@pytest.mark.parametrize("targets", [["to_q", "to_v"], CONVOLUTIONS], ids=["linear", "conv"])
def test_with_a_lorad_unfused_and_fused(pipe, factor, targets):
    add_random_adapter(pipe.unet, targets=targets)
    before = traces(pipe.unet)
    factors = {"mid_block": factor, "up_blocks": factor, "down_blocks.1": factor}
    pipe.enable_scalecrafter(factors=factors)
    turned = predict(pipe.unet)
    pipe.unet.disable_adapters()
    plain = predict(pipe.unet)
    pipe.unet.enable_adapters()
    pipe.disable_scalecrafter()
    assert_untouched(pipe.unet, before)
    assert not torch.allclose(turned, plain, atol=1e-3)
    pipe.unet.fuse_lora()
    with scalecrafter(pipe, factors=factors):
        torch.testing.assert_close(predict(pipe.unet), turned, atol=1e-4, rtol=1e-4)
    pipe.unet.unload_lora()
    with scalecrafter(pipe, factors=factors):  # plain convolutions with the turned weights
        torch.testing.assert_close(predict(pipe.unet), turned, atol=1e-4, rtol=1e-4)


def test_a_lora_on_convolutions_sees_what_its_base_sees(pipe):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=CONVOLUTIONS, init_lora_weights=False))
    factors = {"mid_block": 2.5, "up_blocks": 2.0}
    with scalecrafter(pipe, factors=factors):
        unfused = predict(pipe.unet)
    pipe.unet.fuse_lora()
    with scalecrafter(pipe, factors=factors):
        torch.testing.assert_close(predict(pipe.unet), unfused, atol=1e-4, rtol=1e-4)


def test_dispersed_kernels_need_a_lorad_of_the_same_layer_fused(pipe):
    add_random_adapter(pipe.unet, targets=CONVOLUTIONS)
    with pytest.raises(ValueError, match=r"fuse_lorad\(\) first"):
        pipe.enable_scalecrafter(128, 128, dispersed=True)
    assert all(m.get_base_layer().dilation == (1, 1) for m in wideable(pipe.unet).values())
    pipe.fuse_lorad()
    pipe.enable_scalecrafter(128, 128, dispersed=True)
    turned = predict(pipe.unet)
    pipe.unfuse_lorad()
    with pytest.raises(ValueError, match=r"fuse_lorad\(\) first"):
        predict(pipe.unet)
    pipe.unet.disable_adapters()
    assert not torch.allclose(predict(pipe.unet), turned, atol=1e-3)


def test_an_adapter_that_comes_or_goes_is_noticed(pipe):
    pipe.enable_scalecrafter(128, 128)
    add_random_adapter(pipe.unet, targets=CONVOLUTIONS)
    with pytest.raises(RuntimeError, match="call enable_scalecrafter again"):
        predict(pipe.unet)
    pipe.enable_scalecrafter(128, 128)
    predict(pipe.unet)
    pipe.unet.unload_lora()
    with pytest.raises(RuntimeError, match="call enable_scalecrafter again"):
        predict(pipe.unet)
    pipe.disable_scalecrafter()
    assert all(m.dilation == (1, 1) and not m._forward_hooks for m in wideable(pipe.unet).values())


def test_copies_compiled_and_offloaded_unets_give_the_same(pipe):
    factors = {"mid_block": 2.5, "up_blocks.0": 2.0, "down_blocks.1": 3.0}
    pipe.enable_scalecrafter(factors=factors, dispersed=("mid_block",))
    expected = predict(pipe.unet)
    twin = copy.deepcopy(pipe.unet)
    assert torch.equal(predict(twin), expected)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(predict(pipe.unet), expected)
    pipe.remove_all_hooks()
    assert torch.equal(predict(pipe.unet), expected)
    pipe.disable_scalecrafter()
    assert torch.equal(predict(twin), expected)


@pytest.mark.parametrize("until", [1.0, 0.6])
def test_a_compiled_unet_follows(pipe, until):
    """In an order in which a graph of before would be wrong and is the same but for hooks, which nobody guards."""
    unet, low = pipe.unet, torch.tensor(100)
    pipe.unet = torch.compile(unet, backend="eager")
    plain = predict(pipe.unet), predict(pipe.unet, t=low)
    for factor in (3.0, 2.5):  # both are dilation 3, and 2.5 has hooks
        pipe.enable_scalecrafter(factors={"mid_block": factor}, until=until)
        torch.testing.assert_close(predict(pipe.unet), predict(unet))
        assert not torch.allclose(predict(pipe.unet), plain[0])
        torch.testing.assert_close(predict(pipe.unet, t=low), predict(unet, t=low))
        assert torch.allclose(predict(pipe.unet, t=low), plain[1]) == (until < 1)
        torch.testing.assert_close(predict(pipe.unet), predict(unet))  # dilated once more
    pipe.disable_scalecrafter()
    torch.testing.assert_close(predict(pipe.unet), plain[0])


# ---- with a ControlNet


@pytest.fixture(scope="module")
def deep_parts():
    """A UNet and a ControlNet with Stable Diffusion's three halvings, and channels that do not matter."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=2,
    ).eval()
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).eval()
    for parameter in controlnet.parameters():  # from_unet starts with zeros where the residuals come out
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet, controlnet


@pytest.mark.parametrize("latent", [36, 50])
@pytest.mark.parametrize("factor", [2.0, 2.5])
def test_odd_sizes_fit_a_controlnets_residuals(components, deep_parts, latent, factor):
    components["unet"], controlnet = copy.deepcopy(deep_parts)
    pipe = StableDiffusionControlNetPipeline(**components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    side = 8 * latent
    image = torch.rand(1, 3, side, side, generator=seeded())

    def draw(scale):
        call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        return pipe("red", image, generator=seeded(), controlnet_conditioning_scale=scale, **call).images

    plain = draw(1.0)
    enable_scalecrafter(pipe, side, side, factors={"down_blocks": factor, "up_blocks": factor})
    controlled, free = draw(1.0), draw(0.0)
    assert controlled.shape == plain.shape == (1, 4, latent, latent)
    assert not torch.allclose(controlled, plain, atol=1e-3) and not torch.allclose(controlled, free, atol=1e-3)
    assert all(m.dilation == (1, 1) for m in wideable(controlnet).values())


# ---- the example


def test_the_example_draws_the_strengths_side_by_side(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "scalecrafter.py"
    example = runpy.run_path(str(path))
    output = tmp_path / "new" / "image.png"
    flags = ["--model", "bundled", "--prompt", "a red heart on a white background", "--tiled", "--device", "cpu"]
    args = example["parse_args"](
        [*flags, "--height", "128", "--width", "96", "--strengths", "0.5", "--output", str(output)]
    )
    example["main"](args)
    assert Image.open(output).size == (2 * 96, 128)
    assert "factors by rule" in capsys.readouterr().out
