"""What a conversion kept and what it lost, layer by layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ConversionReport", "LayerReport", "LeftOut"]


@dataclass(frozen=True)
class LayerReport:
    """One converted layer. Shares are of the squared norm of the layer's change.

    Args:
        name: module path.
        shape: of the weight, flattened to (out, in).
        rank: rank of its new factors.
        change: norm of the change of the weight.
        relative_change: the same, as a share of the norm of the base weight.
        explained: share of the change that the new adapter makes; 1 is all of it.
        lost_to_rank: share that a higher rank would bring.
        lost_to_lengths: share that no LoRaD can bring, since it changes lengths of pairs; 0 for a LoRA.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    change: float
    relative_change: float
    explained: float
    lost_to_rank: float
    lost_to_lengths: float = 0.0


@dataclass(frozen=True)
class LeftOut:
    """A tensor that changed, but that the adapter does not touch.

    Args:
        name: its key.
        shape: its shape.
        change: norm of the change.
        relative_change: the same, as a share of the norm of the base tensor.
        reason: why it was left out.
    """

    name: str
    shape: tuple[int, ...]
    change: float
    relative_change: float
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """Every tensor that changed: converted, or left out."""

    layers: list[LayerReport] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def explained(self) -> float:
        """Share of the whole change, that of the tensors left out included."""
        total = sum(entry.change**2 for entry in (*self.layers, *self.left_out))
        return sum(layer.explained * layer.change**2 for layer in self.layers) / total if total else 1.0

    @property
    def explained_of_layers(self) -> float:
        """Share of the change of the converted layers alone."""
        total = sum(layer.change**2 for layer in self.layers)
        return sum(layer.explained * layer.change**2 for layer in self.layers) / total if total else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return {"explained": self.explained, "explained_of_layers": self.explained_of_layers, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def summary(self) -> str:
        """Two lines at most: what was kept, what was left out."""
        ranks = sorted({layer.rank for layer in self.layers})
        spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
        text = f"{len(self.layers)} layers, {spread}: {self.explained_of_layers:.2%} of their change explained"
        if not self.left_out:
            return text
        largest = max(self.left_out, key=lambda entry: entry.change)
        return (
            f"{text}\n{len(self.left_out)} tensors changed and were left out ({largest.reason}: {largest.name}, ...); "
            f"with them {self.explained:.2%}"
        )

    def table(self, limit: int | None = None) -> str:
        """A Markdown table of the layers, the least explained first, then of what was left out.

        Args:
            limit: number of rows of each; default None takes all.
        """
        rows = ["| layer | shape | rank | change | explained | lost to rank | lost to lengths |", "|" + "---|" * 7]
        for layer in sorted(self.layers, key=lambda layer: layer.explained)[:limit]:
            shape = "x".join(map(str, layer.shape))
            shares = f"{layer.explained:.2%} | {layer.lost_to_rank:.2%} | {layer.lost_to_lengths:.2%}"
            rows.append(f"| {layer.name} | {shape} | {layer.rank} | {layer.relative_change:.2%} | {shares} |")
        if self.left_out:
            rows += ["", "| left out | shape | change | reason |", "|" + "---|" * 4]
        for entry in sorted(self.left_out, key=lambda entry: -entry.change)[:limit]:
            shape = "x".join(map(str, entry.shape))
            rows.append(f"| {entry.name} | {shape} | {entry.relative_change:.2%} | {entry.reason} |")
        return "\n".join(rows)
