"""Which layers LoRaD can adapt: Linear, convolutions, transformers' Conv1D, Embedding and MultiheadAttention."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diffusers_wadi.lorad.quantization import refuse_quantized, refuse_unreadable
from diffusers_wadi.lorad.rotation import check_pairs
from diffusers_wadi.lorad.targets import CONVOLUTIONS, weight_vectors

__all__ = ["check_base_layer", "features_of"]


def check_base_layer(base_layer: nn.Module, name: str) -> None:
    """Refuse a layer that LoRaD cannot adapt, before anything is changed.

    Raises:
        ValueError: a layer of another kind, a weight that cannot be read, an odd number of input features of a Linear
            or of a MultiheadAttention, a single number per weight vector, an Embedding with a scale per column, or a
            MultiheadAttention with keys or values of another size than its queries.
    """
    if isinstance(base_layer, nn.Linear):
        refuse_unreadable(base_layer, name)
        check_pairs(base_layer.in_features, name)
    elif isinstance(base_layer, nn.MultiheadAttention):
        _check_attention(base_layer, name)
    elif isinstance(base_layer, (*CONVOLUTIONS, Conv1D, nn.Embedding)):
        refuse_quantized(base_layer, name)
        _check_size(base_layer, name)
        _check_embedding_scale(base_layer, name)
    else:
        raise ValueError(
            "LoRaD adapts `torch.nn.Linear` layers, convolutions (Conv1d, Conv2d, Conv3d), Embedding and "
            f"MultiheadAttention, and Conv1D of transformers, but `{name}` is a {type(base_layer).__name__}. Leave it "
            "out of `target_modules`, or name it in `exclude_modules`."
        )


def features_of(base_layer: nn.Module) -> tuple[int, int]:
    """PEFT's `in_features` and `out_features` of a layer that `check_base_layer` accepts."""
    if isinstance(base_layer, nn.Linear):
        return base_layer.in_features, base_layer.out_features
    if isinstance(base_layer, CONVOLUTIONS):
        return base_layer.in_channels, base_layer.out_channels
    rows, size = weight_vectors(base_layer)
    return (rows, size) if isinstance(base_layer, nn.Embedding) else (size, rows)


def _check_size(layer: nn.Module, name: str) -> None:
    if weight_vectors(layer)[1] < 2:
        raise ValueError(
            f"LoRaD turns pairs of numbers, but `{name}` has a single one per output (a 1x1 kernel on one "
            "channel, say, or one column). Leave this layer out of `target_modules`, or name it in `exclude_modules`."
        )


def _check_embedding_scale(layer: nn.Module, name: str) -> None:
    # Some embeddings of transformers multiply what they look up. One number commutes with the rotation, several do not.
    scale = getattr(layer, "embed_scale", None)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(
            f"LoRaD turns pairs of columns, but `{name}` scales each of them by another number (`embed_scale` of shape "
            f"{tuple(scale.shape)}). Leave this layer out of `target_modules`, or name it in `exclude_modules`."
        )


def _check_attention(layer: nn.MultiheadAttention, name: str) -> None:
    if layer.in_proj_weight is None:
        raise ValueError(
            f"LoRaD adapts attentions whose queries, keys and values have one size, but `{name}` has "
            f"{layer.embed_dim}, {layer.kdim} and {layer.vdim}. Leave it out of `target_modules`, or name it in "
            "`exclude_modules`."
        )
    check_pairs(layer.embed_dim, name)
    out = layer.out_proj
    while hasattr(out, "lorad_A"):  # of another LoRaD adapter
        out = out.base_layer
    weights = layer.in_proj_weight, getattr(out, "weight", None)
    if not isinstance(out, nn.Linear) or any(type(weight) is not nn.Parameter for weight in weights):
        raise ValueError(
            f"LoRaD adapts attentions with plain weights, but the projections of `{name}` are "
            f"{type(weights[0]).__name__} and {type(out).__name__}. Leave it out of `target_modules`, or take other "
            "adapters and the quantisation off first."
        )
