"""One-step pipelines: diffusers' own, with one-step defaults, guard rails and LoRaD loading."""

from diffusers_wadi.pipelines._optimization_steps import OptimizationReport
from diffusers_wadi.pipelines._registry import one_step_pipeline_class, register_auto_pipelines, register_names
from diffusers_wadi.pipelines.pipeline_wadi import WaDiPipeline
from diffusers_wadi.pipelines.pipeline_wadi_controlnet import WaDiControlNetPipeline
from diffusers_wadi.pipelines.pipeline_wadi_pixart import WaDiPixArtPipeline

__all__ = [
    "OptimizationReport",
    "WaDiControlNetPipeline",
    "WaDiPipeline",
    "WaDiPixArtPipeline",
    "one_step_pipeline_class",
    "register_auto_pipelines",
]

register_names()
