"""Which layers the paper adapts, per backbone and role: the student (one-step generator) and the fake-score network."""

from collections.abc import Iterable, Iterator
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = [
    "DEFAULT_RANKS",
    "Role",
    "adaptable_layers",
    "adaptable_linears",
    "backbone_of",
    "lorad_target_modules",
    "trainable_parameter_count",
]

Role = Literal["student", "fake"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

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
    layers = adaptable_layers(model) if convolutions else adaptable_linears(model)
    names = [name for name, _ in layers if chosen(name)]
    if not names:
        raise ValueError(
            f"This {backbone} has no Linear layer of the kind the paper adapts for the {role} (attention, feed-forward "
            "and time projections in its blocks). Pass `target_modules` yourself."
        )
    return names


def trainable_parameter_count(model: nn.Module, names: Iterable[str], r: int) -> int:
    """Parameters of an adapter of rank `r` on the named layers: the sum of `r * (out + in / 2)`.

    For a convolution, in stands for in/groups times the size of its kernel.

    Raises:
        ValueError: a name that is no Linear layer or convolution of the model.
    """
    layers = dict(adaptable_layers(model))
    names = list(names)
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(names)} names are no Linear layers or convolutions of this "
            f"{type(model).__name__}, the first is {unknown[0]!r}. Full names are expected, as `lorad_target_modules` "
            "returns them."
        )
    return sum(r * sum(_rows_and_pairs(layers[name])) for name in names)


def _rows_and_pairs(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features // 2
    return layer.out_channels, layer.weight[0].numel() // 2


def adaptable_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every Linear of the model proper; an adapted layer counts once, under its own name."""
    return ((name, layer) for name, layer in adaptable_layers(model) if isinstance(layer, nn.Linear))


def adaptable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every Linear and every convolution of the model proper, as `adaptable_linears`."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
            module = module.get_base_layer()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
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
