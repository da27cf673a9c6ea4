"""Writing rotations into the base weight and taking them out again.

A float32 weight is turned back by the opposite angle: nothing is stored, and its drift is far below its precision's.
In 16 bits every turn would be rounded (after 100 rounds up to 8e-4 of the norm in float16, 6e-3 in bfloat16), so a
half-precision weight is kept while something is merged, on the CPU: the fused weight is always made of it in one turn,
and unmerging puts the very same numbers back. `keeps_half_weights = False` on the class or on a layer saves that memory
(2 bytes per number, 0.5 GB for the Linear layers of SD 1.5) at the price of that drift.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from diffusers_wadi.lorad.offload import onloaded
from diffusers_wadi.lorad.quantization import is_quantized
from diffusers_wadi.lorad.rotation import turn_weight

__all__ = ["MergingLayer", "outer_unmerged"]

_SAMPLES = 256  # numbers of a merged weight by which a change from outside is noticed
_TOLERANCE = 1e-5  # of the largest of them, for float32, where merging a LoRA and unmerging it leaves rounding errors


class MergingLayer(BaseTunerLayer):
    """The part of a LoRaD layer that fuses. Its other part has `lorad_A`, `lorad_B`, `scaling` and `_factors`."""

    keeps_half_weights: bool = True

    def __init__(self) -> None:
        self.merged_adapters: list[str] = []
        self.merged_scaling: dict[str, float] = {}
        self._original: Tensor | None = None
        self._merged_sample: Tensor | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, scale: float = 1.0) -> None:
        """Turn the base weight itself by the angles of these adapters (default: the active ones), in float32.

        All of them in one rotation, so that a half-precision weight is rounded once.

        Args:
            safe_merge: check that the new weight is finite before it replaces the old one. Default False.
            adapter_names: adapters to merge; those merged already are skipped with a warning.
            scale: further factor on the angles, for this merge alone. Default 1.0.

        Raises:
            ValueError: `safe_merge` found numbers that are not finite, or the base is quantised; the base weight is
                unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lorad_A]
        if not names:
            return
        self._refuse_unmergeable()
        scaling = {name: self.scaling[name] * scale for name in names}
        self._turn_base({**self.merged_scaling, **scaling}, names if safe_merge else None)
        self.merged_adapters.extend(names)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Undo `merge`, with the scales that it used.

        A half-precision weight comes back bit for bit, a float32 one to about 1e-7 of its norm.

        Args:
            adapter_names: which of the merged adapters; default None takes all.

        Raises:
            ValueError: another adapter was merged into a float32 weight since and has to be unmerged first.
        """
        names = [name for name in self.merged_adapters if adapter_names is None or name in adapter_names]
        if not names:
            warnings.warn("No LoRaD adapter is merged, there is nothing to unmerge.", stacklevel=2)
            return
        self._turn_base({name: scale for name, scale in self.merged_scaling.items() if name not in names})
        self.merged_adapters = [name for name in self.merged_adapters if name not in names]

    def keep_merged(self) -> None:
        """Make what is merged a part of the base weight for good, so that its adapters may be deleted."""
        self.merged_adapters = []
        self.merged_scaling = {}
        self._original = self._merged_sample = None

    def _base_weight(self) -> nn.Parameter:
        """The weight that the adapters of this layer turn."""
        return self.get_base_layer().weight

    def _turn(self, weight: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, wide: bool = False) -> Tensor:
        """`turn_weight` for a weight as this layer stores it."""
        return turn_weight(weight, A, B, dtype, wide)

    def _refuse_unmergeable(self) -> None:
        inner = self.get_base_layer()
        if hasattr(inner, "weight") and is_quantized(inner):
            raise ValueError(
                f"The base layer holds quantised weights ({type(inner.weight).__name__}), and the rotated ones would "
                "have to be quantised anew, which changes the images. Use the adapter unfused, or load the base "
                "without quantisation, fuse, and quantise the result."
            )

    @torch.no_grad()
    def _turn_base(self, scaling: dict[str, float], checked: list[str] | None = None) -> None:
        """Bring the base weight from what is merged now to adapters merged with `scaling`."""
        inner = self.get_base_layer()
        with onloaded(inner, self.lorad_A, self.lorad_B, changed=inner), self._inner_unmerged():
            weight = self._base_weight()
            original = self._original
            if original is None and not self.merged_scaling and self._should_keep(weight):
                original = weight.detach().to("cpu", copy=True)
            if original is None:
                turned = self._turn_on(weight, scaling)
            else:
                turned = self._turn_anew(weight, original, scaling)
            if checked is not None and not torch.isfinite(turned).all():
                raise ValueError(
                    f"Merging {', '.join(checked)} would give weights that are not finite (NaN or infinite); the base "
                    "is unchanged. The adapter seems to be broken: load another checkpoint of it."
                )
            weight.data.copy_(turned)
            self.merged_scaling = dict(scaling)
            self._original = original if scaling else None
            self._merged_sample = _sample(weight) if scaling else None

    def _should_keep(self, weight: Tensor) -> bool:
        return self.keeps_half_weights and weight.dtype.itemsize < 4 and not weight.is_meta

    def _turn_on(self, weight: Tensor, scaling: dict[str, float]) -> Tensor:
        """From the merged weight to another one, by the difference of the angles."""
        if self._was_changed(weight):
            raise ValueError(
                f"The base weight was changed while {', '.join(self.merged_adapters)} was fused into it, by another "
                "adapter's merge, say. Unmerge that one first: turning the weight back would turn its change as well."
            )
        added = {name: scale for name, scale in scaling.items() if name not in self.merged_scaling}
        removed = {name: -scale for name, scale in self.merged_scaling.items() if name not in scaling}
        return self._rotated(weight, {**removed, **added}, weight.dtype)

    def _turn_anew(self, weight: Tensor, original: Tensor, scaling: dict[str, float]) -> Tensor:
        """From the kept weight, and what others have added to the merged one since."""
        original = original.to(weight.device)
        if not self._was_changed(weight):
            return self._rotated(original, scaling, original.dtype)
        added = weight.float() - self._rotated(original, self.merged_scaling, original.dtype).float()
        return self._rotated(original, scaling, torch.float32) + added

    def _rotated(self, weight: Tensor, scaling: dict[str, float], dtype: torch.dtype) -> Tensor:
        if not scaling:
            return weight.to(dtype)
        A, B = (factor.to(weight.device) for factor in self._factors(list(scaling), scaling))
        # Sines in float64, so that a turn and its opposite differ by the rounding of the result alone.
        return self._turn(weight, A, B, dtype, wide=weight.dtype == torch.float32)

    def _was_changed(self, weight: Tensor) -> bool:
        """Whether somebody else wrote into the weight since it was merged; a change of dtype or device does not count."""
        sample = self._merged_sample
        if sample is None or weight.is_meta:
            return False
        now = _sample(weight)
        if weight.dtype.itemsize < sample.dtype.itemsize:
            return False
        tolerance = _TOLERANCE * sample.float().abs().max() if self._original is None else 0.0
        return not bool((now.float() - sample.float()).abs().max() <= tolerance)

    def _inner_adapters(self) -> Iterator[BaseTunerLayer]:
        """The layers of other adapters between this one and the base, from the outside in."""
        module: nn.Module = self.base_layer
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


@contextmanager
def outer_unmerged(model: nn.Module) -> Iterator[None]:
    """Inside the block other adapters that were put over LoRaD layers (a LoRA, say) are out of the base weights.

    A LoRaD layer cannot see what lies over it, and turning a weight turns what others have merged into it as well:
    fuse and unfuse inside this block, or the LoRaD before the other and after it.
    """
    outer = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MergingLayer) and module.merged:
            if isinstance(module.base_layer, BaseTunerLayer):
                outer.append((module, list(module.merged_adapters)))
    for layer, _ in outer:
        layer.unmerge()
    try:
        yield
    finally:
        for layer, names in reversed(outer):
            layer.merge(adapter_names=names)


def _sample(weight: Tensor) -> Tensor | None:
    """Evenly spaced numbers of a weight, on the CPU."""
    if weight.is_meta:
        return None
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].cpu().clone()
