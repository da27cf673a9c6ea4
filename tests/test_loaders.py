import copy
import json
import shutil
import warnings

import pytest
import torch
from conftest import TARGETS, add_random_adapter, tiny_unet
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from diffusers_wadi import LoRaDConfig, WaDiPipeline, load_lorad_adapter, save_lorad_adapter
from diffusers_wadi.loaders import lorad_layers
from diffusers_wadi.lorad import lorad_target_modules

WEIGHTS = "pytorch_lorad_weights.safetensors"


@pytest.fixture
def unet(components):
    return components["unet"]


@pytest.fixture
def adapter(adapter_folder, tmp_path):
    """A copy of the adapter folder that a test may spoil."""
    return shutil.copytree(adapter_folder, tmp_path / "adapter")


def predict(unet):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return unet(z, 999, text).sample


def rewrite(folder, change):
    """Apply `change` to the tensors of an adapter file, keeping its metadata."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def refused_untouched(unet, source, message, **options):
    before, keys = predict(unet), list(unet.state_dict())
    with pytest.raises((ValueError, OSError), match=message):
        load_lorad_adapter(unet, source, "new", **options)
    assert list(unet.state_dict()) == keys and torch.equal(predict(unet), before)
    assert "new" not in (getattr(unet, "peft_config", None) or {})


def test_round_trip_is_bit_exact(unet, adapter_folder):
    base = predict(unet)
    load_lorad_adapter(unet, adapter_folder, "mine")
    loaded = {f"unet.{key}": t for key, t in get_peft_model_state_dict(unet, adapter_name="mine").items()}
    saved = load_file(adapter_folder / WEIGHTS)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert all(key.endswith((".lorad_A", ".lorad_B")) for key in saved)
    assert (predict(unet) - base).abs().max() > 1e-3
    unet.disable_adapters()
    assert torch.equal(predict(unet), base)


def test_file_alone_folder_and_dict_are_the_same(components, adapter_folder, tmp_path):
    unet, results = components["unet"], []
    lonely = shutil.copy(adapter_folder / WEIGHTS, tmp_path / "renamed.safetensors")
    for source in (adapter_folder, lonely, load_file(lonely)):
        model = copy.deepcopy(unet)
        load_lorad_adapter(model, source)
        results.append(predict(model))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("component", ["unet", "transformer", "text_encoder"])
def test_keys_may_be_named_by_their_component(components, adapter_folder, component):
    plain = {key.removeprefix("unet."): value for key, value in load_file(adapter_folder / WEIGHTS).items()}
    named, unnamed = components["unet"], copy.deepcopy(components["unet"])
    load_lorad_adapter(named, {f"{component}.{key}": value for key, value in plain.items()})
    load_lorad_adapter(unnamed, plain)
    assert torch.equal(predict(named), predict(unnamed))
    with pytest.raises(ValueError, match="no such module"):
        load_lorad_adapter(unnamed, {f"other.{key}": value for key, value in plain.items()}, "second")


def test_a_conv1d_fits_as_it_is_stored(tmp_path):
    model = torch.nn.Sequential()
    model.add_module("c_fc", Conv1D(8, 6))  # 6 in, 8 out, stored (6, 8)
    saved = {"c_fc.lorad_A": torch.randn(8, 2), "c_fc.lorad_B": torch.randn(2, 3)}
    load_lorad_adapter(model, saved)
    assert torch.equal(dict(model.named_parameters())["c_fc.lorad_A.default"], saved["c_fc.lorad_A"])
    turned = {"c_fc.lorad_A": torch.randn(6, 2), "c_fc.lorad_B": torch.randn(2, 4)}
    with pytest.raises(ValueError, match=r"the file is for \(out, in\) = \(6, 8\), the model has \(8, 6\)"):
        load_lorad_adapter(model, turned, "second")


def test_config_beside_equals_metadata_and_peft_reads_it(adapter_folder, base_folder):
    with safe_open(adapter_folder / WEIGHTS, "pt") as file:
        inside = json.loads(file.metadata()["lorad_config"])
    assert inside == json.loads((adapter_folder / "adapter_config.json").read_text())
    config = PeftConfig.from_pretrained(adapter_folder)
    assert isinstance(config, LoRaDConfig) and config.r == 4 and set(config.target_modules) == set(TARGETS)
    assert config.base_model_name_or_path == str(base_folder)


def test_ranks_may_differ_in_a_state_dict_without_config(unet):
    config = LoRaDConfig(r=4, rank_pattern={"to_q": 2}, target_modules=TARGETS, init_lorad_weights="xavier")
    unet.add_adapter(config, "mixed")
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet, adapter_name="mixed").items()}
    assert len({value.shape[1] for key, value in state.items() if key.endswith("lorad_A")}) == 2
    expected = predict(unet)
    unet.delete_adapters("mixed")
    load_lorad_adapter(unet, state, "again")
    assert torch.equal(predict(unet), expected)


def test_ranks_may_differ(unet, tmp_path):
    other = copy.deepcopy(unet)
    config = LoRaDConfig(r=4, rank_pattern={"to_q": 2}, target_modules=TARGETS, init_lorad_weights="xavier")
    unet.add_adapter(config, "mixed")
    save_lorad_adapter(unet, tmp_path, "mixed")
    load_lorad_adapter(other, tmp_path)
    assert torch.equal(predict(unet), predict(other))


@pytest.mark.parametrize("bias", ["lorad_only", "all"])
@pytest.mark.parametrize("below_a_lora", [False, True])
def test_trained_biases_come_back(unet, tmp_path, bias, below_a_lora):
    other = copy.deepcopy(unet)
    unet.add_adapter(LoRaDConfig(r=2, target_modules=TARGETS, init_lorad_weights="xavier", bias=bias), "mine")
    trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data += 0.1 * torch.randn(parameter.shape)
    assert any(p.ndim == 1 for p in trained)
    expected = predict(unet)
    if below_a_lora:
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]), "lora")
        other.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_out.0"]), "lora")
    save_lorad_adapter(unet, tmp_path, "mine")
    assert not any("base_layer" in key for key in load_file(tmp_path / WEIGHTS))
    load_lorad_adapter(other, tmp_path, "new")
    torch.testing.assert_close(predict(other), expected)


def test_second_adapter_below_a_lora(unet, adapter_folder):
    twin = copy.deepcopy(unet)
    load_lorad_adapter(twin, adapter_folder, "second")
    add_random_adapter(unet, "first", seed=9)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")  # starts without effect
    load_lorad_adapter(unet, adapter_folder, "second")
    torch.testing.assert_close(predict(unet), predict(twin))


def test_biases_that_do_not_fit_are_refused(unet, tmp_path):
    other = copy.deepcopy(unet)
    unet.add_adapter(LoRaDConfig(r=2, target_modules=TARGETS, bias="lorad_only"), "mine")
    save_lorad_adapter(unet, tmp_path, "mine")

    def shorten(tensors):
        for key in [key for key in tensors if key.endswith(".bias")][:1]:
            tensors[key] = tensors[key][:1]

    def add_bias(tensors):
        tensors["unet.nowhere.bias"] = torch.ones(2)
        tensors.update({key: value + 1 for key, value in tensors.items() if key.endswith("to_out.0.bias")})

    whole = (tmp_path / WEIGHTS).read_bytes()
    for change, message in (
        (shorten, "bias is not finite or not of shape"),
        (add_bias, "1 keys have no place in the model, first nowhere.bias"),
        (add_one, "1 keys that belong to no LoRaD layer, first conv_in.weight"),
    ):
        rewrite(tmp_path, change)
        refused_untouched(other, tmp_path, message)
        (tmp_path / WEIGHTS).write_bytes(whole)


@pytest.mark.parametrize("role", ["student", "fake"])
def test_the_paper_s_layers_come_back(unet, tmp_path, role):
    """PEFT shortens long lists of layers to their endings; what is found by them has to be what was saved."""
    other, targets = copy.deepcopy(unet), lorad_target_modules(unet, role)
    add_random_adapter(unet, targets=targets)
    save_lorad_adapter(unet, tmp_path, "student")
    load_lorad_adapter(other, tmp_path)
    assert torch.equal(predict(other), predict(unet))


def test_a_half_precision_file_is_half_as_large_and_loads_as_float32(unet, adapter_folder, tmp_path):
    load_lorad_adapter(unet, adapter_folder)
    exact = predict(unet)
    save_lorad_adapter(unet, tmp_path, dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    unet.delete_adapters("default")
    load_lorad_adapter(unet, tmp_path)
    factors = [p for name, p in unet.named_parameters() if ".lorad_" in name]
    assert factors and {p.dtype for p in factors} == {torch.float32}
    assert 0 < (predict(unet) - exact).abs().max() < 1e-2 * exact.abs().max()


def test_second_adapter_becomes_active_and_taken_name_is_refused(unet, adapter_folder):
    add_random_adapter(unet, "first", seed=9)
    only_first = predict(unet)
    load_lorad_adapter(unet, adapter_folder, "second")
    assert unet.active_adapters() == ["second"]
    unet.set_adapters(["first"])
    assert torch.equal(predict(unet), only_first)
    with pytest.raises(ValueError, match="'second' is taken"):
        load_lorad_adapter(unet, adapter_folder, "second")


def test_wrong_base_names_first_mismatch_and_count(adapter_folder):
    torch.manual_seed(0)
    refused_untouched(tiny_unet(width=12), adapter_folder, r"\d+ of \d+ modules differ, first .*\(out, in\)")


def test_wrong_base_leaves_other_adapters_active(adapter):
    torch.manual_seed(0)
    unet = add_random_adapter(tiny_unet(width=12), "old")
    refused_untouched(unet, adapter, "does not fit")
    assert unet.active_adapters() == ["old"]


def test_failure_while_filling_is_rolled_back(unet, adapter, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk on fire")

    before = predict(unet)
    monkeypatch.setattr("diffusers_wadi._adapter_io.set_peft_model_state_dict", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        load_lorad_adapter(unet, adapter, "new")
    assert torch.equal(predict(unet), before) and not any("lorad" in key for key in unet.state_dict())
    monkeypatch.undo()
    load_lorad_adapter(unet, adapter, "new")


def transpose_one(tensors):
    key = next(key for key in tensors if key.endswith("lorad_A"))
    tensors[key] = tensors[key].T.contiguous()


def spoil_one(tensors):
    tensors[next(iter(tensors))][0, 0] = float("nan")


def drop_one(tensors):
    del tensors[next(key for key in tensors if key.endswith("lorad_B"))]


def rename_one(tensors):
    for letter in "AB":
        key = next(key for key in tensors if key.endswith(f"lorad_{letter}"))
        tensors[f"unet.nowhere.lorad_{letter}"] = tensors.pop(key)


def lose_a_layer(tensors):
    for letter in "AB":
        del tensors[next(key for key in tensors if key.endswith(f"lorad_{letter}"))]


def add_one(tensors):
    tensors["unet.conv_in.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    "change, message",
    [
        (transpose_one, "1 of .* modules differ, first .*not .out, r. and"),
        (spoil_one, "not finite"),
        (drop_one, "1 modules have only one of"),
        (rename_one, "nowhere: no such module"),
        (lose_a_layer, "its config names .*: 1 differ, first "),
        (add_one, "belong to no LoRaD layer, first conv_in.weight"),
    ],
)
def test_damaged_tensors(unet, adapter, change, message):
    rewrite(adapter, change)
    refused_untouched(unet, adapter, message)


def test_damaged_missing_and_foreign_files(unet, adapter, tmp_path):
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused_untouched(unet, adapter, "not a complete safetensors file")
    (adapter / WEIGHTS).unlink()
    refused_untouched(unet, adapter, f"no {WEIGHTS} in .*weight_name=")
    refused_untouched(unet, adapter, "leaves", weight_name="../secret.safetensors")
    refused_untouched(unet, tmp_path / "not there", "neither|not a folder here")
    (tmp_path / "pickle.pth").write_bytes(b"\x80")
    refused_untouched(unet, tmp_path / "pickle.pth", "safetensors only")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused_untouched(unet, adapter, "'LORA', expected 'LORAD'")
    (adapter / "adapter_config.json").write_text("{")
    refused_untouched(unet, adapter, "no valid JSON")
    refused_untouched(unet, {"unet.x.lora_A.weight": torch.zeros(2, 2)}, "load_lora_weights")
    refused_untouched(unet, {"x.weight": torch.zeros(2, 2)}, "holds no LoRaD weights")


def test_config_of_another_adapter(unet, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 64}))
    refused_untouched(unet, adapter, "config says rank 64, its tensors have")


def test_save_refuses_and_keeps_the_old_file(unet, adapter, tmp_path):
    whole = (adapter / WEIGHTS).read_bytes()
    add_random_adapter(unet, "broken")
    next(p for n, p in unet.named_parameters() if "lorad_A.broken" in n).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        save_lorad_adapter(unet, adapter, "broken")
    with pytest.raises(ValueError, match=r"no LoRaD adapter 'other'.*\['broken'\]"):
        save_lorad_adapter(unet, adapter, "other")
    assert (adapter / WEIGHTS).read_bytes() == whole and len(list(adapter.iterdir())) == 2
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to the folder"):
        save_lorad_adapter(unet, tmp_path / "file" / "below", "broken")


def test_pipeline_methods(adapter_folder, base_folder, tmp_path):
    pipe = WaDiPipeline.from_pretrained(base_folder)
    pipe.set_progress_bar_config(disable=True)
    base = predict(pipe.unet)
    pipe.load_lorad_weights(adapter_folder)
    assert pipe.get_active_adapters() == ["default_0"]
    active = predict(pipe.unet)
    pipe.set_adapters(["default_0"], [0.0])
    torch.testing.assert_close(predict(pipe.unet), base)
    pipe.set_adapters(["default_0"], [1.0])

    pipe.fuse_lorad()
    torch.testing.assert_close(predict(pipe.unet), active, rtol=1e-4, atol=1e-5)
    pipe.unfuse_lorad()
    torch.testing.assert_close(predict(pipe.unet), active, rtol=1e-4, atol=1e-5)
    pipe.fuse_lorad(lorad_scale=0.5)
    half = predict(pipe.unet)
    pipe.unfuse_lorad()
    torch.testing.assert_close(predict(pipe.unet), active, rtol=1e-4, atol=1e-5)
    pipe.set_adapters(["default_0"], [0.5])
    torch.testing.assert_close(predict(pipe.unet), half, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="are no LoRaD adapters"):
        pipe.fuse_lorad(adapter_names=["nobody"])

    pipe.save_lorad_weights(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_folder)
    pipe.unload_lorad_weights()
    torch.testing.assert_close(predict(pipe.unet), base)
    assert not any("lorad" in key for key in pipe.unet.state_dict())


def test_lora_beside_lorad_is_kept(components, adapter_folder):
    pipe = WaDiPipeline(**components)
    pipe.load_lorad_weights(adapter_folder, adapter_name="rotation")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["conv_in"]), "plain")
    pipe.unload_lorad_weights()
    assert list(pipe.unet.peft_config) == ["plain"]


def two_adapters(components):
    pipe = WaDiPipeline(**components)
    add_random_adapter(pipe.unet, "a", seed=1)
    add_random_adapter(pipe.unet, "b", seed=2)
    pipe.set_adapters(["a"], [0.8])
    return pipe


def test_each_fuse_has_its_adapters_and_its_scale(components):
    pipe = two_adapters(components)
    live = predict(pipe.unet)
    twin = copy.deepcopy(pipe.unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that a further adapter is being merged
        pipe.fuse_lorad(0.5, ["b"])
        twin.set_adapters(["b"], [0.5])
        torch.testing.assert_close(predict(pipe.unet), predict(twin), rtol=1e-4, atol=1e-5)
        pipe.fuse_lorad(0.25)
        twin.set_adapters(["a", "b"], [0.2, 0.5])
        torch.testing.assert_close(predict(pipe.unet), predict(twin), rtol=1e-4, atol=1e-5)
    pipe.unfuse_lorad()
    assert pipe.get_active_adapters() == ["a"]
    torch.testing.assert_close(predict(pipe.unet), live, rtol=1e-4, atol=1e-5)


def test_safe_fusing_fuses_all_or_nothing(components):
    pipe = two_adapters(components)
    layers = list(lorad_layers(pipe.unet))
    pipe.fuse_lorad(adapter_names=["b"])
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    layers[-1].lorad_A["a"].data[0, 0] = float("nan")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="not finite"):
        warnings.simplefilter("ignore")
        pipe.fuse_lorad(0.5, ["a"], safe_fusing=True)
    assert all(layer.merged_adapters == ["b"] for layer in layers)
    for key, value in pipe.unet.state_dict().items():
        if "lorad_A" not in key:
            torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-6)


def test_what_was_fused_stays_beside_a_lora(components, adapter_folder):
    pipe = WaDiPipeline(**components)
    pipe.load_lorad_weights(adapter_folder, adapter_name="rotation")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "plain")
    pipe.set_adapters(["rotation", "plain"])
    expected = predict(pipe.unet)
    pipe.fuse_lorad()
    pipe.unload_lorad_weights()
    assert list(pipe.unet.peft_config) == ["plain"] and pipe.is_one_step and not list(lorad_layers(pipe.unet))
    torch.testing.assert_close(predict(pipe.unet), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_stock_unload_is_noticed(components, adapter_folder, fused):
    pipe = WaDiPipeline(**components)
    pipe.load_lorad_weights(adapter_folder)
    if fused:
        pipe.fuse_lorad()
    pipe.unload_lora_weights()
    assert pipe.is_one_step == fused and not list(lorad_layers(pipe.unet))


def test_a_local_base_is_stored_by_its_absolute_path(base_folder, adapter_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(base_folder.parent)
    pipe = WaDiPipeline.from_pretrained(adapter_folder, base_model=base_folder.name)
    pipe.save_lorad_weights(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_folder)
