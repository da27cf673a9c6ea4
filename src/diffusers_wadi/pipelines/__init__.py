"""One-step pipelines: diffusers' own, with one-step defaults, guard rails and LoRaD loading."""

from diffusers_wadi.pipelines.pipeline_wadi import WaDiPipeline, register_auto_pipelines

__all__ = ["WaDiPipeline", "register_auto_pipelines"]
