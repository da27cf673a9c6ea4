"""Backbones for tests: the published ones on the meta device, from their configs written out, and tiny ones to run."""

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from peft import PeftConfig
from peft.mapping import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

_SD_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
SD15_UNET = {**_SD_UNET, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21_UNET = {
    **_SD_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
PIXART_ALPHA_256 = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "norm_num_groups": 32,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
}
_TINY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
_TINY_PIXART = {
    **PIXART_ALPHA_256,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "sample_size": 8,
    "caption_channels": 12,
}


def meta_model(cls: type, config: dict) -> torch.nn.Module:
    """A model with the right shapes and no memory."""
    with torch.device("meta"):
        return cls.from_config(config)


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**_TINY_UNET).eval()


def tiny_pixart(seed: int = 0) -> PixArtTransformer2DModel:
    torch.manual_seed(seed)
    return PixArtTransformer2DModel(**_TINY_PIXART).eval()


def unet_inputs(seed: int = 1, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 999),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator).to(dtype),
    }


def pixart_inputs(seed: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.full((batch,), 999),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def add_adapter(model: torch.nn.Module, config: PeftConfig, name: str = "default") -> None:
    """Like diffusers' `add_adapter`, which PixArtTransformer2DModel does not have."""
    inject_adapter_in_model(config, model, name)


def select(model: torch.nn.Module, names: list[str], enabled: bool = True) -> None:
    """Like diffusers' `set_adapter`, `enable_adapters` and `disable_adapters`, for any model."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
            module.enable_adapters(enabled)


def fill_adapter(model: torch.nn.Module, name: str, seed: int = 2, std: float = 0.1) -> None:
    """Give one adapter factors that turn every weight by a visible amount."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if name in getattr(module, "lorad_A", {}):
            with torch.no_grad():
                for factors in (module.lorad_A, module.lorad_B):
                    noise = torch.randn(factors[name].shape, generator=generator)
                    factors[name].copy_(noise * std**0.5)
