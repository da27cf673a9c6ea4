"""Images for a prompt set by any diffusers pipeline, how good they are, and how long they take."""

from diffusers_wadi.evaluation.folders import image_seed
from diffusers_wadi.evaluation.generation import generate_images
from diffusers_wadi.evaluation.latency import Latency, measure_latency
from diffusers_wadi.evaluation.loading import load_pipeline, load_preset
from diffusers_wadi.evaluation.metrics import METRICS, MetricOptions, check_metrics, compute_metrics
from diffusers_wadi.evaluation.presets import PRESETS, UNSUPPORTED, Preset, preset
from diffusers_wadi.evaluation.prompts import Prompt, PromptSet, load_prompts
from diffusers_wadi.evaluation.table import results_table, write_results

__all__ = [
    "METRICS",
    "PRESETS",
    "UNSUPPORTED",
    "Latency",
    "MetricOptions",
    "Preset",
    "Prompt",
    "PromptSet",
    "check_metrics",
    "compute_metrics",
    "generate_images",
    "image_seed",
    "load_pipeline",
    "load_preset",
    "load_prompts",
    "measure_latency",
    "preset",
    "results_table",
    "write_results",
]
