"""Full orthogonal maps of a Linear's input space, W -> W Q, to compare with LoRaD's rotations of pairs.

Q (in, in) is one of torch's parametrizations (``torch.nn.utils.parametrizations.orthogonal``): ``matrix_exp``,
``cayley`` or ``householder``. It starts as the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

ORTHOGONAL_MAPS = ("matrix_exp", "cayley", "householder")


class OrthogonalLinear(nn.Module):
    """A frozen Linear whose weight (out, in) is multiplied by a trained orthogonal matrix (in, in), in float32.

    Args:
        base: the layer; its weight and bias are used as they are, not copied.
        orthogonal_map: one of :data:`ORTHOGONAL_MAPS`.
    """

    def __init__(self, base: nn.Linear, orthogonal_map: str):
        super().__init__()
        self.base = base
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        turn = nn.Linear(base.in_features, base.in_features, bias=False, device=base.weight.device, dtype=dtype)
        with torch.no_grad():
            # Householder takes Q itself; the others take the skew matrix whose exponential or Cayley transform Q is.
            nn.init.eye_(turn.weight) if orthogonal_map == "householder" else nn.init.zeros_(turn.weight)
        # Without trivialization there is no second (in, in) matrix to keep.
        self.turn = orthogonal(turn, orthogonal_map=orthogonal_map, use_trivialization=False)

    def weight(self) -> Tensor:
        """W Q, (out, in), in the dtype of W."""
        base = self.base.weight
        with torch.autocast(base.device.type, enabled=False):
            turn = self.turn.weight
            return (base.to(turn.dtype) @ turn).to(base.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return F.linear(x, self.weight(), self.base.bias)

    def merged(self) -> nn.Linear:
        """A plain Linear with the weight as it is now."""
        plain = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight().detach(), requires_grad=False)
        plain.bias = self.base.bias
        return plain


def turn_linears(model: nn.Module, names: list[str], orthogonal_map: str) -> None:
    """Replace the named Linear layers of ``model`` by :class:`OrthogonalLinear`, in place.

    Raises:
        ValueError: a layer of another kind.
    """
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"`{name}` is a {type(layer).__name__}; {orthogonal_map} turns the inputs of Linear layers. Choose a "
                "layer set without convolutions."
            )
        model.set_submodule(name, OrthogonalLinear(layer, orthogonal_map))


def merge_linears(model: nn.Module) -> None:
    """Replace every :class:`OrthogonalLinear` of ``model`` by the plain Linear that it stands for, in place."""
    turned = [name for name, module in model.named_modules() if isinstance(module, OrthogonalLinear)]
    for name in turned:
        model.set_submodule(name, model.get_submodule(name).merged())
