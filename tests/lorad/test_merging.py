"""Fusing many times, in any order, in any precision, and beside other adapters: what comes back."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from diffusers_wadi.lorad import LoRaDConfig, LoRaDLinear, rotate_weight
from diffusers_wadi.lorad.merging import outer_unmerged

pytestmark = pytest.mark.filterwarnings("ignore:Already f.*:UserWarning")


def layer(dtype=torch.float32, names=("a", "b"), size=64):
    torch.manual_seed(0)
    adapted = LoRaDLinear(nn.Linear(size, size, dtype=dtype), names[0], 8, LoRaDConfig(r=8))
    for name in names[1:]:
        adapted.update_layer(name, 8, LoRaDConfig(r=8))
    for name in names:
        nn.init.normal_(adapted.lorad_A[name], std=0.3)
    adapted.set_adapter(list(names))
    return adapted


@torch.no_grad()
def drift(adapted, before):
    return float((adapted.base_layer.weight.float() - before.float()).norm() / before.float().norm())


def test_a_hundred_rounds_in_float32():
    adapted = layer(size=256)
    before = adapted.base_layer.weight.clone()
    for _ in range(100):
        adapted.merge(adapter_names=["a"])
        adapted.merge(adapter_names=["b"])
        adapted.unmerge()
    assert adapted._original is None  # nothing is kept for this
    assert drift(adapted, before) < 3e-6


@pytest.mark.parametrize("dtype, limits", [(torch.float16, (1e-5, 2e-3)), (torch.bfloat16, (1e-4, 1e-2))])
def test_half_precision_comes_back_bit_for_bit_and_is_rounded_once(dtype, limits):
    adapted = layer(dtype)
    before = adapted.base_layer.weight.clone()
    for _ in range(3):
        adapted.merge(adapter_names=["a"])
        adapted.merge(adapter_names=["b"])
        once = rotate_weight(before, adapted.get_angles(["a", "b"]))
        assert torch.equal(adapted.base_layer.weight, once)
        adapted.unmerge(["a"])
        assert torch.equal(adapted.base_layer.weight, rotate_weight(before, adapted.get_angles(["b"])))
        adapted.unmerge()
        assert torch.equal(adapted.base_layer.weight, before)
    assert adapted._original is None  # nothing is kept any longer
    adapted.keeps_half_weights = False
    for _ in range(100):
        adapted.merge()
        assert adapted._original is None
        adapted.unmerge()
    assert limits[0] < drift(adapted, before) < limits[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_fusing_does_not_matter(dtype):
    weights = []
    for order in (["a", "b"], ["b", "a"]):
        adapted = layer(dtype)
        for name in order:
            adapted.merge(adapter_names=[name])
        weights.append(adapted.base_layer.weight.detach().float())
    assert (weights[0] - weights[1]).abs().max() < (1e-6 if dtype == torch.float32 else 8e-3)


def test_a_copy_of_a_fused_layer_unfuses_by_itself():
    adapted = layer(torch.bfloat16)
    before = adapted.base_layer.weight.clone()
    adapted.merge()
    twin = copy.deepcopy(adapted)
    adapted.keep_merged()
    assert adapted._original is None and not adapted.merged
    twin.unmerge()
    assert torch.equal(twin.base_layer.weight, before) and not torch.equal(adapted.base_layer.weight, before)


def test_factors_changed_while_fused_do_not_spoil_a_half_precision_weight():
    adapted = layer(torch.bfloat16)
    before = adapted.base_layer.weight.clone()
    adapted.merge()
    with torch.no_grad():
        adapted.lorad_A["a"].mul_(3)
    adapted.unmerge()
    assert torch.equal(adapted.base_layer.weight, before)


def under_a_lora(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, dtype=dtype))
    inject_adapter_in_model(LoRaDConfig(r=4, target_modules=["0"]), model, "lorad")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, "lora")
    lora, lorad = model[0], model[0].base_layer
    nn.init.normal_(lorad.lorad_A["lorad"], std=0.5)
    return lora, lorad


def test_a_lora_merged_on_top_stays_when_the_lorad_below_is_unmerged():
    lora, lorad = under_a_lora(torch.bfloat16)
    weight = lorad.base_layer.weight
    before = weight.clone()
    lorad.merge()
    lora.merge()
    lorad.unmerge()
    change = lora.get_delta_weight("lora").float()
    assert change.norm() > 0.1 * before.float().norm()
    assert (weight.float() - before.float() - change).norm() / before.float().norm() < 1e-2
    lora.unmerge()
    assert drift(lorad, before) < 1e-2


def test_in_float32_that_order_is_refused_and_the_other_works():
    lora, lorad = under_a_lora(torch.float32)
    before = lorad.base_layer.weight.clone()
    lorad.merge()
    lora.merge()
    fused = lorad.base_layer.weight.clone()
    with pytest.raises(ValueError, match="changed while lorad was fused.*Unmerge that one first"):
        lorad.unmerge()
    assert torch.equal(lorad.base_layer.weight, fused) and lorad.merged_adapters == ["lorad"]
    lora.unmerge()
    lorad.unmerge()
    assert drift(lorad, before) < 1e-6


def test_fusing_below_a_merged_lora_with_the_lora_taken_out_meanwhile():
    lora, lorad = under_a_lora(torch.float32)
    before, x = lorad.base_layer.weight.clone(), torch.randn(3, 16)
    y = lora(x)
    lora.merge()
    with outer_unmerged(lora):
        assert not lora.merged
        lorad.merge()
    assert lora.merged and lorad.merged
    torch.testing.assert_close(lora(x), y)
    with outer_unmerged(lora):
        lorad.unmerge()
    lora.unmerge()
    assert drift(lorad, before) < 1e-6


def test_a_fused_model_may_be_cast():
    for first, second in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        adapted = layer(first)
        before = adapted.base_layer.weight.clone()
        adapted.merge()
        adapted.base_layer.to(second)
        adapted.unmerge()
        assert adapted.base_layer.weight.dtype == second
        assert drift(adapted, before) < (1e-2 if second == torch.bfloat16 else 1e-7)
