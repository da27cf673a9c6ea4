"""Weighted sums of adapters, swaps in place, and batches with an adapter per sample."""

import copy

import pytest
import torch
from backbones import add_adapter, fill_adapter, pixart_inputs, select, tiny_pixart, tiny_unet, unet_inputs
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from diffusers_wadi.lorad import (
    LoRaDConfig,
    LoRaDLayer,
    add_weighted_adapter,
    hotswap_lorad_adapter,
    lorad_target_modules,
    mixed_adapter_batch,
)

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`|Adapter name 'a':UserWarning")


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).sample


def two_adapters(make=tiny_unet):
    """Adapters of other ranks, on layers that they share only in part; "b" is active."""
    model = make()
    names = lorad_target_modules(model)
    add_adapter(model, LoRaDConfig(r=3, target_modules=names, rank_pattern={"to_q": 2}), "a")
    add_adapter(model, LoRaDConfig(r=2, target_modules=["to_q", "to_v", "proj_in"]), "b")
    for name in "ab":
        fill_adapter(model, name, seed=ord(name))
    select(model, ["b"])
    return model


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.conv, self.lin1 = nn.Linear(10, 16), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 2)

    def forward(self, x):
        return self.lin1(self.conv(self.lin0(x).relu().view(-1, 4, 2, 2)).flatten(1))


def peft_mlp():
    model = get_peft_model(MLP(), LoRaDConfig(r=3, target_modules=["lin0", "conv"], init_weights=False), "a")
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["conv", "lin1"], init_weights=False))
    return model.eval()


@pytest.mark.parametrize("make, inputs", [(tiny_unet, unet_inputs), (tiny_pixart, pixart_inputs)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_a_weighted_sum_equals_both_active(make, inputs, weights):
    model, x = two_adapters(make), inputs()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    b = run(model, x)
    add_weighted_adapter(model, ["a", "b"], weights, "sum")
    assert torch.equal(run(model, x), b)  # it is not active yet, and nothing else has changed
    assert flags.items() <= {name: p.requires_grad for name, p in model.named_parameters()}.items()
    select(model, ["a", "b"])
    for module in model.modules():
        if isinstance(module, LoRaDLayer):
            for name, weight in zip("ab", weights):
                module.set_scale(name, weight)
    both = run(model, x)
    select(model, ["sum"])
    torch.testing.assert_close(run(model, x), both, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(both, b)


def test_the_sum_is_an_adapter_like_any_other(tmp_path):
    model, x = peft_mlp(), torch.randn(5, 10)
    model.base_model.set_adapter(["a", "b"])
    expected = model(x)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    for name in "ab":
        model.delete_adapter(name)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)
    assert {n: m.r for n, m in model.base_model.model.named_children()} == {
        "lin0": {"sum": 3},
        "conv": {"sum": 5},
        "lin1": {"sum": 2},
    }
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP(), tmp_path / "sum")
    assert torch.equal(loaded(x), model(x))


def test_a_sum_of_low_rank():
    model = tiny_unet()
    for name in "ab":
        model.add_adapter(LoRaDConfig(r=4, target_modules=["to_q"]), name)
        fill_adapter(model, name, seed=ord(name))
    for rank in (2, 8):
        add_weighted_adapter(model, ["a", "b"], [1.0, 0.5], f"r{rank}", combination_type="svd", svd_rank=rank)
    for layer in (m for m in model.modules() if isinstance(m, LoRaDLayer)):
        theta = layer.get_angles(["a"]) + 0.5 * layer.get_angles(["b"])
        u, s, v = torch.linalg.svd(theta)
        assert layer.r["r2"] == 2
        torch.testing.assert_close(layer.get_angles(["r2"]), u[:, :2] * s[:2] @ v[:2], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.get_angles(["r8"]), theta, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"adapters": ["a", "c"]}, r"of \['a', 'b'\]; got \['a', 'c'\]"),
        ({"adapters": ["a", "a"]}, "each once"),
        ({"weights": [1.0]}, "2 adapters, 1 weights"),
        ({"weights": [1.0, float("nan")]}, "have to be finite"),
        ({"adapter_name": "a"}, "'a' is taken"),
        ({"combination_type": "ties"}, "one of .'cat', 'svd'., got 'ties'"),
        ({"svd_rank": 2}, "goes with the combination 'svd'"),
    ],
)
def test_sums_that_are_refused(change, message):
    model = two_adapters()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(model, **{"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "sum"} | change)
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["a", "b"]


def test_a_sum_takes_a_trained_module_as_it_is(tmp_path):
    model = get_peft_model(MLP(), LoRaDConfig(r=3, target_modules=["lin0"], modules_to_save=["lin1"]), "a").eval()
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["lin0"], init_weights=False))
    model.add_adapter("c", LoRaDConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"]))
    fill_adapter(model, "a")
    model.base_model.model.lin1.modules_to_save["a"].weight.data.add_(1.0)
    model.base_model.set_adapter(["a", "b"])
    x = torch.randn(5, 10)
    both = model(x)
    model.add_weighted_adapter(["b", "a"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), both)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(MLP(), tmp_path / "sum").eval()
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="same module with modules_to_save, but found 1"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "other")
    assert "other" not in model.peft_config and "other" not in model.base_model.model.lin1.modules_to_save


def test_a_swap_is_in_place_and_changes_everything_else():
    model, x = two_adapters(), unet_inputs()
    select(model, ["a"])
    other = two_adapters()
    fill_adapter(other, "a", seed=99)
    select(other, ["a"])
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    state = get_peft_model_state_dict(other, adapter_name="a")
    hotswap_lorad_adapter(model, {f"unet.{key}": value for key, value in state.items()}, "a")
    assert torch.equal(run(model, x), run(other, x))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    part = {key: value for key, value in state.items() if "to_v" in key}  # fewer layers and a lower rank
    hotswap_lorad_adapter(model, {k: v[:, :1] if k.endswith("A") else v[:1] for k, v in part.items()}, "a")
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, LoRaDLayer) and "a" in m.r):
        expected = torch.zeros_like(layer.get_angles(["a"]))
        if "to_v" in name:
            expected = state[f"{name}.lorad_A"][:, :1] @ state[f"{name}.lorad_B"][:1]
        torch.testing.assert_close(layer.get_angles(["a"]), expected)


@pytest.mark.slow
def test_a_swap_under_the_compiler_compiles_nothing_anew():
    model, x = peft_mlp(), torch.randn(5, 10)
    model.set_adapter("a")
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "lorad_A.a" in name:
            nn.init.normal_(parameter)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        first = compiled(x)
        hotswap_lorad_adapter(compiled, get_peft_model_state_dict(other, adapter_name="a"), "a")
        torch.testing.assert_close(compiled(x), other(x))
        assert not torch.allclose(first, other(x))


def test_swaps_that_are_refused_change_nothing():
    model = two_adapters()
    good = get_peft_model_state_dict(model, adapter_name="a")
    key = next(key for key in good if key.endswith("to_k.lorad_A"))
    bad = {
        "rank 9": good
        | {key: torch.ones(len(good[key]), 9), key[:-1] + "B": torch.ones(9, good[key[:-1] + "B"].shape[1])},
        "trained on another base": good | {key: torch.ones(3, 2)},
        "not finite": good | {key: good[key] * float("nan")},
        "lack one of": {k: v for k, v in good.items() if k != key},
        "named <module>": good | {"conv_in.bias": torch.ones(8)},
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for message, state in bad.items():
        with pytest.raises(ValueError, match=message):
            hotswap_lorad_adapter(model, state, "a")
    with pytest.raises(ValueError, match="no LoRaD adapter 'c'"):
        hotswap_lorad_adapter(model, good, "c")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.fuse_lora(adapter_names=["a"])
    with pytest.raises(ValueError, match="'a' is fused.*unfuse"):
        hotswap_lorad_adapter(model, good, "a")


def test_every_sample_of_a_batch_with_its_own_adapter():
    model = two_adapters()
    x, names = unet_inputs(batch=4), ["a", "__base__", "b", "a"]
    alone = []
    for name in names:
        select(model, [name] if name != "__base__" else ["b"], enabled=name != "__base__")
        alone.append(run(model, x))
    select(model, ["b"])
    b = run(model, x)
    with mixed_adapter_batch(model, names):
        mixed = run(model, x)
    for i in range(4):
        torch.testing.assert_close(mixed[i], alone[i][i], atol=1e-5, rtol=1e-5)
    assert torch.equal(run(model, x), b)  # the hooks are gone


def test_mixed_batches_through_peft():
    model, x = peft_mlp(), torch.randn(3, 10)
    outputs = {}
    for name in "ab":
        model.set_adapter(name)
        outputs[name] = model(x)
    with model.disable_adapter():
        outputs["__base__"] = model(x)
    mixed = model(x, adapter_names=["b", "a", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([outputs["b"][0], outputs["a"][1], outputs["__base__"][2]]))
    with pytest.raises(ValueError, match="got 2 and 3 respectively"):
        model(x, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="non-existing adapter.*: c. There are"):
        model(x, adapter_names=["a", "b", "c"])
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(x, adapter_names=["a", "b", "a"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["a", "b", "a"])
