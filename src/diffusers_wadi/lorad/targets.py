"""Which layers the paper adapts, per backbone and role: the student (one-step generator) and the fake-score network."""

from collections.abc import Iterable, Iterator
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = [
    "DEFAULT_RANKS",
    "Role",
    "adaptable_layers",
    "adaptable_linears",
    "backbone_of",
    "lorad_target_modules",
    "trainable_parameter_count",
    "weight_vectors",
]

Role = Literal["student", "fake"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADAPTABLE = (nn.Linear, *CONVOLUTIONS, Conv1D, nn.Embedding, nn.MultiheadAttention)

_UNET = "UNet2DConditionModel"
_PIXART = "PixArtTransformer2DModel"

# Ranks of the paper and of the authors' release, by the name of the backbone's class and by role.
DEFAULT_RANKS: dict[str, dict[str, int]] = {
    _UNET: {"student": 256, "fake": 32},
    _PIXART: {"student": 128, "fake": 32},
}


def backbone_of(model: nn.Module) -> str:
    """The backbone's class name, a key of `DEFAULT_RANKS`.

    Raises:
        ValueError: a model for which the paper names no layers.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in DEFAULT_RANKS:
            return cls.__name__
    raise ValueError(
        f"The layers that LoRaD adapts are known for {' and '.join(DEFAULT_RANKS)}, not for {type(model).__name__}. "
        'Choose them yourself: `LoRaDConfig(target_modules=["to_q", "to_k", ...])`, or "all-linear".'
    )


def lorad_target_modules(model: nn.Module, role: Role = "student", convolutions: bool = False) -> list[str]:
    """Full names of the layers that the paper adapts, in the model's order.

    UNet: every Linear in down, mid and up blocks; the fake-score network leaves out proj_in, proj_out and
    time_emb_proj. PixArt: every Linear but `adaln_single` (the paper's 81.22 M; the release adapts those three too);
    the fake-score network the Linears of the transformer blocks. Layers that carry adapters already are listed too.

    Args:
        model: a UNet2DConditionModel or PixArtTransformer2DModel.
        role: "student" (default) or "fake".
        convolutions: a UNet's convolutions too, by the same rule: the paper's "Linear + Conv" (174.89 M for SD 1.5 at
            rank 256). Default False.

    Raises:
        ValueError: another model, another role, a model without any such layer, or convolutions of a transformer.
    """
    backbone = backbone_of(model)
    if role not in DEFAULT_RANKS[backbone]:
        raise ValueError(f"`role` has to be one of {tuple(DEFAULT_RANKS[backbone])}, got {role!r}.")
    chosen = _UNET_RULES[role] if backbone == _UNET else _PIXART_RULES[role]
    if convolutions and backbone != _UNET:
        raise ValueError(
            f"`convolutions` is for a {_UNET}; the only convolution of a {backbone} cuts the image into patches, and "
            "the paper leaves it alone. To adapt it all the same, name it in `target_modules`."
        )
    layers = _layers_of(model, (nn.Linear, *CONVOLUTIONS) if convolutions else (nn.Linear,))
    names = [name for name, _ in layers if chosen(name)]
    if not names:
        raise ValueError(
            f"This {backbone} has no Linear layer of the kind the paper adapts for the {role} (attention, feed-forward "
            "and time projections in its blocks). Pass `target_modules` yourself."
        )
    return names


def trainable_parameter_count(model: nn.Module, names: Iterable[str], r: int) -> int:
    """Parameters of an adapter of rank `r` on the named layers: the sum of `r * (out + in / 2)`.

    What in and out stand for in other layers than Linear ones: see `weight_vectors`.

    Raises:
        ValueError: a name that is no layer of the model that LoRaD can adapt.
    """
    layers = dict(adaptable_layers(model))
    names = list(names)
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(names)} names are no Linear layers, convolutions, embeddings or attentions of this "
            f"{type(model).__name__}, the first is {unknown[0]!r}. Full names are expected, as `lorad_target_modules` "
            "returns them."
        )
    return sum(r * (rows + size // 2) for name in names for rows, size in _weights(layers[name]))


def weight_vectors(layer: nn.Module) -> tuple[int, int]:
    """The weight of a layer as a list of vectors that LoRaD turns: their number, and how many numbers each has.

    Linear: (out, in). Convolution: (out, in/groups times the size of the kernel). transformers' Conv1D: (out, in),
    though it stores the transpose. Embedding: (num_embeddings, embedding_dim). MultiheadAttention: (3 * embed_dim,
    embed_dim) for its input projection; the output projection is a Linear.
    """
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features  # not the weight's shape, which quantisation may pack
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    return weight.shape[0], weight[0].numel()


def _weights(layer: nn.Module) -> list[tuple[int, int]]:
    if isinstance(layer, nn.MultiheadAttention):
        return [weight_vectors(layer), weight_vectors(layer.out_proj)]
    return [weight_vectors(layer)]


def adaptable_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every Linear (and Conv1D of transformers) of the model proper, PEFT's "all-linear".

    An adapted layer counts once, under its own name.
    """
    return _layers_of(model, (nn.Linear, Conv1D))


def adaptable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer of the model proper of a kind that LoRaD adapts, as `adaptable_linears`."""
    return _layers_of(model, _ADAPTABLE)


def _layers_of(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
            module = module.get_base_layer()
        if isinstance(module, kinds):
            yield name, module


def _in_unet_block(name: str) -> bool:
    return any(part in name for part in ("down_blocks", "mid_block", "up_blocks"))


def _is_unet_projection(name: str) -> bool:
    return any(part in name for part in ("proj_in", "proj_out", "time_emb_proj"))


_UNET_RULES = {
    "student": _in_unet_block,
    "fake": lambda name: _in_unet_block(name) and not _is_unet_projection(name),
}
_PIXART_RULES = {
    "student": lambda name: not name.startswith("adaln_single"),
    "fake": lambda name: name.startswith("transformer_blocks"),
}
