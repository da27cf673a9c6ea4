"""What a training step of SD 1.5's size keeps for its backward pass, counted on tensors without data."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from diffusers_wadi import LoRaDConfig
from diffusers_wadi.lorad import LoRaDLinear, lorad_target_modules

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
MB = 1e6


def sd15() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15).requires_grad_(False)


def kept_by_a_step(unet: UNet2DConditionModel, batch: int = 4) -> list[torch.Tensor]:
    """The tensors that are kept beside the parameters, each storage once."""
    parameters = {id(parameter) for parameter in unet.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in parameters:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.device("meta"):
        unet(torch.empty(batch, 4, 64, 64), torch.empty(batch), torch.empty(batch, 77, 768))
    return list(kept.values())


def size(tensors: list[torch.Tensor]) -> float:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors) / MB


@pytest.mark.parametrize("rank", [64, 256])
def test_lorad_keeps_less_than_lora_and_no_matrix_of_the_size_of_a_weight(rank):
    names = lorad_target_modules(sd15())
    lora, lorad = sd15(), sd15()
    lora.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    lorad.add_adapter(LoRaDConfig(r=rank, target_modules=names))
    kept = kept_by_a_step(lorad)
    assert 10_000 < size(kept) < size(kept_by_a_step(lora))
    layers = [module for module in lorad.modules() if isinstance(module, LoRaDLinear)]
    shapes = {(layer.out_features, layer.in_features) for layer in layers}
    shapes |= {(out, size // 2) for out, size in shapes}
    # What the attention and the time embedding keep is of (batch, ...); a matrix of rotations has no batch.
    assert len(layers) == len(names) and not [tensor.shape for tensor in kept if tuple(tensor.shape) in shapes]


def test_the_count_sees_what_the_plain_formula_keeps():
    """Angles, cosines, sines and rotated weights of all layers, on top of what a step of the base keeps."""
    unet = sd15()
    unet.add_adapter(LoRaDConfig(r=256, target_modules=lorad_target_modules(unet)))
    with torch.device("meta"):
        ours = kept_by_a_step(unet)
        for module in unet.modules():
            if isinstance(module, LoRaDLinear):
                module._turned = plain_turn.__get__(module)
        plain = kept_by_a_step(unet)
    assert size(plain) - size(ours) > 1_428


def plain_turn(
    layer: LoRaDLinear, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, bias: bool = True
) -> torch.Tensor:
    inner = layer.get_base_layer()
    cos, sin = (A @ B).cos(), (A @ B).sin()
    even, odd = inner.weight[:, 0::2], inner.weight[:, 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(1)
    return torch.nn.functional.linear(x, turned, inner.bias if bias else None)
