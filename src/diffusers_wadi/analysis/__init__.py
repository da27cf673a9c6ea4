"""What fine-tuning or distillation did to the weights: the paper's Eq. 13-17 and Fig. 2 on any two models."""

from diffusers_wadi.analysis.comparison import analyze_weights
from diffusers_wadi.analysis.plots import plot_energies, plot_layers, plot_overview, save_figures
from diffusers_wadi.analysis.report import GroupChange, LayerChange, OtherChange, WeightAnalysis, save_analyses
from diffusers_wadi.analysis.swapping import swap_weights
from diffusers_wadi.analysis.weights import (
    recombine,
    rotation_left,
    singular_value_energies,
    squared_norm,
    vector_changes,
)

__all__ = [
    "GroupChange",
    "LayerChange",
    "OtherChange",
    "WeightAnalysis",
    "analyze_weights",
    "plot_energies",
    "plot_layers",
    "plot_overview",
    "recombine",
    "rotation_left",
    "save_analyses",
    "save_figures",
    "singular_value_energies",
    "squared_norm",
    "swap_weights",
    "vector_changes",
]
