"""The one-step pipelines keep turned weights by default: the same pixels, and nothing of diffusers is disturbed."""

import accelerate
import pytest
import torch
from conftest import TARGETS, add_random_adapter, tiny_unet
from diffusers import ControlNetModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from tiny_pixart import pixart_pipeline

from diffusers_wadi import WaDiControlNetPipeline, WaDiPipeline, WaDiPixArtPipeline, one_step_scheduler
from diffusers_wadi.loaders import lorad_layers
from diffusers_wadi.lorad import LoRaDConfig
from diffusers_wadi.lorad.caching import _cache_of

pytestmark = pytest.mark.usefixtures("without_bars")


@pytest.fixture
def pipe(components):
    add_random_adapter(components["unet"], targets=[*TARGETS, "conv1"])
    return WaDiPipeline(**components)


def draw(pipe, **call):
    return pipe("red blue", generator=torch.Generator().manual_seed(0), output_type="latent", **call).images


def warm(pipe, **call):
    for _ in range(3):
        images = draw(pipe, **call)
    return images


def plainly(pipe, **call):
    """The same by layers that keep nothing."""
    denoiser = getattr(pipe, pipe.lorad_component)
    kept = {layer: layer.kept_rotations for layer in lorad_layers(denoiser)}
    for layer in kept:
        layer.kept_rotations = None
    try:
        return draw(pipe, **call)
    finally:
        for layer, before in kept.items():
            layer.kept_rotations = before


def kept(pipe):
    return _cache_of(getattr(pipe, pipe.lorad_component)).num_layers


def all_layers(pipe):
    return len(list(lorad_layers(getattr(pipe, pipe.lorad_component))))


def test_on_by_default_in_calls_and_off_on_demand(pipe, monkeypatch):
    images = warm(pipe)
    assert kept(pipe) == all_layers(pipe) and torch.equal(images, plainly(pipe))
    cache = _cache_of(pipe.unet)
    assert cache.max_memory == 1 << 30 and cache.calls_only
    monkeypatch.setattr("diffusers_wadi.lorad.layer.LoRaDLinear._turned", None)  # nobody turns anything any more
    assert torch.equal(draw(pipe), images)
    monkeypatch.undo()
    pipe.disable_lorad_cache()
    assert torch.equal(warm(pipe), images) and kept(pipe) == 0
    pipe.enable_lorad_cache("1KiB")
    assert torch.equal(warm(pipe), images) and 0 < cache.nbytes <= 1024
    with pytest.raises(ValueError, match="max_memory"):
        pipe.enable_lorad_cache(-1)


def fuse_and_back(pipe):
    pipe.fuse_lorad()
    draw(pipe)
    pipe.unfuse_lorad()


def off_and_on(pipe):
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plainly(pipe))
    pipe.enable_lora()


def load_lora(pipe):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    pipe.set_adapters(["student", "style"], [0.7, 0.5])


def second_adapter(pipe):
    add_random_adapter(pipe.unet, "other", seed=7)
    pipe.set_adapters(["student", "other"], [1.0, 0.4])


def train_a_module_in_full(pipe):
    config = LoRaDConfig(r=2, target_modules=["to_v"], modules_to_save=["conv_out"], init_weights=False)
    pipe.unet.add_adapter(config, "full")
    pipe.set_adapters(["full"])


def unload_and_load_another(pipe):
    pipe.unload_lorad_weights()
    add_random_adapter(pipe.unet, "next", seed=5)


def cast_by_layers(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


CHANGES = {
    "scale": lambda pipe: pipe.set_adapters("student", 0.5),
    "fused and back": fuse_and_back,
    "fused": lambda pipe: pipe.fuse_lorad(),
    "off and on": off_and_on,
    "a LoRA too": load_lora,
    "another too": second_adapter,
    "modules to save": train_a_module_in_full,
    "loaded anew": unload_and_load_another,
    "float64": lambda pipe: pipe.to(torch.float64),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "ScaleCrafter": lambda pipe: pipe.enable_scalecrafter(128, 128),
    "gradient checkpointing": lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    "8-bit storage": cast_by_layers,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_same_latents_after_any_operation(pipe, change):
    warm(pipe)
    change(pipe)
    size = {"height": 128, "width": 128} if change is CHANGES["ScaleCrafter"] else {}
    for _ in range(3):
        images = draw(pipe, **size)
    assert torch.equal(images, plainly(pipe, **size))


def test_saving_and_loading_hot_and_an_exception(pipe, tmp_path):
    images = warm(pipe)
    pipe.save_lorad_weights(tmp_path / "own")
    pipe.save_pretrained(tmp_path / "whole")
    assert torch.equal(warm(pipe), images)
    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, callback_on_step_end=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert torch.equal(draw(pipe), images)
    pipe.load_lorad_weights(tmp_path / "own", adapter_name="again")
    assert torch.equal(warm(pipe), images)
    state = {key: 0.5 * value for key, value in get_peft_model_state_dict(pipe.unet, adapter_name="again").items()}
    pipe.load_lorad_weights(state, adapter_name="again", hotswap=True)
    assert torch.equal(draw(pipe), plainly(pipe)) and not torch.equal(draw(pipe), images)


def test_pipelines_of_one_denoiser_share_the_setting(pipe):
    twin = WaDiPipeline.from_pipe(pipe)
    controlnet = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(4, 4, 8, 8)).eval()
    controlled = WaDiControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    twin.disable_lorad_cache()
    warm(pipe)
    assert kept(pipe) == 0
    pipe.enable_lorad_cache()
    warm(twin)
    size = 8 * pipe.unet.config.sample_size
    condition = {"image": torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(2))}
    assert torch.equal(warm(controlled, **condition), plainly(controlled, **condition))
    assert kept(controlled) == kept(twin) == all_layers(pipe)


def test_pixart():
    stock = pixart_pipeline()
    config = LoRaDConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False)
    inject_adapter_in_model(config, stock.transformer, "student")
    scheduler = one_step_scheduler(stock.scheduler.config, 0.0047)
    pipe = WaDiPixArtPipeline(**{**stock.components, "scheduler": scheduler})
    images = warm(pipe)
    assert kept(pipe) == all_layers(pipe) > 0 and torch.equal(images, plainly(pipe))


def test_weights_that_are_offloaded_are_not_kept(pipe):
    expected = draw(pipe)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    assert torch.equal(warm(pipe), expected) and kept(pipe) == 0
