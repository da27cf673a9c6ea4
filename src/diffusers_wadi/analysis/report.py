"""What changed between two models, layer by layer and overall: as numbers, a table, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_wadi._files import writable_folder, written_beside
from diffusers_wadi.analysis.weights import Convention

__all__ = ["GROUPS", "GroupChange", "LayerChange", "OtherChange", "WeightAnalysis", "save_analyses"]

LEVELS = (0.5, 0.9, 0.99)
"""Energies of which the rank fraction is given."""

GROUPS = ("self-attention", "cross-attention", "feed-forward", "projection", "convolution", "time embedding", "other")
"""What kinds of layers are told apart, in the order of tables and figures."""

_FRACTIONS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class LayerChange:
    """One weight.

    Args:
        name: module path.
        group: one of `GROUPS`.
        shape: of the weight.
        relative_change: norm of the change as a share of the norm of the base weight; None where that is 0.
        norm: norm change of every vector as a share of its norm in the base; the paper's Delta-norm is its mean. Vectors
            that are zero in one of the two models are left out.
        direction: direction change of the same vectors, 0 to 2; the paper's Delta-dir is its mean.
        change: squared norm of the change.
        rotation_left: squared norm of what of it no rotation in LoRaD's planes makes.
        vectors: how many there are, those of zeros too.
        energies: shares of the squared singular values of the change, largest first, of sum 1; empty where nothing
            changed or where they were not asked for.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    relative_change: float | None
    norm: np.ndarray
    direction: np.ndarray
    change: float
    rotation_left: float
    vectors: int
    energies: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def rotation_share(self) -> float | None:
        """Share of the change that is a rotation in LoRaD's planes, 0 to 1; None where nothing changed."""
        return _share(self.change, self.rotation_left)

    def rank_fraction(self, energy: float) -> float | None:
        """Share of all ranks that the change needs to hold this share of its energy; None without energies."""
        if not self.energies.size:
            return None
        # The last digits of the sum are rounding, which is not to ask for further ranks.
        return (int((self.energies.cumsum() < energy - 1e-9).sum()) + 1) / self.energies.size

    def energy_curve(self, fractions: np.ndarray = _FRACTIONS) -> np.ndarray | None:
        """Energy held by the first singular values, at these fractions of the rank; None without energies."""
        if not self.energies.size:
            return None
        ranks = np.arange(self.energies.size + 1) / self.energies.size
        return np.interp(fractions, ranks, np.concatenate([[0.0], self.energies.cumsum()]))

    def as_dict(self) -> dict[str, Any]:
        """Plain values; without the numbers of the single vectors."""
        return {
            "name": self.name,
            "group": self.group,
            "shape": list(self.shape),
            "vectors": self.vectors,
            **_statistics(self.norm, self.direction),
            "relative_change": self.relative_change,
            "rotation_share": self.rotation_share,
            **{_rank_key(level): self.rank_fraction(level) for level in LEVELS},
        }


@dataclass(frozen=True)
class OtherChange:
    """A tensor that changed and that has no vectors: a bias, a norm's weight or a single value.

    Args:
        name: its key.
        shape: its shape.
        relative_change: norm of the change as a share of the norm of the base tensor; None where that is 0.
    """

    name: str
    shape: tuple[int, ...]
    relative_change: float | None


@dataclass(frozen=True)
class GroupChange:
    """Layers taken together: means and standard deviations over all their vectors, shares of the sum of their changes.

    Rank fractions are means over the layers that changed. `norm_of_random` is the norm change that goes with these
    directions where nothing is special about norms: in n dimensions a random change is mostly sideways, and its one
    component along the vector is on average sqrt(2 / (pi n)) of its length.
    """

    name: str
    layers: int
    changed: int
    vectors: int
    norm_mean: float
    norm_std: float
    direction_mean: float
    direction_std: float
    norm_of_random: float
    rotation_share: float | None
    rank_fractions: dict[float, float | None]

    def as_dict(self) -> dict[str, Any]:
        names = ("name", "layers", "changed", "vectors", "norm_mean", "norm_std", "direction_mean", "direction_std")
        plain = {name: getattr(self, name) for name in (*names, "rotation_share")}
        fractions = {_rank_key(level): value for level, value in self.rank_fractions.items()}
        return plain | fractions | {"norm_of_random": self.norm_of_random}


@dataclass(frozen=True)
class WeightAnalysis:
    """`analyze_weights`' result.

    Args:
        base, tuned: where the two came from.
        convention: what the vectors are.
        layers: every compared weight, changed or not, in the order of the network's own list.
        others: what else changed.
        label: short name of `tuned`, for tables and figures.
    """

    base: str
    tuned: str
    convention: Convention
    layers: list[LayerChange]
    others: list[OtherChange] = field(default_factory=list)
    label: str = ""

    def overall(self) -> GroupChange:
        """All layers together."""
        return summarize("all layers", self.layers)

    def groups(self) -> list[GroupChange]:
        """The kinds of layers that occur."""
        found = {name: [layer for layer in self.layers if layer.group == name] for name in GROUPS}
        return [summarize(name, layers) for name, layers in found.items() if layers]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON, with the energy curve of every layer at rank fractions 0, 0.01, ..., 1."""
        layers = []
        for layer in self.layers:
            curve = layer.energy_curve()
            layers.append(layer.as_dict() | {"energy_curve": None if curve is None else curve.round(6).tolist()})
        others = [vars(other) | {"shape": list(other.shape)} for other in self.others]
        return {
            "label": self.label,
            "base": self.base,
            "tuned": self.tuned,
            "convention": self.convention,
            "overall": self.overall().as_dict(),
            "groups": [group.as_dict() for group in self.groups()],
            "layers": layers,
            "others": others,
        }

    def table(self) -> str:
        """A Markdown table: overall, then by kind of layer."""
        head = "| | layers (changed) | norm change | direction change | rotation share | rank for 90 % energy |"
        rows = [head, "|---|" + "---:|" * 5]
        for group in (self.overall(), *self.groups()):
            rows.append(
                f"| {group.name} | {group.layers} ({group.changed}) | {_mean_std(group.norm_mean, group.norm_std)} | "
                f"{_mean_std(group.direction_mean, group.direction_std)} | {_percent(group.rotation_share)} | "
                f"{_percent(group.rank_fractions[0.9])} |"
            )
        return "\n".join(rows)

    def layer_table(self, limit: int | None = None) -> str:
        """A Markdown table of the layers whose direction changed most.

        Args:
            limit: number of rows; default None takes all.
        """
        head = "| layer | shape | norm change | direction change | rotation share | rank for 90 % energy |"
        rows = [head, "|---|" + "---:|" * 5]
        order = sorted(self.layers, key=lambda layer: -layer.as_dict()["direction_mean"])
        for layer in order[:limit]:
            values = layer.as_dict()
            rows.append(
                f"| {layer.name} | {'x'.join(map(str, layer.shape))} | "
                f"{_mean_std(values['norm_mean'], values['norm_std'])} | "
                f"{_mean_std(values['direction_mean'], values['direction_std'])} | {_percent(layer.rotation_share)} | "
                f"{_percent(layer.rank_fraction(0.9))} |"
            )
        return "\n".join(rows)

    def summary(self) -> str:
        """A few lines of plain text."""
        total = self.overall()
        vector = {"column": "output unit", "row": "input"}[self.convention]
        lines = [
            f"{total.changed} of {total.layers} weights changed. One vector per {vector}: norms by {total.norm_mean:.3g} of "
            f"themselves, directions by {total.direction_mean:.3g} (of 2). A random change of these directions would change "
            f"norms by {total.norm_of_random:.3g}."
        ]
        if total.rotation_share is not None:
            lines.append(
                f"{total.rotation_share:.2%} of the squared change is a rotation in LoRaD's planes; a small random "
                "change would have 50 %."
            )
        if self.others:
            largest = max(self.others, key=lambda other: other.relative_change or 0)
            lines.append(
                f"{len(self.others)} biases, norms and single values changed too, most {largest.name} "
                f"(by {largest.relative_change or math.inf:.2%})."
            )
        return "\n".join(lines)


def save_analyses(analyses: Sequence[WeightAnalysis], folder: str | os.PathLike) -> list[Path]:
    """Write `analysis.json`, `layers.csv` and `overall.csv`, each whole or not at all.

    Args:
        analyses: one, or several of one base.
        folder: created if need be.

    Raises:
        OSError: it is not writable.
    """
    folder = writable_folder(folder)
    whole = [("overall", analysis.overall(), *analysis.groups()) for analysis in analyses]
    texts = {
        "analysis.json": json.dumps([analysis.as_dict() for analysis in analyses], indent=1, allow_nan=False) + "\n",
        "layers.csv": _csv([(a.label, layer.as_dict()) for a in analyses for layer in a.layers]),
        "overall.csv": _csv([(a.label, g.as_dict()) for a, groups in zip(analyses, whole) for g in groups[1:]]),
    }
    for name, text in texts.items():
        with written_beside(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in texts]


def _csv(rows: list[tuple[str, dict[str, Any]]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["tuned", *rows[0][1]], lineterminator="\n")
    writer.writeheader()
    for label, values in rows:
        plain = {k: "x".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
        writer.writerow({"tuned": label, **plain})
    return text.getvalue()


def summarize(name: str, layers: Sequence[LayerChange]) -> GroupChange:
    """Layers taken together, under a name; at least one."""
    norm = np.concatenate([layer.norm for layer in layers])
    direction = np.concatenate([layer.direction for layer in layers])
    change, left = sum(layer.change for layer in layers), sum(layer.rotation_left for layer in layers)
    fractions = {}
    for level in LEVELS:
        known = [value for layer in layers if (value := layer.rank_fraction(level)) is not None]
        fractions[level] = float(np.mean(known)) if known else None
    return GroupChange(
        name=name,
        layers=len(layers),
        changed=sum(layer.change > 0 for layer in layers),
        vectors=sum(layer.vectors for layer in layers),
        rotation_share=_share(change, left),
        rank_fractions=fractions,
        norm_of_random=_norm_of_random(layers),
        **_statistics(norm, direction),
    )


def _statistics(norm: np.ndarray, direction: np.ndarray) -> dict[str, float]:
    """Eq. 13 to 17: means, and standard deviations as the word means it, the root of the mean squared deviation."""
    if not norm.size:
        norm = direction = np.zeros(1)  # all vectors are zero in one of the two: nothing that could be compared
    return {
        "norm_mean": float(norm.mean()),
        "norm_std": float(norm.std()),
        "direction_mean": float(direction.mean()),
        "direction_std": float(direction.std()),
    }


def _norm_of_random(layers: Sequence[LayerChange]) -> float:
    expected, vectors = 0.0, 0
    for layer in layers:
        numbers = math.prod(layer.shape) / max(1, layer.vectors)  # of each vector
        expected += math.sqrt(2 / (math.pi * numbers)) * float(layer.direction.sum())
        vectors += layer.direction.size
    return expected / max(1, vectors)


def _share(change: float, left: float) -> float | None:
    return None if change == 0 else max(0.0, 1 - left / change)


def _rank_key(level: float) -> str:
    return f"rank_fraction_{round(100 * level)}"


def _mean_std(mean: float, std: float) -> str:
    return f"{mean:.3g} ± {std:.2g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
