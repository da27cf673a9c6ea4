"""LoRaD on convolutions: the pairs of the flattened weight, every kind of convolution, and what it keeps."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from backbones import fill_adapter, tiny_unet, unet_inputs
from peft import LoraConfig, inject_adapter_in_model
from reference import reference_rotate
from torch import nn

from diffusers_wadi.lorad import (
    LoRaDConfig,
    LoRaDConv1d,
    LoRaDConv2d,
    LoRaDConv3d,
    lorad_conv,
    lorad_target_modules,
    rotate_weight,
)

CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": (0, 1)},
    "dilation": {"kernel_size": (3, 2), "dilation": 2, "bias": False},
    "groups": {"kernel_size": 3, "groups": 2},
    "same": {"kernel_size": 4, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    "odd": {"kernel_size": 3, "padding": "valid"},
}


def layer(kind="3x3", names=("default",), dtype=torch.float32):
    torch.manual_seed(0)
    adapted = LoRaDConv2d(
        nn.Conv2d(3 if kind == "odd" else 4, 6, **CONVOLUTIONS[kind], dtype=dtype),
        names[0],
        3,
        LoRaDConfig(r=3),
    )
    for name in names[1:]:
        adapted.update_layer(name, 3, LoRaDConfig(r=3))
    for name in names:
        nn.init.normal_(adapted.lorad_A[name], std=0.5)
    return adapted


def inputs(adapted, dtype=torch.float32):
    return torch.randn(2, adapted.in_features, 7, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def reference_output(adapted, x):
    """A stock convolution whose weight was turned pair by pair along the flattened axis."""
    stock = copy.deepcopy(adapted.get_base_layer())
    rows = stock.weight.detach().flatten(1)
    paired = rows.shape[1] - rows.shape[1] % 2
    theta = sum(adapted.lorad_A[name] @ adapted.lorad_B[name] for name in adapted.active_adapters)
    turned = reference_rotate(rows[:, :paired], theta.detach())
    stock.weight.data = torch.cat([turned, rows[:, paired:]], 1).view_as(stock.weight)
    return stock(x)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_forward_and_merge_are_the_reference(kind):
    adapted = layer(kind)
    x, before = inputs(adapted), adapted.base_layer.weight.clone()
    expected = reference_output(adapted, x)
    for y in (adapted(x), torch.no_grad()(adapted)(x)):
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(adapted(x[0]), expected[0])
    adapted.merge(safe_merge=True)
    assert adapted.base_layer.weight.flatten(1).norm(dim=1).allclose(before.flatten(1).norm(dim=1))
    torch.testing.assert_close(adapted(x), expected, atol=1e-6, rtol=1e-5)
    adapted.unmerge()
    torch.testing.assert_close(adapted.base_layer.weight, before, atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", ["1x1", "3x3", "groups", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(kind, dtype):
    adapted = layer(kind, dtype=dtype)
    x = inputs(adapted, dtype)
    assert not torch.equal(adapted(x), adapted.base_layer(x))
    nn.init.zeros_(adapted.lorad_A["default"])
    for y in (adapted(x), torch.no_grad()(adapted)(x)):
        assert torch.equal(y, adapted.base_layer(x)) and y.dtype == dtype
    assert adapted.lorad_A["default"].dtype == torch.float32


def problem(groups=1, channels=4, kernel=3, grad=("x", "weight", "bias", "A", "B")):
    generator = torch.Generator().manual_seed(0)
    taps = channels // groups * kernel * kernel
    shapes = {
        "x": (2, channels, 4, 4),
        "weight": (6, channels // groups, kernel, kernel),
        "bias": (6,),
        "A": (6, 2),
        "B": (2, taps // 2),
    }
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    settings = {"stride": (1, 2), "padding": (1, 0), "dilation": (1, 1), "groups": groups}
    return {name: t.requires_grad_(name in grad) for name, t in tensors.items()}, settings


@pytest.mark.parametrize("grad", [("x", "weight", "bias", "A", "B"), ("A",), ("x",), ("weight", "B")])
@pytest.mark.parametrize("groups, channels", [(1, 4), (2, 4), (1, 3)])
def test_gradients_equal_autograd_through_the_rotation(grad, groups, channels):
    ours, settings = problem(groups, channels, grad=grad)
    plain, _ = problem(groups, channels, grad=grad)
    y = lorad_conv(**ours, **settings)
    turned = rotate_weight(plain["weight"], plain["A"] @ plain["B"])
    expected = F.conv2d(plain["x"], turned, plain["bias"], **settings)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn(y.shape, dtype=y.dtype)
    y.backward(upstream)
    expected.backward(upstream)
    for name in ours:
        assert (ours[name].grad is None) == (name not in grad), name
        if name in grad:
            torch.testing.assert_close(ours[name].grad, plain[name].grad, msg=name)


def test_second_derivatives():
    tensors, settings = problem(channels=2, kernel=2)
    arguments = tuple(tensors.values())
    small = (arguments[0][:1, :, :3, :3].detach().clone().requires_grad_(), *arguments[1:])
    assert torch.autograd.gradgradcheck(lambda *t: lorad_conv(*t, **settings), small)


@pytest.mark.parametrize("grad, kept", [(("x", "A", "B"), {"x", "weight", "A", "B"}), (("x",), {"weight", "A", "B"})])
def test_only_the_inputs_are_kept_for_the_backward_pass(grad, kept):
    tensors, settings = problem(grad=grad)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lorad_conv(**tensors, **settings)
    assert {t.data_ptr() for t in saved} == {tensors[name].data_ptr() for name in kept}


def test_autocast_and_a_half_precision_base():
    adapted = layer("3x3")
    x, expected = inputs(adapted), layer("3x3")(inputs(adapted))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted(x)
    assert y.dtype == torch.bfloat16 and (y.float() - expected).norm() / expected.norm() < 2e-2
    y.float().square().sum().backward()
    grad = adapted.lorad_A["default"].grad
    assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.any()
    half = layer("3x3", dtype=torch.float16)
    y = half(x.half())
    assert y.dtype == torch.float16 and (y.float() - expected).norm() / expected.norm() < 3e-3


def test_several_adapters_with_scales_delete_deepcopy_and_pickle():
    adapted = layer("groups", ("a", "b"))
    x = inputs(adapted)
    adapted.set_adapter(["a", "b"])
    torch.testing.assert_close(adapted(x), reference_output(adapted, x))
    adapted.set_scale("b", 0.0)
    both, only = adapted(x), copy.deepcopy(adapted)
    only.delete_adapter("b")
    assert only.active_adapters == ["a"] and set(only.lorad_A) == {"a"}
    torch.testing.assert_close(only(x), both)
    assert torch.equal(pickle.loads(pickle.dumps(adapted))(x), both)


@pytest.mark.parametrize("cls, base", [(LoRaDConv1d, nn.Conv1d), (LoRaDConv3d, nn.Conv3d)])
def test_one_and_three_axes(cls, base):
    torch.manual_seed(0)
    model = nn.Sequential(base(2, 3, 3, stride=2))
    inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["0"], init_weights=False), model)
    assert type(model[0]) is cls
    x = torch.randn(2, 2, *(5,) * (1 if base is nn.Conv1d else 3))
    expected = model(x)
    assert not torch.allclose(expected, model[0].base_layer(x))
    model[0].merge()
    torch.testing.assert_close(model(x), expected)


def test_over_a_lora():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, "lora")
    with pytest.warns(UserWarning, match="Already found"):
        inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["0"]), model, "lorad")
    lorad, x = model[0], torch.randn(2, 4, 5, 5)
    assert torch.equal(lorad(x), lorad.base_layer(x))
    nn.init.normal_(lorad.lorad_A["lorad"])
    y = lorad(x)
    turned = rotate_weight(lorad.get_base_layer().weight, lorad.get_angles())
    change = F.conv2d(x, turned - lorad.get_base_layer().weight)
    torch.testing.assert_close(y, lorad.base_layer(x) + change)


def test_a_unet_with_linear_and_convolutions():
    unet, x = tiny_unet(), unet_inputs()
    names = lorad_target_modules(unet, convolutions=True)
    unet.add_adapter(LoRaDConfig(r=3, target_modules=names))
    fill_adapter(unet, "default")
    assert any(isinstance(m, LoRaDConv2d) for m in unet.modules())
    with torch.no_grad():
        expected = unet(**x).sample
        unet.fuse_lora()
        torch.testing.assert_close(unet(**x).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_one_graph_for_the_compiler():
    torch._dynamo.reset()
    adapted = layer("reflect", ("a", "b"))
    adapted.set_adapter(["a", "b"])
    x = inputs(adapted)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    expected = adapted(x)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    ours, adapted.lorad_A["a"].grad = adapted.lorad_A["a"].grad, None
    adapted(x).sum().backward()
    torch.testing.assert_close(ours, adapted.lorad_A["a"].grad)
