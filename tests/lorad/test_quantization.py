"""Quantised bases: the dequantised weight is turned, nothing is fused, and what cannot be read is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_wadi.lorad import LoRaDConfig, LoRaDConv2d, LoRaDLinear, rotate
from diffusers_wadi.lorad.quantization import dequantized, is_quantized

IN, OUT = 64, 32


class Codes(torch.Tensor):
    """A stand-in for weights such as torchao's: whole numbers inside, floating point to the outside."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor) / 64

    def new_empty(self, *args, **kwargs):  # copy.deepcopy asks for it
        return super().new_empty(*args, **kwargs).as_subclass(Codes)


class NoWayBack(torch.Tensor):
    def dequantize(self):
        raise NotImplementedError


class PlainTernary(nn.Linear):
    """Whole numbers, and no word of how to read them."""

    def __init__(self):
        super().__init__(IN, OUT)
        self.weight = nn.Parameter(torch.ones(OUT, IN, dtype=torch.int8), requires_grad=False)


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, dtype=dtype)


def stand_in(kind=Codes):
    layer = linear()
    codes = (layer.weight.detach() * 64).round().as_subclass(kind)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    return layer


def torchao_layer(dtype):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = linear(dtype)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer


def bitsandbytes_layer(dtype, bits):
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 4:
        layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=dtype, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.load_state_dict(linear(dtype).state_dict())
    return layer.to("cpu")  # quantises


BASES = {
    "stand-in": lambda: stand_in(),
    "torchao": lambda: torchao_layer(torch.float32),
    "torchao bf16": lambda: torchao_layer(torch.bfloat16),
    "4 bits": lambda: bitsandbytes_layer(torch.float32, 4),
    "4 bits bf16": lambda: bitsandbytes_layer(torch.bfloat16, 4),
    "8 bits": lambda: bitsandbytes_layer(torch.float32, 8),
}


def adapted(base):
    layer = LoRaDLinear(base, "default", 4, LoRaDConfig(r=4))
    torch.manual_seed(1)
    nn.init.normal_(layer.lorad_A["default"], std=0.5)
    return layer


@pytest.mark.parametrize("kind", BASES)
def test_the_dequantised_weight_is_turned(kind):
    base = BASES[kind]()
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert is_quantized(base)
    weight = dequantized(base).float()
    assert weight.shape == (OUT, IN)
    assert 0 < (weight - linear().weight).norm() / linear().weight.norm() < 0.2
    layer = adapted(base)
    theta = layer.get_angles().detach().requires_grad_()
    expected = F.linear(x.float(), rotate(weight, theta), base.bias.float())
    for y in (layer(x), torch.no_grad()(layer)(x), copy.deepcopy(layer)(x)):
        assert y.dtype == dtype and (y.float() - expected).norm() / expected.norm() < tolerance
    layer(x).float().square().sum().backward()
    expected.square().sum().backward()
    grad = layer.lorad_A["default"].grad
    exact = theta.grad @ layer.lorad_B["default"].T
    assert (grad - exact).norm() / exact.norm() < tolerance


def test_training_keeps_no_dequantised_weight():
    layer, x, kept = adapted(stand_in()), torch.randn(5, IN), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = layer(x)
    assert (OUT, IN) not in kept
    y.sum().backward()
    assert layer.lorad_A["default"].grad.any()


def test_fusing_is_refused_and_changes_nothing():
    layer = adapted(stand_in())
    before, x = layer.base_layer.weight.clone(), torch.randn(5, IN)
    y = layer(x)
    with pytest.raises(ValueError, match="quantised weights .Codes.*load the base without quantisation, fuse"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.base_layer.weight, before) and torch.equal(layer(x), y)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="`PlainTernary` is a PlainTernary with torch.int8 weights"):
        adapted(PlainTernary())
    with pytest.raises(ValueError, match="NoWayBack cannot be dequantised"):
        adapted(stand_in(NoWayBack))(torch.randn(5, IN))
    conv = nn.Conv2d(4, 4, 3)
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Codes), requires_grad=False)
    with pytest.raises(ValueError, match="`Conv2d` is a Conv2d with Codes weights"):
        LoRaDConv2d(conv, "default", 2, LoRaDConfig(r=2))


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no 8-bit floats")
def test_weights_stored_in_8_bit_floats():
    """As diffusers' layerwise casting stores them: turned in float32, and used in the dtype of the input."""
    layer = adapted(linear())
    layer.base_layer.weight.data = layer.base_layer.weight.data.to(torch.float8_e4m3fn)
    x = torch.randn(5, IN)
    turned = rotate(layer.base_layer.weight.float(), layer.get_angles())
    torch.testing.assert_close(layer(x), F.linear(x, turned, layer.base_layer.bias))
