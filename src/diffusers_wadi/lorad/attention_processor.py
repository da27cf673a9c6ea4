"""LoRaD on the four projections of one attention, as an attention processor of diffusers.

The other way to the same numbers as `LoRaDConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"])`: nothing in the
model is wrapped, the factors live in the processors that `model.set_attn_processor` takes.

    from diffusers_wadi import LoRaDAttnProcessor

    processors = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = LoRaDAttnProcessor.from_attention(attention, rank=64)
    unet.requires_grad_(False)
    unet.set_attn_processor(processors)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffusers_wadi.lorad.base_layers import check_base_layer
from diffusers_wadi.lorad.layer import LoRaDLayer
from diffusers_wadi.lorad.offload import is_offloaded, onloaded
from diffusers_wadi.lorad.quantization import dequantized, is_quantized, lorad_quantized_linear
from diffusers_wadi.lorad.rotation import check_pairs, lorad_linear

__all__ = ["PROJECTIONS", "LoRaDAttnProcessor", "LoRaDProjection", "base_of", "free_base", "refuse_unfit"]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers of an attention that a processor can adapt, by their names in it."""


class LoRaDProjection(nn.Module):
    """The factors of one projection, `A` (out, r) and `B` (r, in/2).

    They follow their model to a device, but not below float32: angles of 1e-4 do not survive 16 bits.

    Args:
        in_features: of the projection, even.
        out_features: of the projection.
        rank: at least 1.
        identity: `A` zero (True), else Xavier-uniform. Default True. `B` is Xavier-uniform.
        name: for messages.

    Raises:
        ValueError: odd in_features, or a rank below 1.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, identity: bool = True, name: str = "weight"
    ) -> None:
        super().__init__()
        check_pairs(in_features, name)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"A LoRaD rank has to be an integer of at least 1, got {rank!r} for `{name}`.")
        # Without "lorad_", by which PEFT tells the tuner's parameters and would save these in an adapter's file.
        self.A = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(rank, in_features // 2, dtype=torch.float32))
        with torch.no_grad():
            nn.init.xavier_uniform_(self.B)
            if not identity:
                nn.init.xavier_uniform_(self.A)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What `to`, `half` and the like run: the device is taken over, a dtype below float32 is not."""
        exact = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if torch.finfo(parameter.dtype).bits < 32 and not exact[name].is_meta:
                parameter.data = exact[name].to(parameter.device)
        return self

    def extra_repr(self) -> str:
        (out_features, rank), pairs = self.A.shape, self.B.shape[1]
        return f"in_features={2 * pairs}, out_features={out_features}, rank={rank}"


class LoRaDAttnProcessor(nn.Module):
    """Scaled dot-product attention with turned projections: what `AttnProcessor2_0` computes, with LoRaD in it.

    Self- and cross-attention, masks, group, spatial, cross and query/key norms, 4-D input, residual connection and
    output factor are as there. A projection without factors is called as it is. Trainable from the start; the base
    model is not touched.

    Args:
        hidden_size: input features of `to_q`.
        cross_attention_dim: input features of `to_k` and `to_v`. Default None: `hidden_size`.
        rank: of every projection, or a rank for each of those to adapt (`{"to_k": 64, "to_v": 64}`). Default 64.
        inner_dim: output features of `to_q`, which go into `to_out.0`. Default None: `hidden_size`.
        inner_kv_dim: output features of `to_k` and `to_v`. Default None: `inner_dim`.
        out_dim: output features of `to_out.0`. Default None: `hidden_size`.
        scale: factor on all angles, the strength; may be set at any time. Default 1.0.
        init_lorad_weights: True (default): starts as the identity, `A` zero. "xavier" or False: both factors
            Xavier-uniform.

    Raises:
        ValueError: odd input features, a rank below 1, or a projection that no attention has.
    """

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        rank: int | Mapping[str, int] = 64,
        inner_dim: int | None = None,
        inner_kv_dim: int | None = None,
        out_dim: int | None = None,
        scale: float = 1.0,
        init_lorad_weights: bool | Literal["xavier"] = True,
    ) -> None:
        super().__init__()
        ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(PROJECTIONS, rank)
        if not ranks or not ranks.keys() <= set(PROJECTIONS):
            raise ValueError(f"`rank` names {sorted(ranks)}; a processor adapts some of {PROJECTIONS}.")
        inner_dim = inner_dim or hidden_size
        inner_kv_dim, context = inner_kv_dim or inner_dim, cross_attention_dim or hidden_size
        shapes = ((hidden_size, inner_dim), (context, inner_kv_dim), (context, inner_kv_dim))
        shapes = dict(zip(PROJECTIONS, (*shapes, (inner_dim, out_dim or hidden_size))))
        self.scale = float(scale)
        for name in ranks:
            layer = LoRaDProjection(*shapes[name], ranks[name], init_lorad_weights is True, name)
            self.add_module(_attribute(name), layer)

    @classmethod
    def from_attention(
        cls,
        attn: Attention,
        rank: int | Mapping[str, int] = 64,
        scale: float = 1.0,
        init_lorad_weights: bool | Literal["xavier"] = True,
    ) -> LoRaDAttnProcessor:
        """A processor of the sizes of this attention; it still has to be set.

        Raises:
            ValueError: an attention without the four projections, of another processor's kind (added key and value
                projections), or with layers that LoRaD cannot turn.
        """
        refuse_unfit(attn)
        layers = {name: base_of(attn.get_submodule(name)) for name in PROJECTIONS}
        for name in rank if isinstance(rank, Mapping) else PROJECTIONS:
            if name in layers:
                check_base_layer(layers[name], name)
        q, k, _, out = layers.values()
        sizes = q.in_features, k.in_features, rank, q.out_features, k.out_features, out.out_features
        return cls(*sizes, scale=scale, init_lorad_weights=init_lorad_weights)

    @property
    def projections(self) -> dict[str, LoRaDProjection]:
        """The adapted projections, by their names in the attention."""
        found = {name: getattr(self, _attribute(name), None) for name in PROJECTIONS}
        return {name: layer for name, layer in found.items() if layer is not None}

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """As `forward`. Spelled out, because `Attention` looks here for the arguments that it may pass on."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale)

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """The attention's output, of the shape of `hidden_states`.

        Args:
            attn: the attention that this processor stands in.
            hidden_states: (batch, length, channels) or (batch, channels, height, width).
            encoder_hidden_states: (batch, context length, channels). Default None: self-attention.
            attention_mask: added to the scores, (batch, 1 or length, context length). Default None.
            temb: for the spatial norm. Default None.
            scale: further factor on the angles, for this call. Default 1.0.

        Raises:
            ValueError: the attention has other sizes, or a LoRaD adapter of the tuner acts on it at the same time.
        """
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = _heads_mask(attn, attention_mask, context)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        hidden_states = self._attend(attn, hidden_states, context, mask, scale)
        hidden_states = attn.to_out[1](self._project(attn, "to_out.0", hidden_states, scale))

        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(self, attn: Attention, x: Tensor, context: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        query = self._project(attn, "to_q", x, scale)
        key, value = (self._project(attn, name, context, scale) for name in ("to_k", "to_v"))
        query, key, value = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        # The usual scale is torch's own: computed there it is the same to the last bit.
        factor = None if attn.scale_qk else attn.scale
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=factor)
        return attended.transpose(1, 2).flatten(2).to(query.dtype)

    def _project(self, attn: Attention, name: str, x: Tensor, scale: float) -> Tensor:
        layer, factors = attn.get_submodule(name), getattr(self, _attribute(name), None)
        if factors is None:
            return layer(x)
        base, beside = free_base(layer, name)
        _refuse_other_sizes(base, factors, name)
        scale = scale * self.scale
        if not is_offloaded(base, factors):
            return _turned_output(x, layer, base, beside, factors, scale)
        with onloaded(base, factors):
            return _turned_output(x, layer, base, beside, factors, scale)


def refuse_unfit(attn: Attention) -> None:
    """Refuse an attention whose stock processor is of another kind.

    Raises:
        ValueError: a projection is missing, or there are added key and value projections.
    """
    if not isinstance(attn, Attention):
        raise ValueError(f"LoRaDAttnProcessor works in diffusers' `Attention`, not in a {type(attn).__name__}.")
    added = getattr(attn, "added_kv_proj_dim", None)
    if added is not None or any(getattr(attn, name.split(".")[0], None) is None for name in PROJECTIONS):
        raise ValueError(
            f"LoRaDAttnProcessor needs an attention with {', '.join(PROJECTIONS)} and no others; this one has "
            f"added_kv_proj_dim={added}. Use LoRaDConfig(target_modules=...) and add_adapter instead."
        )


def _attribute(projection: str) -> str:
    # Not the projection's own name: PEFT's `target_modules=["to_q"]` would find it here too.
    return projection.split(".")[0] + "_lorad"


def base_of(layer: nn.Module) -> nn.Module:
    """The layer inside its adapters."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def free_base(layer: nn.Module, name: str) -> tuple[nn.Module, bool]:
    """The layer that holds the weight, and whether an adapter of another kind (a LoRA, say) works beside it.

    Raises:
        ValueError: a LoRaD adapter of the tuner acts there too.
    """
    module, beside = layer, False
    while isinstance(module, BaseTunerLayer):
        is_lorad = isinstance(module, LoRaDLayer)
        beside = beside or not is_lorad
        if module.merged and (not is_lorad or module.disable_adapters):
            module.unmerge()  # as in a LoRaDLayer: only the base is turned, and what is switched off is not in it
        acting = is_lorad and any(adapter in module.lorad_A for adapter in module.active_adapters)
        if acting and not module.merged and not module.disable_adapters:
            raise ValueError(
                f"`{name}` has the LoRaD adapter {module.active_adapters} and a LoRaDAttnProcessor, and both are on. "
                "Switch the adapter off (`disable_adapters()`, `pipe.disable_lora()`) or take it out."
            )
        module = module.base_layer
    return module, beside


def _refuse_other_sizes(base: nn.Module, factors: LoRaDProjection, name: str) -> None:
    if type(base) is not nn.Linear:
        check_base_layer(base, name)
    expected = factors.A.shape[0], 2 * factors.B.shape[1]
    if (base.out_features, base.in_features) != expected:
        raise ValueError(
            f"`{name}` has a weight of shape (out, in) = {(base.out_features, base.in_features)}, this processor is for "
            f"{expected}. Make it with `LoRaDAttnProcessor.from_attention(attention)`."
        )


def _turned_output(
    x: Tensor, layer: nn.Module, base: nn.Module, beside: bool, factors: LoRaDProjection, scale: float
) -> Tensor:
    device = base.weight.device  # where an offloaded base is only now
    A, B = factors.A.to(device), factors.B.to(device)
    A = A if scale == 1.0 else A * scale
    if not beside:
        return _turned(x, base, base.bias, A, B)
    # The output is the other adapter's, and LoRaD adds the change that it makes to the base alone.
    weight = dequantized(base).to(x.dtype) if is_quantized(base) else base.weight
    return layer(x) + (_turned(x, base, None, A, B) - F.linear(x, weight))


def _turned(x: Tensor, base: nn.Module, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    if is_quantized(base):
        return lorad_quantized_linear(x, base, bias, A, B)
    # 8-bit floats are for storage: such a weight is turned in float32 and meets x in x's dtype.
    return lorad_linear(x, base.weight, bias, A, B, x.dtype if base.weight.dtype.itemsize == 1 else None)


def _heads_mask(attn: Attention, mask: Tensor | None, context: Tensor) -> Tensor | None:
    """(batch, heads, 1 or length, context length), as torch's attention wants it."""
    if mask is None:
        return None
    batch, length, _ = context.shape
    return attn.prepare_attention_mask(mask, length, batch).unflatten(0, (batch, attn.heads))
