"""LoRaD on torch's own attention, which reads the weights of its projections without calling them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.layer import LoRaDLayer, LoRaDLinear
from diffusers_wadi.lorad.offload import is_offloaded
from diffusers_wadi.lorad.rotation import turned_rows

__all__ = ["LoRaDMultiheadAttention"]

# What others (torch's encoder layers, say) read from an attention.
_READ_FROM_BASE = (
    "add_zero_attn",
    "batch_first",
    "bias_k",
    "bias_v",
    "dropout",
    "embed_dim",
    "head_dim",
    "in_proj_bias",
    "in_proj_weight",
    "kdim",
    "merge_masks",
    "num_heads",
    "vdim",
)


class LoRaDMultiheadAttention(nn.Module, LoRaDLayer):
    """`nn.MultiheadAttention` with LoRaD adapters on its input projection (3 * embed_dim, embed_dim) and its output one.

    The factors here are the input projection's; the output projection becomes a `LoRaDLinear` of its own inside. Both
    follow PEFT's switches separately: merge, scale or delete on the model, or on both.
    """

    adapts = (nn.MultiheadAttention,)

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, config: LoRaDConfig) -> None:
        super().__init__()
        LoRaDLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        base_layer.out_proj = LoRaDLinear(base_layer.out_proj, adapter_name, r, config)
        super().update_layer(adapter_name, r, config)

    def update_layer(self, adapter_name: str, r: int, config: LoRaDConfig) -> None:
        """As for every layer, on both projections."""
        super().update_layer(adapter_name, r, config)
        self._output_projection().update_layer(adapter_name, r, config)

    def forward(self, query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`.

        Raises:
            TypeError: `adapter_names`, since an attention mixes what belongs to one sample only after its projections.
            ValueError: the weights are offloaded.
        """
        if "adapter_names" in options:
            raise TypeError("lorad.MultiheadAttention does not support mixed adapter batches.")
        inner, out = self.get_base_layer(), self._output_projection()
        if is_offloaded(inner, inner.out_proj, out.get_base_layer()):
            raise ValueError(
                "LoRaD on an nn.MultiheadAttention cannot be offloaded. Keep this model on its device, or merge first."
            )
        turned = []
        for layer, holder, name in ((self, inner, "in_proj_weight"), (out, out.get_base_layer(), "weight")):
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
            adapters = [] if layer.disable_adapters or layer.merged else layer._acting()
            if adapters:
                factors = layer._factors(adapters, layer.scaling)
                weight = layer._base_weight()
                # In float64, as merging: the softmax of large numbers shows the last bit of a weight.
                turned.append((holder, name, turned_rows(weight, *factors, weight.dtype == torch.float32)))
        with _replaced(turned):
            return inner(query, *args, **options)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        """PEFT's way out: the attention itself, with the adapters in its weights or without them."""
        inner, out = self.get_base_layer(), self._output_projection()
        if merge:
            out.merge(safe_merge, adapter_names)
            self.merge(safe_merge, adapter_names)
        inner.out_proj = out.get_base_layer()
        return inner

    @property
    def weight(self) -> Tensor:
        """That of the input projection."""
        return self._base_weight()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # torch's encoder layers ask, and would take the base weights past this layer if it were so.
        return False

    def _output_projection(self) -> LoRaDLinear:
        return self.get_base_layer().out_proj

    def _base_weight(self) -> nn.Parameter:
        return self.get_base_layer().in_proj_weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: the two weights of an attention are not one LoRA."""
        return False

    def __repr__(self) -> str:
        return "lorad." + super().__repr__()


@contextmanager
def _replaced(tensors: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Inside the block these attributes of modules are these tensors; the parameters of that name stay as they are."""
    # An attribute of the object itself is found before its parameters (and before what FSDP puts in their place, which
    # `torch.func.functional_call` does not replace).
    before = [(module, name, module.__dict__.get(name)) for module, name, _ in tensors]
    for module, name, tensor in tensors:
        module.__dict__[name] = tensor
    try:
        yield
    finally:
        for module, name, old in before:
            if old is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = old


for _name in _READ_FROM_BASE:
    setattr(LoRaDMultiheadAttention, _name, property(lambda self, name=_name: getattr(self.get_base_layer(), name)))
