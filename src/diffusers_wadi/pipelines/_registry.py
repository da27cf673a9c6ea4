"""Which pipeline class a checkpoint, an adapter or an authors' file is for, and where diffusers looks classes up."""

from __future__ import annotations

import json
import os
from typing import Any

from diffusers_wadi._files import hub_options
from diffusers_wadi.pipelines._loading import PIPELINE_NAMES, index_of, resolve_source
from diffusers_wadi.pipelines._one_step import OneStepMixin
from diffusers_wadi.pipelines.pipeline_wadi import WaDiPipeline
from diffusers_wadi.pipelines.pipeline_wadi_controlnet import WaDiControlNetPipeline
from diffusers_wadi.pipelines.pipeline_wadi_pixart import WaDiPixArtPipeline

PIPELINES: tuple[type[OneStepMixin], ...] = (WaDiPipeline, WaDiPixArtPipeline)


def one_step_pipeline_class(
    pretrained_model_name_or_path: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **options: Any,
) -> type[OneStepMixin]:
    """The pipeline class for what its `from_pretrained` would be given: by the components in `model_index.json`.

    Args:
        pretrained_model_name_or_path, base_model, weight_name, subfolder, **options: of `WaDiPipeline.from_pretrained`.

    Raises:
        OSError: the folder, repository or a file in it is missing.
        ValueError: a pipeline of another kind, with the kinds that there are.
    """
    source = resolve_source(None, pretrained_model_name_or_path, base_model, weight_name, subfolder, options)
    path, location = index_of(source, hub_options(options))
    if path is None:
        raise FileNotFoundError(f"no model_index.json in {location!r}; name a complete pipeline with base_model=")
    index = json.loads(path.read_text(encoding="utf-8"))
    for cls in PIPELINES:
        library, _ = index.get(cls.lorad_component) or (None, None)
        if library is not None and index.get("text_encoder_2") is None:
            controlled = cls is WaDiPipeline and (index.get("controlnet") or (None,))[0] is not None
            return WaDiControlNetPipeline if controlled else cls
    raise ValueError(
        f"{location!r} is a {index.get('_class_name')}; in one step run "
        + " and ".join(cls.stock_class.__name__ for cls in PIPELINES)
        + ". For another pipeline name LoRaDLoaderMixin before its class and call load_lorad_weights."
    )


def register_auto_pipelines() -> None:
    """Make `AutoPipelineFor...from_pipe(wadi_pipeline)` work; does nothing the second time."""
    from diffusers import (
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    )
    from diffusers.pipelines import auto_pipeline

    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["wadi"] = WaDiPipeline
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["wadi_controlnet"] = WaDiControlNetPipeline
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["wadi_pixart"] = WaDiPixArtPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["wadi"] = StableDiffusionImg2ImgPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["wadi_controlnet"] = StableDiffusionControlNetImg2ImgPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING["wadi_controlnet"] = StableDiffusionControlNetInpaintPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING["wadi"] = StableDiffusionInpaintPipeline


def register_names() -> None:
    """Put the classes where diffusers looks pipelines up by name: to inspect them, and when a file names one."""
    import diffusers

    assert set(PIPELINE_NAMES.values()) == {cls.__name__ for cls in PIPELINES}
    for cls in (*PIPELINES, WaDiControlNetPipeline):
        for module in (diffusers, diffusers.pipelines):
            setattr(module, cls.__name__, cls)
