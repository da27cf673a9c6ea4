"""What a trained student is written as for its users: a format that stock code reads where there is one.

LoRaD: the native adapter. LoRA and DoRA: the file that `load_lora_weights` reads. Full fine-tuning and
orthogonal maps, and LoRA where diffusers has no loader (PixArt): a denoiser folder with merged weights.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from .._adapter_files import LORAD_WEIGHT_NAME
from .._files import folder_written_beside, written_beside
from ..loaders import save_lorad_adapter
from ..lorad import LoRaDConfig
from .adapters import plain_twin
from .networks import WaDiNetworks
from .orthogonal import merge_linears

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name


def adapter_config(networks: WaDiNetworks, role: str) -> PeftConfig | None:
    """Of the role's PEFT adapter; ``None`` where it has none."""
    return (getattr(networks.network(role), "peft_config", None) or {}).get(role)


def export_role(
    networks: WaDiNetworks, role: str, folder: Path, component: str, base: str, dtype: torch.dtype
) -> list[str]:
    """Write ``role`` for its users.

    Args:
        folder: where to.
        component: ``"unet"`` or ``"transformer"``, what the denoiser is called in its pipeline.
        base: name of the pipeline that it belongs to, for an adapter's config.
        dtype: of the tensors in the file.

    Returns:
        What was written, names in ``folder``.
    """
    config = adapter_config(networks, role)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(config, LoRaDConfig):
        save_lorad_adapter(networks.network(role), folder, role, component, base, dtype=dtype)
        return [LORAD_WEIGHT_NAME]
    if config is not None and component == "unet":
        return [_export_lora(networks, role, folder, config, dtype)]
    with folder_written_beside(folder / component) as staged:
        _write_model(merged_model(networks, role), staged, dtype)
    return [component]


def _export_lora(networks: WaDiNetworks, role: str, folder: Path, config: PeftConfig, dtype: torch.dtype) -> str:
    state = get_peft_model_state_dict(networks.network(role), adapter_name=role, save_embedding_layers=False)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    with written_beside(folder / LORA_FILE) as file:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            file.parent, state, weight_name=file.name, unet_lora_adapter_metadata=_lora_metadata(config)
        )
    return LORA_FILE


def _lora_metadata(config: PeftConfig) -> dict:
    """What JSON can hold of it; diffusers reads the rank, alpha and whether it is a DoRA from it."""
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return {name: value for name, value in plain.items() if isinstance(value, (bool, int, float, str, list, dict))}


@torch.no_grad()
def merged_model(networks: WaDiNetworks, role: str) -> nn.Module:
    """The denoiser of ``role`` without adapters: what is trained is in its weights.

    What was frozen is shared with the networks, unless the role is a PEFT adapter: then this is a copy.
    """
    model = networks.network(role)
    if adapter_config(networks, role) is None:
        model = plain_twin(model)
        merge_linears(model)
        return model
    model = copy.deepcopy(model)
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        layer.merge(adapter_names=[role])
    return plain_twin(model)


def _write_model(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    model.save_config(folder)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
