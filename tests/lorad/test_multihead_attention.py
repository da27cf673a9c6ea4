"""LoRaD on torch's own attention: both projections, every switch, and the ways around it that torch's layers know."""

import copy
import pickle

import pytest
import torch
from backbones import fill_adapter
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from reference import reference_rotate
from torch import nn

from diffusers_wadi.lorad import (
    LoRaDConfig,
    LoRaDLayer,
    LoRaDMultiheadAttention,
    add_weighted_adapter,
    trainable_parameter_count,
)

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.mha, self.lin = nn.MultiheadAttention(8, 2, **options), nn.Linear(8, 2)

    def forward(self, x, **options):
        return self.lin(self.mha(x, x, x, **options)[0])


def adapted(names=("a",), **options):
    model = Model(**options).eval()
    for seed, name in enumerate(names):
        inject_adapter_in_model(LoRaDConfig(r=3, target_modules=["mha"]), model, name)
        fill_adapter(model, name, seed=seed, std=0.5)
    for layer in layers(model):
        layer.set_adapter(list(names))
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoRaDLayer)]


def inputs():
    return torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))


def reference(model):
    """A stock attention with both weights turned pair by pair."""
    stock = copy.deepcopy(model)
    stock.mha = stock.mha.base_layer
    stock.mha.out_proj = stock.mha.out_proj.base_layer
    stock.requires_grad_(False)
    for layer, weight in zip(layers(model), (stock.mha.in_proj_weight, stock.mha.out_proj.weight)):
        theta = sum(layer.scaling[n] * layer.lorad_A[n] @ layer.lorad_B[n] for n in layer.active_adapters)
        weight.copy_(reference_rotate(weight, theta.detach()))
    return stock


@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bias": False, "add_bias_kv": True}])
@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_forward_merge_and_unmerge_are_the_reference(options, names):
    model, x = adapted(names, **options), inputs()
    layers(model)[0].set_scale("a", 0.6)
    stock, plain = reference(model), Model(**options).eval()
    call = {"attn_mask": torch.ones(4, 4).triu(1).bool()} if options else {}
    expected = stock(x, **call)
    assert not torch.allclose(expected, plain(x, **call), atol=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for run in (model, torch.no_grad()(model)):
        torch.testing.assert_close(run(x, **call), expected)
    for layer in layers(model):  # one projection after the other: every state between them is right as well
        unmerged = model(x, **call)
        layer.merge(safe_merge=True)
        torch.testing.assert_close(model(x, **call), expected)
        assert len(names) > 1 or torch.equal(model(x, **call), unmerged)
    torch.testing.assert_close(model.mha.base_layer.in_proj_weight, stock.mha.in_proj_weight)
    torch.testing.assert_close(model.mha.base_layer.out_proj.weight, stock.mha.out_proj.weight)
    for layer in layers(model):
        layer.enable_adapters(False)
    torch.testing.assert_close(model(x, **call), plain(x, **call))
    assert not any(layer.merged for layer in layers(model))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-7, rtol=0)


def test_a_new_adapter_changes_no_bit_and_training_moves_only_its_factors():
    model, x = Model().eval(), inputs()
    base = model(x)
    model = get_peft_model(model, LoRaDConfig(r=3, target_modules=["mha"]))
    assert torch.equal(model(x), base)
    assert model.base_model.model.mha.base_layer.in_proj_weight.is_leaf  # a parameter again after the call
    fill_adapter(model, "default")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all(".lorad_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == trainable_parameter_count(Model(), ["mha"], 3)
    model(x).square().sum().backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name


def test_gradients_equal_those_through_a_stock_attention():
    model, x = adapted(), inputs()
    model(x).square().sum().backward()
    plain = Model().eval()
    factors = [[p.detach().clone().requires_grad_() for p in (m.lorad_A["a"], m.lorad_B["a"])] for m in layers(model)]
    weights = {}
    for name, weight, (A, B) in zip(
        ("mha.in_proj_weight", "mha.out_proj.weight"), (plain.mha.in_proj_weight, plain.mha.out_proj.weight), factors
    ):
        even, odd, theta = weight[:, ::2], weight[:, 1::2], A @ B
        turned = torch.stack([even * theta.cos() - odd * theta.sin(), even * theta.sin() + odd * theta.cos()], dim=-1)
        weights[name] = turned.flatten(1)
    torch.func.functional_call(plain, weights, (x,)).square().sum().backward()
    for layer, (A, B) in zip(layers(model), factors):
        torch.testing.assert_close(layer.lorad_A["a"].grad, A.grad)
        torch.testing.assert_close(layer.lorad_B["a"].grad, B.grad)


def test_an_encoder_layer_of_torch_does_not_go_around_the_adapter():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = inputs()
    with torch.no_grad():
        base = encoder(x)
        inject_adapter_in_model(LoRaDConfig(r=3, target_modules=["self_attn"]), encoder)
        fill_adapter(encoder, "default", std=0.5)
        y = encoder(x)
        assert not torch.allclose(y, base, atol=1e-2)
        for layer in layers(encoder):
            layer.merge()
        torch.testing.assert_close(encoder(x), y)


def test_saved_summed_deleted_unloaded_copied_and_pickled():
    model, x = adapted(("a", "b")), inputs()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum")
    for layer in layers(model):
        layer.set_adapter(["sum"])
    torch.testing.assert_close(model(x), expected)
    config, state = model.peft_config["sum"], get_peft_model_state_dict(model, adapter_name="sum")
    assert config.target_modules == {"mha"} and len(state) == 4
    fresh = inject_adapter_in_model(config, Model().eval(), "other")
    assert not set_peft_model_state_dict(fresh, state, "other").unexpected_keys
    torch.testing.assert_close(fresh(x), expected)
    wrapped = get_peft_model(Model().eval(), LoRaDConfig(r=3, target_modules=["mha"], init_weights=False))
    expected = wrapped(x)
    merged = wrapped.merge_and_unload(safe_merge=True)
    assert type(merged.mha) is nn.MultiheadAttention and not layers(merged)
    torch.testing.assert_close(merged(x), expected)


def test_safe_merge_with_a_broken_adapter():
    model = adapted()
    before = model.mha.base_layer.in_proj_weight.clone()
    model.mha.lorad_A["a"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.mha.merge(safe_merge=True)
    assert torch.equal(model.mha.base_layer.in_proj_weight, before)


@pytest.mark.parametrize(
    "base, message",
    [
        (nn.MultiheadAttention(9, 3), "even, but `mha` has 9"),
        (nn.MultiheadAttention(8, 2, kdim=6), "`mha` has 8, 6 and 8"),
    ],
)
def test_attentions_that_are_refused(base, message):
    model = Model()
    model.mha = base
    with pytest.raises(ValueError, match=message):
        inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["mha"]), model)
    assert model.mha is base and type(base.out_proj) is type(nn.MultiheadAttention(8, 2).out_proj)


def test_over_a_lora_and_its_output_projection_alone_are_refused():
    model = inject_adapter_in_model(LoraConfig(target_modules=["mha"]), Model())
    with pytest.raises(ValueError, match="projections of `mha` are .*other adapters"):
        inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["mha"]), model, "lorad")
    for targets in (["out_proj", "lin"], "all-linear"):
        model = Model()
        with pytest.warns(UserWarning, match="`mha.out_proj`.*name `mha` itself"):
            inject_adapter_in_model(LoRaDConfig(r=2, target_modules=targets), model)
        assert [type(layer).__name__ for layer in layers(model)] == ["LoRaDLinear"] and model.lin in layers(model)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="not found"):
        inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["out_proj"]), Model())


def test_a_batch_with_an_adapter_per_sample_is_refused():
    model = adapted()
    assert isinstance(model.mha, LoRaDMultiheadAttention)
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        model.mha(inputs(), inputs(), inputs(), adapter_names=["a"] * 3)
