"""`WaDiControlNetPipeline`: the formula with residuals, the guard rails of one step, loading, saving, and company."""

import inspect
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SD_BETAS, add_random_adapter, tiny_unet
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pixart import pixart_pipeline

from diffusers_wadi import CardDetails, WaDiControlNetPipeline, WaDiPipeline, one_step_pipeline_class
from diffusers_wadi.model_card import pipeline_card, with_sample_grid
from diffusers_wadi.pipelines._control import nets_of

LEADING = DDIMScheduler(**SD_BETAS, clip_sample=False)


pytestmark = pytest.mark.usefixtures("without_bars")


def make_controlnet(unet, seed=3, size=0.5):
    """A ControlNet of the UNet; of size 0 it does nothing, as a fresh one."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8)).eval()
    for part in (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=size)
    return net


@pytest.fixture
def controlnet(components):
    return make_controlnet(components["unet"])


@pytest.fixture
def pipe(components, controlnet):
    """With an active adapter."""
    add_random_adapter(components["unet"])
    return WaDiControlNetPipeline(**components, controlnet=controlnet)


def condition(seed=0, height=64, width=64):
    pixels = np.random.default_rng(seed).integers(0, 2, (height // 8, width // 8), dtype=np.uint8) * 255
    return Image.fromarray(pixels).resize((width, height), Image.NEAREST).convert("RGB")


CONDITION = condition()


def draw(pipe, seed=0, prompt="red blue", output_type="np", image=CONDITION, **options):
    generator = torch.Generator().manual_seed(seed)
    control = {} if image is None else {"image": image}
    return pipe(prompt, generator=generator, output_type=output_type, **control, **options).images


def stock_of(pipe):
    return StableDiffusionControlNetPipeline(**pipe.components, requires_safety_checker=False)


# ------------------------------------------------------------------------------------------------------------- calling


def test_one_step_is_the_formula_with_the_residuals(pipe):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, _ = pipe.encode_prompt("red", "cpu", 1, False)
    pixels = torch.from_numpy(np.array(CONDITION)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        down, middle = pipe.controlnet(z, 999, text, controlnet_cond=pixels, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        eps = pipe.unet(z, 999, text, **residuals).sample
    alpha_bar = pipe.scheduler.alphas_cumprod[999]
    expected = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    drawn = pipe("red", image=CONDITION, latents=z, output_type="latent").images
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


def test_a_fresh_controlnet_does_nothing_and_a_trained_one_something(pipe, components):
    plain = draw(WaDiPipeline.from_pipe(pipe), image=None)
    assert not np.array_equal(draw(pipe), plain)
    assert not np.array_equal(draw(pipe), draw(pipe, image=condition(1)))
    assert np.array_equal(draw(pipe, controlnet_conditioning_scale=0), plain)
    pipe.controlnet = make_controlnet(tiny_unet(), size=0.0)
    assert np.array_equal(draw(pipe), plain)


def test_both_networks_see_the_last_timestep_once(pipe, monkeypatch):
    calls = []

    def watch(network, name):
        forward = network.forward

        def spy(sample, timestep, *args, **kwargs):
            calls.append((name, int(timestep), len(sample), kwargs.get("conditioning_scale")))
            return forward(sample, timestep, *args, **kwargs)

        monkeypatch.setattr(network, "forward", spy)

    watch(pipe.controlnet, "controlnet")
    watch(pipe.unet, "unet")
    draw(pipe)
    assert calls == [("controlnet", 999, 1, 1.0), ("unet", 999, 1, None)]


def test_whole_numbers_are_scales_too(pipe):
    assert np.array_equal(draw(pipe, controlnet_conditioning_scale=1), draw(pipe))
    assert np.array_equal(draw(pipe, controlnet_conditioning_scale=[2]), draw(pipe, controlnet_conditioning_scale=2.0))
    assert not np.array_equal(draw(pipe, controlnet_conditioning_scale=2), draw(pipe))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"control_guidance_start": 0.01},
            "control_guidance_start=0.01.*off altogether.*controlnet_conditioning_scale",
        ),
        ({"control_guidance_end": 0.99}, "control_guidance_end=0.99.*off altogether"),
        ({"control_guidance_start": [0.0, 0.5]}, "control_guidance_start"),
        ({"control_guidance_end": (0.9,)}, "control_guidance_end"),
        ({"guess_mode": True}, "guess_mode needs guidance_scale above 1"),
        ({"controlnet_conditioning_scale": float("nan")}, "not finite"),
        ({"controlnet_conditioning_scale": [1.0, 1.0]}, "2 numbers for 1 ControlNets"),
        ({"height": 72, "width": 64}, "is 64x64 .* to be 64x72"),
        ({"width": 128}, "is 64x64 .* to be 128x64"),
        ({"image": condition().resize((60, 64))}, "60x64 .*multiples of 8.*64x64"),
        ({"image": condition().resize((64, 60))}, "64x60 .*multiples of 8.*64x64"),
        ({"timesteps": [999], "num_inference_steps": 4, "guess_mode": True}, "guess_mode needs guidance_scale"),
        ({"image": None}, "image= is missing"),
        ({"image": condition().convert("RGBA")}, "mode 'RGBA'.*convert"),
        ({"image": Image.new("I;16", (64, 64))}, "mode 'I;16'.*16-bit"),
        ({"image": np.zeros((1, 64, 64, 3), np.uint8)}, "uint8 from 0 to 0.*divide bytes by 255"),
        ({"image": [np.full((64, 64, 3), 255.0)]}, "float64 from 0.0 to 255.0"),
        ({"image": -torch.ones(1, 3, 64, 64)}, "from -1.0 to 0, expected|from -1.0 to -1.0, expected"),
        ({"image": torch.full((1, 3, 64, 64), float("nan"))}, "from nan to nan"),
        ({"image": torch.zeros(1, 64, 64, 3)}, "64 channels"),
        ({"image": np.zeros((64, 64, 3))}, "3 dimensions.*image\\[None\\]"),
        ({"image": torch.zeros(3, 64, 64)}, "3 dimensions.*image\\[None\\]"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, "latents of shape.*8 rows and 8 columns"),
    ],
)
def test_what_would_be_void_or_misread_is_refused_before_work(pipe, monkeypatch, options, message):
    monkeypatch.setattr(pipe, "encode_prompt", lambda *args, **kwargs: pytest.fail("worked before checking"))
    with pytest.raises(ValueError, match=message):
        pipe("red", **({"image": CONDITION} | options))


def test_what_is_no_image_is_refused(pipe):
    with pytest.raises(TypeError, match="load_image reads files"):
        pipe("red", image="house.png")


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_modes_without_loss_give_the_same_image(pipe, mode):
    assert np.array_equal(draw(pipe, image=CONDITION.convert(mode)), draw(pipe))


def test_arrays_tensors_and_sizes(pipe):
    pixels = np.asarray(CONDITION) / np.float32(255)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = draw(pipe)
    for image in (pixels[None], [pixels], tensor[None], [tensor]):
        assert np.array_equal(draw(pipe, image=image), expected)
    for more in ({}, {"latents": torch.zeros(1, 4, 9, 12)}):
        assert draw(pipe, image=condition(height=72, width=96), **more).shape == (1, 72, 96, 3)
    several = draw(pipe, prompt=["red", "blue"], image=[CONDITION, condition(1)], num_images_per_prompt=2)
    assert several.shape == (4, 64, 64, 3)


def test_every_argument_of_the_stock_pipeline_reaches_it(pipe, monkeypatch, said):
    names = set(inspect.signature(pipe.stock_class.__call__).parameters) - {"self", "kwargs"}
    # Two times are two steps, whatever the number of steps says, and then none of these is looked at.
    given = {name: object() for name in names} | {"timesteps": [999, 499], "num_inference_steps": 1}
    given |= {"guidance_scale": 1.0, "controlnet_conditioning_scale": 0.5, "further": "argument"}
    seen = {}
    monkeypatch.setattr(pipe.stock_class, "__call__", lambda self, **arguments: seen.update(arguments))
    pipe(**given)
    assert len(names) > 20 and seen == given


def test_unfit_scheduler_is_refused_and_repaired_at_load(pipe, base_folder, controlnet, said):
    pipe.scheduler = LEADING
    with pytest.raises(ValueError, match=r"feed \[1\].*one_step_scheduler"):
        draw(pipe)
    loaded = WaDiControlNetPipeline.from_pretrained(base_folder, controlnet=controlnet)
    expected = draw(loaded)
    assert said == []
    loaded.scheduler = LEADING
    loaded._repair_scheduler(given=False)
    assert np.array_equal(draw(loaded), expected) and "was replaced by one_step_scheduler" in said[0]


@pytest.mark.parametrize(
    "options",
    [
        {"control_guidance_start": 0.3, "control_guidance_end": 0.7},
        {"guess_mode": True},
        {"guess_mode": True, "guidance_scale": 1.0},
        {"height": 72, "width": 64},
        {"image": CONDITION.convert("RGBA"), "negative_prompt": "blue"},
    ],
)
def test_adapter_off_is_the_silent_multi_step_teacher(pipe, options, said):
    pipe.disable_lora()
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"} | options
    assert torch.equal(draw(pipe, **call), draw(stock_of(pipe), **call))
    assert said == []


def test_half_precision_steps_in_float32(pipe):
    pipe.to(torch.bfloat16)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    outputs = []
    pipe.unet.register_forward_hook(lambda module, args, result: outputs.append(result[0]))
    drawn = pipe("red", image=CONDITION, latents=z, output_type="latent").images
    alpha_bar = pipe.scheduler.alphas_cumprod[999]
    exact = (z.float() - (1 - alpha_bar).sqrt() * outputs[0].float()) / alpha_bar.sqrt()
    assert torch.equal(drawn, exact.to(torch.bfloat16))


# ---------------------------------------------------------------------------------------------------- several ControlNets


def test_several_controlnets_add_up_and_each_has_its_scale(pipe, components, controlnet):
    second = make_controlnet(tiny_unet(), seed=8)
    compiled = SimpleNamespace(_orig_mod=second)
    assert nets_of([compiled, controlnet]) == [second, controlnet]
    both = WaDiControlNetPipeline.from_pipe(pipe, controlnet=[controlnet, second])
    images = [CONDITION, condition(1)]
    alone = draw(pipe)
    assert np.array_equal(draw(both, image=images, controlnet_conditioning_scale=[1, 0]), alone)
    assert not np.array_equal(draw(both, image=images), alone)
    assert np.array_equal(
        draw(both, image=images, controlnet_conditioning_scale=[2, 2]),
        draw(both, image=images, controlnet_conditioning_scale=2),
    )
    with pytest.raises(ValueError, match="1 numbers for 2 ControlNets"):
        draw(both, image=images, controlnet_conditioning_scale=[1.0])
    with pytest.raises(ValueError, match="image 1 is 72x64.*the first is 64x64"):
        draw(both, image=[CONDITION, condition(1, width=72)])
    with pytest.raises(ValueError, match="condition image 1 has 3 dimensions"):
        draw(both, image=[CONDITION, torch.zeros(3, 64, 64)])
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in images]
    assert np.array_equal(draw(both, image=tensors), draw(both, image=images))
    assert np.array_equal(draw(both, image=[images], prompt=["red blue"]), draw(both, image=images))
    with pytest.raises(ValueError, match="off altogether"):
        draw(both, image=images, control_guidance_end=[1.0, 0.5])


# ------------------------------------------------------------------------------------------------------------- loading


def test_adapter_folder_with_a_controlnet(adapter_folder, controlnet):
    pipe = WaDiControlNetPipeline.from_pretrained(adapter_folder, controlnet=controlnet)
    by_hand = WaDiControlNetPipeline.from_pipe(WaDiPipeline.from_pretrained(adapter_folder), controlnet=controlnet)
    assert pipe.is_one_step and np.array_equal(draw(pipe), draw(by_hand))
    pipe.unload_lorad_weights()
    assert not pipe.is_one_step


def test_a_missing_controlnet_is_said(base_folder, adapter_folder, components):
    for folder in (base_folder, adapter_folder):
        with pytest.raises(ValueError, match=r"holds no controlnet; pass controlnet=ControlNetModel.from_pretrained"):
            WaDiControlNetPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="WaDiPipeline has no ControlNet; pass controlnet="):
        WaDiControlNetPipeline.from_pipe(WaDiPipeline(**components))


def test_what_is_no_controlnet_or_of_another_family(base_folder, components):
    with pytest.raises(TypeError, match="controlnet is 'some/net', expected a diffusers.ControlNetModel"):
        WaDiControlNetPipeline.from_pretrained(base_folder, controlnet="some/net")
    for other, name in (
        (tiny_unet(cross_attention_dim=24), "cross_attention_dim=24"),
        (tiny_unet(width=12), "block_out"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*different families"):
            WaDiControlNetPipeline(**components, controlnet=[make_controlnet(other)])


def test_pixart_has_none(tmp_path, controlnet):
    pixart = pixart_pipeline()
    with pytest.raises(ValueError, match="no ControlNet pipeline for PixArt-alpha"):
        WaDiControlNetPipeline.from_pipe(pixart, controlnet=controlnet)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]})
    )
    with pytest.raises(ValueError, match="no ControlNet pipeline for a PixArtAlphaPipeline"):
        WaDiControlNetPipeline.from_pretrained(tmp_path, controlnet=controlnet)


def test_from_pipe_all_ways_shares_everything(pipe, controlnet, said):
    expected, plain = draw(pipe), WaDiPipeline.from_pipe(pipe)
    assert type(plain) is WaDiPipeline and plain.unet is pipe.unet and plain.scheduler is pipe.scheduler
    for source in (plain, StableDiffusionPipeline.from_pipe(plain), StableDiffusionControlNetPipeline.from_pipe(pipe)):
        again = WaDiControlNetPipeline.from_pipe(source, controlnet=controlnet)
        assert again.unet is pipe.unet and np.array_equal(draw(again), expected)
    stock = StableDiffusionControlNetPipeline.from_pipe(plain, controlnet=controlnet)
    assert np.array_equal(draw(stock, num_inference_steps=1, guidance_scale=0.0), expected)
    assert type(AutoPipelineForText2Image.from_pipe(plain, controlnet=controlnet)) is WaDiControlNetPipeline
    assert type(AutoPipelineForText2Image.from_pipe(pipe, controlnet=None)) is WaDiPipeline
    assert said == []


# -------------------------------------------------------------------------------------------------------------- saving


def test_saved_folder_is_stock_with_the_controlnet(pipe, tmp_path, said):
    pipe.fuse_lorad()
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionControlNetPipeline"
    assert index["controlnet"] == ["diffusers", "ControlNetModel"]
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is StableDiffusionControlNetPipeline
    assert np.array_equal(draw(stock, num_inference_steps=1, guidance_scale=0.0), expected)
    assert one_step_pipeline_class(tmp_path) is WaDiControlNetPipeline
    assert np.array_equal(draw(WaDiControlNetPipeline.from_pretrained(tmp_path)), expected)
    plain = draw(WaDiPipeline.from_pipe(pipe), image=None)
    assert np.array_equal(draw(WaDiPipeline.from_pretrained(tmp_path), image=None), plain)
    assert said == []


def test_several_controlnets_are_saved_too(pipe, controlnet, tmp_path):
    both = WaDiControlNetPipeline.from_pipe(pipe, controlnet=[controlnet, make_controlnet(tiny_unet(), seed=8)])
    both.fuse_lorad()
    both.save_pretrained(tmp_path / "saved")
    images = [CONDITION, condition(1)]
    loaded = WaDiControlNetPipeline.from_pretrained(tmp_path / "saved")
    assert len(loaded.controlnet.nets) == 2 and np.array_equal(draw(loaded, image=images), draw(both, image=images))


def test_a_controlnet_that_lacks_weights_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "controlnet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["controlnet_mid_block.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OSError, match="ControlNetModel: it lacks 1 tensors, first controlnet_mid_block.weight"):
        WaDiControlNetPipeline.from_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "controlnet")
    with pytest.raises(OSError, match="cannot load the pipeline"):
        WaDiControlNetPipeline.from_pretrained(tmp_path / "saved")


def test_the_card_shows_the_condition_and_nothing_is_drawn_for_it(pipe):
    details = with_sample_grid(pipe, CardDetails(prompts=["red"]))
    assert details.samples is None
    text = str(pipeline_card("some/model", None, {}, details, "WaDiControlNetPipeline"))
    assert (
        'pipe("red", image=condition, num_inference_steps=1' in text and 'pipe("red", image=condition).images' in text
    )
    assert "image=condition" not in str(pipeline_card("some/model", None, {}, details))


# -------------------------------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_learned_relation_and_a_second_adapter(pipe, fused):
    """ReVersion gives an embedding, DreamBooth a second LoRaD: both act, beside the ControlNet and on each other."""
    student = draw(pipe, prompt="red <R> blue")
    pipe.load_textual_inversion({"<R>": torch.linspace(-1, 1, 16)})
    learned = draw(pipe, prompt="red <R> blue")
    assert not np.array_equal(learned, student)
    add_random_adapter(pipe.unet, name="subject", seed=9)
    pipe.set_adapters(["student", "subject"], [1.0, 0.5])
    stacked = draw(pipe, prompt="red <R> blue")
    assert np.abs(stacked - learned).max() > 1e-3
    if fused:
        pipe.fuse_lorad()
        np.testing.assert_allclose(draw(pipe, prompt="red <R> blue"), stacked, atol=1e-4)
    plain = WaDiPipeline.from_pipe(pipe)
    assert np.abs(draw(plain, prompt="red <R> blue", image=None) - stacked).max() > 1e-3
    pipe.set_adapters("student") if not fused else pipe.unfuse_lorad()
    pipe.delete_adapters("subject")
    np.testing.assert_allclose(draw(pipe, prompt="red <R> blue"), learned, atol=1e-4)
