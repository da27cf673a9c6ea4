"""LoRaD on one layer: a wrapper that keeps the base layer frozen and turns its weight on the way through."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.rotation import check_pairs, lorad_angles, lorad_linear, rotate

__all__ = ["LoRaDLayer", "LoRaDLinear", "check_base_layer"]


def check_base_layer(base_layer: nn.Module, name: str) -> None:
    """Refuse a layer that LoRaD cannot adapt, before anything is changed.

    Raises:
        ValueError: not an `nn.Linear`, a quantised weight, or an odd number of input features.
    """
    if not isinstance(base_layer, nn.Linear):
        raise ValueError(
            f"LoRaD adapts `torch.nn.Linear` layers, but `{name}` is a {type(base_layer).__name__}. Leave it out of "
            "`target_modules`, or name it in `exclude_modules`."
        )
    if not base_layer.weight.is_floating_point() or type(base_layer).__module__.startswith("bitsandbytes"):
        raise ValueError(
            f"LoRaD turns floating-point weights, but `{name}` is a {type(base_layer).__name__} with "
            f"{base_layer.weight.dtype} weights. Load the base without quantisation."
        )
    check_pairs(base_layer.in_features, name)


class LoRaDLayer(BaseTunerLayer):
    """Holds the factors of every adapter of one layer: `lorad_A[name]` (out, r) and `lorad_B[name]` (r, in/2), float32.

    All active adapters act at once, their angles add. `_active_adapter` and `_disable_adapters` may be set directly to
    switch adapters without PEFT's change of `requires_grad` (training holds several adapters over one base).
    """

    adapter_layer_names = ("lorad_A", "lorad_B")
    other_param_names = ("r", "scaling", "merged_scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_scaling: dict[str, float] = {}
        self.lorad_A = nn.ParameterDict()
        self.lorad_B = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        inner = self.get_base_layer()
        check_base_layer(inner, type(inner).__name__)
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def update_layer(self, adapter_name: str, r: int, config: LoRaDConfig) -> None:
        """Add (or start afresh) one adapter of rank `r`.

        Raises:
            ValueError: `r` is below 1.
        """
        if r < 1:
            raise ValueError(f"A LoRaD rank has to be at least 1, got {r} for adapter {adapter_name!r}.")
        self.r[adapter_name] = r
        self.scaling[adapter_name] = 1.0
        # float32 whatever the base: angles that training moves by 1e-4 do not survive 16 bits. Drawn on the CPU, so
        # that a seed means the same start on every device.
        options = {"dtype": torch.float32, "device": "meta" if self.weight.is_meta else None}
        self.lorad_A[adapter_name] = nn.Parameter(torch.zeros(self.out_features, r, **options))
        self.lorad_B[adapter_name] = nn.Parameter(torch.zeros(r, self.in_features // 2, **options))
        self.reset_lorad_parameters(adapter_name, config.starts_as_identity)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_lorad_parameters(self, adapter_name: str, identity: bool = True) -> None:
        """`B` Xavier-uniform; `A` zero for an adapter that starts as the identity, otherwise Xavier-uniform too."""
        nn.init.xavier_uniform_(self.lorad_B[adapter_name])
        if identity:
            nn.init.zeros_(self.lorad_A[adapter_name])
        else:
            nn.init.xavier_uniform_(self.lorad_A[adapter_name])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Follow the base to its device, but not to its dtype: factors stay float32 (or wider) over a half base."""
        device = torch.device(self.weight.device if device is None else device)
        for factors in (self.lorad_A, self.lorad_B):
            if adapter_name in factors and not factors[adapter_name].is_meta and device.type != "meta":
                param = factors[adapter_name]
                param.data = param.data.to(device, torch.promote_types(param.dtype, torch.float32))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter.

        Raises:
            ValueError: it is fused into the base weight, from where it could not be taken out any more.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"Adapter {adapter_name!r} is fused into the base weights. Unfuse it (`unfuse_lora`, `unmerge_adapter`) "
                "before deleting it, or drop all adapters and keep the fused weights with `merge_and_unload`."
            )
        super().delete_adapter(adapter_name)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the factor on the angles of one adapter; nothing happens where this layer does not have it."""
        if adapter_name in self.scaling:
            self.scaling[adapter_name] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor on the angles of every active adapter by `scale`."""
        for name in self._acting():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without an argument, go back to the factor 1."""
        for name in self._acting():
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def get_angles(self, adapter_names: list[str] | None = None) -> Tensor:
        """Sum of the scaled angles of these adapters (default: the active ones), (out, in/2)."""
        names = self._acting() if adapter_names is None else adapter_names
        return lorad_angles(*self._factors(names, self.scaling))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, scale: float = 1.0) -> None:
        """Turn the base weight itself by the angles of these adapters (default: the active ones), in float32.

        All of them in one rotation, so that a half-precision weight is rounded once.

        Args:
            safe_merge: check that the new weight is finite before it replaces the old one. Default False.
            adapter_names: adapters to merge; those merged already are skipped with a warning.
            scale: further factor on the angles, for this merge alone. Default 1.0.

        Raises:
            ValueError: `safe_merge` found numbers that are not finite; the base weight is unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lorad_A]
        if not names:
            return
        scaling = {name: self.scaling[name] * scale for name in names}
        self._turn_base(self._factors(names, scaling), 1.0, names if safe_merge else None)
        self.merged_adapters.extend(names)
        self.merged_scaling.update(scaling)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Turn the base weight back by the opposite angle, with the scales that `merge` used.

        Nothing is stored for this. A float32 weight comes back to about 6e-8 of its norm; a bfloat16 one is rounded
        twice on the way (1e-3), so keep half-precision bases unfused where they must stay as they were.

        Args:
            adapter_names: which of the merged adapters; default None takes all.
        """
        names = [name for name in self.merged_adapters if adapter_names is None or name in adapter_names]
        if not names:
            warnings.warn("No LoRaD adapter is merged, there is nothing to unmerge.", stacklevel=2)
            return
        self._turn_base(self._factors(names, self.merged_scaling), -1.0)
        self.merged_adapters = [name for name in self.merged_adapters if name not in names]
        for name in names:
            del self.merged_scaling[name]

    def keep_merged(self) -> None:
        """Make what is merged a part of the base weight for good, so that its adapters may be deleted."""
        self.merged_adapters = []
        self.merged_scaling.clear()

    @torch.no_grad()
    def _turn_base(self, factors: tuple[Tensor, Tensor], sign: float, checked: list[str] | None = None) -> None:
        weight = self.get_base_layer().weight
        with self._inner_unmerged():
            turned = rotate(weight, lorad_angles(*factors, scale=sign).to(weight.device))
            if checked is not None and not torch.isfinite(turned).all():
                raise ValueError(
                    f"Merging {', '.join(checked)} would give weights that are not finite (NaN or infinite); the base "
                    "is unchanged. The adapter seems to be broken: load another checkpoint of it."
                )
            weight.data.copy_(turned)

    def _inner_adapters(self) -> Iterator[BaseTunerLayer]:
        """The layers of other adapters between this one and the base, from the outside in."""
        module = self.base_layer
        while isinstance(module, BaseTunerLayer):
            yield module
            module = module.base_layer

    @contextmanager
    def _inner_unmerged(self) -> Iterator[None]:
        """Inside the block the base weight is without inner adapters (a LoRA, say): LoRaD turns only the base."""
        merged = [(layer, list(layer.merged_adapters)) for layer in self._inner_adapters() if layer.merged]
        for layer, _ in merged:
            layer.unmerge()
        try:
            yield
        finally:
            for layer, names in reversed(merged):
                layer.merge(adapter_names=names)

    def _factors(self, names: list[str], scaling: dict[str, float]) -> tuple[Tensor, Tensor]:
        """One pair (A, B) for all named adapters: angles add, so factors are concatenated along the rank."""
        A = [self.lorad_A[name] if scaling[name] == 1.0 else self.lorad_A[name] * scaling[name] for name in names]
        B = [self.lorad_B[name] for name in names]
        return (A[0], B[0]) if len(names) == 1 else (torch.cat(A, dim=1), torch.cat(B, dim=0))

    def _acting(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lorad_A]


class LoRaDLinear(nn.Module, LoRaDLayer):
    """`nn.Linear` with LoRaD adapters: `y = x @ rotate(W, sum of angles)^T + bias`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, config: LoRaDConfig) -> None:
        super().__init__()
        LoRaDLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._acting()
        if not names:
            return self.base_layer(x)
        A, B = self._factors(names, self.scaling)
        inner = self.get_base_layer()
        if inner is self.base_layer:
            return lorad_linear(x, inner.weight, inner.bias, A, B)
        # Over another adapter (a LoRA, say) the base output is that adapter's, and LoRaD adds the change it makes to
        # the base alone, which takes an unmerged base weight.
        for adapter in self._inner_adapters():
            if adapter.merged:
                adapter.unmerge()
        change = lorad_linear(x, inner.weight, None, A, B) - F.linear(x, inner.weight)  # exactly 0 at angle 0
        return self.base_layer(x) + change

    def __repr__(self) -> str:
        return "lorad." + super().__repr__()
