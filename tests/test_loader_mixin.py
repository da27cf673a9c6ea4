"""`LoRaDLoaderMixin` on other pipelines than ours, and LoRaD adapters beside plain LoRAs."""

import copy
import json

import pytest
import torch
from backbones import SD15_UNET, SD21_UNET, meta_model, pixart_inputs, tiny_pixart
from conftest import add_random_adapter
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_wadi import LoRaDConfig, LoRaDLoaderMixin, WaDiPipeline, save_lorad_adapter
from diffusers_wadi.loaders import load_lorad_adapter, lorad_layers
from diffusers_wadi.lorad import lorad_target_modules

WEIGHTS = "pytorch_lorad_weights.safetensors"


class StockPipeline(LoRaDLoaderMixin, StableDiffusionPipeline):
    """A pipeline that has diffusers' adapter methods."""


class TransformerPipeline(LoRaDLoaderMixin, DiffusionPipeline):
    """One without any, around a transformer that has none either (PixArt's)."""

    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)


class NoDenoiser(LoRaDLoaderMixin, DiffusionPipeline):
    def __init__(self, vae):
        super().__init__()
        self.register_modules(vae=vae)


def predict(pipe):
    with torch.no_grad():
        if hasattr(pipe, "transformer"):
            return pipe.transformer(**pixart_inputs()).sample
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(4))
        return pipe.unet(z, 999, text).sample


def write_adapter(model, folder, seed, component):
    from diffusers_wadi._adapter_ops import add_adapter

    model = copy.deepcopy(model)
    add_adapter(model, LoRaDConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "x")
    generator = torch.Generator().manual_seed(seed)
    for layer in lorad_layers(model):
        layer.lorad_A["x"].data = 0.3 * torch.randn(layer.lorad_A["x"].shape, generator=generator)
    save_lorad_adapter(model, folder, "x", component)
    return folder


@pytest.fixture(params=["unet", "transformer"])
def case(request, components, tmp_path):
    """A pipeline of each kind and two adapter folders for it."""
    pipe = StockPipeline(**components) if request.param == "unet" else TransformerPipeline(tiny_pixart())
    model = getattr(pipe, request.param)
    folders = [write_adapter(model, tmp_path / name, seed, request.param) for name, seed in (("a", 1), ("b", 2))]
    return pipe, request.param, *folders


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_all_methods_on_any_pipeline(case, tmp_path):
    pipe, component, a, b = case
    base = predict(pipe)
    pipe.load_lorad_weights(a, adapter_name="a")
    only_a = predict(pipe)
    assert (only_a - base).abs().max() > 1e-4
    pipe.load_lorad_weights(b)
    assert pipe.get_list_adapters() == {component: ["a", "default_0"]} and pipe.get_active_adapters() == ["default_0"]
    only_b = predict(pipe)
    pipe.set_adapters("a")
    assert torch.equal(predict(pipe), only_a)
    pipe.set_adapters(["a", "default_0"], [0.0, 1.0])
    close(predict(pipe), only_b)
    pipe.set_adapters(["a", "default_0"], 0.5)
    mixed = predict(pipe)
    pipe.fuse_lorad()
    close(predict(pipe), mixed)
    pipe.unfuse_lorad()
    close(predict(pipe), mixed)
    pipe.disable_lora()
    close(predict(pipe), base)
    pipe.enable_lora()
    pipe.save_lorad_weights(tmp_path / "saved", "a")
    saved, given = load_file(tmp_path / "saved" / WEIGHTS), load_file(a / WEIGHTS)
    assert saved.keys() == given.keys() and all(torch.equal(saved[key], given[key]) for key in given)
    assert all(key.startswith(f"{component}.") for key in saved)
    pipe.delete_adapters("default_0")
    assert pipe.get_list_adapters() == {component: ["a"]}
    pipe.set_adapters("a")
    close(predict(pipe), only_a)
    pipe.unload_lorad_weights()
    close(predict(pipe), base)
    assert not list(lorad_layers(getattr(pipe, component))) and pipe.get_list_adapters() == {}
    pipe.load_lorad_weights(a)
    pipe.delete_adapters(["default_0"])
    close(predict(pipe), base)
    assert pipe.get_list_adapters() == {}


def test_default_names_are_free_ones(case):
    pipe, component, a, b = case
    for source in (a, b):
        pipe.load_lorad_weights(source)
    pipe.delete_adapters("default_0")
    pipe.load_lorad_weights(a)
    assert pipe.get_list_adapters() == {component: ["default_1", "default_0"]}


def refusals(pipe, a, b):
    yield lambda: pipe.set_adapters("c"), r"\['c'\] not in the list of present adapters: \['a'\]"
    yield lambda: pipe.set_adapters(["a"], [1.0, 2.0]), "weights"
    yield lambda: pipe.delete_adapters(["a", "c"]), r"\['c'\] not in the list"
    yield lambda: pipe.fuse_lorad(adapter_names=["c"]), r"\['c'\] are no LoRaD adapters; \['a'\] are"
    yield lambda: pipe.load_lorad_weights(b, adapter_name="a"), "'a' is taken; choose another or delete"
    yield lambda: pipe.load_lorad_weights(b, adapter_name="c", hotswap=True), "no LoRaD adapter 'c' to swap"
    yield lambda: pipe.load_lorad_weights(b, weight_name="../a/x.safetensors"), "leaves .* give a name inside it"
    yield lambda: pipe.load_lorad_weights(b, weight_name="/etc/x.safetensors"), "leaves"
    yield lambda: pipe.load_lorad_weights(b, subfolder=".."), "leaves"
    yield lambda: pipe.load_lorad_weights(b, weight_name="weights.bin"), "safetensors only, which cannot carry code"
    yield lambda: pipe.load_lorad_weights(b, weight_name="weights.pth"), "safetensors only"
    yield lambda: pipe.load_lorad_weights(b, subfolder="deeper"), "no pytorch_lorad_weights.safetensors in .*b/deeper"
    yield lambda: pipe.load_lorad_weights(b, revison="v1"), "unexpected keyword 'revison'; expected revision"
    yield lambda: pipe.save_lorad_weights(b, "c"), r"no LoRaD adapter 'c' to save; the model has \['a'\]"
    yield lambda: pipe.save_lorad_weights(b, repo="x"), "unexpected keyword 'repo'; for the upload there are repo_id"


def test_refusals_leave_the_pipeline_as_it_was(case):
    pipe, component, a, b = case
    pipe.load_lorad_weights(a, adapter_name="a")
    before, keys = predict(pipe), list(getattr(pipe, component).state_dict())
    for call, message in refusals(pipe, a, b):
        with pytest.raises((ValueError, OSError, TypeError), match=message):
            call()
        assert torch.equal(predict(pipe), before) and list(getattr(pipe, component).state_dict()) == keys, message
        assert pipe.get_list_adapters() == {component: ["a"]} and pipe.get_active_adapters() == ["a"], message


def test_a_fused_adapter_is_not_deleted(case):
    pipe, component, a, b = case
    pipe.load_lorad_weights(a, adapter_name="a")
    pipe.fuse_lorad()
    before = predict(pipe)
    with pytest.raises(ValueError, match="fused into the weights; call unfuse_lorad"):
        pipe.delete_adapters("a")
    assert torch.equal(predict(pipe), before)


def test_a_pipeline_without_a_denoiser(components):
    with pytest.raises(ValueError, match="neither a unet nor a transformer"):
        NoDenoiser(components["vae"]).load_lorad_weights({})


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_draws_no_random_numbers_it_need_not_and_shares_none(case, low_cpu_mem_usage):
    pipe, component, a, _ = case
    given = load_file(a / WEIGHTS)
    state, before = torch.random.get_rng_state(), {key: value.clone() for key, value in given.items()}
    pipe.load_lorad_weights(given, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(torch.random.get_rng_state(), state) == low_cpu_mem_usage
    layers = list(lorad_layers(getattr(pipe, component)))
    assert all(layer.lorad_A["default_0"].dtype == torch.float32 for layer in layers)
    for layer in layers:
        layer.lorad_A["default_0"].data += 1
    assert all(torch.equal(given[key], before[key]) for key in given)


def test_hotswap_keeps_the_tensors_and_what_is_active(case):
    pipe, component, a, b = case
    pipe.load_lorad_weights(b, adapter_name="b")
    expected = predict(pipe)
    pipe.delete_adapters("b")
    pipe.load_lorad_weights(a, adapter_name="a")
    parameters = [id(p) for p in getattr(pipe, component).parameters()]
    pipe.load_lorad_weights(b, adapter_name="a", hotswap=True)
    assert [id(p) for p in getattr(pipe, component).parameters()] == parameters
    assert torch.equal(predict(pipe), expected)
    wider = {
        key: torch.cat([value, value], dim=int(key.endswith("_A"))) for key, value in load_file(a / WEIGHTS).items()
    }
    for source, message in ((wider, "rank"), ({"unet.nowhere.lorad_A": torch.zeros(1, 1)}, "only one of lorad_A")):
        with pytest.raises(ValueError, match=message):
            pipe.load_lorad_weights(source, adapter_name="a", hotswap=True)
        assert torch.equal(predict(pipe), expected)
    pipe.fuse_lorad()
    with pytest.raises(ValueError, match="fused into the base weights; unfuse it"):
        pipe.load_lorad_weights(a, adapter_name="a", hotswap=True)
    pipe.unfuse_lorad()
    close(predict(pipe), expected)


def test_the_metadata_alone_rebuilds_the_config(components, tmp_path):
    unet = components["unet"]
    config = LoRaDConfig(
        r=4, target_modules=["to_q", "to_k", "time_emb_proj"], rank_pattern={"to_k": 2}, exclude_modules=["nothing"]
    )
    unet.add_adapter(config, "x")
    save_lorad_adapter(unet, tmp_path, "x", base_model_name_or_path="org/base")
    (tmp_path / "adapter_config.json").unlink()
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        stored = json.loads(file.metadata()["lorad_config"])
    rebuilt = LoRaDConfig.from_peft_type(**stored)
    want = copy.deepcopy(config)
    want.base_model_name_or_path, want.inference_mode = "org/base", True
    assert rebuilt == want
    other = copy.deepcopy(components["unet"])
    other.delete_adapters("x")
    load_lorad_adapter(other, tmp_path, "y")
    assert {layer.r["y"] for layer in lorad_layers(other)} == {2, 4}


def test_the_same_adapter_gives_the_same_file(components, tmp_path):
    unet = add_random_adapter(components["unet"])
    folders = [tmp_path / str(number) for number in range(8)]
    for folder in folders:
        save_lorad_adapter(unet, folder, "student", metadata={"steps": "5", "prompt": "größer"})
    assert len({(folder / WEIGHTS).read_bytes() for folder in folders}) == 1
    with safe_open(folders[0] / WEIGHTS, "pt") as file:
        assert file.metadata()["prompt"] == "größer" and list(file.keys()) == list(load_file(folders[0] / WEIGHTS))


def test_convolutions_come_back(components, tmp_path):
    unet, other = components["unet"], copy.deepcopy(components["unet"])
    unet.add_adapter(LoRaDConfig(r=2, target_modules=["conv1", "conv_in", "to_q"], init_lorad_weights="xavier"), "x")
    assert any(layer.get_base_layer().weight.ndim == 4 for layer in lorad_layers(unet))
    save_lorad_adapter(unet, tmp_path, "x")
    load_lorad_adapter(other, tmp_path, "x")
    pair = [type("Pipe", (), {"unet": model})() for model in (unet, other)]
    assert torch.equal(*map(predict, pair))


def test_an_adapter_of_sd_21_is_refused_on_sd_15():
    sd15, sd21 = (meta_model(UNet2DConditionModel, config) for config in (SD15_UNET, SD21_UNET))
    layers = {name: sd21.get_submodule(name) for name in lorad_target_modules(sd21)}
    state = {}
    for name, layer in layers.items():
        state[f"unet.{name}.lorad_A"] = torch.zeros(layer.out_features, 1)
        state[f"unet.{name}.lorad_B"] = torch.zeros(1, layer.in_features // 2)
    with pytest.raises(
        ValueError, match=r"does not fit this UNet2DConditionModel: \d+ of 2\d\d modules differ, first"
    ):
        load_lorad_adapter(sd15, state)
    assert not list(lorad_layers(sd15)) and not hasattr(sd15, "peft_config")


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def lora_file(components, tmp_path):
    """A LoRA as stock diffusers saves it."""
    torch.manual_seed(1)
    pipe = StableDiffusionPipeline(**copy.deepcopy(components))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False), "lora")
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipe.unet, adapter_name="lora")
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    return tmp_path / "lora"


@pytest.mark.parametrize("pipeline", [WaDiPipeline, StockPipeline])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("lora_first", [False, True])
def test_a_plain_lora_over_a_lorad(components, adapter_folder, lora_file, pipeline, fused, lora_first):
    """Both act: the weight is turned, and the LoRA adds to it what it adds to any weight."""
    expected = pipeline(**copy.deepcopy(components))
    expected.load_lorad_weights(adapter_folder)
    expected.fuse_lorad()
    expected.unload_lorad_weights()
    without_lora = predict(expected)
    expected.load_lora_weights(lora_file, adapter_name="lora")
    expected = predict(expected)
    assert (expected - without_lora).abs().max() > 1e-3

    pipe = pipeline(**components)
    if lora_first:
        pipe.load_lora_weights(lora_file, adapter_name="lora")
    pipe.load_lorad_weights(adapter_folder, adapter_name="rotation")
    if fused:
        pipe.fuse_lorad(adapter_names=["rotation"])
    if not lora_first:
        pipe.load_lora_weights(lora_file, adapter_name="lora")
    pipe.set_adapters(["rotation", "lora"])
    close(predict(pipe), expected)
    pipe.set_adapters(["rotation", "lora"], [1.0, 0.0])
    close(predict(pipe), without_lora)
    pipe.set_adapters(["rotation", "lora"])
    pipe.delete_adapters("lora")
    close(predict(pipe), without_lora)


def test_a_lora_loaded_over_an_active_lorad_acts_at_once(components, adapter_folder, lora_file):
    pipe = WaDiPipeline(**components)
    pipe.load_lorad_weights(adapter_folder, adapter_name="rotation")
    pipe.load_lora_weights(lora_file, adapter_name="lora")
    seen = predict(pipe)
    pipe.set_adapters(["rotation", "lora"])
    close(predict(pipe), seen)


def test_a_lorad_fused_and_unfused_under_a_fused_lora(components, adapter_folder, lora_file):
    """Stock `fuse_lora` merges the LoRA into the same weight; what it added must not be turned."""
    pipe = WaDiPipeline(**components)
    pipe.load_lorad_weights(adapter_folder, adapter_name="rotation")
    pipe.load_lora_weights(lora_file, adapter_name="lora")
    pipe.set_adapters(["rotation", "lora"])
    both = predict(pipe)
    pipe.fuse_lorad(adapter_names=["rotation"])
    pipe.fuse_lora(adapter_names=["lora"])
    close(predict(pipe), both)
    pipe.unfuse_lorad()
    pipe.fuse_lorad(adapter_names=["rotation"])
    close(predict(pipe), both)
