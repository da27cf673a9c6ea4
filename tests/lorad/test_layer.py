"""One adapted Linear: identity, precision, scales, several adapters, merging, and what it refuses."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from reference import reference_lorad_linear, reference_rotate
from torch import nn

from diffusers_wadi.lorad import LoRaDConfig, LoRaDLinear, rotate
from diffusers_wadi.lorad.layer import TurnedWeightLayer
from diffusers_wadi.lorad.model import _LAYERS

IN, OUT = 8, 6


def layer(names=("default",), r=3, filled=True, dtype=torch.float32, **config):
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, dtype=dtype)
    config = LoRaDConfig(r=r, **config)
    adapted = LoRaDLinear(base, names[0], r, config)
    for name in names[1:]:
        adapted.update_layer(name, r, config)
    if filled:
        with torch.no_grad():
            for name in names:
                nn.init.normal_(adapted.lorad_A[name], std=0.5)
    return adapted


def inputs(dtype=torch.float32):
    return torch.randn(4, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_a_new_adapter_changes_no_bit(dtype, amp):
    if amp is not None and dtype == torch.float64:
        pytest.skip("autocast leaves float64 inputs alone and casts the weights: stock layers fail as well")
    adapted, x = layer(filled=False, dtype=dtype), inputs(dtype)
    with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
        expected = adapted.base_layer(x)
        for y in (adapted(x), adapted(x.requires_grad_())):
            assert y.dtype == expected.dtype and torch.equal(y, expected)
    assert adapted.lorad_A["default"].dtype == adapted.lorad_B["default"].dtype == torch.float32


def test_forward_is_the_reference():
    adapted, x = layer(), inputs()
    A, B = adapted.lorad_A["default"], adapted.lorad_B["default"]
    expected = reference_lorad_linear(x, adapted.base_layer.weight, adapted.base_layer.bias, A, B)
    torch.testing.assert_close(adapted(x), expected)


def test_initialisation_choices():
    zero = layer(filled=False)
    assert not zero.lorad_A["default"].any() and zero.lorad_B["default"].any()
    bound = (6 / (3 + IN / 2)) ** 0.5
    assert zero.lorad_B["default"].abs().max() <= bound
    for choice in ({"init_lorad_weights": "xavier"}, {"init_lorad_weights": False}, {"init_weights": False}):
        other = layer(filled=False, **choice)
        assert other.lorad_A["default"].any() and other.lorad_B["default"].any(), choice


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_base_trains_float32_factors(dtype, tolerance):
    low, full = layer(), layer()
    low.base_layer.to(dtype)
    y = low(inputs(dtype))
    assert y.dtype == dtype
    assert (y.float() - full(inputs())).norm() / full(inputs()).norm() < tolerance
    y.float().square().mean().backward()
    full(inputs()).square().mean().backward()
    grad, expected = low.lorad_A["default"].grad, full.lorad_A["default"].grad
    assert grad.dtype == torch.float32 and (grad - expected).norm() / expected.norm() < 5 * tolerance


def test_training_keeps_row_norms_and_leaves_the_base_alone():
    adapted, x = layer(filled=False), inputs()
    adapted.base_layer.requires_grad_(False)
    before = adapted.base_layer.weight.clone()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    target = torch.randn(4, 5, OUT)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(adapted(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(adapted.base_layer.weight, before) and adapted.base_layer.weight.grad is None
    turned = rotate(before, adapted.get_angles())
    assert not torch.allclose(turned, before, atol=1e-2)
    torch.testing.assert_close(turned.norm(dim=1), before.norm(dim=1), rtol=1e-6, atol=0)


def test_two_adapters_at_once_are_the_sum_of_their_angles():
    adapted, x = layer(("a", "b")), inputs()
    adapted.set_adapter(["a", "b"])
    theta = sum(adapted.lorad_A[n] @ adapted.lorad_B[n] for n in "ab")
    torch.testing.assert_close(adapted.get_angles(), theta)
    expected = F.linear(
        x, reference_rotate(adapted.base_layer.weight.detach(), theta.detach()), adapted.base_layer.bias
    )
    torch.testing.assert_close(adapted(x), expected)
    adapted(x).sum().backward()
    assert all(adapted.lorad_A[n].grad is not None and adapted.lorad_B[n].grad is not None for n in "ab")


def test_scale_acts_on_the_angle():
    adapted, x = layer(("a", "b")), inputs()
    adapted.set_adapter(["a", "b"])
    adapted.set_scale("b", 0.5)
    adapted.set_scale("unknown", 3.0)
    theta = adapted.lorad_A["a"] @ adapted.lorad_B["a"] + 0.5 * adapted.lorad_A["b"] @ adapted.lorad_B["b"]
    torch.testing.assert_close(adapted.get_angles(), theta)
    before = adapted(x)
    adapted.scale_layer(0.3)
    torch.testing.assert_close(adapted.get_angles(), 0.3 * theta)
    adapted.unscale_layer(0.3)
    torch.testing.assert_close(adapted(x), before)
    adapted.scale_layer(0.0)
    assert torch.equal(adapted(x), adapted.base_layer(x))
    adapted.unscale_layer()
    assert adapted.scaling == {"a": 1.0, "b": 1.0}


def test_adapters_switch_by_attribute_without_touching_requires_grad():
    adapted, x = layer(("student", "fake")), inputs()
    adapted.set_requires_grad(["student", "fake"])
    outputs = []
    for name in ("student", "fake"):
        adapted._active_adapter = name
        outputs.append(adapted(x))
    adapted._disable_adapters = True
    outputs.append(adapted(x))
    assert torch.equal(outputs[2], adapted.base_layer(x))
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    assert all(p.requires_grad for name in ("student", "fake") for p in (adapted.lorad_A[name], adapted.lorad_B[name]))
    outputs[0].sum().backward()
    assert adapted.lorad_A["fake"].grad is None and adapted.lorad_A["student"].grad is not None


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_gives_the_same_output_and_unmerge_the_same_weight(names, safe_merge):
    adapted, x = layer(("a", "b")), inputs()
    adapted.set_adapter(names)
    adapted.set_scale("a", 0.7)
    weight, before = adapted.base_layer.weight.clone(), adapted(x)
    adapted.merge(safe_merge=safe_merge)
    assert adapted.merged_adapters == names
    torch.testing.assert_close(adapted(x), before, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(adapted.base_layer.weight, weight, atol=1e-2)
    adapted.set_scale("a", 0.1)  # unmerge has to take the scale that was merged
    adapted.unmerge()
    torch.testing.assert_close(adapted.base_layer.weight, weight, atol=1e-6, rtol=0)
    assert not adapted.merged and not adapted.merged_scaling


def test_merging_in_turn_is_merging_at_once_and_the_order_does_not_matter():
    weights = []
    for batches in ([["a", "b"]], [["a"], ["b"]], [["b"], ["a"]]):
        adapted = layer(("a", "b"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that a further adapter is being merged
            for names in batches:
                adapted.merge(adapter_names=names)
        weights.append(adapted.base_layer.weight.detach())
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0], atol=1e-6, rtol=0)


def test_merging_twice_or_unmerging_nothing_warns_and_does_nothing():
    adapted = layer()
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        adapted.unmerge()
    adapted.merge()
    weight = adapted.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="already merged"):
        adapted.merge()
    assert torch.equal(adapted.base_layer.weight, weight) and adapted.merged_adapters == ["default"]


def over_a_lora():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, "lora")
    inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["0"]), model, "lorad")
    return model[0], model[0].base_layer


def test_a_new_adapter_over_a_lora_changes_no_bit():
    torch.manual_seed(2)
    lorad, lora = over_a_lora()
    x = torch.randn(64, IN)
    assert torch.equal(lorad(x), lora(x))


def test_a_lora_below_is_not_turned_whatever_is_merged_first():
    lorad, lora = over_a_lora()
    nn.init.normal_(lorad.lorad_A["lorad"])
    base, x = lorad.get_base_layer().weight, inputs()
    y, before = lorad(x), base.clone()
    lora.merge()
    torch.testing.assert_close(lorad(x), y)
    lora.merge()
    with_lora = base.clone()
    lorad.merge()
    torch.testing.assert_close(lorad(x), y)
    assert lora.merged and lorad.merged
    lorad.unmerge()
    torch.testing.assert_close(base, with_lora)
    lora.unmerge()
    torch.testing.assert_close(base, before)


def test_merging_with_a_scale_and_unmerging_some():
    adapted = layer(("a", "b"))
    weight = adapted.base_layer.weight.clone()
    adapted.set_scale("b", 0.5)
    adapted.merge(adapter_names=["b"], scale=0.5)
    theta = adapted.lorad_A["b"] @ adapted.lorad_B["b"]
    torch.testing.assert_close(adapted.base_layer.weight, rotate(weight, 0.25 * theta))
    with pytest.warns(UserWarning, match="additionally"):
        adapted.merge(adapter_names=["a"])
    adapted.unmerge(["a"])
    torch.testing.assert_close(adapted.base_layer.weight, rotate(weight, 0.25 * theta))
    adapted.unmerge()
    torch.testing.assert_close(adapted.base_layer.weight, weight)
    assert adapted.scaling == {"a": 1.0, "b": 0.5} and not adapted.merged_scaling


def test_disabling_a_merged_adapter_unmerges_it():
    adapted, x = layer(), inputs()
    weight, before = adapted.base_layer.weight.clone(), adapted.base_layer(x)
    adapted.merge()
    adapted.enable_adapters(False)
    torch.testing.assert_close(adapted(x), before, atol=1e-5, rtol=0)
    torch.testing.assert_close(adapted.base_layer.weight, weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite_before_touching_the_base(bad):
    adapted = layer()
    with torch.no_grad():
        adapted.lorad_A["default"][0, 0] = bad
    weight = adapted.base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite.*base is unchanged"):
        adapted.merge(safe_merge=True)
    assert torch.equal(adapted.base_layer.weight, weight) and not adapted.merged


@pytest.mark.parametrize("dtype, drift", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_a_half_precision_weight_comes_back_to_its_own_rounding(dtype, drift):
    adapted = layer(dtype=dtype)
    weight = adapted.base_layer.weight.float()
    adapted.merge()
    adapted.unmerge()
    assert (adapted.base_layer.weight.float() - weight).norm() / weight.norm() < drift


def test_deleting_an_adapter_leaves_nothing_of_it():
    adapted = layer(("a", "b"))
    adapted.set_adapter("a")
    adapted.merge()
    with pytest.raises(ValueError, match="'a' is fused.*Unfuse"):
        adapted.delete_adapter("a")
    adapted.unmerge()
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        adapted.delete_adapter("a")
    for attribute in adapted.adapter_layer_names + adapted.other_param_names:
        assert "a" not in getattr(adapted, attribute)
    assert adapted.active_adapters == ["b"]


def test_deepcopy_and_pickle():
    adapted, x = layer(("a", "b")), inputs()
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(twin(x), adapted(x))
        assert twin.lorad_A["a"].data_ptr() != adapted.lorad_A["a"].data_ptr()


@pytest.mark.slow
def test_one_graph_for_the_compiler():
    torch._dynamo.reset()
    adapted, x = layer(("a", "b")), inputs()
    adapted.set_adapter(["a", "b"])
    expected = adapted(x)
    torch.testing.assert_close(torch.compile(adapted, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize(
    "base, message",
    [
        (nn.Linear(7, 4), "even, but `Linear` has 7.*exclude_modules"),
        (nn.Conv2d(1, 4, 1), "`Conv2d` has a single one per output.*exclude_modules"),
        (nn.ConvTranspose2d(4, 4, 2), "`ConvTranspose2d` is a ConvTranspose2d.*exclude_modules"),
        (nn.Embedding(4, 4), "`Embedding` is a Embedding"),
    ],
)
def test_layers_that_cannot_be_adapted(base, message):
    with pytest.raises(ValueError, match=message):
        LoRaDLinear(base, "default", 2, LoRaDConfig(r=2))


def test_rank_below_one():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        layer().update_layer("b", 0, LoRaDConfig())


def test_a_kind_of_layer_has_to_say_what_its_weight_does():
    class Half(TurnedWeightLayer):
        adapts = (nn.Linear,)

        def _plain(self, x):
            return x

    with pytest.raises(TypeError, match="abstract methods? .*_turned"):
        Half(nn.Linear(4, 4), "default", 2, LoRaDConfig(r=2))
    assert _LAYERS and not any(map(inspect.isabstract, _LAYERS.values()))
