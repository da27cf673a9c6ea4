"""LoRaD on one layer: a wrapper that keeps the base layer frozen and turns its weight on the way through."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_wadi.lorad.base_layers import check_base_layer, features_of
from diffusers_wadi.lorad.config import LoRaDConfig
from diffusers_wadi.lorad.kernels.precision import angle_dtype, autocast_dtype
from diffusers_wadi.lorad.merging import MergingLayer
from diffusers_wadi.lorad.offload import is_offloaded, onloaded
from diffusers_wadi.lorad.quantization import dequantized, is_quantized, lorad_quantized_linear
from diffusers_wadi.lorad.rotation import lorad_angles, lorad_linear, turn_weight
from diffusers_wadi.lorad.targets import weight_vectors

if TYPE_CHECKING:
    from diffusers_wadi.lorad.kept_rotations import KeptRotations

__all__ = ["LoRaDLayer", "LoRaDLinear", "OneTensorLayer", "TurnedWeightLayer"]

BASE_MODEL = "__base__"  # PEFT's name, in a mixed batch, for no adapter


class LoRaDLayer(MergingLayer):
    """Holds the factors of every adapter of one layer: `lorad_A[name]` (out, r) and `lorad_B[name]` (r, in/2), float32.

    For what out and in are in other layers than a Linear, see `weight_vectors`. All active adapters act at once, their
    angles add. `_active_adapter` and `_disable_adapters` may be set directly to switch adapters without PEFT's change
    of `requires_grad` (training holds several adapters over one base).
    """

    adapter_layer_names = ("lorad_A", "lorad_B")
    other_param_names = ("r", "scaling", "merged_scaling")
    adapts: tuple[type[nn.Module], ...] = ()  # the kinds of base layer
    cast_input_dtype_enabled = (
        False  # PEFT's `disable_input_dtype_casting`, of diffusers' layerwise casting, asks for it
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lorad_A = nn.ParameterDict()
        self.lorad_B = nn.ParameterDict()
        self._disable_adapters = False
        inner = self.get_base_layer()
        kind = type(inner).__name__
        check_base_layer(inner, kind)
        if not isinstance(inner, self.adapts):
            wanted = " or ".join(cls.__name__ for cls in self.adapts)
            raise ValueError(f"A {type(self).__name__} adapts a {wanted}, but `{kind}` is a {kind}.")
        self.in_features, self.out_features = features_of(inner)
        self.rows, size = weight_vectors(inner)
        self.pairs = size // 2

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
        options = {"dtype": torch.float32, "device": "meta" if self._is_meta() else None}
        self.lorad_A[adapter_name] = nn.Parameter(torch.zeros(self.rows, r, **options))
        self.lorad_B[adapter_name] = nn.Parameter(torch.zeros(r, self.pairs, **options))
        self.reset_lorad_parameters(adapter_name, config.starts_as_identity)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_factors(self, adapter_name: str, A: Tensor, B: Tensor) -> None:
        """Add an adapter with these factors, (out, r) and (r, in/2), frozen and not active."""
        self.r[adapter_name] = A.shape[1]
        self.scaling[adapter_name] = 1.0
        for factors, values in ((self.lorad_A, A), (self.lorad_B, B)):
            factors[adapter_name] = nn.Parameter(values.detach().clone(), requires_grad=False)

    def _is_meta(self) -> bool:
        """Whether the base has no numbers at all; those of an offloaded one are elsewhere."""
        return self._base_weight().is_meta and not is_offloaded(self.get_base_layer())

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
        device = torch.device(self._base_weight().device if device is None else device)
        for factors in (self.lorad_A, self.lorad_B):
            if adapter_name in factors and not factors[adapter_name].is_meta and device.type != "meta":
                param = factors[adapter_name]
                param.data = param.data.to(device, torch.promote_types(param.dtype, torch.float32))

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Store the factors of one adapter in `dtype`; angles are computed in float32 all the same."""
        for factors in (self.lorad_A, self.lorad_B):
            if adapter_name in factors:
                factors[adapter_name].data = factors[adapter_name].data.to(dtype)

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

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What one adapter with its scale changes in the weight, in the weight's shape and float32 or wider.

        PEFT's `convert_to_lora` asks for it. Unlike the angles, such changes of several adapters do not add up.

        Raises:
            ValueError: something is merged, so that the weight is not the base's.
        """
        if self.merged:
            raise ValueError(f"{', '.join(self.merged_adapters)} is merged into the base weight; unmerge it first.")
        weight = self._base_weight()
        if isinstance(inner := self.get_base_layer(), nn.Linear):
            weight = dequantized(inner)
        A, B = self._factors([adapter_name], self.scaling)
        dtype = angle_dtype(A, B)
        return self._turn(weight, A, B, dtype) - weight.to(dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` applies: to Linear layers."""
        return isinstance(self.get_base_layer(), nn.Linear)

    def _factors(self, names: list[str], scaling: dict[str, float]) -> tuple[Tensor, Tensor]:
        """One pair (A, B) for all named adapters: angles add, so factors are concatenated along the rank."""
        A = [self.lorad_A[name] if scaling[name] == 1.0 else self.lorad_A[name] * scaling[name] for name in names]
        B = [self.lorad_B[name] for name in names]
        return (A[0], B[0]) if len(names) == 1 else (torch.cat(A, dim=1), torch.cat(B, dim=0))

    def _acting(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lorad_A]


class OneTensorLayer(nn.Module, LoRaDLayer):
    """A layer that is called with one tensor, whose first axis is the batch where samples have adapters of their own."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, config: LoRaDConfig) -> None:
        super().__init__()
        LoRaDLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        """Input and output have the shapes of the base layer.

        Args:
            adapter_names: for every sample of the batch the adapter that acts on it, or "__base__" for none. Default
                None: the active adapters act on all.
        """
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names)
        names = [] if self.merged else self._acting()
        return self._with_adapters(x, names) if names else self.base_layer(x)

    def _check_mixed_batch(self, x: Tensor, adapter_names: list[str]) -> None:
        # The wording is PEFT's, whose users may look for it.
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Every sample with the adapter that is named for it, or with the base alone."""
        y = self.base_layer(x)
        for name in dict.fromkeys(adapter_names):
            if name in self.lorad_A:
                rows = [i for i, other in enumerate(adapter_names) if other == name]
                y[rows] = self._with_adapters(x[rows], [name])
        return y

    @abstractmethod
    def _with_adapters(self, x: Tensor, names: list[str]) -> Tensor:
        """The output with these adapters, at least one."""

    def __repr__(self) -> str:
        return "lorad." + super().__repr__()


class TurnedWeightLayer(OneTensorLayer):
    """A layer that multiplies its input by its weight: the weight is turned on the way, or kept turned by a cache."""

    kept_rotations: KeptRotations | None = None

    def _with_adapters(self, x: Tensor, names: list[str]) -> Tensor:
        inner = self.get_base_layer()
        modules = (inner, self.lorad_A, self.lorad_B)
        if is_offloaded(*modules):
            with onloaded(*modules):
                return self._turned_output(x, names, inner, None)
        # What the compiler traces is not to depend on what happens to be kept.
        kept = None if torch.compiler.is_compiling() else self.kept_rotations
        return self._turned_output(x, names, inner, kept)

    def _turned_output(self, x: Tensor, names: list[str], inner: nn.Module, kept: KeptRotations | None) -> Tensor:
        if inner is self.base_layer:
            return self._times_turned(x, names, inner, kept)
        # Over another adapter (a LoRA, say) the base output is that adapter's, and LoRaD adds the change it makes to
        # the base alone, which takes an unmerged base weight.
        for adapter in self._inner_adapters():
            if adapter.merged:
                adapter.unmerge()
        change = self._times_turned(x, names, inner, kept, bias=False) - self._plain(x)  # exactly 0 at angle 0
        return self.base_layer(x) + change

    def _times_turned(
        self, x: Tensor, names: list[str], inner: nn.Module, kept: KeptRotations | None, bias: bool = True
    ) -> Tensor:
        rotated = None
        if kept is not None:
            low = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)
            rotated = kept.rotated(self, inner, names, x.device, low or inner.weight.dtype)
        if rotated is None:
            return self._turned(x, *self._factors(names, self.scaling), bias)
        vector = inner.bias if bias else None
        if low is None:
            return self._times(x, rotated, vector)
        with torch.autocast(x.device.type, enabled=False):
            return self._times(x.to(low), rotated, None if vector is None else vector.to(low))

    @abstractmethod
    def _turned(self, x: Tensor, A: Tensor, B: Tensor, bias: bool = True) -> Tensor:
        """The layer's output with the weight turned by the angles A @ B, with or without the bias."""

    @abstractmethod
    def _plain(self, x: Tensor) -> Tensor:
        """The layer's output without adapters and without bias."""

    @abstractmethod
    def _times(self, x: Tensor, rotated: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output with this weight, as `_turned` computes it."""

    def _rotated_weight(self, names: list[str], scaling: dict[str, float], dtype: torch.dtype) -> Tensor:
        """The weight as `_times` takes it, turned by these adapters at these scales."""
        return turn_weight(self._base_weight(), *self._factors(names, scaling), dtype)

    def _turn_base(self, *args: Any) -> None:
        self._forget_rotated()
        super()._turn_base(*args)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter."""
        super().delete_adapter(adapter_name)
        self._forget_rotated()

    def train(self, mode: bool = True) -> nn.Module:
        """As of every module; a layer in training keeps no turned weight."""
        if mode:
            self._forget_rotated()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What `to`, `half` and the like run: the turned weight of other tensors is freed with them."""
        super()._apply(fn, recurse)
        if self.kept_rotations is not None:
            self.kept_rotations.forget_moved(self)
        return self

    def _forget_rotated(self) -> None:
        if self.kept_rotations is not None:
            self.kept_rotations.forget(self)


class LoRaDLinear(TurnedWeightLayer):
    """`nn.Linear` with LoRaD adapters: `y = x @ rotate(W, sum of angles)^T + bias`, (..., in) -> (..., out)."""

    adapts = (nn.Linear,)

    def _turned(self, x: Tensor, A: Tensor, B: Tensor, bias: bool = True) -> Tensor:
        inner = self.get_base_layer()
        vector = inner.bias if bias else None
        if is_quantized(inner):
            return lorad_quantized_linear(x, inner, vector, A, B)
        # 8-bit floats are for storage: such a weight is turned in float32 and meets x in x's dtype.
        dtype = x.dtype if inner.weight.dtype.itemsize == 1 else None
        vector = vector if dtype is None or vector is None else vector.to(dtype)
        return lorad_linear(x, inner.weight, vector, A, B, dtype)

    def _times(self, x: Tensor, rotated: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, rotated, bias)

    def _plain(self, x: Tensor) -> Tensor:
        inner = self.get_base_layer()
        weight: Any = dequantized(inner).to(x.dtype) if is_quantized(inner) else inner.weight
        return F.linear(x, weight)
