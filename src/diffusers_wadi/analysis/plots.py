"""The figures of an analysis, after Fig. 2 and 10-13 of the paper; matplotlib comes with the extra `analysis`.

Colours are those of Okabe and Ito, which the colour-blind tell apart; lines differ in their dashes and bars in their
hatches too, for print.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_wadi._files import writable_folder, written_beside
from diffusers_wadi._optional import require
from diffusers_wadi.analysis.report import GROUPS, LayerChange, WeightAnalysis, summarize

__all__ = ["plot_energies", "plot_layers", "plot_overview", "save_figures"]

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "oo")
_TITLES = {"norm": "Norm change", "direction": "Direction change"}
_AXES = {"norm": "change of norm / norm", "direction": "length of change of unit vector"}
_FLOOR = 1e-6  # what a logarithmic axis begins with: rounding of 32-bit weights lies below
_FRACTIONS = np.linspace(0, 1, 101)
_DPI = 150


def plot_overview(analyses: Sequence[WeightAnalysis], logarithmic: bool | None = None) -> Any:
    """Norm beside direction change, and the energy of the change by rank (Fig. 2a and 2b).

    Violins are the distributions over all vectors, dots their means, bars their middle halves: by kind of layer for one
    analysis, by analysis for several. The dashes are the norm changes that random changes of these directions would
    have. Lines of energy are means over layers, shades their standard deviation.

    Args:
        analyses: one, or several of one base.
        logarithmic: scale of both changes. Default None: for several analyses, where their directions differ by more
            than ten times or one did not change at all.

    Returns:
        A matplotlib Figure.
    """
    figure, axes = _figure(9.6, 3.3 if len(analyses) > 1 else 3.9, 1, 3, width_ratios=[1, 1, 1.05])
    by_layer = len(analyses) == 1
    columns = (
        _by_group(analyses[0]) if by_layer else [(a.label, _COLOURS[i % 7], a.layers) for i, a in enumerate(analyses)]
    )
    logarithmic = _spread(analyses) > 10 if logarithmic is None else logarithmic
    for ax, kind in zip(axes[:2], _TITLES):
        _violins(ax, kind, columns, logarithmic)
    _dashes(axes[0], columns, logarithmic)
    low, high = (f(ax.get_ylim()[i] for ax in axes[:2]) for i, f in enumerate((min, max)))
    for ax in axes[:2]:  # one scale, since that is the comparison
        ax.set_ylim(low, high)
        ax.tick_params(axis="x", labelrotation=40 if by_layer or len(columns) > 4 else 0)
        if by_layer or len(columns) > 4:
            for text in ax.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
    _curves(axes[2], columns)
    return figure


def plot_layers(analysis: WeightAnalysis) -> Any:
    """Norm beside direction change of every layer, bars of the means with whiskers of the standard deviation (Fig. 10-13).

    Returns:
        A matplotlib Figure, taller for more layers.
    """
    count = len(analysis.layers)
    dense = count > 60
    figure, axes = _figure(
        8.4 if dense else 7.6, max(2.4, (0.105 if dense else 0.17) * count + 1.1), 1, 2, sharey=True
    )
    places = np.arange(count)
    for ax, kind in zip(axes, _TITLES):
        for group, colour, hatch in zip(GROUPS, _COLOURS, _HATCHES):
            rows = [(i, getattr(layer, kind)) for i, layer in enumerate(analysis.layers) if layer.group == group]
            rows = [(i, values) for i, values in rows if values.size]
            if not rows:
                continue
            ax.barh(
                [i for i, _ in rows],
                [values.mean() for _, values in rows],
                xerr=np.array([_whiskers(values) for _, values in rows]).T,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
                height=0.82,
                label=group,
                error_kw={"elinewidth": 0.7, "ecolor": "#222222"},
            )
        ax.set_title(f"{_TITLES[kind]}, mean {getattr(analysis.overall(), f'{kind}_mean'):.2g}", fontsize=10)
        ax.set_xlabel(_AXES[kind], fontsize=8)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    right = max(ax.get_xlim()[1] for ax in axes)
    for ax in axes:
        ax.set_xlim(0, right)
    axes[0].set_yticks(places, [_short(layer.name) for layer in analysis.layers], fontsize=4.6 if dense else 6.5)
    axes[0].set_ylim(count - 0.4, -0.6)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=7, frameon=False)
    return figure


def plot_energies(analysis: WeightAnalysis) -> Any:
    """Energy of every layer's change by rank, thin, and the mean of every kind of layer, thick.

    Returns:
        A matplotlib Figure.
    """
    figure, (ax,) = _figure(4.6, 3.8, 1, 1)
    for (group, colour, layers), dash in zip(_by_group(analysis), _DASHES):
        curves = _energy_curves(layers)
        if not len(curves):
            continue
        ax.plot(100 * _FRACTIONS, curves.T, color=colour, linewidth=0.4, alpha=0.25)
        ax.plot(100 * _FRACTIONS, curves.mean(0), color=colour, linestyle=dash, linewidth=1.9, label=group)
    _energy_axis(ax)
    return figure


def save_figures(
    analyses: Sequence[WeightAnalysis], folder: str | os.PathLike, formats: Iterable[str] = ("png",)
) -> list[Path]:
    """Write `overview`, and for each analysis `layers` and `energies`, with its label where there are several.

    Args:
        analyses: one, or several of one base.
        folder: created if need be.
        formats: file types that matplotlib writes, such as "pdf". Default png.

    Raises:
        ImportError: matplotlib is not installed; the message holds the pip command.
        OSError: `folder` is not writable.
    """
    require("matplotlib", "analysis")
    folder = writable_folder(folder)
    figures = {"overview": plot_overview(analyses)}
    for analysis in analyses:
        tag = f"-{re.sub(r'[^A-Za-z0-9._-]+', '-', analysis.label)}" if len(analyses) > 1 else ""
        figures[f"layers{tag}"] = plot_layers(analysis)
        if any(layer.energies.size for layer in analysis.layers):
            figures[f"energies{tag}"] = plot_energies(analysis)
    paths = []
    for name, figure in figures.items():
        for kind in formats:
            paths.append(folder / f"{name}.{kind}")
            with written_beside(paths[-1]) as temporary:
                figure.savefig(temporary, dpi=_DPI)
    return paths


def _figure(width: float, height: float, rows: int, columns: int, **grid: Any) -> tuple[Any, list[Any]]:
    # Without pyplot, which would choose a window system and keep every figure in memory.
    figure = require("matplotlib.figure", "analysis").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **({"gridspec_kw": grid} if "width_ratios" in grid else grid))
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.set_axisbelow(True)
    return figure, list(axes.flat)


def _by_group(analysis: WeightAnalysis) -> list[tuple[str, str, list[LayerChange]]]:
    found = [(name, [layer for layer in analysis.layers if layer.group == name]) for name in GROUPS]
    return [(name, colour, layers) for (name, layers), colour in zip(found, _COLOURS) if layers]


def _spread(analyses: Sequence[WeightAnalysis]) -> float:
    means = [analysis.overall().direction_mean for analysis in analyses]
    return max(means) / min(means) if min(means) > 0 else (np.inf if max(means) > 0 else 1.0)


def _violins(ax: Any, kind: str, columns: Sequence[tuple[str, str, list[LayerChange]]], logarithmic: bool) -> None:
    for place, ((_, colour, layers), hatch) in enumerate(zip(columns, _HATCHES * len(columns))):
        values = np.concatenate([getattr(layer, kind) for layer in layers])
        if not values.size:
            continue
        mean = values.mean()
        # As many quantiles as a density needs, so that a large model takes no longer than a small one.
        values = np.quantile(values, np.linspace(0.001, 0.999, 2000))
        if logarithmic:
            values, mean = np.log10(np.maximum(values, _FLOOR)), np.log10(max(mean, _FLOOR))
        (body,) = ax.violinplot([values], [place], widths=0.85, showextrema=False)["bodies"]
        body.set(facecolor=colour, edgecolor="white", alpha=0.85, hatch=hatch, linewidth=0)
        ax.vlines(place, *np.quantile(values, (0.25, 0.75)), color="#222222", linewidth=2.4)
        ax.plot(place, mean, "o", color="white", markeredgecolor="#222222", markersize=4.5, zorder=4, clip_on=False)
    ax.set_xticks(range(len(columns)), [_column_label(kind, columns, i) for i in range(len(columns))])
    ax.set_xlim(-0.6, len(columns) - 0.4)
    ax.set_title(_TITLES[kind], fontsize=10)
    ax.set_ylabel(_AXES[kind], fontsize=8)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    if logarithmic:
        ax.yaxis.set_major_formatter(_power)
        ax.yaxis.get_major_locator().set_params(integer=True)
    else:
        ax.set_ylim(0, None)


def _column_label(kind: str, columns: Sequence[tuple[str, str, list[LayerChange]]], place: int) -> str:
    """The name, and the mean in numbers where there is room."""
    name, _, layers = columns[place]
    return name if len(columns) > 4 else f"{name}\nmean {getattr(summarize(name, layers), f'{kind}_mean'):.2g}"


def _dashes(ax: Any, columns: Sequence[tuple[str, str, list[LayerChange]]], logarithmic: bool) -> None:
    values = np.array([summarize(name, layers).norm_of_random for name, _, layers in columns])
    values = np.log10(np.maximum(values, _FLOOR)) if logarithmic else values
    places = np.arange(len(columns))
    ax.hlines(
        values, places - 0.3, places + 0.3, color="#222222", linestyle="--", linewidth=1.2, label="random change"
    )
    ax.legend(fontsize=7, loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")


def _power(value: float, _: Any) -> str:
    return f"$10^{{{value:.0f}}}$" if value > np.log10(_FLOOR) else f"$\\leq 10^{{{value:.0f}}}$"


def _curves(ax: Any, columns: Sequence[tuple[str, str, list[LayerChange]]]) -> None:
    for (name, colour, layers), dash in zip(columns, _DASHES * len(columns)):
        curves = _energy_curves(layers)
        if not len(curves):
            continue
        mean, spread = curves.mean(0), curves.std(0)
        ax.fill_between(
            100 * _FRACTIONS,
            np.clip(mean - spread, 0, 1),
            np.clip(mean + spread, 0, 1),
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        ax.plot(100 * _FRACTIONS, mean, color=colour, linestyle=dash, linewidth=1.7, label=name)
    ax.set_title("Energy of the change", fontsize=10)
    _energy_axis(ax)


def _energy_axis(ax: Any) -> None:
    ax.plot([0, 100], [0, 1], color="#999999", linewidth=0.8, zorder=1)  # all singular values alike
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 1.01)
    ax.set_xlabel("largest singular values, % of the rank", fontsize=8)
    ax.set_ylabel("share of the squared change", fontsize=8)
    ax.grid(color="#dddddd", linewidth=0.6)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", handlelength=3.2)


def _energy_curves(layers: Sequence[LayerChange]) -> np.ndarray:
    found = [curve for layer in layers if (curve := layer.energy_curve(_FRACTIONS)) is not None]
    return np.array(found).reshape(-1, _FRACTIONS.size)


def _whiskers(values: np.ndarray) -> tuple[float, float]:
    return min(values.std(), values.mean()), values.std()


def _short(name: str) -> str:
    """A module path of a UNet or transformer in fewer letters: down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q
    is down.0.attn.1.attn1.to_q."""
    name = re.sub(r"\b(down|up|mid)_blocks?\b", r"\1", name)
    name = re.sub(r"\battentions\.(\d+)\.transformer_blocks\.0\.", r"attn.\1.", name)
    name = name.replace("transformer_blocks.", "block.").replace("resnets.", "res.").replace("attentions.", "attn.")
    return name
